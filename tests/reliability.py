"""Kill a small run of the real model at random moments, give the same command again, compare with an undisturbed run.

    make reliability                             20 kills (-9), one per run, spread over the stages; writes
                                                 results/reliability.json
    python tests/reliability.py kills=5 seed=1

Equal means: the same results.json but for times and provenance, and the same bytes in every adapter and generator.
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
from degaml import ORDER  # noqa: E402

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
    "evaluate.methods=[base,generator,degaml,degaml_plus,no_meta]",
]
TIMES = ("seconds", "provenance", "forwards", "backwards")  # what a repetition may change


def start(folder: Path) -> subprocess.Popen:
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
    if isinstance(tree, dict):
        return {k: stable(v) for k, v in tree.items() if not k.startswith(TIMES)}
    return [stable(v) for v in tree] if isinstance(tree, list) else tree


def outcome(folder: Path) -> tuple:
    """Everything that must not depend on how often the run was interrupted."""
    weights = {
        str(p.relative_to(folder)): p.read_bytes()
        for part in ("adapters", "generator", "adapted")
        for p in folder.glob(f"{part}/**/*.safetensors")
    }
    return stable(json.loads((folder / "report/results.json").read_text())), weights


def stage_of(folder: Path) -> str:
    """The stage a dead run was in: the first without a record."""
    return next((s for s in ORDER if not (folder / f"stages/{s}.json").exists()), "after the end")


def moments(folder: Path, began: float, kills: int, rng: random.Random) -> list[float]:
    """Seconds from the start at which to kill: at random within one stage after the other, as often in each."""
    spans, at = [], 0.0
    for stage in ORDER:
        end = (folder / f"stages/{stage}.json").stat().st_mtime - began
        if end - at > 0.5:  # stages that had nothing to do are over at once
            spans.append((at, end))
        at = end
    return [rng.uniform(*spans[i % len(spans)]) for i in range(kills)]


def kill_once(folder: Path, after: float) -> tuple[str, int]:
    """Kill a fresh run `after` seconds from its start and finish it. Returns (stage of the kill, exit status)."""
    process = start(folder)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return stage_of(folder), start(folder).wait()


def main(
    kills: int = 20,
    seed: int = 0,
    output: str = "results/reliability.json",
    folder: str = "runs/reliability",
) -> int:
    base = ROOT / folder
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    at_once = max(1, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(
        at_once
    ) as pool:  # undisturbed runs, as many at once as there will be later
        began = time.time()  # the clock of files
        assert set(pool.map(lambda i: start(base / f"whole{i}").wait(), range(at_once))) == {0}, (
            base / "whole0.log"
        ).read_text()[-2000:]
        want, when = (
            outcome(base / "whole0"),
            moments(base / "whole0", began, kills, random.Random(seed)),
        )
        print(
            f"an undisturbed run takes {time.time() - began:.0f} s; {kills} kills at random moments",
            flush=True,
        )

        def one(job):
            i, after = job
            folder = base / f"killed{i}"
            stage, status = kill_once(folder, after)
            equal = status == 0 and outcome(folder) == want
            print(
                f"kill {i + 1}: after {after:5.1f} s in {stage}: {'equal' if equal else f'NOT EQUAL, {status}'}",
                flush=True,
            )
            if equal:
                shutil.rmtree(folder)
            return stage, equal

        done = list(pool.map(one, enumerate(when)))
    per_stage = Counter(stage for stage, _ in done)
    found = {
        "kills": kills,
        "equal": sum(equal for _, equal in done),
        "seed": seed,
        "per_stage": {s: per_stage[s] for s in (*ORDER, "after the end") if per_stage[s]},
        "run": WORDS,
    }
    (ROOT / output).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['equal']} of {kills} equal -> {output}")
    return int(found["equal"] != kills)


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    sys.exit(main(**{k: v if k in ("output", "folder") else int(v) for k, v in given.items()}))
