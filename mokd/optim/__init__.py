"""Optimisers, schedules and the arithmetic they work in."""
