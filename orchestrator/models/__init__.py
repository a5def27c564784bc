"""The frozen base model: finding, checking, loading and running it."""
