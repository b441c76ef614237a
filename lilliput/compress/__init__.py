"""Compression strategies, one per file: `def <name>(context: Context, config: <Config>) -> Result`."""
