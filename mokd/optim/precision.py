"""The arithmetic of the networks, as `precision` in the configuration asks for it."""

from __future__ import annotations

import os

import torch

from mokd.config import PrecisionConfig

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def half_dtype(config: PrecisionConfig) -> torch.dtype | None:
    """The type in which products are computed; None for fp32."""
    return _HALF.get(config.compute)


def view_dtype(config: PrecisionConfig, device: torch.device) -> torch.dtype:
    """The type of the views: on GPUs that of the first products, to which autocast would round them anyway."""
    return (half_dtype(config) if device.type == "cuda" else None) or torch.float32


def autocast(config: PrecisionConfig, device: torch.device) -> torch.autocast:
    """The context of the forward passes: products in half precision, sums over many elements in fp32."""
    dtype = half_dtype(config)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def set_arithmetic(config: PrecisionConfig) -> None:
    """How GPUs compute, in this process: whether what stays fp32 may take the 10-bit mantissas of TensorFloat-32, and
    whether every operation has to give the same bits each time (one that has no such algorithm raises).
    """
    precision = "tf32" if config.tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = not config.deterministic  # shapes are few: the fastest algorithm for each
    if config.deterministic:
        # read when cuBLAS is first used in this process; fresh memory need not be filled for the sake of it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
