"""Ranks: the process group, shards, agreement, streams and copies to the host."""
