"""What rank and learning rate a method needs: loss against rate, variants, capacity, batch size."""
