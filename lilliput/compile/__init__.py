"""Compiling: a checkpoint becomes what a device's runtime opens, code for code. One target a file."""
