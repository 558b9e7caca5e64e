"""The run folder, its DONE records, atomic writes, seeds, ranks and progress: what every stage needs and none owns.

A unit of work (one task, one left-out set) is finished when its folder holds DONE.json, written last. Ranks started by
torchrun take units from one shared counter, longest first, so they change how soon a run ends and nothing else.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save
from tqdm import tqdm

import config
import methods
from config import Config, UserError

# What a stage's output depends on. Keys that only choose *which* units are worked on are left out.
_DATA = ["seed", "dtype", "model", "data"]
_ADAPTER = ["model.name", "model.revision", "model.rank", "model.alpha", "model.modules"]
DEPENDS = {
    "collect": ["seed", "dtype", *_ADAPTER, "data", "collect"],
    "prompts": [
        "seed",
        "model.name",
        "model.revision",
        "data",
        "generator.encoder",
        "generator.max_length",
    ],
    "generator": [*_DATA, "collect", "generator"],
    "rewards": [
        *_DATA,
        "collect",
        "generator",
        "strategies.ttl_threshold",
        "strategies.ttl_lambda",
        "strategies.mix",
        "policy.folds",
        "evaluate.metric",
    ],
    "policy": [*_DATA, "collect", "generator", "strategies", "policy", "evaluate.metric"],
    "adapt": [*_DATA, "collect", "generator", "strategies", "policy", "evaluate.metric"],
    "align": [*_DATA, "collect", "generator", "align"],
    "baselines": [*_DATA, "collect", "baselines"],
    "evaluate": [
        *_DATA,
        "data.skip_test",
        "collect",
        "generator",
        "strategies",
        "policy",
        "evaluate",
    ],
}
# What a method's adapters and scores depend on besides.
METHOD_DEPENDS = {
    **dict.fromkeys(methods.BASELINES, ["baselines"]),
    "no_meta": ["baselines.sft"],
    **dict.fromkeys(methods.ALIGNED, ["align"]),
}
# Keys that choose which units are worked on; they change no unit, unless named above.
_CHOICES = (
    "data.test_tasks",
    "data.targets",
    "data.skip_test",
    "evaluate.methods",
    "generator.save_every",
)


@dataclass
class Run:
    """One run folder as seen by one rank.

    Attributes:
        path: the folder. cfg: the validated configuration. rank, world: of torchrun, 0 and 1 without it.
        device, dtype: of the frozen base model.
    """

    path: Path
    cfg: Config
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    store: object = None
    quiet: bool = False
    cache: dict = field(
        default_factory=dict
    )  # the base model, tokenizer and tasks, loaded once per process
    _deals: int = 0

    def log(self, text: str, every_rank: bool = False) -> None:
        """Print a line and append it to log.txt (rank 0, unless `every_rank`)."""
        if self.rank and not every_rank:
            return
        line = f"[{self.rank}] {text}" if self.world > 1 and every_rank else text
        if not self.quiet:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        with open(self.path / "log.txt", "a") as f:
            f.write(f"{datetime.datetime.now():%H:%M:%S} {line}\n")

    def metric(self, **row) -> None:
        """Append one flat object to metrics.jsonl; a single write, so that ranks do not tear each other's lines."""
        if self.cfg.task:  # the curves are the run's
            return
        with open(self.path / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def track(self, items, label: str, total: int | None = None):
        """Iterate with a progress bar on a terminal, or a line with an ETA every 15 s in a log."""
        total = len(items) if total is None else total
        bar = sys.stderr.isatty() and self.rank == 0
        start = last = time.monotonic()
        for i, item in enumerate(
            tqdm(items, desc=label, total=total, leave=False) if bar else items
        ):
            yield item
            if bar:
                continue
            now = time.monotonic()
            if now - last > 15 and i + 1 < total:
                last = now
                eta = (now - start) / (i + 1) * (total - i - 1)
                self.log(
                    f"{label} {i + 1}/{total} {100 * (i + 1) / total:.0f}% | eta {eta / 60:.1f}m",
                    True,
                )

    def deal(self, units: list):
        """Yield the units this rank should do. Units are given longest first; every rank passes the same list."""
        self._deals += 1
        if self.store is None:
            yield from units
            return
        while (i := self.store.add(f"deal/{self._deals}", 1) - 1) < len(units):
            yield units[i]
        self.barrier()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def finished(self, folder: str, stage: str, method: str = "", redo: bool = True) -> bool:
        """Is this unit (of a method, where its stage makes several) done under the present configuration?

        Args: redo: may `overwrite` clear it? Not where a stage only reads it.
        Raises: UserError: it is done under another one; the changed keys are named.
        """
        path = self.path / folder
        if not (path / "DONE.json").is_file():
            return False
        made = read_json(path / "DONE.json").get("config", {})
        now = fingerprint(self.cfg, stage, method, path.name)
        changed = sorted(
            k for k in made | now if made.get(k) != now.get(k) and (k in now or k not in _CHOICES)
        )
        if not changed:
            return True
        if self.cfg.overwrite and redo:
            shutil.rmtree(path)
            return False
        shown = "; ".join(f"{k}: {made.get(k)!r} -> {now.get(k)!r}" for k in changed[:6])
        how = "the old values, or overwrite=true to redo it" if redo else "or the old values"
        raise UserError(
            f"{path} was made with another configuration ({shown}); use another folder (run=...), {how}"
        )

    def finish(
        self, folder: str, stage: str, started: float, method: str = "", ranks: int = 1, **facts
    ) -> None:
        """Record a unit as done: configuration, seconds of all the ranks that worked on it, and whatever the stage
        wants kept."""
        write_json(
            self.path / folder / "DONE.json",
            {
                "stage": stage,
                "seconds": round(ranks * (time.monotonic() - started), 2),
                **facts,
                **({"ranks": ranks} if ranks > 1 else {}),
                **(
                    {"own_task": True} if self.cfg.task else {}
                ),  # no part of what the run's own tasks cost
                "config": fingerprint(self.cfg, stage, method, Path(folder).name),
            },
        )


def fingerprint(cfg: Config, stage: str, method: str = "", unit: str = "") -> dict:
    """The flat keys a stage's output depends on.

    Of the maps by task only the entries of the meta-training tasks and of `unit`, so that a run takes in tasks it was
    not told of when it began; of a user's file its content counts.
    """
    keys = DEPENDS[stage] + METHOD_DEPENDS.get(method, [])
    out = {
        k: v
        for k, v in config.flatten(cfg.model_dump()).items()
        if (k not in _CHOICES or k in keys) and any(k == p or k.startswith(p + ".") for p in keys)
    }
    for k in out.keys() & {"data.jsonl", "data.hub", "data.columns"}:
        out[k] = {
            t: v if k == "data.columns" else _content(v)
            for t, v in out[k].items()
            if t == unit or t in cfg.data.train_tasks
        }
    return out


def _content(source: str) -> str:
    """What a file, a {split} pair of files or a folder holds, eight digits each; the name itself of what is none."""
    files = (
        [Path(source.replace("{split}", s)) for s in ("train", "test")]
        if "{split}" in source
        else [Path(source)]
    )
    if files[0].is_dir():
        files = sorted(f for f in files[0].rglob("*") if f.is_file())
    return (
        " ".join(_digest(f, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())
        or source
    )


@functools.cache
def _digest(path: Path, changed: int, size: int) -> str:
    """Asked for each time a unit is looked up: read again only where the file has changed."""
    return sha256(path)[:8]


def open_run(cfg: Config, stage: str, argv: list[str]) -> Run:
    """Open (or make) the run folder, join torchrun's ranks, choose device and dtype.

    Raises: UserError: the folder cannot be written, or another process works in it.
    """
    path = Path(cfg.run)
    rank, world, store = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), None
    device = _pick_device(cfg.device)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock")
        if rank == 0:
            lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"run={path}: another process is working in this folder; wait for it, or use run=..."
        ) from None
    except OSError as e:
        raise UserError(
            f"run={path}: cannot write there ({e.strerror}); name a writable folder"
        ) from None
    local = int(os.environ.get("LOCAL_RANK", rank))
    if device == "cuda" and local >= torch.cuda.device_count():
        raise UserError(
            f"rank {local} finds {torch.cuda.device_count()} GPU(s): start one rank per GPU (make … NPROC="
            f"{torch.cuda.device_count()}, torchrun --nproc-per-node), or use device=cpu"
        )
    if world > 1:
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # the agent's store survives a restart, and with it what the dead ranks wrote; the count is each agent's
            # own, so several nodes set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (slurm.sh) and get a new store instead
            store = dist.PrefixStore(
                f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
            )
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        if device == "cuda":
            torch.cuda.set_device(local)
            # torchrun's one thread a rank suits ranks that compute on the CPU
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // beside))
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            store=store,
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(days=2),
            device_id=torch.device("cuda", local) if device == "cuda" else None,
        )
        if device == "cpu":
            _pin(local, beside)
    run = Run(path, cfg, rank, world, device, _pick_dtype(cfg.dtype, device), store)
    run.cache["lock"] = lock  # held as long as the run lives
    if rank == 0:
        _describe(run, stage, argv)
    return run


