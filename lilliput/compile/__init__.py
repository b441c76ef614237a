"""Compiles a checkpoint for a device's runtime, keeping quantised integers unchanged. One target per file."""
