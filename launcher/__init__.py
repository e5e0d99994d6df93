"""SLURM and local launching, and the command line."""
