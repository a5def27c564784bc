"""What a search keeps in its folder."""
