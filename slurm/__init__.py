"""A real SLURM cluster on one machine, for development and tests."""
