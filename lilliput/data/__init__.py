"""Corpora, calibration sets and question sets."""
