"""The search: Ray Tune proposes and stops trials, Ray Train workers train them packed, a broker in between."""
