"""The fused loss and its gradients against float64 on the CPU, in every precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu_check.setting import Setting
from data_pipeline.core.errors import DataError
from mokd.losses.kernels.targets import Target
from mokd.losses.prototype_loss import prototype_loss
from mokd.losses.prototypes import HeadOutput, Prototypes

VIEWS, BATCH, PROTOTYPES, WIDTH = 4, 4, 2048, 64
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure(setting: Setting) -> Iterator[tuple[str, float]]:
    """Largest relative error of the terms and gradients, by type of products."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # the kernels are in question, not TensorFloat-32
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(VIEWS, BATCH, WIDTH), dim=-1)
    head = Prototypes(WIDTH, PROTOTYPES, train_gain=True)
    probabilities = [torch.randn(2, BATCH, PROTOTYPES).mul(4).softmax(-1) for _ in range(2)]

    def results(where: torch.device, dtype: torch.dtype, half: torch.dtype | None) -> list[torch.Tensor]:
        own = Prototypes(WIDTH, PROTOTYPES, train_gain=True).to(where, dtype)
        own.load_state_dict(head.state_dict())
        x = rows.to(where, dtype).requires_grad_()
        self_, cross = (p.to(where, dtype) for p in probabilities)
        targets = [Target(self_, 1.0), Target(cross, 0.3)]
        with torch.autocast(where.type, half, enabled=half is not None):
            total, terms = prototype_loss(HeadOutput(x, own()), targets, 0.1)
        gradients = torch.autograd.grad(total, [x, own.direction, own.gain])
        return [tensor.double().cpu() for tensor in (terms, *gradients)]

    expected = results(torch.device("cpu"), torch.float64, None)
    for name, half in PRECISIONS.items():
        found = results(setting.device, torch.float32, half)
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        yield name, error
        limit = 1e-3 if half is None else 5e-2
        if not error < limit:
            raise DataError(f"{name}: relative error {error:.3g}, expected below {limit:g}")
