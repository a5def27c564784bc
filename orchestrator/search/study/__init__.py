"""Ray Tune: proposing, stopping and copying trials."""
