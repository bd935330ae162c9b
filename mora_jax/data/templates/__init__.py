"""From messages to text with labelled segments."""
