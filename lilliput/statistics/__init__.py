"""Intervals and paired differences: the arithmetic below all metrics."""
