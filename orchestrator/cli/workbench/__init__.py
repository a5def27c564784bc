"""Work on registered prompts by hand: evaluate, inspect, export and import."""
