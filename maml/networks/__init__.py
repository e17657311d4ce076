"""Networks as Keras models, their layers, and what differentiates through them."""

from maml.process import silent_start

with silent_start():
    import tensorflow  # noqa: F401
