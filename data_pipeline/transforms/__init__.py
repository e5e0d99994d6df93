"""What happens to the colours of views, in batches, on CPUs and GPUs."""
