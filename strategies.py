"""The strategy families: as data, a checked JSON object, and as execution on a generated adapter.

TTT      test-time training on unlabelled prompts        (DeGAML, F.1; TEMPO, G.1; TLM)
LORA     two-subspace mixing of the adapter              (TEMPO, G.2, eq. 9-11)
TTS      several generated adapters, routed or pooled    (TEMPO, G.3)
Latent   per-question steering of the last hidden state  (TEMPO, G.4, Algorithm 3; SLOT)
SFT      supervised steps on the support labels          (ours)
none     keeps the adapter; never proposed

The policy proposes JSON. `parse_strategy` checks it and makes a `Strategy`. `execute` carries that
out on a `Target`, one function per family, and makes a `Refined`, which `score_refined` scores.

A new family is four edits (docs/extend.md has a worked example):
    methods.py      its name in `LABEL_FREE`, so that it is legal and methods may use it
    strategies.py   its fields and their bounds in `schema`
    strategies.py   its branch in `execute`
    proposals.py    what the policy reads about it in `DESCRIPTIONS`
Sampling, checks, rewards, caching and the report need nothing more.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import answers
import icl
import lora
import packing
import runtime
import scoring
from config import UserError
from data import Example
from lora import Adapter, AdapterTrainer
from scoring import LM, Scores

# How TTS combines several adapters: two methods route each question to one, the others pool scores.
ROUTERS = ("avg_sim_score", "avg_prompt_embed")
TTS_METHODS = (*ROUTERS, "max_confidence", "majority_vote", "sum_logprobs")

# What these make is more than an adapter. It is made again where it is needed, exactly, untrained.
REPEATED = ("TTS", "Latent")

# What these make is an adapter that has read no label: a further strategy may start from it.
CHAINED = ("TTT", "LORA")

MEDIAN_OF = 64  # prompts, of which the median surprise is taken

# Other names of families, in capitals: the papers and their code use them too.
FAMILY_ALIASES = {
    "TTL": "TTT",
    "LORA": "LORA",
    "LORA_MIXING": "LORA",
    "LS": "Latent",
    "LATENT": "Latent",
}
FIELD_ALIASES = {
    "TTS": {"num_lora_adpt": "num_prompt_batches"},
    "Latent": {"times": "slot_steps", "learning_rate": "slot_lr"},
}


@dataclass(frozen=True)
class Strategy:
    """A checked choice of a family and its fields. Its canonical JSON is its identity."""

    family: str
    fields: tuple[tuple[str, object], ...] = ()

    def __post_init__(self):
        # sorted, so that two strategies are equal whatever order their fields came in
        object.__setattr__(self, "fields", tuple(sorted(self.fields)))

    def __getitem__(self, name: str):
        return dict(self.fields)[name]

    @classmethod
    def from_dict(cls, obj: dict) -> Strategy:
        """The inverse of `as_dict`, for what was checked before it was stored."""
        fields = dict(obj)
        family = fields.pop("family")
        return cls(family, tuple(fields.items()))

    def as_dict(self) -> dict:
        return {"family": self.family, **dict(self.fields)}

    def but(self, **fields) -> Strategy:
        """The same with other values."""
        return Strategy.from_dict(self.as_dict() | fields)

    @property
    def plain(self) -> bool:
        """Does it start from nothing of the generated adapter?"""
        return self.family == "SFT" and not self["init_scale"]

    def __str__(self) -> str:
        return json.dumps(self.as_dict(), sort_keys=True)


KEEP = Strategy("none")


def schema(bounds) -> dict[str, dict[str, dict]]:
    """The action space, {family: {field: JSON schema}}, within the section `strategies`."""

    def integer(low, high):
        return {"type": "integer", "minimum": low, "maximum": high}

    def number(low, high):
        # steps bound the digits: a small policy else writes zeros until its tokens are spent
        step = low or 0.01
        return {"type": "number", "minimum": low, "maximum": high, "multipleOf": step}

    # bounded from above, so that no proposal can ask for hours of work
    return {
        "TTT": {
            "ttl_steps": integer(1, bounds.max_ttl_steps),
            "learning_rate": number(1e-7, bounds.max_ttl_lr),
            "batch_size": integer(1, bounds.max_batch_size),
            "shuffle_data": {"type": "boolean"},
        },
        "LORA": {"lambda": number(0, 1)},
        "TTS": {
            "num_prompt_batches": integer(1, bounds.max_prompt_batches),
            "method": {"enum": list(TTS_METHODS)},
        },
        "Latent": {
            "slot_steps": integer(0, bounds.max_slot_steps),
            "slot_lr": number(1e-4, bounds.max_slot_lr),
        },
        "SFT": {
            "sft_steps": integer(1, bounds.max_sft_steps),
            "learning_rate": number(1e-6, bounds.max_sft_lr),
            "batch_size": integer(1, bounds.max_batch_size),
            "loss": {"enum": ["lm", "choice"]},
            "init_scale": number(0, 1),
        },
    }


def check_grid(bounds) -> None:
    """Check strategies.proposal_grid.

    Raises: UserError: it names what is no field, or a value that no proposal may have.
    """
    legal = {}
    for family, fields in schema(bounds).items():
        legal |= {f"{family}.{name}": spec for name, spec in fields.items()}

    for key, values in bounds.proposal_grid.items():
        if key not in legal:
            raise UserError(
                f"strategies.proposal_grid: {key!r} is no field of a strategy; expected one of "
                f"{list(legal)}"
            )
        for value in values:
            try:
                _check(key, value, legal[key])
            except ValueError as error:
                raise UserError(f"strategies.proposal_grid: {error}") from None


def proposal_schema(bounds, families: list[str], explore=None) -> dict:
    """The JSON schema proposals are sampled under: one object per family, fields in order.

    A field listed in `strategies.proposal_grid` takes one of the listed values. Another field takes
    any value in its bounds.
    Args:
        explore: a numpy generator, or None. With it only a random half of each list is offered.
            Left alone, a small policy proposes the same few settings every time.
    """
    options = []
    for family in families:
        properties = {"family": {"enum": [family]}}
        for name, spec in schema(bounds)[family].items():
            grid = bounds.proposal_grid.get(f"{family}.{name}")
            if grid and explore is not None:  # a random half, in the order of the list
                count = (len(grid) + 1) // 2
                offered = sorted(explore.permutation(len(grid))[:count])
                grid = [grid[i] for i in offered]
            properties[name] = {"enum": grid} if grid else spec
        option = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        options.append(option)
    return {"anyOf": options}


def parse_strategy(text: str | dict, bounds, families: list[str]) -> Strategy:
    """Read a proposal: the first balanced {...}, aliases resolved, every field checked.

    Only a mixing ratio outside [0, 1] is clipped (docs/choices.md, 6).
    Raises: ValueError: it says which field, what it is and what is legal.
    """
    # the family says which fields there are
    given = dict(text) if isinstance(text, dict) else _first_object(text)
    named = given.pop("family", None)
    family = FAMILY_ALIASES.get(str(named).upper(), str(named))
    if family not in families:
        raise ValueError(f"family {named!r} is not one of {list(families)}")

    # every field must be there, and no other
    aliases = FIELD_ALIASES.get(family, {})
    given = {aliases.get(name, name): value for name, value in given.items()}
    legal = schema(bounds)[family]
    unknown = sorted(set(given) - set(legal))
    if unknown:
        raise ValueError(f"{family}: unknown field {unknown[0]!r}; expected {list(legal)}")

    fields = []
    for name, spec in legal.items():
        if name not in given:
            raise ValueError(f"{family}: field {name!r} is missing")
        value = _check(f"{family}.{name}", given[name], spec)
        fields.append((name, value))
    return Strategy(family, tuple(fields))


def _first_object(text):
    """The first {...} of a text that is whole JSON."""
    decoder = json.JSONDecoder()
    for brace in re.finditer("{", text):
        try:
            return decoder.raw_decode(text[brace.start() :])[0]
        except ValueError:  # not JSON from here: try the next brace
            continue
    raise ValueError(f"no JSON object in {text[:60]!r}")


def _check(name, value, spec):
    """The value in its field's type. Raises: ValueError: it is not legal."""
    if "enum" in spec:
        if value not in spec["enum"]:
            raise ValueError(f"{name} is {value!r}, expected one of {spec['enum']}")
        return value
    if spec["type"] == "boolean":
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, expected true or false")
        return value

    # True and False are ints to Python; nan fails every comparison
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) < 1e9:
        raise ValueError(f"{name} is {value!r}, expected a number")
    if name == "LORA.lambda":  # the one value that is clipped
        return min(1.0, max(0.0, float(value)))
    if spec["type"] == "integer" and int(value) != value:
        raise ValueError(f"{name} is {value!r}, expected a whole number")
    value = int(value) if spec["type"] == "integer" else float(value)
    if not spec["minimum"] <= value <= spec["maximum"]:
        raise ValueError(f"{name} is {value}, expected {spec['minimum']}..{spec['maximum']}")
    return value


