"""What a run will need before anything is rented: the real step of the real shapes, compiled or estimated."""
