"""Measurements of recipes/benchmark.py: each part against a reference in the same run."""
