"""Runs a flow: scheduler, runners, DVC lineage, workspaces, stopping."""
