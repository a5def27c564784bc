"""What the user writes: the job spec and the space of its trials."""
