"""The training loop and its step, from a configuration to a trained run."""
