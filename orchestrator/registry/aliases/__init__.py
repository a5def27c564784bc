"""Aliases: the gate that promotions pass, and the history of moves."""
