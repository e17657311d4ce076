"""Charts, pictures, tables and TensorBoard."""
