"""Runs of several processes, and how runs are stopped."""
