"""Hides zeus's package `amdsmi` where AMD's library is missing (see `flows/engine/runners.py`)."""

raise ImportError("amdsmi is installed, libamd_smi.so is not")
