"""Where engines run, in a thread or in processes of their own, which are watched and replaced."""
