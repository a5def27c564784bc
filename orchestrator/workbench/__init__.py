"""Commands on registered prompts: evaluate, inspect, export and import."""
