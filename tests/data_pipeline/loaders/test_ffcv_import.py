from __future__ import annotations

import subprocess
import sys

from tests.support import ROOT

PROGRAM = """
import numba.typed
from numba.core import compiler

own, compiled = numba.typed.Dict, []
compile_extra = compiler.compile_extra
compiler.compile_extra = lambda *args, **options: compiled.append(args[2]) or compile_extra(*args, **options)
import data_pipeline.loaders.ffcv_crops
from ffcv.fields.rgb_image import IMAGE_MODES

assert compiled == [], compiled
assert numba.typed.Dict is own
assert dict(IMAGE_MODES) == {"jpg": 0, "raw": 1}
{more}
"""
# that the count above sees what FFCV compiles when it is imported as it is
AS_IT_IS = "import importlib, ffcv.fields.rgb_image as module; importlib.reload(module); assert compiled"


def test_ffcv_is_imported_without_compiling_and_means_the_same() -> None:
    program = PROGRAM.replace("{more}", AS_IT_IS)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
