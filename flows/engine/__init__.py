"""What runs a flow: the scheduler, its runners, DVC's lineage, workspaces and stopping."""
