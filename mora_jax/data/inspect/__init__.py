"""What a data set will become, for the eye."""
