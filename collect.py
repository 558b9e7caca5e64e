"""LoRA trajectories of the training tasks (DeGAML, stage 1).

python degaml.py stage=collect config=configs/smollm2.yaml     -> adapters/<task>/step_0060.safetensors …
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path

import numpy as np

import data
import lora
import runtime
import scoring
from config import UserError
from data import Task
from lora import Adapter, AdapterTrainer
from runtime import Run
from scoring import LM, Row

# ------------------------------------------------------------------------------------------------------- checkpoints


def collect_adapters(run: Run) -> dict:
    """LoRA trajectories of the training tasks, one checkpoint per step, all from one A initialisation.

    Source: paper D, E.4: `pretrain_steps` at `pretrain_lr`, then `finetune_steps` at `finetune_lr`; the optimiser
    state carries over. Writes adapters/<task>/ with the last `save_last` steps and a manifest.
    Raises: UserError: a loss that is not finite; the state before it is saved.
    """
    cfg = run.cfg
    tasks = data.load_tasks(run)
    lm = scoring.load_lm(run)
    units = sorted(cfg.data.train_tasks, key=lambda t: -_mean_length(lm, tasks[t]))
    for name in run.deal(units):
        if not run.finished(f"adapters/{name}", "collect"):
            _collect_one(run, lm, tasks[name])
    manifests = [
        runtime.read_json(run.path / f"adapters/{t}/manifest.json") for t in cfg.data.train_tasks
    ]
    if len({m["init_sha"] for m in manifests}) != 1:
        raise UserError(
            f"{run.path / 'adapters'}: the tasks do not share one A initialisation; delete the folder and "
            "run stage=collect again"
        )
    return {"collect/last_loss": sum(m["last_loss"] for m in manifests) / len(manifests)}


def _mean_length(lm: LM, task) -> float:
    return sum(len(e.text) for e in task.train[:50])


def _collect_one(run: Run, lm: LM, task: Task) -> None:
    """One task's trajectory: a loop over steps that keeps the last adapters.

    Raises: UserError: a loss that is not finite; the adapter before it is saved.
    """
    settings = run.cfg.collect
    folder = run.path / f"adapters/{task.name}"
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)

    # whole passes over the train split, each shuffled anew
    steps = settings.pretrain_steps + settings.finetune_steps
    rng = runtime.rng_for(run.cfg.seed, "collect", task.name)
    passes = 1 + steps * settings.batch_size // len(task.train)
    order = np.concatenate([rng.permutation(len(task.train)) for _ in range(passes)])

    # every task begins from one and the same A: with different A's, A is noise to the generator
    first = lora.init_adapter(lm.layout, run.cfg.seed)
    rows: dict[int, Row] = {}
    losses: list[float] = []
    with AdapterTrainer(lm.model, lm.layout, first) as trainer:
        for step in run.track(range(steps), f"collect {task.name}"):
            index = order[step * settings.batch_size : (step + 1) * settings.batch_size]
            for i in index:
                if i not in rows:
                    rows[i] = scoring.make_row(lm, task.train[i])
            batch = [rows[i] for i in index]

            loss = trainer.backward(scoring.loss_in_parts(lm, batch, scoring.lm_loss))
            if not math.isfinite(loss):
                last = losses[-1] if losses else math.nan
                _save_before_failure(folder, trainer.adapter(), task.name, step, last)
            lr = learning_rate(settings, step, settings.pretrain_steps)
            trainer.step(lr)

            losses.append(loss)
            if step % 5 == 4 or step == steps - 1:
                run.metric(
                    stage="collect", unit=task.name, step=step + 1, loss=round(loss, 5), lr=lr
                )
            if step >= steps - settings.save_last:
                runtime.save_tensors(folder / f"step_{step + 1:04d}.safetensors", trainer.adapter())

    hashes = {f.name: runtime.sha256(f) for f in sorted(folder.glob("step_*.safetensors"))}
    manifest = {
        "task": task.name,
        "steps": steps,
        "last_loss": losses[-1],
        "losses": [round(x, 4) for x in losses],
        "init_sha": lora.adapter_hash({k: v for k, v in first.items() if "lora_A" in k}),
        "sha256": hashes,
    }
    runtime.write_json(folder / "manifest.json", manifest)
    run.finish(f"adapters/{task.name}", "collect", began, steps=steps)
    run.log(
        f"collect {task.name}: loss {losses[0]:.3f} -> {losses[-1]:.3f} "
        f"in {time.monotonic() - began:.0f} s",
        True,
    )


def learning_rate(settings, step: int, pretrain_steps: int) -> float:
    """The rate of a step: a short warm-up, `pretrain_lr`, then `finetune_lr` (DeGAML, E.4).

    Args:
        settings: the section `collect`.
        pretrain_steps: steps of the first phase; `union` trains longer by the same rule.
    """
    if step >= pretrain_steps:
        return settings.finetune_lr
    warmup = settings.warmup_steps
    return lora.rate(step, pretrain_steps, settings.pretrain_lr, warmup, "constant")


def _save_before_failure(folder: Path, adapter: Adapter, task: str, step: int, last: float):
    """Raises: UserError, after saving the adapter that the failing step began from."""
    path = folder / "before_failure.safetensors"
    runtime.save_tensors(path, adapter)
    raise UserError(
        f"collect {task}: the loss is not finite at step {step + 1} (last finite {last:.4f}); "
        f"the adapter before it is in {path}; lower collect.pretrain_lr"
    )


def load_checkpoints(run: Run, lm: LM, task: str) -> list[Adapter]:
    """The collected checkpoints of a task, oldest first. Raises: UserError: missing, changed since, or made under
    another configuration."""
    folder = run.path / f"adapters/{task}"
    run.finished(f"adapters/{task}", "collect", redo=False)
    out = []
    for name, digest in runtime.read_json(folder / "manifest.json")["sha256"].items():
        if not (folder / name).is_file() or runtime.sha256(folder / name) != digest:
            raise UserError(
                f"{folder / name}: missing, truncated or changed since it was made (hash differs from "
                f"manifest.json); delete {folder} and run stage=collect again"
            )
        out.append(lora.load_adapter(folder / name, lm.layout))
    return out


def last_checkpoint(run: Run, lm: LM, task: str) -> Adapter:
    """The adapter trained on the task's own train split (method `full_data`)."""
    name = sorted(runtime.read_json(run.path / f"adapters/{task}/manifest.json")["sha256"])[-1]
    return lora.load_adapter(run.path / f"adapters/{task}/{name}", lm.layout)


def mean_adapter(run: Run, lm: LM, target: str) -> Adapter:
    """Control: element-wise mean of the training tasks' last checkpoints, without the target's."""
    return lora.average_adapters(
        [
            last_checkpoint(run, lm, t)
            for t in data.training_tasks(run.cfg, data.left_out_for(run.cfg, target))
        ]
    )
