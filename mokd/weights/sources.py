"""First weights from where `init` says: timm, a repository of the Hugging Face hub, torchvision, a run, a file.

What is downloaded goes through the caches of huggingface_hub and torch, as timm's own downloads do. What is there is
taken without asking anybody.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch

from data_pipeline.core.errors import UserError
from mokd.checkpointing.hold import newest_held
from mokd.checkpointing.state import below, branch_file, network_tensors
from mokd.config import BranchConfig, InitSource, parse_init
from mokd.models.backbones import build_backbone, timm_arguments
from mokd.runs.files import file_checksum, read_json
from mokd.runs.run_directory import RunDirectory
from mokd.weights.formats import Tensors, fit, read_tensors

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """Weights that fit a branch. backbone: its own keys (`net....`); heads: what else a run's network had, by its keys.

    facts: what is on record of them: `init`, `source` in words, and `license` and `source_sha256` where known.
    """

    backbone: Tensors
    heads: Tensors
    facts: dict[str, Any]


def find(branch: BranchConfig, image_px: int, channels: int = 3) -> Found:
    """The weights that `branch.init` names, for a network built for images of so many pixels.

    UserError in one line: no such source, no connection, or weights that do not fit.
    """
    assert branch.init is not None
    source, owner = parse_init(branch.init), f"branches.{branch.name}"
    with torch.random.fork_rng(), torch.device("cpu"):
        backbone = build_backbone(branch, image_px, drop_path=0.0, images_per_rank=1, channels=channels)
        tensors, heads, facts = _READERS[source.kind](source, branch, timm_arguments(branch, image_px, channels), owner)
        # a file is told by its path, everything else by the words that it was asked for with
        fitted = fit(backbone, tensors, owner, source.name if source.kind == "file" else f"{owner}.init {branch.init}")
    return Found(fitted, heads, {"init": branch.init, **facts})


# what timm takes besides the name for the very network of the branch
Arguments = dict[str, Any]
Read = tuple[Tensors, Tensors, dict[str, Any]]


def _from_timm(source: InitSource, branch: BranchConfig, arguments: Arguments, owner: str) -> Read:
    where = f"{owner}.init timm"
    with torch.device("meta"):
        config = timm.create_model(branch.backbone, pretrained=False).pretrained_cfg
    place = config.get("hf_hub_id") or config.get("url")
    if not place:
        near = ", ".join(timm.list_pretrained(f"{branch.backbone[:6]}*")[:4]) or "others"
        raise UserError(f"{where}: timm has no weights of '{branch.backbone}'; it has some of {near}")
    with _reachable(where, place):
        if config.get("hf_hub_id") and config.get("custom_load") != "hf":
            # from the cache without asking the hub, which timm does first, again and again where there is no network
            name = config.get("hf_hub_filename") or "pytorch_model.bin"
            safe = "model.safetensors" if name == "pytorch_model.bin" else str(Path(name).with_suffix(".safetensors"))
            file = str(_hub_file(config["hf_hub_id"], safe, name))
            arguments = {**arguments, "pretrained_cfg_overlay": {"file": file}}
        try:
            net = timm.create_model(branch.backbone, pretrained=True, **arguments)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            first = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line).rstrip(".")
            raise UserError(f"{where}: {first}; the weights are of another network than {owner}") from None
    name = ".".join(filter(None, (config.get("architecture"), config.get("tag"))))
    return dict(net.state_dict()), {}, {"source": f"timm's {name} ({place})", "license": config.get("license")}


def _from_hub(source: InitSource, branch: BranchConfig, arguments: Arguments, owner: str) -> Read:
    where = f"{owner}.init hub:{source.name}"
    with _reachable(where, source.name):
        tensors = read_tensors(_hub_file(source.name, "model.safetensors", "pytorch_model.bin"))
    about = _cached(source.name, "config.json")
    described = read_json(about) if about else None
    license = described.get("license") if isinstance(described, dict) else None
    return tensors, {}, {"source": f"repository {source.name} of the hub", "license": license}


def _hub_file(repository: str, *names: str) -> Path:
    """The first of these files that is cached, else the first that the repository has, downloaded into the cache.

    A repository may have a revision behind `@`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in names:
        if (cached := _cached(repository, name)) is not None:
            return cached
    owner, _, revision = repository.partition("@")
    for name in names:
        try:
            return Path(hf_hub_download(owner, name, revision=revision or None))
        except LocalEntryNotFoundError:  # no connection: the next name would wait for one as long
            raise
        except EntryNotFoundError:
            if name == names[-1]:
                raise
    raise AssertionError  # the last name returns or raises


