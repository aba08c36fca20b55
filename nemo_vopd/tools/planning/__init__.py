"""What a run will need, before it has a GPU: parameters, memory and time of every pipeline stage."""
