"""The job spec that a user writes, and the search space of its trials."""
