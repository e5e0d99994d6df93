"""Runs `mokd` commands one after the other, each in a fork of a process that has imported torch already.

usage: python -m tests.programs.run_commands < COMMANDS    (a JSON list of words a line; of each an object comes back)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from glob import glob

import torch  # noqa: F401 - imported, not used: no thread of its may run before a fork
import torchvision  # noqa: F401

import mokd.evaluation.entry
import mokd.export
import mokd.training.trainer  # noqa: F401
from launcher.cli import main as cli

SECONDS = 100  # of one command


def run(words: list[str]) -> dict[str, object]:
    """Exit status and output of one command."""
    begun = time.monotonic()
    words = [found for word in words for found in (sorted(glob(word)) if "*" in word else [word])]
    with tempfile.TemporaryFile("w+b") as output:
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)
            null = os.open(os.devnull, os.O_RDONLY)
            for target, source in ((0, null), (1, output.fileno()), (2, output.fileno())):
                os.dup2(source, target)
            sys.argv[:] = ["mokd", *words]
            status = 70
            try:
                cli.main(words)
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException as error:
                sys.excepthook(type(error), error, error.__traceback__)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    return {"status": os.waitstatus_to_exitcode(ended), "output": text, "seconds": time.monotonic() - begun}


for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
