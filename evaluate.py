"""Test examples: nothing before this room judges by their labels.

    python degaml.py stage=evaluate config=configs/smollm2.yaml   -> scores/<method>/<task>.jsonl

What is scored here was chosen and stored before, from the support set. Nothing goes back:
tests/test_evaluate.py changes every test label, and all that came before stays as it was, byte by
byte. A file holds one row per test example; accuracies are means over its rows.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

import answers
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


def evaluate_methods(run: Run) -> dict:
    """Score every configured method on every target's test examples."""
    cfg = run.cfg
    tasks = data.load_tasks(run)
    targets = [tasks[name] for name in cfg.data.targets or tasks]
    if run.rank == 0:
        data.keep_example_ids(run)

    # methods that begin from one generated adapter often share it: one rank scores them together
    generated = []
    aligned = []
    groups = [generated, aligned]
    for method in cfg.evaluate.methods:
        if method in methods.ALIGNED:
            aligned.append(method)
        elif method in methods.GENERATED:
            generated.append(method)
        else:
            groups.append([method])

    # dealt out to the ranks, longest first
    units = [(task, group) for task in targets for group in groups]
    units.sort(key=lambda unit: _cost(cfg, *unit), reverse=True)
    for task, group in run.deal(units):
        _evaluate_task(run, task, group)
    return {}


def _cost(cfg, task, method_ids):
    """How long a unit takes, about: characters to read times passes over them."""
    variants = {
        "generator": cfg.evaluate.prompt_batches,
        "abmll": cfg.baselines.abmll.test_samples,
    }
    passes = 0
    for method in method_ids:
        passes += variants.get(method, 1)
    if "icl" in method_ids:
        passes += 2  # attention to the solved examples costs as much as twice a row, about
    return passes * data.text_size(task.test)


def _evaluate_task(run, task, method_ids):
    """Score a group of methods on one task.

    Writes scores/<method>/<task>.jsonl, and its cost beside it in <task>.meta.json.
    """
    # a rerun scores only what is missing
    todo = [method for method in method_ids if _is_due(run, task, method)]
    # what further adapters are drawn from; a group is of one start, so one target serves all of it
    target = None
    if todo and todo[0] in methods.GENERATED:
        target = policy.make_target(run, task, aligned=todo[0] in methods.ALIGNED)

    lm = scoring.load_lm(run)
    memo: dict = {}  # answers that several methods share
    for method in run.track(todo, f"evaluate {task.name}"):
        began = time.monotonic()
        passes = lm.forwards
        written = lm.written
        read = lm.read
        rows = _test_rows(run, task, target, method, memo)

        # beside the unit's folder, which holds its record alone
        folder = run.path / f"scores/{method}"
        seconds = round(time.monotonic() - began, 1)
        cost = {"seconds": seconds, "forwards": lm.forwards - passes}
        cost["written_tokens"] = lm.written - written
        cost["read_tokens"] = lm.read - read
        runtime.write_jsonl(folder / f"{task.name}.jsonl", rows)
        runtime.write_json(folder / f"{task.name}.meta.json", cost)
        run.finish(f"scores/{method}/{task.name}", "evaluate", began, method)
        if rows and "text" in rows[0]:
            each = (
                f"{seconds / len(rows):.3f} s and {cost['written_tokens'] / len(rows):.1f} tokens"
            )
            run.log(f"{method} {task.name}: {each} generated per answer", True)


def _is_due(run, task, method):
    """Does the method exist on this task, and are its scores still to be made?"""
    training_tasks_only = methods.METHODS[method].domain == "id"
    if training_tasks_only and task.domain != "id":
        return False
    unit = f"scores/{method}/{task.name}"
    if run.finished(unit, "evaluate", method):
        return False
    # scores of another configuration must not be taken for this one's
    (run.path / f"{unit}.jsonl").unlink(missing_ok=True)
    return True


def method_variants(run: Run, task: Task, target: Target | None, method: str) -> list[Refined]:
    """What a method made of a task: one thing to score, or several whose results are averaged.

    `generator` and `aligned` are averaged over several prompt batches. So is a method that kept the
    adapter it started from: its difference to its start is then zero, not the chance by which one
    prompt batch is better than another.
    """
    folder = run.path / f"adapted/{method}/{task.name}"
    if method == "abmll":
        return [_posterior_draws(run, folder)]

    strategy = None
    if method in methods.PROPOSING:
        strategy = load_strategy(folder)
        if strategy.family in strategies.REPEATED:
            return [remake(target, strategy, folder)]

    # generated adapters as they are
    if method in ("generator", "aligned") or strategy == strategies.KEEP:
        variants = []
        for batch in range(run.cfg.evaluate.prompt_batches):
            adapter, _ = target.source.draw(batch)
            variants.append(Refined([adapter]))
        return variants

    if method == "icl":
        return [Refined([None], shots=task.support)]
    return [Refined([_one_adapter(run, task, method)])]


