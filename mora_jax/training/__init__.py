"""Training: configuration, the vocabulary loss, the compiled step, the loop and what it writes and shows."""
