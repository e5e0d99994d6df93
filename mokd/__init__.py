"""Multi-mode Online Knowledge Distillation: two or more networks trained together, without labels."""

__version__ = "0.1.0"