@dataclass
class Source:
    """Where further adapters of a task come from.

    Attributes:
        draw: prompt-batch number -> (adapter, indices of the prompts it was generated from).
        texts: the unlabelled prompts as the model reads them.
        pooled: (prompts, d) their embeddings.
        embed: examples -> (n, d) embeddings of their questions.
    """

    draw: Callable
    texts: list[str]
    pooled: Tensor
    embed: Callable


@dataclass
class Target:
    """A task as the strategies see it.

    Attributes:
        start: the adapter to refine.
        bounds: the section `strategies` of the configuration.
        source: where further adapters come from. A baseline's start has none: only SFT refines it.
        warm_up: does SFT begin with two lower rates? Settings that the papers fix have one rate.
        cache: scores of drawn adapters, so that ensembles share them.
    """

    name: str
    lm: LM
    start: Adapter
    bounds: object
    seed: int
    source: Source | None = None
    warm_up: bool = True
    cache: dict = field(default_factory=dict)


@dataclass
class Router:
    """Chooses an adapter per question: the one whose prompts lie nearest.

    Attributes:
        batches: per adapter (n, d), the embeddings of its prompts.
        embed: examples -> (n, d) embeddings of their questions.
    """

    batches: list[Tensor]
    embed: Callable


@dataclass
class Refined:
    """What a strategy made: one adapter, several with a way to combine them, or one with steering.

    Attributes:
        combine: "" for one adapter, else a TTS method.
        slot: (steps, learning rate) of latent steering, or None.
        router: of a TTS method that routes, else None.
        shots: solved examples before every question (`icl`).
    """

    adapters: list[Adapter]
    combine: str = ""
    slot: tuple | None = None
    router: Router | None = None
    shots: tuple[Example, ...] = ()
    notes: dict = field(default_factory=dict)


