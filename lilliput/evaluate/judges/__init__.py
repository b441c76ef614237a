"""Judges of free answers: one per kind of expectation, with one type of judgement."""
