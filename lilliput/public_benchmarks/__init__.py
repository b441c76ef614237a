"""Public benchmarks: BFCL, and the tasks of lm-evaluation-harness."""
