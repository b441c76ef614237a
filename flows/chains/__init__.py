"""The search over chains of strategies: its study and what makes and measures a chain."""
