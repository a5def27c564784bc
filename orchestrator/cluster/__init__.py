"""Ray as a place: sessions, nodes and submitted jobs."""
