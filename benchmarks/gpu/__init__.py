"""Measures Lilliput on an NVIDIA GPU (`make gpu`), one part at a time, and rehearses all of it on a CPU."""