def _cached(repository: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    owner, _, revision = repository.partition("@")
    found = try_to_load_from_cache(owner, name, revision=revision or None)
    return Path(found) if isinstance(found, str) else None


def _from_torchvision(source: InitSource, branch: BranchConfig, arguments: Arguments, owner: str) -> Read:
    import torchvision

    where = f"{owner}.init torchvision:{source.name}"
    try:
        weights = torchvision.models.get_weight(source.name)
    except (ValueError, KeyError, AttributeError):
        kind, _, _ = source.name.partition(".")
        near = [name for name in _torchvision_names() if name.lower().startswith(kind.lower()[:8])][:4]
        raise UserError(
            f"{where}: torchvision has no such weights; similar: {', '.join(near) or 'none'}; "
            "they are named as in ResNet50_Weights.IMAGENET1K_V2"
        ) from None
    # torch tells of a download in a line of its own
    with _reachable(where, weights.url), contextlib.redirect_stderr(io.StringIO()):
        tensors = weights.get_state_dict(progress=False, check_hash=True)
    return dict(tensors), {}, {"source": f"torchvision's {source.name} ({weights.url})", "license": None}


def _torchvision_names() -> list[str]:
    import torchvision

    models = [torchvision.models.get_model_weights(name) for name in torchvision.models.list_models()]
    return [f"{weights.__name__}.{member.name}" for weights in models for member in weights]


def _from_run(source: InitSource, branch: BranchConfig, arguments: Arguments, owner: str) -> Read:
    run = RunDirectory.open(Path(source.name))
    names = [other.name for other in run.config().branches]
    if source.branch not in names:
        raise UserError(f"{owner}.init: {run.path} has no branch '{source.branch}'; there are {', '.join(names)}")
    try:
        with newest_held(run) as checkpoint:
            tensors = network_tensors(checkpoint, source.branch, "teacher")
            checksum = checkpoint.checksums.get(f"{branch_file(source.branch)}.safetensors")
            taken = f"teacher of branch {source.branch} of run {run.path.name} at step {checkpoint.step}"
    except OSError as error:  # a checkpoint is held by links in its run, which needs the right to write there
        raise UserError(f"{owner}.init: {run.path}: {error.strerror}; or give a file that mokd export wrote") from None
    facts = {"source": taken, "source_sha256": checksum, "license": None}
    prefix = "backbone."
    return below(tensors, prefix), {key: value for key, value in tensors.items() if not key.startswith(prefix)}, facts


def _from_file(source: InitSource, branch: BranchConfig, arguments: Arguments, owner: str) -> Read:
    path = Path(source.name)
    if path.is_dir():
        raise UserError(f"{owner}.init: {path} is a folder; give a file of weights, or run:RUN/BRANCH for a run")
    tensors = read_tensors(path)
    facts = {"source": f"file {path.name}", "source_sha256": file_checksum(path), "license": None}
    return tensors, {}, facts


_READERS: dict[str, Callable[[InitSource, BranchConfig, Arguments, str], Read]] = {
    "timm": _from_timm,
    "hub": _from_hub,
    "torchvision": _from_torchvision,
    "run": _from_run,
    "file": _from_file,
}


@contextmanager
def _reachable(where: str, place: str) -> Generator[None]:
    """Turns what downloads raise, of many libraries and kinds, into one line."""
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it tells of every try
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # which is for answers; torch tells of downloads there
            yield
    except UserError:
        raise
    except Exception as error:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"RepositoryNotFoundError", "EntryNotFoundError", "GatedRepoError", "HFValidationError"} and not (
            names & {"LocalEntryNotFoundError"}
        ):
            raise UserError(f"{where}: {place}: the hub has no such weights, or does not give them out") from None
        if isinstance(error, OSError) or names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "HfHubHTTPError"}:
            raise UserError(
                f"{where}: {place} is not in the cache and cannot be downloaded; run this once where there is a network"
                " connection, or give a file"
            ) from None
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: {place} cannot be read: {line}") from None
    finally:
        hub_logging.set_verbosity(before)
