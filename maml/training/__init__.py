"""The outer loop, training and evaluation; knows no learner, screen or disk."""
