"""What holds for every test."""

import os

from hypothesis import settings

# One thread for each process: tests run tiny models, and on a busy machine threads that wait for each other cost far more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline for an example: whether the machine is busy is not what is tested. Every run tries the same examples.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")
