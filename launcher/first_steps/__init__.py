"""A person's first minutes: the demo, and a first configuration."""
