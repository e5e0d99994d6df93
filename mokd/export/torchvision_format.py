"""The format of torchvision: plain ResNets, vision transformers and ConvNeXts, under its names of their tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from mokd.export.source import Source
from mokd.weights.torchvision_names import to_torchvision

# what takes the place of the classifier, by the class of the network
_CLASSIFIERS = {"ResNet": "fc.", "VisionTransformer": "heads.", "ConvNeXt": "classifier.2."}


def _resnet(name: str) -> tuple[dict[str, Any], Callable[[], nn.Module]]:
    from torchvision.models import get_model

    return {"architecture": name}, lambda: get_model(name)


def _transformer(net: nn.Module, image_px: int) -> tuple[dict[str, Any], Callable[[], nn.Module]]:
    from torchvision.models import VisionTransformer

    blocks: Any = net.blocks
    arguments = {
        "image_size": image_px,
        "patch_size": net.patch_embed.patch_size[0],  # type: ignore[union-attr, index]
        "num_layers": len(blocks),
        "num_heads": blocks[0].attn.num_heads,
        "hidden_dim": net.embed_dim,
        "mlp_dim": blocks[0].mlp.fc1.out_features,
    }
    return {"arguments": arguments}, lambda: VisionTransformer(**arguments)


def _convnext(net: nn.Module) -> tuple[dict[str, Any], Callable[[], nn.Module]]:
    from torchvision.models import ConvNeXt
    from torchvision.models.convnext import CNBlockConfig

    stages: Any = net.stages
    widths = [stage.blocks[0].conv_dw.out_channels for stage in stages]
    settings = list(zip(widths, [*widths[1:], None], (len(stage.blocks) for stage in stages), strict=True))
    return {"block_setting": settings}, lambda: ConvNeXt([CNBlockConfig(*setting) for setting in settings])


def _counterpart(source: Source) -> tuple[dict[str, Any], Callable[[], nn.Module]] | None:
    """What builds torchvision's network, as `config.json` has it and as a call; None where it has none of the kind."""
    from timm.models.convnext import ConvNeXt
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer
    from torchvision.models import list_models

    net, name = source.backbone.net, source.branch.backbone
    if type(net) is VisionTransformer:
        return _transformer(net, source.image_px)
    if type(net) is ConvNeXt:
        return _convnext(net)
    plain = not source.branch.backbone_options and source.branch.stem == "default"
    if type(net) is ResNet and plain and name in list_models():
        return _resnet(name)
    return None


def _tensors(source: Source, build: Callable[[], nn.Module]) -> dict[str, Tensor] | None:
    """The state dict of torchvision's network without its classifier; None where the two networks differ."""
    try:
        with torch.device("meta"):
            net = build()
    except (AssertionError, ValueError):  # a size of images that the patches do not divide
        return None
    classifier = _CLASSIFIERS[type(net).__name__]
    expected = {key: value for key, value in net.state_dict().items() if not key.startswith(classifier)}
    found = to_torchvision(source.backbone.net.state_dict(), expected)
    if {key: value.shape for key, value in found.items()} != {key: value.shape for key, value in expected.items()}:
        return None
    return {key: found[key].contiguous() for key in expected}


def write(source: Source, folder: Path) -> None:
    """`model.pth`, and `config.json` with what builds the network; UserError where torchvision has no such network."""
    entry = f"--format torchvision: branch '{source.branch.name}'"
    counterpart = _counterpart(source)
    if counterpart is None:
        raise UserError(
            f"{entry} is no plain ResNet, vision transformer or ConvNeXt as torchvision has them; "
            "export it as timm or onnx"
        )
    config, build = counterpart
    weights = _tensors(source, build)
    if weights is None:
        raise UserError(f"{entry}: timm's '{source.branch.backbone}' differs from torchvision's; export it as timm")
    torch.save(weights, folder / "model.pth")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


_START = """\
import json
import torch
import torchvision

"""
_RESNET = """\
model = torchvision.models.get_model(json.load(open("config.json"))["architecture"]).eval()
model.fc = torch.nn.Identity()
"""
_TRANSFORMER = """\
model = torchvision.models.VisionTransformer(**json.load(open("config.json"))["arguments"]).eval()
model.heads = torch.nn.Identity()
"""
_CONVNEXT = """\
stages = json.load(open("config.json"))["block_setting"]
model = torchvision.models.ConvNeXt([torchvision.models.convnext.CNBlockConfig(*stage) for stage in stages]).eval()
model.classifier[2] = torch.nn.Identity()
"""
_END = """\
model.load_state_dict(torch.load("model.pth", weights_only=True))
features = model(torch.from_numpy(images)).detach().numpy()
"""


def load(source: Source) -> str:
    """The lines that read what `write` has written."""
    kinds = {"VisionTransformer": _TRANSFORMER, "ConvNeXt": _CONVNEXT}
    return _START + kinds.get(type(source.backbone.net).__name__, _RESNET) + _END
