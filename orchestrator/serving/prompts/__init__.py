"""Prompts as the server holds them."""
