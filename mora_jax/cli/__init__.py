"""The command line `mora-jax`: one file a command, without logic of its own."""
