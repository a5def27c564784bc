"""What a job will take, measured."""
