"""The run folder: units of work and their records, whole files, ranks, seeds and progress.

A unit of work is one task or one left-out set, of one method. It is finished when its folder holds
DONE.json, which is written last. Ranks started by torchrun take units from one shared counter,
longest first, so that they change how soon a run ends and nothing else.

A process may be killed at any moment. A file is written under another name and then renamed, so it
is there whole or not at all. The same command then continues: it does the unfinished unit again,
a generator from its last save.
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
from collections.abc import Iterator
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
import limits
import methods
from config import Config, UserError

# The keys that a stage's output depends on, by section or by name.
_BASE = ["model.name", "model.revision"]
_ADAPTER = [*_BASE, "model.rank", "model.alpha", "model.modules"]
_EXECUTION = ["strategies.ttl_threshold", "strategies.ttl_lambda", "strategies.mix"]
_DATA = ["seed", "dtype", "model", "data"]
_GENERATED = [*_DATA, "collect", "generator"]
_SEARCHED = [*_GENERATED, "strategies", "policy"]
_STUDY = [
    "study.further_tasks",
    "study.around_steps",
    "study.development_tasks",
    "study.development_examples",
    "study.losses",
    "study.steps",
    "study.learning_rate",
    "study.batch_size",
]
DEPENDS = {
    # a token's width does not matter to a checkpoint
    "collect": ["seed", "dtype", "data", "collect", *_ADAPTER],
    "prompts": [
        "seed",
        "data",
        *_BASE,
        "generator.encoder",
        "generator.condition",
        "generator.max_length",
    ],
    "generator": _GENERATED,
    "align": [*_GENERATED, "align"],
    "policy": [*_SEARCHED, "evaluate.metric"],
    "adapt": [*_SEARCHED, "evaluate.metric"],
    "baselines": [*_DATA, "collect", "baselines"],
    "evaluate": [*_SEARCHED, "data.skip_test", "evaluate"],
    "study": [
        *_GENERATED,
        "baselines.union",
        "baselines.maml",
        "strategies",
        "data.skip_test",
        "evaluate",
        *_STUDY,
    ],
    # what a strategy makes of a support set, whoever proposed it
    "rewards": [*_GENERATED, *_EXECUTION, "policy.folds", "evaluate.metric"],
}
# What a method's adapters and scores depend on besides.
METHOD_DEPENDS = {
    **dict.fromkeys(methods.BASELINES, ["baselines"]),
    "no_meta": ["baselines.sft"],
    **dict.fromkeys(methods.ALIGNED, ["align"]),
}
# Keys that choose which units are worked on. They change no unit, unless DEPENDS names them.
_CHOICES = (
    "data.test_tasks",
    "data.targets",
    "data.skip_test",
    "evaluate.methods",
    "generator.save_every",
)
_LOG_EVERY_S = 15
# The choice of `dtype: auto`: bfloat16 where its products are so many times as fast as float32's,
# in a measurement of so many seconds on up to so many tokens. A GPU needs many, or it only waits.
CLEARLY_FASTER = 1.2
MEASURE_S = 0.1
FEWEST_TOKENS = 16
MOST_TOKENS = {"cpu": 128, "cuda": 4096}
# Hidden and intermediate width: those of SmolLM2-135M, and the widest that is measured.
USUAL_WIDTHS = (576, 1536)
WIDEST = 2048


@dataclass
class Run:
    """One run folder as seen by one rank.

    Attributes:
        path: the folder.
        cfg: the validated configuration.
        rank, world: of torchrun; 0 and 1 without it.
        device, dtype: of the frozen base model.
        store: what the ranks count units in; None for a single rank.
        auto_dtype: what `dtype: auto` means in this folder, of `choose_dtype`; {} if never asked.
        quiet: log to the file alone.
        cache: base model, encoder and tasks, loaded once per process.
    """

    path: Path
    cfg: Config
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    store: dist.Store | None = None
    auto_dtype: dict = field(default_factory=dict)
    quiet: bool = False
    cache: dict = field(default_factory=dict)
    _deals: int = 0

    def log(self, text: str, every_rank: bool = False) -> None:
        """Print a line and append it to log.txt: on rank 0, or on every rank."""
        if self.rank and not every_rank:
            return
        line = f"[{self.rank}] {text}" if self.world > 1 and every_rank else text
        if not self.quiet:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        with open(self.path / "log.txt", "a") as f:
            f.write(f"{datetime.datetime.now():%H:%M:%S} {line}\n")

    def metric(self, **row) -> None:
        """Append one flat object to metrics.jsonl. One write, so ranks do not tear lines apart."""
        if self.cfg.task:  # the curves are of the run, not of what is later done with it
            return
        with open(self.path / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def track(self, items, label: str) -> Iterator:
        """Iterate with a progress bar on a terminal, or with a line and an ETA now and then."""
        if sys.stderr.isatty() and self.rank == 0:
            yield from tqdm(items, desc=label, leave=False)
            return

        total = len(items)
        began = time.monotonic()
        logged = began
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - logged < _LOG_EVERY_S or done == total:
                continue
            logged = now
            eta = (now - began) / done * (total - done)
            self.log(f"{label} {done}/{total} {done / total:.0%} | eta {eta / 60:.1f}m", True)

    def deal(self, units: list) -> Iterator:
        """Yield the units that this rank should do.

        Args: units: longest first; every rank passes the same list.
        """
        self._deals += 1
        if self.store is None:
            yield from units
            return
        counter = f"deal/{self._deals}"
        while True:
            taken = self.store.add(counter, 1)  # counts from 1, one number per call
            if taken > len(units):
                break
            yield units[taken - 1]
        self.barrier()

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.world > 1:
            dist.barrier()

    def finished(self, folder: str, stage: str, method: str = "", redo: bool = True) -> bool:
        """Is this unit (of a method, where its stage makes several) done as configured now?

        Args: redo: may `overwrite` clear it? Not where a stage only reads it.
        Raises: UserError: it is done under another configuration; the changed keys are named.
        """
        path = self.path / folder
        if not (path / "DONE.json").is_file():
            return False

        made = read_json(path / "DONE.json").get("config", {})
        now = fingerprint(self.cfg, stage, method, path.name)
        changed = []
        for key in sorted(made | now):
            only_a_choice = key in _CHOICES and key not in now
            if made.get(key) != now.get(key) and not only_a_choice:
                changed.append(key)
        if not changed:
            return True

        if self.cfg.overwrite and redo:
            shutil.rmtree(path)
            return False
        shown = "; ".join(f"{key}: {made.get(key)!r} -> {now.get(key)!r}" for key in changed[:6])
        how = "the old values, or overwrite=true to redo it" if redo else "or the old values"
        raise UserError(
            f"{path} was made with another configuration ({shown}); "
            f"use another folder (run=...), {how}"
        )

    def finish(
        self, folder: str, stage: str, began: float, method: str = "", ranks: int = 1, **facts
    ) -> None:
        """Record a unit as done.

        Args:
            began: time.monotonic() when it was begun.
            ranks: how many worked on it together; the record counts the seconds of all.
            facts: whatever the stage wants kept.
        """
        record = {"stage": stage, "seconds": round(ranks * (time.monotonic() - began), 2), **facts}
        if ranks > 1:
            record["ranks"] = ranks
        if self.cfg.task:
            record["own_task"] = True  # it is no part of what the run cost
        record["config"] = fingerprint(self.cfg, stage, method, Path(folder).name)
        write_json(self.path / folder / "DONE.json", record)


def fingerprint(cfg: Config, stage: str, method: str = "", unit: str = "") -> dict:
    """The flat keys that a stage's output depends on, with their values.

    Of the maps by task only the entries of the training tasks and of `unit` count, so that a run
    takes in tasks that it was not told of when it began. Of a user's file its content counts.
    """
    wanted = DEPENDS[stage] + METHOD_DEPENDS.get(method, [])
    # what a written answer earns depends on how long it may be
    if "evaluate.metric" in wanted and cfg.evaluate.metric in ("strict", "lenient"):
        wanted = [*wanted, "evaluate.max_new_tokens"]
    found = {}
    for key, value in config.flatten(cfg.model_dump()).items():
        named = [name for name in wanted if key == name or key.startswith(name + ".")]
        if named and (key not in _CHOICES or key in wanted):
            found[key] = value

    tasks = {unit, *cfg.data.train_tasks}
    for key in found.keys() & {"data.jsonl", "data.hub"}:
        found[key] = {task: _content(at) for task, at in found[key].items() if task in tasks}
    if "data.columns" in found:
        columns = found["data.columns"].items()
        found["data.columns"] = {task: names for task, names in columns if task in tasks}
    return found


def _content(source: str) -> str:
    """Eight digits for the content of each file behind a source; its own name if there is none.

    Args: source: a file, a pair of files with {split} in the name, a folder, or a hub id.
    """
    splits = ("train", "test") if "{split}" in source else ("",)
    files = [Path(source.replace("{split}", split)) for split in splits]
    if files[0].is_dir():
        files = sorted(files[0].rglob("*"))
    digests = []
    for file in files:
        if file.is_file():
            facts = file.stat()
            digests.append(_digest(file, facts.st_mtime_ns, facts.st_size))
    return " ".join(digests) or source


@functools.cache
def _digest(path: Path, changed: int, size: int) -> str:
    """Asked for each time a unit is looked up, so a file is read again only when changed."""
    return sha256(path)[:8]


def open_run(cfg: Config, stage: str, argv: list[str]) -> Run:
    """Open (or make) the run folder, join torchrun's ranks, choose device and dtype.

    Raises: UserError: the folder cannot be written, or another process works in it.
    """
    path = Path(cfg.run)
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = _pick_device(cfg.device)
    lock = _lock_folder(path, rank)
    # torch starts a thread for each core of the machine; a container may have fewer
    if limits.cores() < torch.get_num_threads():
        torch.set_num_threads(limits.cores())
    store = None
    if world > 1:
        store, rank, world = _join_ranks(rank, world, device)

    settled = _settle_dtype(cfg, path, device, rank, store)
    dtype = getattr(torch, settled["dtype"])
    run = Run(path, cfg, rank, world, device, dtype, store, auto_dtype=settled["auto"])
    run.cache["lock"] = lock  # held as long as the run lives
    if rank == 0:
        _describe(run, stage, argv)
    return run


def _lock_folder(path: Path, rank: int) -> FileLock:
    """Make the folder; rank 0 locks it. The system lets the lock go when the process ends."""
    lock = FileLock(path / ".lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"run={path}: another process is working in this folder; wait for it, or use run=..."
        ) from None
    except OSError as error:
        raise UserError(
            f"run={path}: cannot write there ({error.strerror}); name a writable folder"
        ) from None
    return lock


def _join_ranks(rank: int, world: int, device: str) -> tuple[dist.Store, int, int]:
    """Join the ranks that torchrun started. Returns: (their store, this rank, their number)."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    gpus = torch.cuda.device_count() if device == "cuda" else 0

    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent's store outlives a restart, and so do the dead ranks' counts in it. Its number
        # of restarts is known to one agent only: several nodes set
        # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (slurm.sh) and get a new store instead.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt {attempt}", store)

    # ranks may share a GPU: a small model leaves it idle while kernels are launched
    shared = beside > gpus
    gpu = None
    if device == "cuda":
        gpu = torch.device("cuda", local % gpus)
        torch.cuda.set_device(gpu)
        # torchrun gives a rank one thread, which suits ranks that compute on the CPU
        torch.set_num_threads(max(1, limits.cores() // beside))
    dist.init_process_group(
        # NCCL wants a GPU for each rank
        "gloo" if shared else "nccl",
        store=store,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(days=2),  # ranks wait for the longest unit of another
        device_id=None if shared else gpu,
    )
    if device == "cpu":
        _pin(local, beside)
    return store, rank, world


def _describe(run: Run, stage: str, argv: list[str]) -> None:
    """Say what begins, and keep how the results were made."""
    kept = _recorded_choice(run.path) != {}
    makes_results = not run.cfg.task and stage not in config.ASIDE
    if makes_results:
        # a command that is refused later must not describe the folder anew
        if not (run.path / "config.yaml").exists():
            write_config(run)
        with open(run.path / "command.txt", "a") as f:
            f.write("python degaml.py " + " ".join(argv) + "\n")
        write_json(run.path / "env.json", environment(run))
    run.log(
        f"{run.cfg.name}: stage {stage} | {run.device} {_dtype_name(run)} | {run.world} rank(s) x "
        f"{torch.get_num_threads()} thread(s) | run folder {run.path}"
    )
    if run.cfg.dtype == "auto":
        run.log(_explain_dtype(run, kept))
    with open(run.path / "log.txt", "a") as f:
        f.write("not the default: " + json.dumps(config.differences(run.cfg)) + "\n")


def _explain_dtype(run: Run, kept: bool) -> str:
    """A line that says why `dtype: auto` is what it is. Args: kept: from when the folder began."""
    parts = [f"dtype auto: {_dtype_name(run)}"]
    rates = [f"{name} {rate:.0f}" for name, rate in run.auto_dtype["gflops"].items()]
    if rates:
        parts.append("measured GFLOP/s: " + ", ".join(rates))
    if kept:
        parts.append("as when this run folder began")
    return " | ".join(parts)


def record_stage(run: Run, name: str, took: float, summary: dict) -> None:
    """Keep what a stage took in stages/<name>.json, and say it.

    Its seconds are those of its finished units on all ranks. So neither a rerun nor an interruption
    changes them. A stage without units is counted by `took`.
    """
    seconds = 0.0
    for path in run.path.glob("**/DONE.json"):
        record = read_json(path)
        if _stage_of(path, record) == name and not record.get("own_task"):
            seconds += record["seconds"]

    path = run.path / f"stages/{name}.json"
    memory = peak_memory(run.device)
    if path.is_file() and not run.cfg.overwrite:
        memory = max(memory, read_json(path)["memory_gib"])  # a rerun that skips needs less
    write_json(path, {"seconds": round(seconds or took, 1), "memory_gib": memory, **summary})

    shown = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in summary.items()]
    run.log(f"stage {name}: {took:.0f} s, {memory:.1f} GiB {' '.join(shown)}")


def _stage_of(path: Path, record: dict) -> str:
    """The stage that made a unit, from its DONE.json."""
    method = path.parent.parent.name
    if record["stage"] == "adapt" and method in methods.BASELINES:
        return "baselines"
    return {"prompts": "generator"}.get(record["stage"], record["stage"])


def write_config(run: Run) -> None:
    """Keep the resolved configuration beside what it made."""
    write_text(run.path / "config.yaml", yaml.safe_dump(run.cfg.model_dump(), sort_keys=False))


def environment(run: Run) -> dict:
    """Versions and machine, for provenance; no host name, no path."""
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": limits.cores(),
        "ranks": run.world,
        "device": run.device,
        "dtype": _dtype_name(run),
        "auto_dtype": run.auto_dtype,
    }


