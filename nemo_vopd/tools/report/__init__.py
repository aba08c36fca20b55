"""The HTML page about a run, made from its files."""
