"""The outer loop, training and evaluation; knows no learner, screen or disk."""

from maml.process import silent_start

with silent_start():
    import tensorflow  # noqa: F401
