"""Which layers of a model carry an adapter, which can't, and why."""
