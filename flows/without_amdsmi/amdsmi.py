"""Stands before the package `amdsmi`, which zeus brings, where AMD's library is missing (`flows/crew.py` says why)."""

raise ImportError("amdsmi is installed, libamd_smi.so is not")
