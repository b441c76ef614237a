"""The MLflow registry: model versions, champions and approvals."""
