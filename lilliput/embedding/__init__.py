"""Sentence embeddings, for the answer cache and the learned router."""
