"""Flags, what they say, and the paper's values."""
