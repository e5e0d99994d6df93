"""The implementations of photometrics against each other, from the same bytes and parameters."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from data_pipeline.config import CropConfig, ViewsConfig
from data_pipeline.core.host_memory import Packed, Recycler, Ring
from data_pipeline.core.native_library import PHOTOMETRIC, Engine
from data_pipeline.sampling.draws import draw_views, view_sizes
from data_pipeline.transforms.photometrics import CpuPhotometrics, pack_parameters, photometrics_torch
from tests.support import ROOT

VIEWS = ViewsConfig(
    global_crops=CropConfig(
        count=2, size_px=37, area_scale=(0.25, 1.0), blur_probability=(1.0, 0.3), solarize_probability=(0.0, 0.7)
    ),
    local_crops=CropConfig(count=3, size_px=16, area_scale=(0.05, 0.25), blur_probability=(0.5,)),
    blur_radius_px=(0.1, 5.0),
    mean=(0.0, 0.1, 0.2),
    std=(1.0, 0.5, 2.0),
)
# of other than three channels: no colours, which would be left out
FOUR = VIEWS.model_copy(update={"mean": (0.0, 0.1, 0.2, 0.3), "std": (1.0, 0.5, 2.0, 1.5)})
GREY = VIEWS.model_copy(update={"mean": (0.1,), "std": (0.5,)})
STEP = 1 / 255


def packed_batch(samples: int = 12, views: ViewsConfig = VIEWS) -> Packed:
    draws = draw_views(views, 1, 2, np.arange(samples), np.full(samples, 90), np.full(samples, 80))
    parameters = pack_parameters(draws).view(np.uint8)
    row_bytes = int((views.channels * view_sizes(views).astype(np.int64) ** 2).sum())
    packed = Ring(1, samples, row_bytes, parameters.shape[1], pinned=False).next(
        np.arange(samples), np.zeros(samples, np.int64)
    )
    # smooth with a few flat and grey parts: where hue is hardest
    waves = np.sin(np.arange(row_bytes) / 7.0 + np.arange(samples)[:, None]) * 200 + 120
    packed.crops[:] = np.clip(waves, 0, 255).astype(np.uint8)
    packed.parameters[:] = parameters
    return packed


def reference(packed: Packed, views: ViewsConfig = VIEWS) -> tuple[torch.Tensor, ...]:
    parameters = packed.parameters.view(PHOTOMETRIC)
    return photometrics_torch(torch.from_numpy(packed.crops), views, parameters, torch.float32)


def assert_close(found, expected, tolerance=0.02 * STEP) -> None:
    """Tolerance in units of the views; where a pixel is right at the threshold, solarisation may differ."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        far = ((a.float() - b).abs() > tolerance * 2).float().mean()
        assert far < 1e-4


@pytest.mark.parametrize("kernels", ["generic", "avx2", None])
@pytest.mark.parametrize("threads", [1, 3])
def test_native_equals_torch(kernels, threads):
    packed, engine = packed_batch(), Engine(threads, kernels)
    assert_close(CpuPhotometrics(VIEWS, torch.float32, engine)(packed), reference(packed))
    engine.close()


@pytest.mark.parametrize("kernels", ["generic", "avx2", None])
@pytest.mark.parametrize("views", [GREY, FOUR])
def test_native_equals_torch_on_other_than_three_channels(kernels, views):
    packed, engine = packed_batch(views=views), Engine(2, kernels)
    found = CpuPhotometrics(views, torch.float32, engine)(packed)
    assert [group.shape[2] for group in found] == [views.channels] * 2
    assert_close(found, reference(packed, views))
    engine.close()


@pytest.mark.parametrize("kernels", ["generic", "avx2", None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(kernels, dtype):
    packed, engine = packed_batch(), Engine(1, kernels)
    exact = CpuPhotometrics(VIEWS, torch.float32, engine)(packed)
    halves = CpuPhotometrics(VIEWS, dtype, engine)(packed)
    assert all(torch.equal(half, full.to(dtype)) for half, full in zip(halves, exact, strict=True))
    engine.close()


def test_triton_equals_torch(tmp_path):
    """Where there is no GPU, Triton's interpreter runs the kernels; it has to be chosen before they are defined."""
    pytest.importorskip("triton")
    program = (
        "import torch\n"
        "from tests.data_pipeline.transforms.test_photometrics import VIEWS, assert_close, packed_batch, reference\n"
        "from data_pipeline.transforms.photometrics_triton import photometrics_triton\n"
        "packed = packed_batch(4)\n"
        "device = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
        "crops, parameters = (torch.from_numpy(x).to(device) for x in (packed.crops, packed.parameters))\n"
        "found = photometrics_triton(crops, VIEWS, parameters, torch.float32)\n"
        "assert_close([x.cpu() for x in found], reference(packed))\n"
        "half = photometrics_triton(crops, VIEWS, parameters, torch.float16)\n"
        "assert all(torch.equal(h, f.half()) for h, f in zip(half, found))\n"
    )
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"

    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, check=True, timeout=200)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_loader_equals_cpu_loader(beton, small_views):
    from data_pipeline.config import DataConfig
    from data_pipeline.loaders.build import build_loader

    data = DataConfig(train=beton, workers=1, batches_ahead=1)
    common = {"seed": 3, "rank": 0, "world_size": 1, "global_batch": 2}
    loaders = [build_loader(data, small_views, device=device, **common) for device in ("cpu", "cuda")]
    for a, b in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert_close([x.cpu() for x in b.views], a.views, 0.1 * STEP)
    for loader in loaders:
        loader.close()


def test_memory_is_used_again_only_when_nobody_looks():
    memory = Recycler()
    first = memory.empty((4, 5), torch.bfloat16)
    address, part = first.data_ptr(), first[1]
    del first
    assert memory.empty((4, 5), torch.bfloat16).data_ptr() != address  # a part is still looked at
    del part
    seen = [memory.empty((4, 5), torch.float16) for _ in range(3)]
    assert address in [tensor.data_ptr() for tensor in seen]


def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    from data_pipeline.transforms import photometrics_triton as module

    shape = {"COUNT": 3, "SIZE": 96}
    types = {"crops": "*u8", "ints": "*i32", "row_bytes": "i32", "start": "i32", "batch": "i32", "out": "*bf16"}
    types |= dict.fromkeys(("floats", "bases", "columns"), "*fp32")
    for name in ("_contrast_bases", "_blur_along_y", "_finish"):
        kernel = getattr(module, name)
        if not hasattr(kernel, "arg_names"):
            pytest.skip("the interpreter is chosen")
        names = kernel.arg_names
        signature = {key: "constexpr" if key in shape else types.get(key, "fp32") for key in names}
        constants = {(names.index(key),): value for key, value in shape.items()}
        source = compiler.ASTSource(kernel, signature, constexprs=constants)
        assert compiler.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
