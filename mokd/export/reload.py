"""Is an export what it was made from? It is read in a process of its own, with the lines that its card gives."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from data_pipeline.core.errors import UserError
from mokd.export.source import Source

IMAGES = 4
# of the largest feature: what other kernels and another order of summation may make
TOLERANCE = 1e-3
OURS = ("mokd", "launcher", "data_pipeline")
PROGRAM = """\
import sys
# as where this project is not installed: importing it fails
sys.modules.update(dict.fromkeys({ours}))
import numpy
images = numpy.load(sys.argv[1])
{load}
numpy.save(sys.argv[2], numpy.asarray(features, dtype="float32"))
"""


def largest_difference(source: Source, folder: Path, load: str) -> float:
    """The largest difference between the features of the run's network and of the export, over the largest feature.

    UserError when the export cannot be read, or differs by more than `TOLERANCE`.
    """
    shape = (IMAGES, source.backbone.channels, source.image_px, source.image_px)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = source.backbone(images).pooled.numpy()
    with tempfile.TemporaryDirectory() as scratch:
        given, answer = Path(scratch, "images.npy"), Path(scratch, "features.npy")
        np.save(given, images.numpy())
        # -I: neither the working directory nor PYTHONPATH can bring this project in
        command = [sys.executable, "-I", "-c", PROGRAM.format(load=load, ours=OURS), str(given), str(answer)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise UserError(f"the export cannot be read back: {said}; nothing was written")
        found = np.load(answer)
    if found.shape != own.shape:
        raise UserError(f"the export gives features {found.shape} instead of {own.shape}; nothing was written")
    difference = float(np.abs(found - own).max() / max(float(np.abs(own).max()), 1e-12))
    if not difference <= TOLERANCE:
        raise UserError(
            f"the export's features differ from the run's by {difference:.1e} of the largest one, more than "
            f"{TOLERANCE:.0e}; nothing was written"
        )
    return difference
