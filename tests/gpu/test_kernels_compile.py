"""Every Triton kernel, in every variant that `configs/` use, compiled to machine code for GPUs that are not here."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mokd.config import DinoConfig, RunConfig, load_config
from tests.support import ROOT

compiler = pytest.importorskip("triton.compiler")

CAPABILITIES = (80, 90, 100)
# registers of a thread: with 128 threads to a program, so many leave room for 3 programs on a multiprocessor of 65,536
REGISTER_BUDGET = 168


def configurations() -> list[RunConfig]:
    return [load_config(path) for path in sorted((ROOT / "configs").glob("*.yaml"))]


def photometrics(capability: int) -> Iterator[tuple[Any, dict[str, Any], dict[str, str]]]:
    from data_pipeline.transforms import photometrics_triton as module

    # one size of crops differs from another by constants alone: all of them once, the paper's everywhere
    wanted = configurations() if capability == 90 else [load_config(ROOT / "configs" / "vit_s_resnet50.yaml")]
    shapes = {(group.count, group.size_px) for config in wanted for group in config.views.groups}
    outputs = {"*fp32" if config.precision.compute == "fp32" else "*bf16" for config in wanted}
    types = {"crops": "*u8", "ints": "*i32", "row_bytes": "i32", "start": "i32", "batch": "i32"}
    types |= dict.fromkeys(("floats", "bases", "columns"), "*fp32")
    for count, size in sorted(shapes):
        constants = {"COUNT": count, "SIZE": size}
        for kernel in (module._contrast_bases, module._blur_along_y):
            yield kernel, constants, types
        for out in sorted(outputs):
            yield module._finish, constants, {**types, "out": out}


def losses(capability: int) -> Iterator[tuple[Any, dict[str, Any], dict[str, str]]]:
    from mokd.losses.kernels import triton as module

    counts = ("views", "batch", "count", "tiles")
    variants = set()
    for config in configurations():
        if isinstance(config.objective, DinoConfig):
            teachers = config.views.global_crops.count
            crossed = len(config.branches) > 1
            # MLP head: own and other teachers; T-Head: own, and what was searched for the views after the global ones
            variants.add((teachers, 2 if crossed and config.objective.terms.cross_mlp else 1, False, 0))
            variants.add((teachers, 1, crossed and config.objective.terms.cross_search, teachers if crossed else 0))
    for number, paired, by_row, first in sorted(variants):
        terms = {"TEACHERS": number, "PAIRED": paired, "BY_ROW": by_row, "FIRST": first, "TILE": module._TILE}
        yield module._observe, terms, _loss_types(module._observe, counts)
        for logits in (False, True):
            for out in ("*fp32", "*bf16"):
                types = {**_loss_types(module._gradient, counts), "out": out}
                yield module._gradient, {**terms, "LOGITS": logits}, types


def _loss_types(kernel: Any, counts: tuple[str, ...]) -> dict[str, str]:
    types = dict.fromkeys(kernel.arg_names, "*fp32")
    types |= {name: "i32" for name in types if name in counts or name.endswith(("_view", "_image"))}
    return types | {f"factor{place}": "fp32" for place in range(3)}


def machine_code(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], capability: int, folder: Path
) -> tuple[int, int]:
    """Registers of a thread, and bytes of them spilt to memory."""
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    source = compiler.ASTSource(kernel, signature, constexprs=values)
    compiled = compiler.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    # sums in the order in which they happen to arrive would give other bits each time (precision.deterministic)
    assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"]), kernel.__name__
    code = folder / "kernel.cubin"
    code.write_bytes(compiled.asm["cubin"])
    import triton

    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([dump, "-res-usage", code], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variants", [photometrics, losses])
def test_kernels_are_machine_code_within_their_registers(variants: Any, capability: int, tmp_path: Path) -> None:
    seen = 0
    for kernel, constants, types in variants(capability):
        if not hasattr(kernel, "arg_names"):
            pytest.skip("the interpreter is chosen")
        registers, spilt = machine_code(kernel, constants, types, capability, tmp_path)
        what = f"{kernel.__name__} {constants} sm_{capability}: {registers} registers, {spilt} bytes spilt"
        assert spilt == 0, what
        assert registers <= REGISTER_BUDGET, what
        seen += 1
    assert seen >= 6
