"""When a weight of the loss begins, or ceases, to count."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.core.schema import NonNegativeFloat, StrictModel


class RampConfig(StrictModel):
    """A factor that goes from one value to another: by default from 0 to 1, a weight that waits, then grows."""

    start: Annotated[NonNegativeFloat, Field(description="the factor is the first one before")] = 0.0
    length: Annotated[NonNegativeFloat, Field(description="of the linear way to the last one; 0: at once")] = 0.0
    unit: Annotated[Literal["epochs", "run"], Field(description="of start and length; run: parts of optim.epochs")] = (
        "epochs"
    )
    first: Annotated[NonNegativeFloat, Field(description="the factor up to start")] = 0.0
    last: Annotated[NonNegativeFloat, Field(description="the factor from start + length on; 0: the weight ends")] = 1.0

    def factor(self, epoch: int, epochs: int) -> float:
        """In an epoch, counted from 0, of a run of so many epochs."""
        now = epoch if self.unit == "epochs" else epoch / epochs
        if now < self.start:
            return self.first
        part = min((now - self.start) / self.length, 1.0) if self.length else 1.0
        return self.first + part * (self.last - self.first)


def factor(ramp: RampConfig | None, epoch: int, epochs: int) -> float:
    """As `RampConfig.factor`; 1 where there is none."""
    return 1.0 if ramp is None else ramp.factor(epoch, epochs)


def check_ramp(key: str, ramp: RampConfig | None, epochs: int) -> None:
    """ValueError when the weight does not count in any epoch."""
    if ramp is not None and not any(ramp.factor(epoch, epochs) for epoch in range(epochs)):
        raise ValueError(
            f"{key}: does not count in any of the {epochs} epochs; lower its start or length, or raise first"
        )
