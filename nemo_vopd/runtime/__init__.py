"""Metrics, timers and progress of a run."""