def execute(target: Target, strategy: Strategy, labelled: list[Example] = ()) -> Refined:
    """Carry a strategy out on a target's adapter. Only SFT reads `labelled`."""
    family = strategy.family
    if family == "TTT":
        return train_on_prompts(target, strategy)
    if family == "LORA":
        mixed = mix_subspaces(target.start, strategy["lambda"], target.bounds.mix)
        return Refined([mixed])
    if family == "TTS":
        return draw_several(target.source, strategy)
    if family == "Latent":
        # the steering vectors are found while a question is scored
        slot = (strategy["slot_steps"], strategy["slot_lr"])
        return Refined([target.start], slot=slot)
    if family == "SFT":
        (trained,) = train_on_support(target, strategy, labelled).values()
        return Refined([trained])
    if strategy == KEEP:
        return Refined([target.start])
    raise ValueError(f"family {family} cannot be carried out: `execute` has no branch for it")


def changes(target: Target, refined: Refined) -> bool:
    """Does it make anything else of a question than the target's start does?"""
    if refined.slot is not None:
        return refined.slot[0] > 0
    if len(refined.adapters) > 1:
        return True
    (adapter,) = refined.adapters
    return any(not torch.equal(adapter[key], value) for key, value in target.start.items())


def execute_finite(target: Target, strategy: Strategy, support: list) -> Refined:
    """`execute` of a chosen strategy. Raises: UserError: its training diverged."""
    try:
        return execute(target, strategy, support)
    except FloatingPointError as error:
        raise UserError(
            f"{target.name}: the loss of {strategy} is not finite ({error}); lower the rate "
            "(strategies.max_sft_lr, strategies.proposal_grid or baselines.sft)"
        ) from None


