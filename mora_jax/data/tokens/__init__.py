"""From text to tokens, and where they are kept."""
