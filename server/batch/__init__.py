"""The running batch: the engine's loop and every decision it takes, in numpy alone; no clock but the engine's own, no I/O."""
