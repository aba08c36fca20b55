"""Weights between Hugging Face files and Megatron's shards."""
