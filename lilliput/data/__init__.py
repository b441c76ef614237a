"""Questions, corpora and JSON Lines files."""
