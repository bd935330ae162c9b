"""From files to numbered rows."""
