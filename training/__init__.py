"""Training: a table of history in, a bundle that can be served out. Lightning lives here and nowhere else."""
