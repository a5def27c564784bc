"""Ray Tune's part of a search: proposing, stopping and copying trials."""
