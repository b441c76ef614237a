"""Devices: compiled models run within a device's budgets, and what that measures."""
