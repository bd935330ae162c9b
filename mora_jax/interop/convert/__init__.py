"""Adapters of one method as adapters of another."""
