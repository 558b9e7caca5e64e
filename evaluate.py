"""Test examples: the only room that reads their labels.

python degaml.py stage=evaluate config=…   -> scores/<method>/<task>.jsonl
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

import baselines
import collect
import data
import generator
import lora
import methods
import policy
import runtime
import scoring
import strategies
from data import Task
from runtime import Run
from strategies import Refined, Strategy, Target


def load_refined(run: Run, target: Target, folder: Path) -> Refined:
    """What `adapt` chose for a target, ready to score: its adapter, or an ensemble or steering rebuilt from it."""
    strategy = Strategy.from_dict(runtime.read_json(folder / "strategy.json")["strategy"])
    if strategy.family in ("TTS", "Latent", "none"):  # made from the generator alone, exactly again
        return strategies.execute(target, strategy)
    return Refined([lora.load_adapter(folder, scoring.load_lm(run).layout)])


# ----------------------------------------------------------------------------------------------------------- evaluate


def evaluate_methods(run: Run) -> dict:
    """Score every configured method on every target's test examples. Writes scores/<method>/<task>.jsonl."""
    cfg = run.cfg
    tasks = data.load_tasks(run)
    wanted = [tasks[t] for t in cfg.data.targets or tasks]
    if run.rank == 0:
        data.keep_example_ids(run, wanted)
    wanted_methods = cfg.evaluate.methods
    groups = [
        [m for m in wanted_methods if m in methods.GENERATED],
        *([m] for m in wanted_methods if m not in methods.GENERATED),
    ]
    passes = {"generator": cfg.evaluate.prompt_batches, "abmll": cfg.baselines.abmll.test_samples}

    def cost(unit):
        task, group = unit
        return sum(len(e.prompt + "".join(e.options)) for e in task.test) * sum(
            passes.get(m, 1) for m in group
        )

    for task, group in run.deal(
        sorted(((t, g) for t in wanted for g in groups), key=cost, reverse=True)
    ):
        _evaluate_task(run, task, group)
    return {}


def _evaluate_task(run: Run, task: Task, method_ids: list[str]) -> None:
    """Score methods on a task's test examples, an adapter that several of them share once."""
    lm, todo = scoring.load_lm(run), []
    for method in method_ids:
        if methods.METHODS[method].domain == "id" and task.domain != "id":
            continue
        if not run.finished(f"scores/{method}/{task.name}", "evaluate", method):
            (run.path / f"scores/{method}/{task.name}.jsonl").unlink(
                missing_ok=True
            )  # another configuration's
            todo.append(method)
    drawn = {
        m in methods.ALIGNED
        for m in todo
        if m in methods.PROPOSING or m in ("generator", "aligned")
    }
    targets = {aligned: policy.make_target(run, task, aligned=aligned) for aligned in drawn}
    memo: dict = {}
    for method in run.track(todo, f"evaluate {task.name}"):
        start, passes = time.monotonic(), lm.forwards
        rows = _test_rows(run, lm, task, targets.get(method in methods.ALIGNED), method, memo)
        folder = run.path / f"scores/{method}"
        runtime.write_jsonl(folder / f"{task.name}.jsonl", rows)
        runtime.write_json(
            folder / f"{task.name}.meta.json",
            {"seconds": round(time.monotonic() - start, 1), "forwards": lm.forwards - passes},
        )
        run.finish(f"scores/{method}/{task.name}", "evaluate", start, method)


def wrong_prompts_task(cfg, name: str) -> str:
    """Whose prompts the control `wrong_prompts` conditions on: two places on in the task list, so never a twin."""
    names = cfg.data.train_tasks + cfg.data.test_tasks
    return names[(names.index(name) + 2) % len(names)]