def train_on_prompts(target: Target, strategy: Strategy) -> Refined:
    """TTT: minimise the input NLL of unlabelled prompts, weighted towards the surprising ones.

    It continues from the generated adapter. One step is one update.
    Implements: TEMPO, eq. 7, with S * ln P in place of eq. 8's S * P (docs/choices.md, 5).
    """
    lm = target.lm
    texts = target.source.texts
    steps = strategy["ttl_steps"]
    size = strategy["batch_size"]

    # the prompts in order or shuffled once, repeated as often as the steps need
    order = np.arange(len(texts))
    if strategy["shuffle_data"]:
        order = runtime.rng_for(target.seed, "ttt", target.name).permutation(order)
    batches = np.resize(order, steps * size).reshape(-1, size)

    threshold = surprise_threshold(target)
    selected = []  # how many prompts of each part pass the gate
    with AdapterTrainer(lm.model, lm.layout, target.start) as trainer:
        for batch in batches:
            rows = [scoring.prompt_row(lm, texts[i]) for i in batch]
            scale = target.bounds.ttl_lambda
            loss = trainer.backward(_surprise_losses(lm, rows, threshold, scale, selected))
            if loss is None:  # no prompt of the batch passes the gate
                continue
            if not math.isfinite(loss):
                raise FloatingPointError("test-time training")
            trainer.step(strategy["learning_rate"])
    notes = {"selected": sum(selected), "seen": batches.size}
    return Refined([trainer.adapter()], notes=notes)


@torch.no_grad()
def surprise_threshold(target: Target) -> float:
    """The mean token NLL above which TTT trains on a prompt: `strategies.ttl_threshold`.

    `median` is that of the task's prompts under the target's start, so half of them are trained on
    whatever the model and the form of the prompts are.
    """
    wanted = target.bounds.ttl_threshold
    if wanted != "median":
        return wanted
    if "median surprise" not in target.cache:
        lm = target.lm
        texts = target.source.texts
        order = runtime.rng_for(target.seed, "surprise", target.name).permutation(len(texts))
        rows = [scoring.prompt_row(lm, texts[i]) for i in order[:MEDIAN_OF]]
        found = []
        lora.swap_adapter(lm.model, lm.layout, target.start)
        try:
            for part in packing.plan_batches(rows, scoring.part_tokens(lm.budget, all_scored=True)):
                nll = scoring.prompt_nll(lm, [rows[i] for i in part])
                found += nll.tolist()
        finally:
            lora.clear_adapters(lm.model)
        target.cache["median surprise"] = float(np.median(found))
    return target.cache["median surprise"]


def _surprise_losses(lm, rows, threshold, scale, selected):
    """Yield (weighted sum, count) of the prompts above the threshold, in parts that fit the memory.

    A prompt's weight is scale * exp(nll - threshold) if its nll is above the threshold, else 0. The
    loss is the mean over the selected prompts. How many there are in each part is appended to
    `selected`. A threshold of 0 selects all.
    """
    parts = scoring.parts_of(lm, rows, all_scored=True)
    for part in parts:
        nll = scoring.prompt_nll(lm, part)
        surprise = nll.detach()  # a weight, through which no gradient flows
        gate = surprise > threshold
        if not threshold:
            gate = torch.ones_like(gate)
        count = int(gate.sum())
        selected.append(count)
        if not count:
            del nll  # its graph, before the next part's is built
            continue
        weight = scale * torch.exp(surprise - threshold)
        total = (weight * nll)[gate].sum()
        # a whole batch is its own mean; parts are divided by the sum of their counts, in the end
        yield (total / count, 1) if len(parts) == 1 else (total, count)


def mix_subspaces(adapter: Adapter, lam: float, mode: str) -> Adapter:
    """LORA: mix the halves A = [A1; A2] and B = [B1, B2] of the rank, by A' = M A.

    Only A changes, so that what comes out is a LoRA of the same rank. An odd last row is not mixed.
    interp   M = (1 - lam) I + lam [[I, I], [I, I]]: the plain adapter at 0, TEMPO's eq. 11 at 1.
    magdir   Frobenius norm and direction of both updates interpolated apart (DeGAML, F.1).
    """
    mixed = dict(adapter)  # B stays as it is
    for key, a in adapter.items():
        if "lora_A" in key:
            b = adapter[key.replace("lora_A", "lora_B")]
            mixed[key] = _mix_rows(a, b, lam, mode)
    return mixed


def _mix_rows(a, b, lam, mode):
    """A' of one matrix; a: (r, d_in), b: (d_out, r)."""
    # B [A2; A1] holds the cross terms: B A is the plain update, B (A + swapped) the fully mixed one
    half = a.shape[0] // 2
    odd_row = torch.zeros_like(a[2 * half :])
    swapped = torch.cat([a[half : 2 * half], a[:half], odd_row])
    if mode == "interp" or lam == 0:
        return a + lam * swapped

    plain_norm = _update_norm(a, b)
    full_norm = _update_norm(a + swapped, b)
    if plain_norm == 0 or full_norm == 0:  # an update of zero has no direction
        return a
    plain_share = (1 - lam) / plain_norm
    full_share = lam / full_norm
    direction = (plain_share + full_share) * a + full_share * swapped
    norm = (1 - lam) * plain_norm + lam * full_norm
    return direction * (norm / max(_update_norm(direction, b), 1e-30))


