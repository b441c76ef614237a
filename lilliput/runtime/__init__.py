"""Runtimes: one Protocol, one engine per file."""
