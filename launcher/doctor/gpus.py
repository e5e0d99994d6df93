"""GPUs, their driver, and the network between them."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from launcher.doctor.finding import Finding, Surroundings, last_line

# in a fresh interpreter: what CUDA is like depends on its first use, and the environment is the one asked about
_PROBE = """
import pathlib, os, torch
from mokd.distributed.accelerators import driver_cuda, why_no_gpu
if torch.cuda.is_available():
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    print("found", torch.cuda.device_count(), ", ".join(sorted(names)), "; driver knows CUDA %d.%d" % driver_cuda())
else:
    print("none", why_no_gpu(root=pathlib.Path(ROOT)))
"""


def gpus(here: Surroundings) -> Finding:
    """The driver fits torch, and as many GPUs are visible as were promised."""
    done = here.python(_PROBE.replace("ROOT", repr(str(here.root))))
    if done.returncode:
        return Finding("problem", f"cannot be looked for: {last_line(done.stderr)}", "make setup")
    kind, _, text = done.stdout.strip().splitlines()[-1].partition(" ")
    if kind == "none":
        if not here.wants_gpus:
            return Finding("ok", f"none, and none are promised ({text})")
        promised = f"{here.promised} promised, none usable" if here.promised else "none usable"
        return Finding("problem", f"{promised}: {text}", _mend(text))
    count, _, names = text.partition(" ")
    if here.promised is not None and int(count) < here.promised:
        message = f"{here.promised} promised, {count} visible ({names})"
        return Finding("problem", message, "nvidia-smi; keep the node away with --exclude NODE")
    return Finding("ok", f"{count} x {names}")


def _mend(cause: str) -> str:
    if "forgotten" in cause:
        return "mokd launch ... --gpus-per-node N, or srun --gpus-per-node=N"
    if "without CUDA" in cause or "install torch" in cause:
        return "pip install torch  # a build for this driver's CUDA, see https://pytorch.org"
    return "nvidia-smi; keep the node away with --exclude NODE, or set parallel.device=cpu"


def network(here: Surroundings) -> Finding:
    """NCCL's version, and the interface that the ranks would meet on."""
    ups = {path.name: path for path in Path("/sys/class/net").glob("*") if _up(path)}
    outside = [name for name in sorted(ups) if not re.match(r"lo$|docker|virbr|veth", name)]
    variable = next((v for v in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if here.environ.get(v)), None)
    if variable:
        wanted = here.environ[variable]
        chosen = _match(wanted, list(ups))
        if not chosen:
            message = f"{variable}={wanted} names no interface that is up here ({', '.join(sorted(ups))})"
            return Finding("problem", message, f"cluster.environment: {{{variable}: {(outside or ['lo'])[0]}}}")
    else:
        # NCCL's own order: InfiniBand's interfaces, then whatever is neither loopback nor a container's bridge
        chosen = sorted(outside, key=lambda name: not name.startswith("ib"))
    fabric = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    done = here.python("import torch; print(*torch.cuda.nccl.version(), sep='.')")
    nccl = f"NCCL {done.stdout.strip()}" if done.returncode == 0 else "no NCCL"
    text = f"{nccl} over {', '.join(fabric) or ', '.join(chosen[:1]) or 'loopback'}"
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        message = f"{text}; this machine's name {socket.gethostname()} has no address"
        return Finding("warning", message, f"add {socket.gethostname()} to /etc/hosts or the name service")
    return Finding("ok", text)


def _up(interface: Path) -> bool:
    try:
        return (interface / "operstate").read_text().strip() in ("up", "unknown")  # loopback says unknown
    except OSError:
        return False


def _match(wanted: str, names: list[str]) -> list[str]:
    """Interfaces by NCCL's rules: prefixes, `=` in front for exact names, `^` for all but these."""
    exclude, exact = "^" in wanted[:2], "=" in wanted[:2]
    parts = [part for part in wanted.lstrip("^=").split(",") if part]
    hit = [name for name in names if any(name == part if exact else name.startswith(part) for part in parts)]
    return sorted(set(names) - set(hit)) if exclude else sorted(hit)
