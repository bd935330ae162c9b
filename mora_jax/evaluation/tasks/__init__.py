"""Tasks: each a small file that turns rows into prompts and says what is measured; and what runs them."""
