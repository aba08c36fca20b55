"""From records with images to an Energon data set that a run reads; synthetic data for tests and the quickstart."""
