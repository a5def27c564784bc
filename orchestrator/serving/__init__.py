"""Serving: prompts of one registry on one frozen backbone, requests for different prompts in one batch.

A request's life: routes (HTTP) -> service (checks, tokens) -> prompt_store (which prompt) -> engine (one mixed batch)
-> ranking or generation (the model) -> back. Only ``app`` imports Ray; everything else runs in any process.
"""
