"""The formats: what is written into a folder, and the lines that read it with nothing of ours installed.

`load` gives a program that is given `images` `[B, C, S, S]` (normalised, float32 numpy) and the current
directory, and leaves `features` `[B, D]` as a numpy array. The same lines stand in the model card and are run to check
the export.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from mokd.export import torchvision_format
from mokd.export.source import Source
from mokd.models.backbones import STEM_STRIDES, Backbone

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Format:
    """A way to write a network. load: the program that reads it; needs: what the extra `mokd[export]` brings for it."""

    write: Callable[[Source, Path], None]
    load: Callable[[Source], str]
    needs: tuple[str, ...] = ()


def _timm_weights(source: Source) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in source.backbone.net.state_dict().items()}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _timm_config(source: Source) -> dict[str, Any]:
    arguments = {"architecture": source.branch.backbone, "arguments": source.timm_arguments()}
    return arguments | {"small_stem_stride": STEM_STRIDES.get(source.branch.stem)}


def _write_timm(source: Source, folder: Path) -> None:
    save_file(_timm_weights(source), folder / WEIGHTS)
    _write_json(folder / "config.json", _timm_config(source))


def _write_safetensors(source: Source, folder: Path) -> None:
    save_file({key: value.contiguous() for key, value in source.whole_tensors().items()}, folder / WEIGHTS)
    _write_json(folder / "config.json", _timm_config(source))


_CREATE = """\
import json
import timm
import torch
from safetensors.torch import load_file

config = json.load(open("config.json"))
model = timm.create_model(config["architecture"], **config["arguments"])
"""
_SMALL_STEM = """\
channels, stride = config["arguments"].get("in_chans", 3), config["small_stem_stride"]
model.conv1 = torch.nn.Conv2d(channels, model.bn1.num_features, 3, stride, padding=1, bias=False)
model.maxpool = torch.nn.Identity()
"""
_RUN = """\
features = model.eval()(torch.from_numpy(images)).detach().numpy()
"""


def _load_timm(source: Source) -> str:
    stem = "" if source.branch.stem == "default" else _SMALL_STEM
    return _CREATE + stem + 'model.load_state_dict(load_file("model.safetensors"))\n' + _RUN


def _load_safetensors(source: Source) -> str:
    stem = "" if source.branch.stem == "default" else _SMALL_STEM
    lines = """\
prefix, saved = "backbone.net.", load_file("model.safetensors")
model.load_state_dict({k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)})
"""
    return _CREATE + stem + lines + _RUN


class _Pooled(nn.Module):
    """Images to the pooled feature."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(images).pooled
        return features


def _write_onnx(source: Source, folder: Path) -> None:
    px = source.image_px
    batch, height, width = torch.export.Dim("batch"), torch.export.Dim("height"), torch.export.Dim("width")
    attempts = [{0: batch, 2: height, 3: width}, {0: batch}]
    if source.backbone.is_sequence or hasattr(source.backbone.net, "pos_embed"):
        attempts = attempts[1:]  # position embeddings are those of one size
    error: Exception | None = None
    for dynamic in attempts:
        try:
            program = torch.onnx.export(
                _Pooled(source.backbone).eval(),
                (torch.zeros(2, source.backbone.channels, px, px),),
                dynamo=True,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes={"images": dynamic},
                verbose=False,
            )
        except Exception as caught:  # the exporter has many ways to say that a network does not allow a shape
            error = caught
            continue
        assert program is not None
        program.save(folder / "model.onnx")
        _write_json(folder / "config.json", {"dynamic": ["batch", "height", "width"][: len(dynamic)], "image_px": px})
        return
    reason = str(error).splitlines()[0]
    raise UserError(f"--format onnx: branch '{source.branch.name}' cannot be exported: {reason}")


LOAD_ONNX = """\
import onnxruntime

model = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
features = model.run(["features"], {"images": images})[0]
"""


def _write_huggingface(source: Source, folder: Path) -> None:
    if source.branch.stem != "default":
        raise UserError(
            f"--format huggingface: branch '{source.branch.name}' has the stem '{source.branch.stem}', which timm "
            "alone does not build; export it as timm, whose lines set the stem, or as onnx"
        )
    arguments = source.timm_arguments()
    preprocessing = source.preprocessing()
    save_file(_timm_weights(source), folder / WEIGHTS, metadata={"format": "pt"})
    pretrained = {
        "input_size": [source.backbone.channels, source.image_px, source.image_px],
        "fixed_input_size": source.backbone.is_sequence,
        "interpolation": preprocessing["interpolation"],
        "crop_pct": preprocessing["crop_px"] / preprocessing["resize_px"],
        "crop_mode": "center",
        "mean": preprocessing["mean"],
        "std": preprocessing["std"],
        "num_classes": 0,
        "pool_size": None,
        "first_conv": None,
        "classifier": None,
    }
    _write_json(
        folder / "config.json",
        {
            "architecture": source.branch.backbone,
            "num_classes": 0,
            "num_features": source.backbone.width,
            "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
            "pretrained_cfg": pretrained,
        },
    )


LOAD_HUGGINGFACE = """\
import torch
from transformers import TimmWrapperModel

model = TimmWrapperModel.from_pretrained(".").eval()
features = model(torch.from_numpy(images)).pooler_output.detach().numpy()
"""

FORMATS = {
    "timm": Format(_write_timm, _load_timm),
    "safetensors": Format(_write_safetensors, _load_safetensors),
    "torchvision": Format(torchvision_format.write, torchvision_format.load),
    "onnx": Format(_write_onnx, lambda _: LOAD_ONNX, ("onnx", "onnxscript", "onnxruntime")),
    "huggingface": Format(_write_huggingface, lambda _: LOAD_HUGGINGFACE, ("transformers",)),
}
