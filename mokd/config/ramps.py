"""When a weight of the loss begins to count."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.core.schema import NonNegativeFloat, StrictModel


class RampConfig(StrictModel):
    """A factor that is 0 at first and 1 in the end: a weight that waits, then grows."""

    start: Annotated[NonNegativeFloat, Field(description="the factor is 0 before")] = 0.0
    length: Annotated[NonNegativeFloat, Field(description="of the linear way from 0 to 1; 0: at once")] = 0.0
    unit: Annotated[Literal["epochs", "run"], Field(description="of start and length; run: parts of optim.epochs")] = (
        "epochs"
    )

    def factor(self, epoch: int, epochs: int) -> float:
        """In an epoch, counted from 0, of a run of so many epochs."""
        now = epoch if self.unit == "epochs" else epoch / epochs
        if now < self.start:
            return 0.0
        return min((now - self.start) / self.length, 1.0) if self.length else 1.0


def factor(ramp: RampConfig | None, epoch: int, epochs: int) -> float:
    """As `RampConfig.factor`; 1 where there is none."""
    return 1.0 if ramp is None else ramp.factor(epoch, epochs)


def check_ramp(key: str, ramp: RampConfig | None, epochs: int) -> None:
    """ValueError when the weight does not count in any epoch."""
    if ramp is not None and ramp.factor(epochs - 1, epochs) == 0.0:
        raise ValueError(f"{key}: has not begun when the {epochs} epochs are over; lower its start or length")
