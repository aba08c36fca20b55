"""Questions to a model and what its replies are worth: benchmarks, grading, the regional-to-global gap."""
