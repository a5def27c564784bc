"""The engine that answers batched requests."""
