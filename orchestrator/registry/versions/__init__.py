"""Registered versions: published, read and described."""
