"""The one door to Megatron-Core outside `nemo_vopd.vlm`."""
