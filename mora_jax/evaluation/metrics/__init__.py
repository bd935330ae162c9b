"""What is computed from the records of examples: metrics with their standard errors, and comparisons of two models."""
