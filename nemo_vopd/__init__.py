"""Vision-OPD (arXiv 2605.18740) as a NeMo / Megatron-Core training recipe."""

__version__ = "0.2.0"