def _describe(run: Run, stage: str, argv: list[str]) -> None:
    if (
        not run.cfg.task and stage not in config.ASIDE
    ):  # what made the results, not what was done with them
        if not (
            run.path / "config.yaml"
        ).exists():  # a command that is refused must not redescribe the folder
            write_config(run)
        with open(run.path / "command.txt", "a") as f:
            f.write("python degaml.py " + " ".join(argv) + "\n")
        write_json(run.path / "env.json", environment(run))
    run.log(
        f"{run.cfg.name}: stage {stage} | {run.device} {str(run.dtype)[6:]} | {run.world} rank(s) x "
        f"{torch.get_num_threads()} thread(s) | run folder {run.path}"
    )
    with open(run.path / "log.txt", "a") as f:
        f.write("not the default: " + json.dumps(config.differences(run.cfg)) + "\n")


def record_stage(run: Run, name: str, took: float, summary: dict) -> None:
    """Keep what a stage took in stages/<name>.json, and say it.

    Seconds are the sum over the records of its finished units, on all ranks, so that neither a rerun nor an
    interruption changes them; `took` counts where a stage has no units.
    """
    seconds = 0.0
    for done in run.path.glob("**/DONE.json"):
        record = read_json(done)
        if record["stage"] == name and not record.get("own_task"):
            seconds += record["seconds"]
    path = run.path / f"stages/{name}.json"
    before = read_json(path)["memory_gib"] if path.is_file() and not run.cfg.overwrite else 0.0
    memory = max(before, peak_memory(run.device))
    write_json(path, {"seconds": round(seconds or took, 1), "memory_gib": memory, **summary})
    shown = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in summary.items()]
    run.log(f"stage {name}: {took:.0f} s, {memory:.1f} GiB " + " ".join(shown))


