"""Estimates of the time and memory that a job will take, from measurements."""
