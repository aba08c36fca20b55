"""From records on disk to prompts: crops, templates, M-RoPE positions, Energon."""
