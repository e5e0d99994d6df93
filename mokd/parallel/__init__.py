"""Parallelism, recomputation and compilation, applied to a branch from outside."""
