"""Registered prompts by hand: evaluate, inspect, exchange."""
