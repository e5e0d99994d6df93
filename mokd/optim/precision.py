"""The arithmetic of the networks, as `precision` in the configuration asks for it."""

from __future__ import annotations

import torch

from mokd.config import PrecisionConfig

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def half_dtype(config: PrecisionConfig) -> torch.dtype | None:
    """The type in which products are computed; None for fp32."""
    return _HALF.get(config.compute)


def autocast(config: PrecisionConfig, device: torch.device) -> torch.autocast:
    """The context of the forward passes: products in half precision, sums over many elements in fp32."""
    dtype = half_dtype(config)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def set_tf32(config: PrecisionConfig) -> None:
    """Whether GPUs may compute what stays fp32 with the 10-bit mantissas of TensorFloat-32."""
    precision = "tf32" if config.tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
