"""A run around the step: checkpoints, stopping, metrics."""
