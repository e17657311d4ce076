"""The learners: one algorithm a file, one line each in the table."""