def _one_adapter(run, task, method):
    """The one adapter of a control, a baseline or a refinement; None for the base model."""
    lm = scoring.load_lm(run)
    if method == "base":
        return None
    if method == "mean":
        return collect.mean_adapter(run, lm, task.name)
    if method == "full_data":
        return collect.last_checkpoint(run, lm, task.name)
    if method == "wrong_prompts":
        other = generator.wrong_task(run, task.name)
        return generator.generate_adapter(run, task.name, 0, prompts_of=other)[0]
    # a baseline, or what a strategy made
    return lora.load_adapter(run.path / f"adapted/{method}/{task.name}", lm.layout)


def _posterior_draws(run, folder):
    """ABMLL's prediction: the mean probability over draws from its posterior."""
    settings = run.cfg.baselines.abmll
    layout = scoring.load_lm(run).layout
    posterior = baselines.load_posterior(folder, layout)

    # the same draws in every run, whatever was scored before
    seed = runtime.seed_for(run.cfg.seed, "posterior")
    rng = torch.Generator().manual_seed(seed)
    adapters = []
    for _ in range(settings.test_samples):
        adapters.append(baselines.draw_adapter(posterior, layout, settings, rng))
    return Refined(adapters, "mean_probability")


def remake(target: Target, strategy: Strategy, folder: Path) -> Refined:
    """What a strategy that makes more than an adapter makes of a target, stored in `folder`."""
    # in a chain (`policy.steps`) it acts on what the strategies before it made
    if "before" in runtime.read_json(folder / "strategy.json"):
        start = lora.load_adapter(folder, target.lm.layout)
        target = dataclasses.replace(target, start=start)
    return strategies.execute(target, strategy)


def load_strategy(folder: Path) -> Strategy:
    """What `adapt` chose for a target, at the last step of a chain."""
    chosen = runtime.read_json(folder / "strategy.json")
    return Strategy.from_dict(chosen["strategy"])


def _test_rows(run, task, target, method, memo):
    """One row per test example; correctness is averaged over a method's variants.

    Args:
        memo: answers to this task's examples so far, which grows: methods may share adapters.
    """
    variants = []
    for refined in method_variants(run, task, target, method):
        variants.append(_answer(run, task, target, refined, memo))

    rows = []
    for i, example in enumerate(task.test):
        scores = [variant[i] for variant in variants]
        row = {"id": example.id, "gold": example.gold}
        if example.options:
            row |= _judge_options(example, scores)
        if scores[0].text is not None:
            row |= _judge_texts(example, scores)
        if method == "base":  # the report shows examples, which one method's rows hold
            row["prompt"] = example.text
            row["options"] = list(example.options)
        rows.append(row)
    return rows


def mark_test(run: Run, task: Task, refined: Refined) -> str:
    """A digit per test example, in order: 1 where `evaluate.metric` calls the answer right."""
    test = list(task.test)
    scores = strategies.score_refined(scoring.load_lm(run), refined, test)
    correct = scoring.judge(scores, test, run.cfg.evaluate.metric)["correct"]
    return "".join(str(right) for right in correct)


def _answer(run, task, target, refined, memo):
    """Scores of every test example, with written answers where the run or the task wants them."""
    lm = scoring.load_lm(run)
    test = list(task.test)
    # two methods have the same answers if their adapters hold the same numbers
    hashes = [a and lora.adapter_hash(a) for a in refined.adapters]
    key = (refined.combine, refined.slot, refined.shots, *hashes)
    if key not in memo:
        cache = target.cache if target else None
        tokens = answers.answer_tokens(run.cfg.evaluate, test)
        memo[key] = strategies.score_refined(lm, refined, test, cache, tokens)
    return memo[key]


def _judge_options(example, variants):
    """Row fields of one example's option scores, by both metrics."""
    fields = {}
    for metric in ("norm", "raw"):
        picks = [scores.pick(metric) for scores in variants]
        fields[f"pred_{metric}"] = picks[0]
        fields[f"correct_{metric}"] = picks.count(example.gold) / len(picks)
    # probabilities are not averaged: those of the first variant
    first = variants[0]
    fields["logp_gold"] = first.raw[example.gold]
    fields["raw"] = [round(value, 4) for value in first.raw]
    return fields


def _judge_texts(example, variants):
    """Row fields of one example's written answers, read strictly and leniently."""
    fields = {}
    for reading in scoring.WRITTEN:
        right = [answers.is_right(scores, example, reading) for scores in variants]
        fields[reading] = sum(right) / len(variants)
        fields[f"first_{reading}"] = int(right[0])  # of the adapter that is exported
    fields["text"] = variants[0].text
    return fields
