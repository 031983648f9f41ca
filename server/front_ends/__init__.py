"""Several processes that take calls on one port, and the one that owns the engines and the queue."""
