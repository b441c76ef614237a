"""Lilliput makes a language model small enough for a phone, and measures what it can still do."""

__version__ = "0.1.0"
