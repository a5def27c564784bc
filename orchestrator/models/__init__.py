"""The frozen model: where it comes from and how it is run."""
