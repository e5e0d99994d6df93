"""Errors, strict configurations, native code and memory: what everything else stands on."""
