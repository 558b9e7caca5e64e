"""Kill a small run of the real model at random moments, give the same command again, and compare.

    make reliability                             20 kills (-9), spread over the stages; writes
                                                 results/reliability.json
    python tests/reliability.py kills=5 seed=1

Equal means: the same results.json except for times and provenance, and the same bytes in every
adapter and generator, as an undisturbed run has.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import methods  # noqa: E402

METHODS = ["base", "generator", "degaml", "degaml_plus", "no_meta"]
WORDS = [
    "stage=all",
    "config=configs/demo.yaml",
    "data.targets=[divlogic]",
    "data.num_train=60",
    "data.num_support=8",
    "data.num_test=12",
    "data.num_prompts=16",
    "collect.pretrain_steps=4",
    "collect.finetune_steps=2",
    "collect.batch_size=4",
    "collect.save_last=2",
    "generator.steps=8",
    "generator.save_every=2",
    "policy.iterations=2",
    "policy.epochs=1",
    f"evaluate.methods=[{','.join(METHODS)}]",
]
PIPELINE = ("collect", "generator", "align", "policy", "adapt", "baselines", "evaluate", "report")
STAGES = [stage for stage in PIPELINE if stage not in methods.idle_stages(METHODS)]
MAY_CHANGE = ("seconds", "provenance", "forwards", "backwards")  # by a repetition


def start(folder: Path) -> subprocess.Popen:
    """The command, in a process group of its own."""
    out = open(folder.with_suffix(".log"), "a")
    return subprocess.Popen(
        [sys.executable, "degaml.py", *WORDS, f"run={folder}"],
        cwd=ROOT,
        stdout=out,
        stderr=out,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def stable(tree):
    """A tree of JSON without what a repetition may change."""
    if isinstance(tree, dict):
        return {k: stable(v) for k, v in tree.items() if not k.startswith(MAY_CHANGE)}
    if isinstance(tree, list):
        return [stable(item) for item in tree]
    return tree


def outcome(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """Everything that must not depend on how often the run was interrupted."""
    weights = {}
    for part in ("adapters", "generator", "adapted"):
        for path in folder.glob(f"{part}/**/*.safetensors"):
            weights[str(path.relative_to(folder))] = path.read_bytes()
    results = json.loads((folder / "report/results.json").read_text())
    return stable(results), weights


def record_of(folder: Path, stage: str) -> Path:
    return folder / f"stages/{stage}.json"


def stage_of(folder: Path) -> str:
    """The stage that a dead run was in: the first without a record."""
    for stage in STAGES:
        if not record_of(folder, stage).exists():
            return stage
    return "after the end"


def random_moments(folder: Path, began: float, kills: int, rng: random.Random) -> list[float]:
    """Seconds from the start at which to kill: at random within one stage after the other."""
    spans = []
    at = 0.0
    for stage in STAGES:
        end = record_of(folder, stage).stat().st_mtime - began
        if end - at > 0.5:  # a stage that had nothing to do is over at once
            spans.append((at, end))
        at = end
    return [rng.uniform(*spans[i % len(spans)]) for i in range(kills)]


def kill_once(folder: Path, after: float) -> tuple[str, int]:
    """Kill a fresh run and give its command again. Returns: (stage of the kill, exit status)."""
    process = start(folder)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stage = stage_of(folder)
    return stage, start(folder).wait()


def run_undisturbed(base: Path, at_once: int) -> float:
    """Whole runs, as many at once as there will be later. Returns: when they began."""
    began = time.time()  # the clock of files
    processes = [start(base / f"whole{i}") for i in range(at_once)]
    for process in processes:
        assert process.wait() == 0, (base / "whole0.log").read_text()[-2000:]
    print(f"an undisturbed run takes {time.time() - began:.0f} s", flush=True)
    return began


def main(
    kills: int = 20,
    seed: int = 0,
    output: str = "results/reliability.json",
    folder: str = "runs/reliability",
) -> int:
    """Returns: 0 if every interrupted run came out equal."""
    base = ROOT / folder
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    at_once = max(1, len(os.sched_getaffinity(0)))
    began = run_undisturbed(base, at_once)
    wanted = outcome(base / "whole0")
    moments = random_moments(base / "whole0", began, kills, random.Random(seed))

    def kill_number(i: int) -> tuple[str, bool]:
        killed = base / f"killed{i}"
        stage, status = kill_once(killed, moments[i])
        equal = status == 0 and outcome(killed) == wanted
        verdict = "equal" if equal else f"NOT EQUAL, {status}"
        print(f"kill {i + 1}: after {moments[i]:5.1f} s in {stage}: {verdict}", flush=True)
        if equal:
            shutil.rmtree(killed)
        return stage, equal

    with ThreadPoolExecutor(at_once) as pool:
        done = list(pool.map(kill_number, range(kills)))

    per_stage = Counter(stage for stage, _ in done)
    equal = sum(is_equal for _, is_equal in done)
    found = {
        "kills": kills,
        "equal": equal,
        "seed": seed,
        "per_stage": {s: per_stage[s] for s in (*STAGES, "after the end") if per_stage[s]},
        "run": WORDS,
    }
    (ROOT / output).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{equal} of {kills} equal -> {output}")
    return int(equal != kills)


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    options = {k: v if k in ("output", "folder") else int(v) for k, v in given.items()}
    sys.exit(main(**options))
