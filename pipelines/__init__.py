"""Pipelines that turn log rows into a registered model: Ray Data, Ray Train and MLflow around the plain library."""
