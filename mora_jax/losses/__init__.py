"""Losses over the vocabulary, in chunks of tokens."""
