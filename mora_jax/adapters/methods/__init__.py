"""Adapter methods, and the table of them by name."""
