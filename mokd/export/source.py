"""What is taken home: one network of a run with all that a file of it has to say."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from data_pipeline.core.errors import UserError
from mokd.checkpointing.hold import newest_held
from mokd.checkpointing.reading import Checkpoint
from mokd.checkpointing.state import network_tensors
from mokd.config import BranchConfig, RunConfig
from mokd.evaluation import subjects
from mokd.models.backbones import Backbone, timm_arguments
from mokd.runs.run_directory import RunDirectory


@dataclass(frozen=True)
class Source:
    """A branch's student or teacher at a step of a run, on the CPU, in evaluation mode. checkpoint: held meanwhile."""

    run: RunDirectory
    config: RunConfig
    branch: BranchConfig
    network: str
    step: int
    checkpoint: Checkpoint
    backbone: Backbone

    @property
    def image_px(self) -> int:
        """The side of the images that the network was built for."""
        return self.config.views.global_crops.size_px

    def timm_arguments(self) -> dict[str, Any]:
        """What `timm.create_model` takes besides the name."""
        return timm_arguments(self.branch, self.image_px, self.config.data.channels)

    def whole_tensors(self) -> dict[str, Tensor]:
        """The state dict of the whole network, heads included; the backbone's keys begin with `backbone.net.`."""
        return network_tensors(self.checkpoint, self.branch.name, self.network)

    def preprocessing(self) -> dict[str, Any]:
        """How images become the network's input, as `mokd eval` prepares them."""
        views, evaluation = self.config.views, self.config.evaluation
        return {
            "channels": {1: "grey", 3: "RGB"}.get(views.channels, views.channels),
            "range": [0.0, 1.0],
            "mean": list(views.mean),
            "std": list(views.std),
            "resize_px": evaluation.resize_px,
            "crop_px": evaluation.crop_px,
            "interpolation": "bicubic",
        }


@contextmanager
def held_sources(run: RunDirectory, branch: str | None, network: str) -> Generator[list[Source]]:
    """One branch of a run at its newest checkpoint, or all of them; no pruning takes it away within the context.

    UserError when there is no such thing.
    """
    if network not in ("student", "teacher"):
        raise UserError(f"--network {network}: student or teacher")
    config = run.config()
    by_name = {branch.name: branch for branch in config.branches}
    with newest_held(run) as found:
        wanted = subjects.chosen(subjects.from_run(run, config, network, found.path), [branch] if branch else [])
        backbones = [(subject, subject.load().eval().requires_grad_(False)) for subject in wanted]
        yield [Source(run, config, by_name[s.name], network, s.step, found, backbone) for s, backbone in backbones]
