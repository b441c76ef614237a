"""MLflow: where models are registered, champions are kept and approvals are stored."""