def _update_norm(a, b):
    """Frobenius norm of B A, from two (r, r) products: B A itself is large."""
    square = (b.t() @ b) * (a @ a.t())
    return float(square.sum().clamp_min(0).sqrt())


def draw_several(source: Source, strategy: Strategy) -> Refined:
    """TTS: one adapter per prompt batch, and for a router the embeddings of their prompts."""
    method = strategy["method"]
    adapters = []
    batches = []
    for number in range(strategy["num_prompt_batches"]):
        adapter, prompts = source.draw(number)
        adapters.append(adapter)
        batches.append(source.pooled[torch.as_tensor(prompts)])
    router = Router(batches, source.embed) if method in ROUTERS else None
    return Refined(adapters, method, router=router)


def train_on_support(
    target: Target, strategy: Strategy, labelled: list[Example], at_steps: list[int] = ()
) -> dict[int, Adapter]:
    """SFT: supervised steps on labelled examples, at a constant rate.

    Two warm-up steps go before, at a third and two thirds of it, unless the target says otherwise.

    The start is s * generated + (1 - s) * plain, entry by entry, with s = `init_scale`. At 0 it is
    the plain initialisation, as if there were no generator.
    With a constant rate the first s steps of a longer training are the training of s steps. So one
    trajectory yields every step count in `at_steps` exactly.
    Returns: {steps: adapter} for `sft_steps` and `at_steps`.
    """
    lm = target.lm
    steps = strategy["sft_steps"]
    size = min(strategy["batch_size"], len(labelled))

    # the start: a share of the target's adapter, the rest plain
    share = strategy["init_scale"]
    plain = lora.init_adapter(lm.layout, target.seed)
    start = {k: share * v + (1 - share) * plain[k] for k, v in target.start.items()}

    # whole passes over the examples, each shuffled anew
    rows = [scoring.make_row(lm, example) for example in labelled]
    rng = runtime.rng_for(target.seed, "sft", target.name, len(labelled), size)
    passes = 1 + steps * size // len(rows)
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(passes)])
    batches = order[: steps * size].reshape(steps, size)

    # the gold answer's tokens alone, or also the choice among the options
    loss_fn = scoring.choice_loss if strategy["loss"] == "choice" else scoring.lm_loss
    trained = {}
    with AdapterTrainer(lm.model, lm.layout, start) as trainer:
        for step, picked in enumerate(batches, 1):
            batch = [rows[i] for i in picked]
            loss = trainer.backward(scoring.loss_in_parts(lm, batch, loss_fn))
            if not math.isfinite(loss):
                raise FloatingPointError(f"at step {step}")
            share_of_rate = 1.0
            if target.warm_up:
                share_of_rate = min(1.0, step / 3)
            trainer.step(strategy["learning_rate"] * share_of_rate)
            if step in (steps, *at_steps):  # a copy: training goes on
                trained[step] = trainer.adapter()
    return trained


def score_refined(
    lm: LM,
    refined: Refined,
    examples: list[Example],
    cache: dict | None = None,
    tokens: int = 0,
) -> list[Scores]:
    """Score examples with what a strategy made, and with `tokens` let it answer.

    Args:
        cache: scores of adapters that several ensembles share.
        tokens: of a written answer, at most; 0 = none is written.
    """
    if refined.router is not None:
        return _score_routed(lm, refined, examples, tokens)
    if refined.shots and examples:
        with icl.in_front(lm, refined.shots, examples, tokens):
            return answers.answer_examples(lm, None, examples, tokens=tokens)

    cache = {} if cache is None else cache
    ids = tuple(example.id for example in examples)
    each = []
    for adapter in refined.adapters:
        key = (id(adapter), refined.slot, ids, tokens)
        if key not in cache:
            slot = refined.slot
            found = answers.answer_examples(lm, adapter, examples, slot=slot, tokens=tokens)
            # the adapter is kept beside its scores, so that its id stays its own
            cache[key] = adapter, found
        each.append(cache[key][1])
    if not refined.combine:
        return each[0]

    pooled = []
    for scores in zip(*each, strict=True):  # every adapter's scores of one example
        raw = combine([s.raw for s in scores], refined.combine)
        norm = combine([s.norm for s in scores], refined.combine)
        together = Scores(raw, norm)
        if tokens:
            together = pool_answers(scores, together, refined.combine)
        pooled.append(together)
    return pooled


