"""Shared memory, open files, disks and the clock."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

from launcher.doctor.finding import Finding, Level, Surroundings

MIB = 2**20
SHM_LEAST_BYTES, SHM_ENOUGH_BYTES = 512 * MIB, 4096 * MIB  # a container's default of 64 MiB ends loaders with SIGBUS
FILES_LEAST, FILES_ENOUGH = 1024, 4096
WRITE_BYTES, READ_BYTES, BLOCK_BYTES, LIMIT_SECONDS = 64 * MIB, 256 * MIB, 4 * MIB, 3.0
SLOW_MIB_PER_SECOND = 50.0
FREE_BYTES = 10 * 2**30
SKEW_SECONDS = 5.0


def shared_memory(here: Surroundings) -> Finding:
    """Room for the batches that loader processes hand over, and for NCCL between GPUs of a node."""
    try:
        space = os.statvfs(here.shm)
    except OSError as error:
        return Finding("problem", f"{here.shm}: {error.strerror}", f"mount -t tmpfs tmpfs {here.shm}")
    size = space.f_blocks * space.f_frsize
    text = f"{here.shm}: {size // MIB} MiB, {space.f_bavail * space.f_frsize // MIB} free"
    if size >= SHM_ENOUGH_BYTES:
        return Finding("ok", text)
    level: Level = "problem" if size < SHM_LEAST_BYTES else "warning"
    return Finding(level, text, f"mount -o remount,size=16G {here.shm}; in a container: --shm-size=16g")


def open_files(here: Surroundings) -> Finding:
    """The limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES_ENOUGH:
        return Finding("ok", str(soft))
    if hard == soft:  # only who set it can raise it
        mend = "raise the hard limit: --ulimit nofile=65536 of a container, LimitNOFILE of slurmd's unit"
    else:
        mend = f"cluster.setup: [ulimit -n {hard if 0 < hard < 65536 else 65536}]"
    return Finding("problem" if soft < FILES_LEAST else "warning", f"at most {soft} at once", mend)


def run_directory(here: Surroundings) -> Finding:
    """Runs can be written, fast enough, and there is room."""
    folder = here.runs.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    block, written, began = os.urandom(BLOCK_BYTES), 0, time.monotonic()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".mokd-doctor-") as file:
            while written < WRITE_BYTES and time.monotonic() - began < LIMIT_SECONDS:
                file.write(block)
                written += len(block)
            file.flush()
            os.fsync(file.fileno())
            speed = written / MIB / (time.monotonic() - began)
    except OSError as error:
        mend = "choose another folder with --root, and make sure that nodes mount it writable"
        return Finding("problem", f"{folder}: cannot be written: {error.strerror}", mend)
    free = shutil.disk_usage(folder).free
    text = f"{folder}: writes {speed:.0f} MiB/s, {free / 2**30:.0f} GiB free"
    if free < FREE_BYTES:
        return Finding("warning", f"{text}; checkpoints may not fit", "choose another folder with --root")
    if speed < SLOW_MIB_PER_SECOND:
        return Finding("warning", f"{text}: saves will be slow", "checkpoint.asynchronous: true, --root")
    return Finding("ok", text)


def data(here: Surroundings) -> Finding:
    """The data can be read from here, fast enough."""
    speeds = []
    for path in here.data:
        try:
            speeds.append((_read_speed(path), path))
        except OSError as error:
            mend = "mokd convert SRC OUT, or the file's place on this node in data.train"
            return Finding("problem", f"{path}: cannot be read: {error.strerror}", mend)
    if not speeds:
        return Finding("ok", "none named: give a configuration to have its data read")
    speed, path = min(speeds)
    text = f"{path}: reads {speed:.0f} MiB/s"
    if speed < SLOW_MIB_PER_SECOND:
        return Finding("warning", f"{text}: loading will wait", "copy the data to a faster or node-local disk")
    return Finding("ok", text)


def _read_speed(path: Path) -> float:
    """MiB/s over blocks spread through a file, past what the page cache holds of it where the system can be asked."""
    if path.is_dir():
        os.listdir(path)
        path = next((found for found in path.rglob("*") if found.is_file()), path)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        blocks = max(1, min(READ_BYTES, size) // BLOCK_BYTES)
        read, began = 0, time.monotonic()
        for index in range(blocks):
            file.seek(index * (size // blocks))
            read += len(file.read(BLOCK_BYTES))
            if time.monotonic() - began > LIMIT_SECONDS:
                break
    # a file of a few KiB says nothing of a disk's speed, only that it can be read
    return read / MIB / (time.monotonic() - began) if size >= BLOCK_BYTES else float("inf")


def clock(here: Surroundings) -> Finding:
    """This machine's clock agrees with the controller's: munge refuses what is minutes off, records mix times."""
    done = here.run("sdiag", seconds=10.0)
    told = next((part for line in done.stdout.splitlines() if "output at" in line for part in line.split("(")[1:]), "")
    if done.returncode or not told.rstrip(")").isdigit():
        return Finding("ok", f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}; no SLURM controller to compare it with")
    skew = time.time() - int(told.rstrip(")"))
    text = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the SLURM controller's"
    if abs(skew) <= SKEW_SECONDS:
        return Finding("ok", f"within {SKEW_SECONDS:.0f} s of the SLURM controller's")
    return Finding("problem", text, "systemctl restart chronyd  # or ntpd, as root")