def _dtype_name(run: Run) -> str:
    return str(run.dtype).removeprefix("torch.")


def _cpu_name() -> str:
    """What the first processor calls itself, its family and model; "" where nothing says so.

    A cloud gives processors of different speed one name: family and model tell them apart.
    """
    facts = {}
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        for line in first.splitlines():
            field_name, _, value = line.partition(":")
            facts[field_name.strip()] = value.strip()
    if "model name" not in facts:
        return ""
    name = facts["model name"]
    if "cpu family" in facts:
        name += f" family {facts['cpu family']} model {facts['model']}"
    return name


def refuse_missing(found: dict) -> None:
    """Raises: ValueError: weights that a model's files lack; transformers makes random ones.

    Args: found: what `from_pretrained` says with output_loading_info=True.
    """
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """A CPU tensor on its way; from pinned memory the copy to a GPU does not stop the host."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still take: its GPU's, or its share of main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return limits.free_memory() // ranks


def peak_memory(device: str) -> float:
    """GiB that this process has held at most.

    On a GPU: allocated there since the last call. On a CPU: resident since the process began.
    """
    if device == "cuda":
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, else KiB
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(most / 2**30, 2)


def _pick_device(wish: str) -> str:
    """`auto`: the first of cuda, mps and cpu that is there. Raises: UserError."""
    have = ["cpu"]
    if torch.backends.mps.is_available():
        have.insert(0, "mps")
    if torch.cuda.is_available():
        have.insert(0, "cuda")
    if wish == "auto":
        return have[0]
    if wish not in have:
        raise UserError(f"device={wish}: not available here; legal: {have} or auto")
    return wish


def _settle_dtype(cfg: Config, path: Path, device: str, rank: int, store) -> dict:
    """The base model's dtype: {"dtype": its name, "auto": what `dtype: auto` means here}.

    Rank 0 decides for all ranks. A run folder keeps what it chose when it began: its units must not
    be made in two dtypes, and another machine must be able to continue it.
    """
    if rank:
        return json.loads(store.get("dtype"))  # waits for rank 0

    auto = _recorded_choice(path)
    dtype = cfg.dtype
    if dtype == "auto":
        auto = auto or choose_dtype(cfg, device)
        dtype = auto["dtype"]
    settled = {"dtype": dtype, "auto": auto}
    if store is not None:
        store.set("dtype", json.dumps(settled))
    return settled


def _recorded_choice(path: Path) -> dict:
    """What `choose_dtype` returned when this run folder began; {} if it was not asked."""
    file = path / "env.json"
    if not file.is_file():
        return {}
    env = read_json(file)
    # an older folder names only what it computed in
    if "auto_dtype" not in env and "dtype" in env:
        return {"dtype": env["dtype"], "gflops": {}}
    return env.get("auto_dtype", {})


def choose_dtype(cfg: Config, device: str) -> dict:
    """What `dtype: auto` means on this machine, by a measurement of a tenth of a second.

    bfloat16 costs precision, so it has to be clearly faster than float32. A flag of the processor
    does not tell: some have its instructions and run them at half of float32's rate.

    Returns: {"dtype": name, "gflops": {name: measured rate of the model's matrix products}}.
    """
    if device == "mps":
        return {"dtype": "float32", "gflops": {}}

    # float16 is measured for the record and never chosen. Its gradients need a scaled loss: what
    # is below 6e-8 becomes zero. States above 65,504, which some base models have, become infinite.
    names = ["float32", "float16"]
    # an older GPU emulates bfloat16, at the cost of other operations than the one measured
    if device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        names.append("bfloat16")
    rates = measure_rates(names, device, *_model_widths(cfg))

    chosen = "float32"
    if rates.get("bfloat16", 0) >= CLEARLY_FASTER * rates["float32"]:
        chosen = "bfloat16"
    return {"dtype": chosen, "gflops": rates}


def _model_widths(cfg: Config) -> tuple[int, int]:
    """(hidden, intermediate) width of the base model, or usual ones where they are not known yet.

    Only what is on this machine is read: a hub that cannot be reached answers after many seconds.
    """
    from transformers import AutoConfig

    try:
        shapes = AutoConfig.from_pretrained(
            cfg.model.name, revision=cfg.model.revision, local_files_only=True
        )
        text = shapes.get_text_config()
        widths = text.hidden_size, text.intermediate_size
    except Exception:  # a faulty model is reported where it is loaded
        return USUAL_WIDTHS
    return min(widths[0], WIDEST), min(widths[1], WIDEST)


def measure_rates(names: list[str], device: str, width: int, inner: int) -> dict[str, float]:
    """GFLOP/s of products of states (tokens, width) with a matrix (width, inner), by dtype.

    Args: names: dtypes. The best of each counts: others may be at work here.
    """
    weights = {}
    for name in names:
        dtype = getattr(torch, name)
        weights[name] = torch.full((inner, width), 0.01, dtype=dtype, device=device)
        _time_product(weights[name], FEWEST_TOKENS)  # the first use of a kernel is slow

    # few tokens at first: a dtype that is not built in may be very slow
    tokens = dict.fromkeys(names, FEWEST_TOKENS)
    best = dict.fromkeys(names, 0.0)
    spent = dict.fromkeys(names, 0.0)
    # each has the same time, so that a slow one takes none from the others
    share = MEASURE_S / len(names)
    while min(spent.values()) < share:
        name = min(spent, key=spent.get)
        weight = weights[name]
        seconds = _time_product(weight, tokens[name])
        spent[name] += seconds
        rate = 2 * tokens[name] * weight.numel() / seconds / 1e9
        best[name] = max(best[name], rate)
        tokens[name] = min(2 * tokens[name], MOST_TOKENS[device])
    return {name: round(rate, 1) for name, rate in best.items()}


def _time_product(weight: torch.Tensor, tokens: int) -> float:
    """Seconds of one product."""
    states = torch.full((tokens, weight.shape[1]), 0.01, dtype=weight.dtype, device=weight.device)
    if weight.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    torch.nn.functional.linear(states, weight)
    if weight.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _pin(rank: int, local_world: int) -> None:
    """Keep a rank on its own share of the cores, with no more threads than cores.

    Two ranks that migrate are 1.5 times slower. A thread that waits for a core on which its
    neighbour spins makes small steps ten times slower. Both were measured.
    """
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
    """A generator of random numbers with the seed of `seed_for`."""
    return np.random.default_rng(seed_for(*parts))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed at the end: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk has no room for halves
        raise


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value) -> None:
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """A JSON object per line, whole or not at all."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def read_json(path: Path):
    """Raises: UserError: missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that makes it") from None
    except ValueError as error:
        raise UserError(
            f"{path}: damaged JSON ({error}); delete it and run the stage again"
        ) from None


def read_jsonl(path: Path) -> list[dict]:
    """All whole lines. A last line cut short by a kill is dropped.

    Raises: UserError: a damaged line before the last.
    """
    # split at newlines alone: other separators may stand inside a text; bytes that are no UTF-8
    # become damaged JSON
    lines = Path(path).read_text(errors="replace").rstrip("\n").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number}: damaged JSON line; delete the file and run the stage again"
            ) from None
    return rows


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, whole or not at all."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole(path) as temporary:
        # through bytes: the library's own writer reports a full disk by an error type of its own,
        # and makes files that only their owner can read
        temporary.write_bytes(save(contiguous, metadata))


def save_array(path: Path, array: np.ndarray) -> None:
    """A npy file, whole or not at all."""
    header = np.lib.format.header_data_from_array_1_0(array)
    # numpy's own writer reports a full disk by an error without a number
    with whole(path) as temporary, open(temporary, "wb") as f:
        np.lib.format.write_array_header_1_0(f, header)
        f.write(np.ascontiguousarray(array).data)


def load_array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    """Raises: UserError: missing, truncated or corrupt."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the stage that makes it")
    try:
        return np.load(path, mmap_mode=mmap_mode)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f"{path}: truncated or corrupt ({str(error)[:80]}); delete its folder and run the same "
            "command again"
        ) from None


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Raises: UserError: missing, truncated or corrupt."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; run the stage that makes it")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own types, none of them public
        raise UserError(
            f"{path}: truncated or corrupt safetensors file ({str(error)[:80]}); delete its folder "
            "and run the same command again"
        ) from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
