"""Vision-language models on Megatron-Core: one file for each family."""
