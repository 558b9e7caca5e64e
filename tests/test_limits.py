"""What a container may use: its control groups' limits, not the machine's memory and cores."""

import os
import subprocess
import sys

import pytest

import limits
import runtime
from limits import GIB


@pytest.fixture
def root(tmp_path, monkeypatch):
    """write(file, text) in a file system of our own; the machine has 64 cores and 96 GiB free."""

    def write(file, text):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    monkeypatch.setattr(limits, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(limits, "_count_gpus", lambda: 0)
    write("proc/meminfo", f"MemTotal: 1 kB\nMemAvailable:   {96 * GIB // 1024} kB")
    write("proc/self/cgroup", "0::/")
    return write


def test_without_limits_it_is_the_machine(root):
    root("sys/fs/cgroup/memory.max", "max")
    root("sys/fs/cgroup/cpu.max", "max 100000")
    assert limits.cores() == 64
    assert limits.free_memory() == 96 * GIB
    assert limits.ranks() == 12, "no more than tasks"


def test_a_container_of_version_2(root):
    """Four GiB, of which three are held, one of them files' pages; one and a half cores."""
    root("sys/fs/cgroup/memory.max", str(4 * GIB))
    root("sys/fs/cgroup/memory.current", str(3 * GIB))
    root("sys/fs/cgroup/memory.stat", f"anon 5\ninactive_file {GIB}")
    root("sys/fs/cgroup/cpu.max", "150000 100000")
    assert limits.total_memory() == 4 * GIB
    assert limits.free_memory() == 2 * GIB
    assert limits.cores() == limits.ranks() == 1


def test_the_narrowest_of_nested_groups_counts(root):
    root("proc/self/cgroup", "0::/slice/pod")
    root("sys/fs/cgroup/slice/memory.max", str(16 * GIB))
    root("sys/fs/cgroup/slice/pod/memory.max", str(32 * GIB))
    root("sys/fs/cgroup/slice/pod/cpu.max", "400000 100000")
    assert limits.total_memory() <= 16 * GIB
    assert limits.free_memory() == 16 * GIB
    assert limits.cores() == 4
    assert limits.ranks() == 2, "six GiB each"


def test_a_container_of_version_1(root):
    root("proc/self/cgroup", "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1")
    root("sys/fs/cgroup/memory/memory.limit_in_bytes", str(8 * GIB))
    root("sys/fs/cgroup/memory/memory.usage_in_bytes", str(GIB))
    root("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "200000")
    root("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert limits.free_memory() == 7 * GIB
    assert limits.cores() == 2


def test_doctor_and_batches_see_the_limit(root, monkeypatch):
    root("sys/fs/cgroup/memory.max", str(GIB))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert limits.total_memory() == GIB
    assert runtime.free_memory(runtime.torch.device("cpu")) == GIB // 2


def test_the_makefile_asks_before_anything_is_installed():
    """Plain Python without site packages is enough."""
    asked = [sys.executable, "-I", "-S", "-c"]
    code = "import sys; sys.path.insert(0, '.'); import limits; print(limits.ranks())"
    said = subprocess.run([*asked, code], capture_output=True, text=True, check=True).stdout
    assert int(said) >= 1


def test_a_process_per_gpu_that_is_shown(monkeypatch, tmp_path):
    """nvidia-smi lists all; CUDA_VISIBLE_DEVICES says which of them are ours."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'GPU 0: a\\nGPU 1: b\\nGPU 2: c\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert limits.ranks() == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert limits.ranks() == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert limits.ranks() == 2