def write_config(run: Run) -> None:
    """Keep the resolved configuration beside what it made."""
    write_text(run.path / "config.yaml", yaml.safe_dump(run.cfg.model_dump(), sort_keys=False))


def environment(run: Run) -> dict:
    """Versions and machine, for provenance; no host name, no path."""
    import peft
    import transformers

    cpu = next(
        (
            line.split(":")[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        "",
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "ranks": run.world,
        "device": run.device,
        "dtype": str(run.dtype)[6:],
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def to_device(x: torch.Tensor, device) -> torch.Tensor:
    """A CPU tensor on its way; from pinned memory the copy to a GPU does not stop the host."""
    return (
        x.pin_memory().to(device, non_blocking=True)
        if torch.device(device).type == "cuda"
        else x.to(device)
    )


def peak_memory(device: str) -> float:
    """GiB this process has held at most: allocated on its GPU since the last call; on a CPU resident since it began."""
    if device != "cuda":
        kilobyte = 1 if sys.platform == "darwin" else 1024  # the unit differs
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 2**30, 2)
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(most, 2)


def _pick_device(wish: str) -> str:
    have = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wish == "auto":
        return next(d for d in have if have[d])
    if not have[wish]:
        raise UserError(
            f"device={wish}: not available here; legal: {[d for d in have if have[d]]} or auto"
        )
    return wish


def _pick_dtype(wish: str, device: str) -> torch.dtype:
    if wish != "auto":
        return getattr(torch, wish)
    flags = " ".join(line for line in _lines("/proc/cpuinfo") if line.startswith("flags"))
    native = device == "cuda" or "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if native else torch.float32


def _pin(rank: int, local_world: int) -> None:
    """A rank's own share of the cores (measured 1.5x faster than two ranks that migrate), and no more threads than
    cores: a thread that waits for a core its neighbour spins on made small steps ten times slower."""
    with contextlib.suppress(AttributeError, OSError):
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // local_world)
        first = rank * share % len(cores)
        os.sched_setaffinity(0, cores[first : first + share])
        torch.set_num_threads(min(torch.get_num_threads(), share))


def seed_for(*parts) -> int:
    """A stable 63-bit seed from names and numbers, the same on every rank and machine."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng_for(*parts) -> np.random.Generator:
    return np.random.default_rng(seed_for(*parts))


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all: a temporary file in the same folder, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def read_json(path: Path):
    """Raises: UserError: missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that makes it") from None
    except ValueError as e:
        raise UserError(f"{path}: damaged JSON ({e}); delete it and run the stage again") from None


def read_jsonl(path: Path) -> list[dict]:
    """All whole lines; a last line cut short by a kill is dropped, damage elsewhere is an error."""
    # split at newlines alone: other separators may stand inside a text; damaged bytes become damaged JSON
    lines = Path(path).read_text(errors="replace").rstrip("\n").split("\n")
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if i < len(lines) - 1:
                raise UserError(
                    f"{path}:{i + 1}: damaged JSON line; delete the file and run the stage again"
                ) from None
    return rows


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # through bytes: the library's own writer reports a full disk by an error type of its own, and makes files 0600
    tmp.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata))
    os.replace(tmp, path)


def save_array(path: Path, array: np.ndarray) -> None:
    """npy, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(
        tmp, "wb"
    ) as f:  # numpy's own writer reports a full disk by an error without a number
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(array))
        f.write(np.ascontiguousarray(array).data)
    os.replace(tmp, path)


def load_array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    """Raises: UserError: missing, truncated or corrupt."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the stage that makes it")
    try:
        return np.load(path, mmap_mode=mmap_mode)
    except (ValueError, OSError, EOFError) as e:
        raise UserError(
            f"{path}: truncated or corrupt ({str(e)[:80]}); delete its folder and run the same command "
            "again"
        ) from None


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Raises: UserError: missing, truncated or corrupt."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; run the stage that makes it")
    try:
        return load_file(path)
    except Exception as e:  # safetensors raises its own types, none of them public
        raise UserError(
            f"{path}: truncated or corrupt safetensors file ({str(e)[:80]}); delete its folder "
            "and run the same command again"
        ) from None


def sha256(path: Path) -> str:
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()
