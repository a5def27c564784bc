"""The state that a search keeps in its folder."""
