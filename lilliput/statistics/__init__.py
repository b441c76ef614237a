"""Intervals and paired differences, used by all metrics."""
