"""Support for the process of a stage: locks, costs, deadlines, memory checks and messages."""
