"""Where responses come from: the training model itself, or a file."""
