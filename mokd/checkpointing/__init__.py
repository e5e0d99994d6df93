"""Checkpoints: what is in them, how they are published, who writes them."""
