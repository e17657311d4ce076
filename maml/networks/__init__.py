"""Networks as Keras models, their layers, and what differentiates through them."""
