"""Prompts as the server holds them: checked, loaded, cached and kept up to date."""
