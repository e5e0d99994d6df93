"""What the launcher keeps about runs in their directories."""
