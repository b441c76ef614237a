"""Compares a compiled model on an emulated ARM processor with the same model on this machine."""