def pool_answers(each: list[Scores], together: Scores, method: str) -> Scores:
    """The written answer of several adapters: always one that one of them wrote.

    majority_vote   the option that most adapters name. Ties go to the larger summed probability.
    the others      of the options named, the best by the adapters' combined letter probabilities.
    Answers without options are voted on, as numbers or expressions; the first of equals wins.

    Args:
        each: every adapter's scores of one example, with its answer.
        together: their combined option scores.
    """
    if len(together.raw) == 1:
        finals = [answers.final_answer(s.text, strict=False) for s in each]
        # what names no number is no vote, unless nothing else was written
        named = [final for final in finals if final] or finals
        winner = finals.index(max(named, key=named.count))
        return dataclasses.replace(together, text=each[winner].text)

    named = {}
    for reading in scoring.WRITTEN:
        picks = [s.pick(reading) for s in each]
        named[reading] = _vote(picks, [s.raw for s in each], together.raw, method)
    # the text of the first adapter that wrote it
    writers = [s for s in each if s.lenient == named["lenient"]]
    return dataclasses.replace(together, text=writers[0].text, **named)


def _vote(picks, raw, together, method):
    """The winner among the options that were named, or None."""
    candidates = sorted({option for option in picks if option is not None})
    if not candidates:
        return None
    if method != "majority_vote":
        return max(candidates, key=lambda option: together[option])
    mean = combine(raw, "mean_probability")
    return max(candidates, key=lambda option: (picks.count(option), mean[option]))


def _score_routed(lm, refined, examples, tokens):
    """Score each question with its own adapter."""
    choice = route(refined, examples)
    scores = {}
    # questions grouped by their adapter, so that each adapter is swapped in once
    for number in sorted(set(choice)):
        group = [i for i, chosen in enumerate(choice) if chosen == number]
        asked = [examples[i] for i in group]
        found = answers.answer_examples(lm, refined.adapters[number], asked, tokens=tokens)
        scores.update(zip(group, found, strict=True))
    return [scores[i] for i in range(len(examples))]


def route(refined: Refined, examples: list[Example]) -> list[int]:
    """The number of the adapter for each question: that of the nearest prompt batch.

    Distances are Euclidean (DeGAML, footnote 6; docs/choices.md, 7).
    avg_sim_score (M1)      mean distance to the batch's prompts.
    avg_prompt_embed (M2)   distance to their mean embedding.
    """
    # by the encoder that conditions the generator, so that questions and prompts are comparable
    questions = refined.router.embed(examples)
    distances = []
    for batch in refined.router.batches:
        if refined.combine == "avg_sim_score":
            distances.append(torch.cdist(questions, batch).mean(1))
        else:
            distances.append((questions - batch.mean(0)).norm(dim=1))
    return torch.stack(distances).argmin(0).tolist()


def combine(scores: list[tuple[float, ...]], method: str) -> tuple[float, ...]:
    """One score per option from several adapters' scores. The largest is the ensemble's answer.

    Each adapter counts by log p, its log-softmax over the options.
    sum_logprobs       the mean of log p, which ranks as the sum does.
    max_confidence     the largest log p of any adapter.
    majority_vote      the mean of p, its largest value moved to the option with most votes. Ties go
                       to the larger summed probability, then to the first option.
    mean_probability   the mean of p: a Bayesian prediction (ABMLL), no method of TTS.
    """
    # normalised, as adapters may differ in how likely they find every option
    log_p = torch.log_softmax(torch.tensor(scores, dtype=torch.float64), -1)
    if len(scores) == 1:
        return tuple(log_p[0].tolist())
    if method == "sum_logprobs":
        return tuple(log_p.mean(0).tolist())
    if method == "max_confidence":
        return tuple(log_p.max(0).values.tolist())
    mean = log_p.exp().mean(0)
    if method == "majority_vote":
        votes = torch.bincount(log_p.argmax(-1), minlength=len(mean))
        # half a probability decides ties and never outweighs a vote
        winner = int((votes + mean / 2).argmax())
        # swapped, not raised: it stays a distribution
        top = int(mean.argmax())
        mean[[winner, top]] = mean[[top, winner]]
    return tuple(mean.log().tolist())
