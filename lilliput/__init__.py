"""Lilliput makes a language model small enough for a phone, and proves it."""

__version__ = "0.1.0"
