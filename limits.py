"""What this process may use of its machine: cores, and main memory.

A container sees the machine's cores and memory, and is stopped or slowed at the limits of its
control groups. Both versions of control groups are read, and the limits of all outer groups.

The Makefile asks here before anything is installed, so this needs nothing but Python.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
GIB = 2**30
# Main memory that a rank should find, and ranks that find a unit of work: one of the twelve tasks.
RANK_MEMORY = 6 * GIB
MOST_RANKS = 12
# Without Linux's count of what is free: a size that any machine has.
ANY_MACHINE = 4 * GIB


def cores() -> int:
    """Whole cores that this process may keep busy, at least one."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))

    for group in _groups("cpu"):
        quota, period = _cpu_quota(group)
        if quota > 0:
            count = min(count, quota // period)
    return max(1, count)


def total_memory() -> int:
    """Bytes of main memory that this process may hold, if nothing else did."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for group in _groups("memory"):
        limit = _memory_limit(group)
        if limit is not None:
            total = min(total, limit)
    return total


def free_memory() -> int:
    """Bytes of main memory that this process and its siblings may still take."""
    found = re.search(r"MemAvailable:\s*(\d+)", _read(ROOT / "proc/meminfo"))
    free = ANY_MACHINE
    if found:
        free = 1024 * int(found[1])

    for group in _groups("memory"):
        limit = _memory_limit(group)
        if limit is not None:
            free = min(free, limit - _memory_held(group))
    return max(0, free)


def ranks() -> int:
    """How many processes should work together here: one per GPU, else one per core.

    Without a GPU each should find `RANK_MEMORY`.
    """
    gpus = _count_gpus()
    if gpus:
        return gpus
    fitting = free_memory() // RANK_MEMORY
    return max(1, min(cores(), fitting, MOST_RANKS))


def _count_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")  # nvidia-smi passes over it
    if shown is not None:
        return len([name for name in shown.split(",") if name.strip() not in ("", "-1")])
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return len(re.findall(r"^GPU", listed.stdout, re.M))


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups this process is in, from its own to the outermost.

    Args: controller: cpu or memory.
    """
    mount = ROOT / "sys/fs/cgroup"
    for line in _read(ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one tree for all controllers
            top = mount
        elif controller in controllers.split(","):
            top = mount / controller
        else:
            continue

        # A container's own group is often the outermost folder it sees, whatever its path says.
        # Folders that are not there are read as without a limit.
        names = [name for name in path.split("/") if name not in ("", "..")]
        for depth in range(len(names), -1, -1):
            yield top.joinpath(*names[:depth])


def _cpu_quota(group: Path) -> tuple[int, int]:
    """(microseconds of cores in a period, microseconds of the period); (0, 1) without a limit."""
    words = _read(group / "cpu.max").split()  # version 2: "max 100000" or "200000 100000"
    if not words:
        words = _read(group / "cpu.cfs_quota_us").split()  # version 1: -1 is no limit
        words += _read(group / "cpu.cfs_period_us").split()
    if len(words) != 2 or words[0] in ("max", "-1"):
        return 0, 1
    return int(words[0]), int(words[1])


def _memory_limit(group: Path) -> int | None:
    """Bytes; None without a limit. Version 1 writes a huge number for none."""
    text = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
    if text in ("", "max"):
        return None
    return int(text)


def _memory_held(group: Path) -> int:
    """Bytes the group holds, without the files' pages that the system would give up first."""
    text = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
    held = int(text or 0)
    # total_: version 1, with the groups inside this one
    statistics = _read(group / "memory.stat")
    found = re.search(r"^total_inactive_file (\d+)", statistics, re.M)
    if found is None:
        found = re.search(r"^inactive_file (\d+)", statistics, re.M)
    if found:
        held -= int(found[1])
    return held


def _read(path: Path) -> str:
    """A small file's text; "" where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
