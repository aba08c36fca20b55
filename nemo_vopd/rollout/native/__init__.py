"""The native engine: the training model itself decodes."""
