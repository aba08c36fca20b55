"""Scoring, the regional-to-global gap, and the report page."""
