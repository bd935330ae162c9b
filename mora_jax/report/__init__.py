"""Runs beside each other: what differs in their settings, what came of them, and what they answer."""
