"""Metrics, one per file, and the evaluation record."""
