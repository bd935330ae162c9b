"""What is learned against what is forgotten, the spectrum of the change, and intruder dimensions."""