def _variants(
    run: Run, lm: scoring.LM, task: Task, target: Target | None, method: str
) -> list[Refined]:
    """The adapters of a method on a task; `generator` is several, whose results are averaged.

    A method that kept the adapter it started from counts as `generator` (or `aligned`), so that its difference to it is
    zero, not the chance by which its own prompt batch was a better or a worse one.
    """
    cfg = run.cfg
    if method == "base":
        return [Refined([None])]
    if method == "mean":
        return [Refined([collect.mean_adapter(run, lm, task.name)])]
    if method == "full_data":
        return [Refined([collect.last_checkpoint(run, lm, task.name)])]
    if method == "wrong_prompts":
        return [
            Refined(
                [
                    generator.generate_adapter(
                        run, task.name, 0, wrong_prompts_task(cfg, task.name)
                    )[0]
                ]
            )
        ]
    folder = run.path / f"adapted/{method}/{task.name}"
    if (
        method in methods.PROPOSING
        and runtime.read_json(folder / "strategy.json")["strategy"] == strategies.KEEP.as_dict()
    ):
        method = "aligned" if method in methods.ALIGNED else "generator"
    if method in ("generator", "aligned"):
        return [Refined([target.source.draw(b)[0]]) for b in range(cfg.evaluate.prompt_batches)]
    if method == "abmll":
        b, rng = (
            cfg.baselines.abmll,
            torch.Generator().manual_seed(runtime.seed_for(cfg.seed, "posterior")),
        )
        posterior = baselines.load_posterior(folder, lm.layout)
        return [
            Refined(
                [
                    baselines.draw_adapter(posterior, lm.layout, b.space, b.init_log_sd, rng)
                    for _ in range(b.test_samples)
                ],
                "mean_probability",
            )
        ]
    if method in methods.BASELINES:
        return [Refined([lora.load_adapter(folder, lm.layout)])]
    return [load_refined(run, target, folder)]


def _test_rows(
    run: Run, lm: scoring.LM, task: Task, target: Target | None, method: str, memo: dict
) -> list[dict]:
    """One row per test example; correctness is averaged over a method's variants.

    Generated answers (strict, lenient) come from the first adapter of an ensemble.
    """
    cfg = run.cfg
    test = list(task.test)
    scored, written = [], []
    for refined in _variants(run, lm, task, target, method):
        key = (
            refined.combine,
            refined.slot,
            *(a and lora.adapter_hash(a) for a in refined.adapters),
        )
        if key not in memo:
            cache = target.cache if target else None
            memo[key] = strategies.score_refined(lm, refined, test, cache)
        scored.append(memo[key])
        if cfg.evaluate.generate or not test[0].options:
            tokens = (
                cfg.evaluate.max_new_tokens
                if test[0].options
                else max(256, cfg.evaluate.max_new_tokens)
            )
            key = ("answers", refined.adapters[0] and lora.adapter_hash(refined.adapters[0]))
            if key not in memo:
                memo[key] = scoring.generate_answers(lm, refined.adapters[0], test, tokens)
            written.append(memo[key])
    rows = []
    for i, e in enumerate(test):
        row: dict = {"id": e.id, "gold": e.gold}
        if e.options:
            for metric in ("norm", "raw"):
                picks = [s[i].pick(metric) for s in scored]
                row |= {
                    f"pred_{metric}": picks[0],
                    f"correct_{metric}": sum(p == e.gold for p in picks) / len(picks),
                }
            row["logp_gold"] = scored[0][i].raw[e.gold]
            row["raw"] = [round(x, 4) for x in scored[0][i].raw]
        for kind in ("strict", "lenient") if written else ():
            right = [
                scoring.parse_letter(w[i], len(e.options), kind == "strict") == e.gold
                if e.options
                else scoring.match_answer(w[i], e.answer, kind == "strict")
                for w in written
            ]
            row[kind] = sum(right) / len(right)
        if written:
            row["text"] = written[0][i]
        if method == "base":
            row |= {"prompt": e.text, "options": list(e.options)}
        rows.append(row)
    return rows
