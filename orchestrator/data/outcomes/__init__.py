"""What a prompt made of each row of a set: the metrics of rows, and how sure a difference is."""
