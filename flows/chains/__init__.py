"""The search over chains of strategies: its Optuna study, and the runner that makes and measures a chain."""
