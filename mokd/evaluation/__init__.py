"""Evaluations of trained networks."""
