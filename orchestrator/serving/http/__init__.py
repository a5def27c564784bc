"""The HTTP side of the server: routes, wire formats, access control, metrics and traces."""
