"""The options and processes of a deployment on Ray Serve."""
