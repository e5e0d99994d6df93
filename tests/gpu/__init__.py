"""What can be proven of the GPU path without a GPU."""
