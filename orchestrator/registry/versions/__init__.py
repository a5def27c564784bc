"""Registered versions: publishing, reading and describing them."""
