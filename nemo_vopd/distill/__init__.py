"""The divergence, its fused vocabulary-parallel form, the importance weights and the teachers."""
