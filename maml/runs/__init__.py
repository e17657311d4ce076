"""A run is a folder: built, trained, saved, restored."""
