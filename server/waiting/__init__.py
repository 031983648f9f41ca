"""Where requests wait for an engine: who is refused, and whose turn it is."""
