"""Multi-mode Online Knowledge Distillation: two or more networks trained together, without labels."""

import os

__version__ = "0.1.0"

# DDP advises against a setting that resuming bit for bit needs (see parallel.py), once per branch, rank and start.
# torch reads the variable when it is first imported; whoever wants the messages sets it to INFO or WARNING.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
