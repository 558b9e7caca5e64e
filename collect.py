"""LoRA trajectories of the training tasks (DeGAML, stage 1).

    python degaml.py stage=collect config=configs/smollm2.yaml

Writes adapters/<task>/: step_0060.safetensors … and manifest.json.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import data
import lora
import proof
import runtime
import scoring
from config import UserError
from data import Task
from lora import Adapter, AdapterTrainer
from runtime import Run
from scoring import LM, Row


def collect_adapters(run: Run) -> dict:
    """LoRA trajectories of the training tasks: the adapters of the last `save_last` steps.

    Source: DeGAML, E.4: `pretrain_steps` at `pretrain_lr`, then `finetune_steps` at `finetune_lr`;
        the optimiser's state carries over.
    Raises: UserError: a loss that is not finite, or tasks that do not share one A.
    """
    tasks = data.load_tasks(run)
    names = run.cfg.data.train_tasks
    # a model that is scored wrongly is not worth the hours
    proof.ensure(run)
    run.barrier()

    # the task with the longest texts first: no rank is left with it at the end
    longest_first = sorted(names, key=lambda name: -data.text_size(tasks[name].train[:50]))
    for name in run.deal(longest_first):
        if not run.finished(f"adapters/{name}", "collect"):
            collect_one(run, tasks[name])

    # a folder may hold tasks collected before, by another version
    manifests = [_manifest(run, name) for name in names]
    if len({manifest["init_sha"] for manifest in manifests}) != 1:
        raise UserError(
            f"{run.path / 'adapters'}: the tasks do not share one A initialisation; "
            "delete the folder and run stage=collect again"
        )
    last = [manifest["last_loss"] for manifest in manifests]
    return {"collect/last_loss": sum(last) / len(last)}


def _manifest(run: Run, task: str) -> dict:
    return runtime.read_json(run.path / f"adapters/{task}/manifest.json")


def collect_one(run: Run, task: Task, first: Adapter | None = None) -> None:
    """One task's checkpoints, and the manifest that says what they are.

    Args: first: the adapter to begin with; None = the plain start, which all tasks share.
    """
    lm = scoring.load_lm(run)
    folder = run.path / f"adapters/{task.name}"
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)

    # every task begins from one and the same A: with different A's, A is noise to the generator
    if first is None:
        first = lora.init_adapter(lm.layout, run.cfg.seed)
    losses = _train(run, lm, task, first, folder)

    # the manifest comes last: what it lists is whole
    first_a = {key: tensor for key, tensor in first.items() if "lora_A" in key}
    hashes = {}
    for file in sorted(folder.glob("step_*.safetensors")):
        hashes[file.name] = runtime.sha256(file)
    manifest = {
        "task": task.name,
        "steps": len(losses),
        "last_loss": losses[-1],
        "losses": [round(loss, 4) for loss in losses],
        "init_sha": lora.adapter_hash(first_a),
        "sha256": hashes,
    }
    runtime.write_json(folder / "manifest.json", manifest)
    run.finish(f"adapters/{task.name}", "collect", began, steps=len(losses))
    seconds = time.monotonic() - began
    change = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    run.log(f"collect {task.name}: {change} in {seconds:.0f} s", True)


def _train(run, lm, task, first, folder) -> list[float]:
    """Train from the adapter `first`, and keep the last adapters in `folder`.

    Returns: the loss of every step.
    Raises: UserError: a loss that is not finite; the adapter before it is saved.
    """
    settings = run.cfg.collect
    steps = settings.pretrain_steps + settings.finetune_steps
    size = settings.batch_size

    # whole passes over the train split, each shuffled anew
    count = len(task.train)
    rng = runtime.rng_for(run.cfg.seed, "collect", task.name)
    passes = 1 + steps * size // count
    order = np.concatenate([rng.permutation(count) for _ in range(passes)])

    # tokenised when first needed: a short training never reaches most examples
    rows: dict[int, Row] = {}
    losses: list[float] = []
    with AdapterTrainer(lm.model, lm.layout, first) as trainer:
        for step in run.track(range(steps), f"collect {task.name}"):
            batch = []
            for i in order[step * size : (step + 1) * size]:
                if i not in rows:
                    rows[i] = scoring.make_row(lm, task.train[i])
                batch.append(rows[i])

            loss = trainer.backward(scoring.loss_in_parts(lm, batch, scoring.lm_loss))
            # nothing was updated yet: the trainer still holds the adapter before this step
            if not math.isfinite(loss):
                raise _diverged(folder, trainer.adapter(), losses)
            lr = learning_rate(settings, step, settings.pretrain_steps)
            trainer.step(lr)
            losses.append(loss)

            # every fifth step is enough for a curve
            done = step + 1
            if done % 5 == 0 or done == steps:
                shown = round(loss, 5)
                run.metric(stage="collect", unit=task.name, step=done, loss=shown, lr=lr)
            # the last adapters are the generator's targets
            if done > steps - num_kept(settings):
                runtime.save_tensors(folder / f"step_{done:04d}.safetensors", trainer.adapter())
    return losses


def _diverged(folder: Path, adapter: Adapter, losses: list[float]) -> UserError:
    """The error to raise, after saving the adapter that the failing step began from."""
    path = folder / "before_failure.safetensors"
    runtime.save_tensors(path, adapter)
    last = [math.nan, *losses][-1]
    return UserError(
        f"collect {folder.name}: the loss is not finite at step {len(losses) + 1} "
        f"(last finite {last:.4f}); the adapter before it is in {path}; lower collect.pretrain_lr"
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


def num_kept(settings) -> int:
    """How many checkpoints of a task are kept: `collect.save_last`, at most one per step."""
    steps = settings.pretrain_steps + settings.finetune_steps
    if settings.save_last == "all":
        return steps
    return min(settings.save_last, steps)


def checkpoint_names(run: Run, task: str) -> list[str]:
    """The files of a task's checkpoints, oldest first: names count the steps."""
    return sorted(_manifest(run, task)["sha256"])


def load_checkpoints(run: Run, lm: LM, task: str) -> Iterator[Adapter]:
    """Yield the collected checkpoints of a task, oldest first: all at once may be too many.

    Raises: UserError: missing, changed since, or made under another configuration.
    """
    folder = run.path / f"adapters/{task}"
    # refuses what another configuration made
    run.finished(f"adapters/{task}", "collect", redo=False)
    for name, digest in _manifest(run, task)["sha256"].items():
        file = folder / name
        if not file.is_file() or runtime.sha256(file) != digest:
            raise UserError(
                f"{file}: missing, truncated or changed since it was made "
                "(hash differs from manifest.json); "
                f"delete {folder} and run stage=collect again"
            )
        yield lora.load_adapter(file, lm.layout)


def last_checkpoint(run: Run, lm: LM, task: str) -> Adapter:
    """The adapter trained on the task's own train split (method `full_data`)."""
    name = checkpoint_names(run, task)[-1]
    return lora.load_adapter(run.path / f"adapters/{task}/{name}", lm.layout)


def mean_adapter(run: Run, lm: LM, target: str) -> Adapter:
    """Control: element-wise mean of the training tasks' last checkpoints, without the target's."""
    left_out = data.left_out_for(run.cfg, target)
    tasks = data.training_tasks(run.cfg, left_out)
    adapters = [last_checkpoint(run, lm, task) for task in tasks]
    return lora.average_adapters(adapters)
