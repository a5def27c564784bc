"""The engine that runs the rows of all requests in mixed batches."""
