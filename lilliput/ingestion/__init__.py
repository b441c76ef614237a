"""Turns files and datasets of any supported format into normalised rows."""
