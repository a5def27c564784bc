"""The search for the best trial of a job.

Ray Tune proposes and stops trials, Ray Train workers train several of them at once, and a broker
connects the two.
"""
