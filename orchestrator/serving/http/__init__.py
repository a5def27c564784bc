"""The server's routes and wire formats."""
