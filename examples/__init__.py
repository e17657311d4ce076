"""The library on tasks that it does not bring along: `python -m examples.NAME`."""
