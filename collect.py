"""LoRA trajectories of the training tasks (DeGAML, stage 1).

python degaml.py stage=collect config=configs/smollm2.yaml     -> adapters/<task>/step_0060.safetensors …
"""

from __future__ import annotations

import shutil
import time

import numpy as np

import data
import lora
import runtime
import scoring
from config import UserError
from lora import Adapter
from runtime import Run

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


def _mean_length(lm: scoring.LM, task) -> float:
    return sum(len(e.text) for e in task.train[:50])


def _collect_one(run: Run, lm: scoring.LM, task) -> None:
    cfg = run.cfg
    c, folder, start = cfg.collect, run.path / f"adapters/{task.name}", time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    steps = c.pretrain_steps + c.finetune_steps
    rng = runtime.rng_for(cfg.seed, "collect", task.name)
    order = np.concatenate(
        [
            rng.permutation(len(task.train))
            for _ in range(1 + steps * c.batch_size // len(task.train))
        ]
    )
    rows = {}

    def batches():
        for s in run.track(range(steps), f"collect {task.name}"):
            index = order[s * c.batch_size : (s + 1) * c.batch_size]
            for i in index:
                rows.setdefault(i, scoring.make_row(lm, task.train[i]))
            yield [rows[i] for i in index]

    def lr(s):
        if s < c.pretrain_steps:
            return lora.rate(s, c.pretrain_steps, c.pretrain_lr, c.warmup_steps, "constant")
        return lora.rate(s - c.pretrain_steps, c.finetune_steps, c.finetune_lr, 0, "constant")

    def on_step(s, loss, snapshot):
        losses.append(loss)
        if s % 5 == 4 or s == steps - 1:
            run.metric(stage="collect", unit=task.name, step=s + 1, loss=round(loss, 5), lr=lr(s))
        if s >= steps - c.save_last:
            runtime.save_tensors(folder / f"step_{s + 1:04d}.safetensors", snapshot())

    losses: list[float] = []
    first = lora.init_adapter(lm.layout, cfg.seed)
    try:
        lora.train_adapter(
            lm.model,
            lm.layout,
            first,
            batches(),
            lambda b: scoring.loss_in_parts(lm, b, scoring.lm_loss),
            lr=lr,
            on_step=on_step,
        )
    except FloatingPointError as e:
        step, last, adapter = e.args
        runtime.save_tensors(folder / "before_failure.safetensors", adapter)
        raise UserError(
            f"collect {task.name}: the loss is not finite at step {step + 1} (last finite {last:.4f}); the "
            f"adapter before it is in {folder / 'before_failure.safetensors'}; lower collect.pretrain_lr"
        ) from None
    runtime.write_json(
        folder / "manifest.json",
        {
            "task": task.name,
            "steps": steps,
            "last_loss": losses[-1],
            "losses": [round(x, 4) for x in losses],
            "init_sha": lora.adapter_hash({k: v for k, v in first.items() if "lora_A" in k}),
            "sha256": {
                f.name: runtime.sha256(f) for f in sorted(folder.glob("step_*.safetensors"))
            },
        },
    )
    run.finish(f"adapters/{task.name}", "collect", start, steps=steps)
    run.log(
        f"collect {task.name}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {time.monotonic() - start:.0f} s",
        True,
    )


def load_checkpoints(run: Run, lm: scoring.LM, task: str) -> list[Adapter]:
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


def last_checkpoint(run: Run, lm: scoring.LM, task: str) -> Adapter:
    """The adapter trained on the task's own train split (method `full_data`)."""
    name = sorted(runtime.read_json(run.path / f"adapters/{task}/manifest.json")["sha256"])[-1]
    return lora.load_adapter(run.path / f"adapters/{task}/{name}", lm.layout)


def mean_adapter(run: Run, lm: scoring.LM, target: str) -> Adapter:
    """Control: element-wise mean of the training tasks' last checkpoints, without the target's."""
    return lora.average_adapters(
        [
            last_checkpoint(run, lm, t)
            for t in data.training_tasks(run.cfg, data.left_out_for(run.cfg, target))
        ]
    )
