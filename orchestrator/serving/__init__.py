"""Serving: prompts of one registry on one frozen backbone, with different prompts in one batch.

A request passes through these modules and back:

- ``http.routes`` reads the HTTP request;
- ``http.service`` checks and tokenizes it;
- ``prompts.store`` finds the prompt;
- ``engine.engine`` puts its rows into a mixed batch;
- ``engine.classify`` or ``engine.generation`` runs the model.

Only ``app`` imports Ray; everything else runs in any process.
"""
