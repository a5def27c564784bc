"""Training of packed trials on one frozen backbone, without Ray or MLflow."""
