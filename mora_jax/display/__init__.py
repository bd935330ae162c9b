"""How things are shown: tables, figures, web pages, and how far a command is."""
