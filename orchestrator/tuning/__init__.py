"""Training of packed trials on one frozen backbone. Knows neither Ray nor MLflow."""
