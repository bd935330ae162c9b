"""The study of the loss over instructions."""
