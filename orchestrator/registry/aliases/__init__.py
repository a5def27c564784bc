"""Aliases: the gate they pass and the history of their moves."""
