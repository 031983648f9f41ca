"""Measurements: numbers to read, never assertions about time."""
