"""Vision-language models on Megatron-Core: one file for each family, weights in `hf_weights`."""
