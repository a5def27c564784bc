"""Searches as runs in MLflow."""
