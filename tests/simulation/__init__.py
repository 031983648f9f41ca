"""The real queue, admission, scheduler and engine under a clock that jumps: seconds of life in milliseconds, any seed again."""
