"""Which part of each array every device holds."""
