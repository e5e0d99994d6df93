"""Batches of views for training, and of centre crops for evaluation, by FFCV or torchvision."""
