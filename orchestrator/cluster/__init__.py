"""Ray: sessions, nodes and submitted jobs."""
