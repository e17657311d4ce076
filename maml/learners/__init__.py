"""The learners: one algorithm a file, one line each in the table."""

from maml.process import silent_start

with silent_start():
    import tensorflow  # noqa: F401
