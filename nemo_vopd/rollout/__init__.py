"""Where responses come from: the training model itself, vLLM servers, or a file."""
