"""Trained networks as files that load with nothing of this project installed."""
