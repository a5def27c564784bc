"""Soft prompts: what is learned, and where it starts.

Shape legend: B rows, P virtual tokens, T input tokens, Y target tokens, H width, L layers, K trials.
"""
