"""Use the adapter, or keep the base model? Judged by counts on rows that no choice has seen.

A rate has Wilson's interval. A difference of two methods on the same rows has Newcombe's (1998,
method 10), which pairs the rows and holds at small counts too. Both are at 95 %.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

import conditions
import generator
import lora
import methods
import runtime
import scoring
from data import Task
from lora import Adapter
from runtime import Run

Z = 1.959964  # of a normal distribution, 95 %

USE_IT = "use it"
NO_DIFFERENCE = "no difference shown"
KEEP_BASE = "keep the base model"
NOT_MEASURED = "not measured"

# What an adapter competes with on the same rows.
RIVALS = ("icl", "no_meta")
# Below this mean change of the logits an adapter does nothing.
SMALLEST_SHIFT = 0.01
SHIFT_PROMPTS = 32


@dataclass(frozen=True)
class Verdict:
    """What the held-out rows say of one method.

    Attributes:
        decision: USE_IT, NO_DIFFERENCE, KEEP_BASE or NOT_MEASURED.
        text: the decision and its reason, in a line.
        table: what every method got, as lines.
    """

    decision: str
    text: str
    table: tuple[str, ...] = ()


def judge(run: Run, task: Task, method: str) -> Verdict:
    """The verdict on what a method made of a task, from the stored scores of this run."""
    right = {}
    ids = [example.id for example in task.test]
    for other in run.cfg.evaluate.methods:
        path = run.path / f"scores/{other}/{task.name}.jsonl"
        rows = runtime.read_jsonl(path) if ids and path.is_file() else []
        # an earlier file of this name may have left rows of its own
        if rows and [row["id"] for row in rows] == ids:
            right[other] = [_is_right(row, run.cfg.evaluate.metric) for row in rows]
    if method not in right or "base" not in right:
        reason = "no labelled rows are left to measure it on"
        return Verdict(NOT_MEASURED, f"verdict: {NOT_MEASURED}: {reason}")

    table = tuple(_describe_all(right, task, run.cfg.evaluate.metric))
    difference, low, high = compare(right[method], right["base"])
    decision = NO_DIFFERENCE
    if low > 0:
        decision = USE_IT
    elif high < 0:
        decision = KEEP_BASE
    ours = f"{sum(right[method])} of {len(right[method])} held-out rows"
    text = (
        f"verdict: {decision}. {method} is right in {ours} and the base model in "
        f"{sum(right['base'])}: {_points(difference, low, high)}"
    )
    for rival in RIVALS:
        if rival in right:
            ahead, least, most = compare(right[rival], right[method])
            if least > 0:
                what = methods.METHODS[rival].label
                text += f". {what} is better still: {_points(ahead, least, most)}"
    return Verdict(decision, text, table)


def _is_right(row: dict, metric: str) -> bool:
    """Is the answer to a stored example right that the method's first adapter gives?"""
    if f"pred_{metric}" in row:
        return row[f"pred_{metric}"] == row["gold"]
    # a written answer
    reading = metric if metric in scoring.WRITTEN else "lenient"
    return row[f"first_{reading}"] == 1


def _describe_all(right, task, metric):
    """A line per method: how many are right, and against the base model."""
    count = len(task.test)
    yield (
        f"{count} held-out rows by {metric}; always the most frequent answer: "
        f"{100 * majority_rate(task):.1f} %"
    )
    yield f"  {'':28} {'right':>11}  {'Wilson 95 %':>15}  against the base model (Newcombe 95 %)"
    for method, answers in right.items():
        low, high = wilson(sum(answers), len(answers))
        share = f"{sum(answers)} of {len(answers)}"
        interval = f"{100 * low:.1f} to {100 * high:.1f} %"
        line = f"  {methods.METHODS[method].label:28} {share:>11}  {interval:>15}"
        if method != "base":
            line += f"  {_points(*compare(answers, right['base']))}"
        yield line


def majority_rate(task: Task) -> float:
    """How often the most frequent right answer of the test is right, by text or by place."""
    texts = Counter(e.options[e.gold] if e.options else e.answer for e in task.test)
    places = Counter(e.gold for e in task.test if e.options)
    most = max([*texts.values(), *places.values()], default=0)
    return most / max(1, len(task.test))


def _points(difference, low, high):
    return f"{100 * difference:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate. Source: Wilson 1927."""
    share = right / count
    middle = share + Z**2 / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def compare(a: list[bool], b: list[bool]) -> tuple[float, float, float]:
    """(difference, low, high) of the rates of a and b on the same rows, at 95 %.

    Source: Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10.
    """
    pairs = Counter(zip(a, b, strict=True))
    count = len(a)
    both = pairs[True, True]
    only_a = pairs[True, False]
    only_b = pairs[False, True]
    neither = pairs[False, False]
    rate_a = (both + only_a) / count
    rate_b = (both + only_b) / count
    low_a, high_a = wilson(both + only_a, count)
    low_b, high_b = wilson(both + only_b, count)

    # how the rates go together; the continuity correction makes a small positive one zero
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    agreement = both * neither - only_a * only_b
    if agreement > 0:
        agreement = max(0.0, agreement - count / 2)
    phi = agreement / math.sqrt(product) if product else 0.0

    down = _together(rate_a - low_a, high_b - rate_b, phi)
    up = _together(high_a - rate_a, rate_b - low_b, phi)
    difference = rate_a - rate_b
    return difference, difference - down, difference + up


def _together(first, second, phi):
    """Two half-widths squared and added, less what the rates share."""
    return math.sqrt(max(0.0, first**2 + second**2 - 2 * phi * first * second))


@torch.no_grad()
def describe_shift(run: Run, task: Task, adapter: Adapter) -> list[str]:
    """How far an adapter moves the base model, and how far another task's prompts would have.

    The logits are those of the next token after a prompt. No label is read.
    """
    lm = scoring.load_lm(run)
    texts = conditions.texts_of(lm, task, task.prompts[:SHIFT_PROMPTS])
    name = generator.wrong_task(run, task.name)  # as the control wrong_prompts
    other, _ = generator.generate_adapter(run, task.name, 0, prompts_of=name)
    base = _next_logits(lm, None, texts)
    ours = _next_logits(lm, adapter, texts)
    theirs = _next_logits(lm, other, texts)

    moved, changed = _distance(ours, base)
    lines = [
        f"behind {len(texts)} prompts the adapter moves the logits by {moved:.2g} on average and "
        f"changes {changed} likeliest tokens"
    ]
    apart, differ = _distance(ours, theirs)
    lines.append(
        f"from the adapter that {name}'s prompts give it lies {apart:.2g} apart, in {differ} "
        "likeliest tokens"
    )
    if moved < SMALLEST_SHIFT:
        lines.append(
            "warning: this adapter does next to nothing; train longer (collect.pretrain_steps, "
            "generator.steps)"
        )
    return lines


def _next_logits(lm, adapter, texts):
    """(prompts, V) logits behind each prompt, less their mean: a constant changes nothing."""
    rows = [scoring.prompt_row(lm, text) for text in texts]
    lora.swap_adapter(lm.model, lm.layout, adapter)
    try:
        hidden, starts = scoring.hidden_states(lm, rows)
    finally:
        lora.clear_adapters(lm.model)
    last = [start + row.length - 1 for start, row in zip(starts, rows, strict=True)]
    logits = scoring.project(lm, hidden[last])
    return logits - logits.mean(-1, keepdim=True)


def _distance(a, b):
    """(mean absolute difference of logits, prompts whose likeliest token differs)."""
    changed = (a.argmax(-1) != b.argmax(-1)).sum()
    return float((a - b).abs().mean()), int(changed)
