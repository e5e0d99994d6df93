"""What trained networks have learned, as numbers and pictures."""
