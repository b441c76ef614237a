"""Runs compiled models within a device's limits and measures them."""
