"""Data sets: one a file, one line each in the table."""
