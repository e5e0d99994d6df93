"""Any timm network behind one interface: pooled feature, dense tokens, grid.

Shape letters: B images, N tokens, D width, S side in pixels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from data_pipeline.config import ViewsConfig
from data_pipeline.core.errors import UserError
from mokd.config import BranchConfig
from mokd.models import positions
from mokd.models.drop_path import SampleDropPath, drawn_together
from mokd.models.sync_batchnorm import CountsBatches

STEM_STRIDES = {"cifar": 1, "cifar_stride2": 2}


@dataclass(frozen=True)
class Features:
    """What a backbone says of a batch.

    pooled: `[B, D_pooled]`; tokens: `[B, N, D]`, row-major over a square grid;
    cls: the class token `[B, D]`, None for a network without one.
    """

    pooled: Tensor
    tokens: Tensor
    cls: Tensor | None

    @property
    def grid(self) -> int:
        """Side of the square grid of tokens."""
        return math.isqrt(self.tokens.shape[1])


class Backbone(CountsBatches):
    """A timm network without classifier. The network is the submodule `net`; its key names are timm's own.

    channels: of its images. channels_last: whether it computes in NHWC memory order.
    """

    channels_last = False

    def __init__(self, net: nn.Module, channels: int = 3) -> None:
        super().__init__()
        self.net, self.channels = net, channels
        self.prefix_tokens = int(getattr(net, "num_prefix_tokens", 0))
        self.width = int(net.num_features)  # type: ignore[arg-type]
        # those that draw together; where blocks are computed again, each by itself draws again what it drew
        self.drop_paths = [layer for layer in net.modules() if isinstance(layer, SampleDropPath) and layer.p > 0.0]

    @property
    def is_sequence(self) -> bool:
        """Whether the dense features are a transformer's tokens rather than a feature map."""
        return self.prefix_tokens > 0

    def forward(self, images: Tensor) -> Features:
        """Features of images `[B, channels, S, S]`."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        self.count_batch()
        with drawn_together(self.drop_paths, images):
            dense = self.net.forward_features(images)  # type: ignore[operator]
        pooled = self.net.forward_head(dense, pre_logits=True)  # type: ignore[operator]
        cls = None
        if dense.ndim == 4:
            if dense.shape[1] == self.width and getattr(self.net, "output_fmt", "NCHW") != "NHWC":
                dense = dense.permute(0, 2, 3, 1)
            tokens = dense.flatten(1, 2)
        else:
            cls = dense[:, 0] if self.prefix_tokens else None
            tokens = dense[:, self.prefix_tokens :]
        return Features(pooled, tokens, cls)


@dataclass(frozen=True)
class BackboneShapes:
    """Sizes that the heads need to know: widths, and the token grid's side for every crop size."""

    pooled_width: int
    width: int
    is_sequence: bool
    grids: dict[int, int]


def create_net(config: BranchConfig, image_px: int, drop_path: float, channels: int = 3) -> nn.Module:
    """The timm network of a branch, randomly initialised; UserError when timm does not know it or its options."""
    net, _ = _timm_net(config, image_px, drop_path, channels)
    positions.use_in(net)
    if isinstance(token := getattr(net, "cls_token", None), nn.Parameter):
        nn.init.trunc_normal_(token, std=0.02)  # timm's 1e-6 makes all class tokens zero at first
    if config.stem != "default":
        _use_small_stem(net, STEM_STRIDES[config.stem], channels, f"branches.{config.name}.backbone")
    return net


def timm_arguments(config: BranchConfig, image_px: int, channels: int = 3) -> dict[str, Any]:
    """What `timm.create_model` takes besides the name for the network that `create_net` builds."""
    with torch.device("meta"):
        return _timm_net(config, image_px, 0.0, channels)[1]


