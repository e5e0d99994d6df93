"""Weights as other programs save them, fitted to a backbone: prefixes, wrappers and names are recognised."""

from __future__ import annotations

import argparse
import contextlib
import io
import pathlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from mokd.models.backbones import Backbone

Tensors = dict[str, Tensor]

# Where training code keeps the network: where a file has keys below one of these, the others are not the network's.
# Of two networks in one file (DINO, DINOv2, lightly) the teacher is taken, of MoCo's the query encoder.
_PARTS = (
    *("teacher.", "teacher_backbone.", "student_backbone.", "student.", "encoder_q.", "base_encoder.", "model."),
    *("backbone.", "net."),
)
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")
# entries of a checkpoint that hold a state dict, the preferred first
_ENTRIES = ("state_dict", "model", "teacher", "student")
# classifiers and projection heads
_HEADS = frozenset(
    {"fc", "head", "head_dist", "heads", "classifier", "projector", "projection_head", "dino_head", "ibot_head"}
)
# what programs save beside weights and what only holds values: arguments, paths
_HARMLESS: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]
# lightly keeps a ResNet as a sequence of its children, without names
_RESNET_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# DINOv2 trains its blocks in chunks; a block keeps its own number within its chunk
_CHUNKED = re.compile(r"blocks\.\d+\.(\d+\.)")


def load_weights(backbone: Backbone, path: Path, owner: str) -> None:
    """Backbone weights from a safetensors or state-dict file; UserError when they do not fit (`fit`)."""
    backbone.load_state_dict(fit(backbone, read_tensors(path), owner, str(path)), strict=False)


def read_tensors(path: Path) -> Tensors:
    """The state dict in a safetensors file or a checkpoint of torch's; UserError in one line when there is none."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (weights to start from)") from None
    except Exception as error:  # both readers raise many kinds on a damaged or foreign file, and give long advice
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise UserError(
                f"{path}: cannot be read safely as weights: it holds a {foreign[1]}, whose making may run code; "
                "docs/weights.md has the lines that keep the tensors alone"
            ) from None
        raise UserError(
            f"{path}: cannot be read safely as weights; expected a safetensors file or a state dict of tensors"
        ) from None
    return state_dict_of(loaded, str(path))


def state_dict_of(loaded: object, where: str) -> Tensors:
    """The tensors of a checkpoint that may keep its state dict below an entry."""
    for key in _ENTRIES:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise UserError(f"{where}: holds {type(loaded).__name__}, not a state dict")
    return {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}


def fit(backbone: Backbone, tensors: Mapping[str, Tensor], owner: str, where: str) -> Tensors:
    """The backbone's own keys (`net....`) with values from `tensors`, in the backbone's types.

    Takes timm's keys, torchvision's where they are the same, and those of the checkpoints of DINO, DINOv2, DINOv3,
    MoCo and lightly; a classifier or projection head is ignored. timm converts what it knows of a family, position
    embeddings of another grid among it. UserError naming the first keys that are missing, of another shape or unknown.
    """
    own = backbone.net.state_dict()
    given = _named_alike(backbone_part(tensors), own)
    problem = _problem(own, given, owner)
    patches = "patch_embed.proj.weight"
    # another patch size is another network: timm would resample the kernel without a word
    if problem and not (patches in own and patches in given and given[patches].shape != own[patches].shape):
        converted = _converted(backbone.net, given)
        if converted is not None:
            given, problem = converted, _problem(own, converted, owner)
    if problem:
        raise UserError(f"{where}: {problem}")
    return {f"net.{key}": given[key].to(value.dtype) for key, value in own.items() if key in given}


def backbone_part(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors of the network proper, without what wrappers and methods put before their names."""
    tensors = dict(tensors)
    while True:
        before = tensors
        for wrapper in _WRAPPERS:
            tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
        for part in _PARTS:
            inside = {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
            if inside:
                tensors = inside
                break
        if tensors.keys() == before.keys():
            return tensors


def _named_alike(given: Tensors, own: Mapping[str, Tensor]) -> Tensors:
    """Keys as timm writes them, of sequences of a ResNet's children and of blocks in chunks."""
    if "conv1.weight" in own and "0.weight" in given:
        parts = {key: key.partition(".") for key in given}
        given = {f"{_RESNET_CHILDREN.get(p[0], p[0])}.{p[2]}": given[key] for key, p in parts.items()}
    return {_CHUNKED.sub(r"blocks.\1", key): value for key, value in given.items()}


def _converted(net: nn.Module, given: Tensors) -> Tensors | None:
    """What timm makes of another program's weights for this family of networks; None where it knows nothing."""
    family = sys.modules[type(net).__module__]
    convert = getattr(family, "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it passes over
            return dict(convert(dict(given), net))
    except Exception:  # it expects the weights of its family, and fails in many ways on others
        return None


def _problem(own: Mapping[str, Tensor], given: Mapping[str, Tensor], owner: str) -> str | None:
    """Why the weights do not fit, in one line; None where they do."""
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    if missing:
        return f"{owner} needs {_first(missing)}, which it does not hold"
    wrong = [key for key in own if key in given and given[key].shape != own[key].shape]
    if wrong:
        pairs = [(key, list(given[key].shape), list(own[key].shape)) for key in wrong[:2]]
        shapes = ", ".join(f"'{key}' is {there} instead of {here}" for key, there, here in pairs)
        more = f" ({len(wrong)} keys in all)" if len(wrong) > 2 else ""
        return f"{shapes}{more}; the weights are of another network than {owner}"
    unknown = [key for key in given if key not in own and key.split(".")[0] not in _HEADS]
    if unknown:
        return f"holds {_first(unknown)}, which {owner} does not know"
    return None


def _first(keys: list[str]) -> str:
    shown = ", ".join(f"'{key}'" for key in keys[:2])
    return f"{shown} ({len(keys)} keys in all)" if len(keys) > 2 else shown
