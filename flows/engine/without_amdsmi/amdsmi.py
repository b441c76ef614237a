"""Hides the package `amdsmi` of zeus where AMD's library is missing (see `flows/engine/runners.py`)."""

raise ImportError("amdsmi is installed, libamd_smi.so is not")