def _timm_net(config: BranchConfig, image_px: int, drop_path: float, channels: int) -> tuple[nn.Module, dict[str, Any]]:
    """A network as timm builds it, and the arguments that it was built with."""
    entry = f"branches.{config.name}.backbone"
    if not timm.is_model(config.backbone):
        near = timm.list_models(f"*{config.backbone.split('_')[0].rstrip('0123456789oO')}*")[:4]
        raise UserError(f"{entry}: timm has no model '{config.backbone}'; similar: {', '.join(near) or 'none'}")
    options = {"num_classes": 0, **({} if channels == 3 else {"in_chans": channels}), **config.backbone_options}
    if drop_path:
        options["drop_path_rate"] = drop_path
    error: Exception | None = None
    # what architectures may take to learn of the size of images, most telling first
    for extra in ({"dynamic_img_size": True, "img_size": image_px}, {"img_size": image_px}, {}):
        arguments = {**extra, **options}
        try:
            return timm.create_model(config.backbone, pretrained=False, **arguments), arguments
        except TypeError as caught:  # the architecture does not know one of the extra options
            error = error if "unexpected keyword" in str(error) and extra else caught
        except (RuntimeError, ValueError, AssertionError) as caught:
            raise UserError(f"{entry}: '{config.backbone}' with {options} cannot be built: {_line(caught)}") from None
    raise UserError(f"branches.{config.name}.backbone_options: '{config.backbone}' refuses them: {_line(error)}")


def build_backbone(
    config: BranchConfig, image_px: int, *, drop_path: float, images_per_rank: int, channels: int = 3
) -> Backbone:
    """The backbone of a student (with its stochastic depth) or of a teacher (drop_path 0)."""
    net = create_net(config, image_px, drop_path, channels)
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                setattr(parent, name, SampleDropPath(float(child.drop_prob or 0.0), images_per_rank))
    return Backbone(net, channels)


def build_for_views(
    config: BranchConfig, views: ViewsConfig, *, student: bool, images_per_rank: int
) -> tuple[Backbone, BackboneShapes]:
    """The backbone of a branch's student (with stochastic depth) or teacher, randomly initialised, and the sizes of
    what it says of every view.
    """
    global_px = views.global_crops.size_px
    shapes = measure_shapes(config, global_px, [group.size_px for group in views.groups], views.channels)
    backbone = build_backbone(
        config,
        global_px,
        drop_path=config.drop_path if student else 0.0,
        images_per_rank=images_per_rank,
        channels=views.channels,
    )
    return backbone, shapes


def measure_shapes(
    config: BranchConfig, image_px: int, crop_sizes_px: Iterable[int], channels: int = 3
) -> BackboneShapes:
    """Runs the network without data or memory on every crop size; UserError naming the size it cannot take."""
    grids: dict[int, int] = {}
    features: Features | None = None
    with torch.device("meta"), torch.no_grad():
        backbone = Backbone(create_net(config, image_px, 0.0, channels), channels).eval()
        for size in crop_sizes_px:
            try:
                features = backbone(torch.zeros(2, channels, size, size))
            except (AssertionError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"branches.{config.name}: '{config.backbone}' cannot take crops of {size} px: {_line(error)}; "
                    "change the crop's size_px or the network's patch or image size"
                ) from None
            tokens = features.tokens.shape[1]
            if features.grid**2 != tokens:
                raise UserError(f"branches.{config.name}: '{config.backbone}' gives {tokens} tokens, not a grid")
            grids[size] = features.grid
    assert features is not None, "at least one crop size"
    return BackboneShapes(features.pooled.shape[1], features.tokens.shape[2], backbone.is_sequence, grids)


def _use_small_stem(net: nn.Module, stride: int, channels: int, entry: str) -> None:
    norm, pool = getattr(net, "bn1", None), getattr(net, "maxpool", None)
    if not hasattr(net, "conv1") or not isinstance(norm, nn.BatchNorm2d) or pool is None:
        raise UserError(f"{entry}: stems for small images are for ResNets; this network has no 'conv1' and 'maxpool'")
    # as wide as what it replaces: a deep stem's last layer, or the only one
    stem = nn.Conv2d(channels, norm.num_features, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    net.conv1, net.maxpool = stem, nn.Identity()


def _line(error: BaseException | None) -> str:
    return inspect.cleandoc(str(error)).splitlines()[0] if str(error) else type(error).__name__
