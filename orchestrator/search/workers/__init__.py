"""Ray Train: the workers that train trials."""
