"""The load test: open-loop Poisson traffic against a running server on this machine. ``python -m tests.load --help``."""
