"""The strategy families, as data (a validated JSON object) and as execution on a generated adapter.

TTT      test-time training on unlabelled prompts          (paper D, F.1; paper T, G.1; TLM)
LORA     two-subspace mixing of the adapter                (paper T, G.2, eq. 9-11)
TTS      several generated adapters, routed or ensembled   (paper T, G.3)
Latent   per-question steering of the last hidden state    (paper T, G.4, Algorithm 3; SLOT)
SFT      supervised steps on the support labels            (ours; paper D calls its families "not exhaustive")

Each family takes (target, parameters) and returns a `Refined` that `score_refined` can score. `none` keeps the adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import lora
import runtime
import scoring
from config import UserError
from data import Example
from lora import Adapter, AdapterTrainer
from scoring import LM, Row, Scores

METHODS = ("avg_sim_score", "avg_prompt_embed", "max_confidence", "majority_vote", "sum_logprobs")
ROUTERS = METHODS[:2]
_ALIASES = {"TTL": "TTT", "LORA": "LORA", "LORA_MIXING": "LORA", "LS": "Latent", "LATENT": "Latent"}


@dataclass(frozen=True)
class Strategy:
    """A validated choice of family and fields. Its canonical JSON is its identity and cache key."""

    family: str
    fields: tuple[tuple[str, object], ...] = ()

    def __post_init__(self):
        object.__setattr__(
            self, "fields", tuple(sorted(self.fields))
        )  # equal whatever order they were given in

    def __getitem__(self, name: str):
        return dict(self.fields)[name]

    @classmethod
    def from_dict(cls, obj: dict) -> Strategy:
        """The inverse of `as_dict`, for what was validated before it was stored."""
        return cls(obj["family"], tuple((k, v) for k, v in obj.items() if k != "family"))

    def as_dict(self) -> dict:
        return {"family": self.family, **dict(self.fields)}

    def but(self, **fields) -> Strategy:
        """The same with other values."""
        return Strategy(self.family, tuple((dict(self.fields) | fields).items()))

    @property
    def plain(self) -> bool:
        """Does it start from nothing of the generated adapter?"""
        return self.family == "SFT" and not self["init_scale"]

    def __str__(self) -> str:
        return json.dumps(self.as_dict(), sort_keys=True)


KEEP = Strategy("none")


def schema(bounds) -> dict[str, dict[str, dict]]:
    """{family: {field: JSON schema}}: the action space under `strategies.*` of the configuration."""

    def integer(high, low=1):
        return {"type": "integer", "minimum": low, "maximum": high}

    def number(low, high):
        return {"type": "number", "minimum": low, "maximum": high}

    b = bounds
    return {
        "TTT": {
            "ttl_steps": integer(b.max_ttl_steps),
            "learning_rate": number(1e-7, b.max_ttl_lr),
            "batch_size": integer(b.max_batch_size),
            "shuffle_data": {"type": "boolean"},
        },
        "LORA": {"lambda": number(0, 1)},
        "TTS": {
            "num_prompt_batches": integer(b.max_prompt_batches),
            "method": {"enum": list(METHODS)},
        },
        "Latent": {
            "slot_steps": integer(b.max_slot_steps, 0),
            "slot_lr": number(1e-4, b.max_slot_lr),
        },
        "SFT": {
            "sft_steps": integer(b.max_sft_steps),
            "learning_rate": number(1e-6, b.max_sft_lr),
            "batch_size": integer(b.max_batch_size),
            "loss": {"enum": ["lm", "choice"]},
            "init_scale": number(0, 1),
        },
    }


def check_grid(bounds) -> None:
    """Raises: UserError: strategies.proposal_grid names what is no field, or a value that no proposal may have."""
    legal = {
        f"{family}.{name}": spec
        for family, fields in schema(bounds).items()
        for name, spec in fields.items()
    }
    for key, values in bounds.proposal_grid.items():
        if key not in legal:
            raise UserError(
                f"strategies.proposal_grid: {key!r} is no field of a strategy; expected one of "
                f"{list(legal)}"
            )
        try:
            for value in values:
                _check(key, value, legal[key])
        except ValueError as e:
            raise UserError(f"strategies.proposal_grid: {e}") from None


def proposal_schema(bounds, families: list[str], explore=None) -> dict:
    """The JSON schema proposals are sampled under: one object per family, fields in order, nothing else.

    Fields listed in `strategies.proposal_grid` take one of the listed values; the others any value in bounds. With
    `explore`, a numpy generator, only a random half of each list is offered: left alone, a small policy proposes the
    same few settings every time.
    """
    options = []
    for family in families:
        fields = {"family": {"enum": [family]}}
        for name, spec in schema(bounds)[family].items():
            grid = bounds.proposal_grid.get(f"{family}.{name}")
            if grid and explore is not None:
                grid = [
                    grid[i] for i in sorted(explore.permutation(len(grid))[: (len(grid) + 1) // 2])
                ]
            fields[name] = {"enum": grid} if grid else spec
        options.append(
            {
                "type": "object",
                "properties": fields,
                "required": list(fields),
                "additionalProperties": False,
            }
        )
    return {"anyOf": options}


def parse_strategy(text: str | dict, bounds, families: list[str]) -> Strategy:
    """Read a proposal: the first balanced {...}, names and aliases resolved, every field checked.

    Raises: ValueError: saying which field, what it is and what is legal. Nothing is silently clipped but a mixing
        ratio outside [0, 1] (docs/choices.md, 6).
    """
    obj = text if isinstance(text, dict) else _first_object(text)
    family = _ALIASES.get(str(obj.get("family")).upper(), str(obj.get("family")))
    if family not in families:
        raise ValueError(f"family {obj.get('family')!r} is not one of {list(families)}")
    spec, out = schema(bounds)[family], {}
    renamed = (
        {"times": "slot_steps", "learning_rate": "slot_lr"}
        if family == "Latent"
        else {"num_lora_adpt": "num_prompt_batches"}
        if family == "TTS"
        else {}
    )
    given = {renamed.get(k, k): v for k, v in obj.items() if k != "family"}
    if extra := sorted(set(given) - set(spec)):
        raise ValueError(f"{family}: unknown field {extra[0]!r}; expected {list(spec)}")
    for name, s in spec.items():
        if name not in given:
            raise ValueError(f"{family}: field {name!r} is missing")
        out[name] = _check(f"{family}.{name}", given[name], s)
    return Strategy(family, tuple(out.items()))


def _first_object(text: str) -> dict:
    decoder = json.JSONDecoder()
    for i, c in enumerate(text):
        if c == "{":
            try:
                obj, _ = decoder.raw_decode(text[i:])
                return obj
            except ValueError:
                continue
    raise ValueError(f"no JSON object in {text[:60]!r}")


def _check(name: str, value, spec: dict):
    if "enum" in spec:
        if value not in spec["enum"]:
            raise ValueError(f"{name} is {value!r}, expected one of {spec['enum']}")
        return value
    if spec["type"] == "boolean":
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, expected true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ValueError(f"{name} is {value!r}, expected a number")
    if spec["type"] == "integer":
        if int(value) != value:
            raise ValueError(f"{name} is {value!r}, expected a whole number")
        value = int(value)
    else:
        value = float(value)
    if name == "LORA.lambda":
        return min(1.0, max(0.0, value))
    if not spec["minimum"] <= value <= spec["maximum"]:
        raise ValueError(f"{name} is {value}, expected {spec['minimum']}..{spec['maximum']}")
    return value


# ---------------------------------------------------------------------------------------------------------- execution


@dataclass
class Source:
    """Where further adapters of a task come from.

    Attributes:
        draw: prompt-batch number -> (adapter, indices of the prompts it was generated from).
        texts: the unlabelled prompts as the model reads them.
        pooled: (prompts, d) their embeddings.
        embed: texts -> (n, d) embeddings.
    """

    draw: Callable[[int], tuple[Adapter, np.ndarray]]
    texts: list[str]
    pooled: Tensor
    embed: Callable[[list[str]], Tensor]


@dataclass
class Target:
    """A task as the strategies see it.

    Attributes:
        start: the adapter to refine.
        bounds: the section `strategies`.
        source: where further adapters come from; None for a baseline's start, which only SFT refines.
        cache: scores of drawn adapters, so that ensembles share them.
    """

    name: str
    lm: LM
    start: Adapter
    bounds: object
    seed: int
    source: Source | None = None
    cache: dict = field(default_factory=dict)


@dataclass
class Router:
    """Chooses an adapter per question: the one whose prompts lie nearest.

    Attributes: batches: per adapter (n, d), the embeddings of its prompts. embed: texts -> (n, d).
    """

    batches: list[Tensor]
    embed: Callable[[list[str]], Tensor]


@dataclass
class Refined:
    """What a strategy made: one adapter, or several with a way to combine them, or latent steering on top.

    Attributes: combine: "" for one adapter, else a TTS method. router: of a method that routes.
    """

    adapters: list[Adapter]
    combine: str = ""
    slot: tuple[int, float] | None = None
    router: Router | None = None
    notes: dict = field(default_factory=dict)


def execute(target: Target, strategy: Strategy, labelled: list[Example] = ()) -> Refined:
    """Carry a strategy out on a target's adapter. `labelled` is read by SFT only."""
    if strategy.family == "TTT":
        return train_on_prompts(target, strategy)
    if strategy.family == "LORA":
        lam = strategy["lambda"]
        return Refined([mix_subspaces(target.start, lam, target.bounds.mix)])
    if strategy.family == "TTS":
        source = target.source
        draws = [source.draw(batch) for batch in range(strategy["num_prompt_batches"])]
        adapters = [adapter for adapter, _ in draws]
        if strategy["method"] not in ROUTERS:
            return Refined(adapters, strategy["method"])
        batches = [source.pooled[torch.as_tensor(index)] for _, index in draws]
        return Refined(adapters, strategy["method"], router=Router(batches, source.embed))
    if strategy.family == "Latent":
        return Refined([target.start], slot=(strategy["slot_steps"], strategy["slot_lr"]))
    if strategy.family == "SFT":
        return Refined([train_on_support(target, strategy, list(labelled))[strategy["sft_steps"]]])
    return Refined([target.start])


def train_on_prompts(target: Target, strategy: Strategy) -> Refined:
    """Test-time training: minimise the input NLL of unlabelled prompts, weighted towards the surprising ones.

    Implements: paper T, eq. 7, with S * ln P in place of eq. 8's S * P (docs/choices.md, 5): weight
    lambda * exp(nll - threshold) where nll > threshold, else 0, detached; mean over the selected prompts. Continues
    from the generated adapter; one step is one update.
    """
    lm = target.lm
    bounds = target.bounds
    texts = target.source.texts
    steps = strategy["ttl_steps"]
    size = strategy["batch_size"]

    # the prompts in order or shuffled once, repeated as often as the steps need
    order = np.arange(len(texts))
    if strategy["shuffle_data"]:
        order = runtime.rng_for(target.seed, "ttt", target.name).permutation(order)
    batches = np.resize(order, steps * size).reshape(-1, size)

    rows: dict[int, Row] = {}
    selected: list[int] = []
    with AdapterTrainer(lm.model, lm.layout, target.start) as trainer:
        for batch in batches:
            for i in batch:
                if i not in rows:
                    rows[i] = scoring.prompt_row(lm, texts[i])
            losses = _surprise_losses(lm, [rows[i] for i in batch], bounds, selected)
            loss = trainer.backward(losses)
            if loss is None:  # no prompt of the batch passes the gate
                continue
            if not math.isfinite(loss):
                raise FloatingPointError("test-time training")
            trainer.step(strategy["learning_rate"])
    notes = {"selected": sum(selected), "seen": batches.size}
    return Refined([trainer.adapter()], notes=notes)


def _surprise_losses(lm: LM, rows: list[Row], bounds, selected: list[int]):
    """Yield (weighted sum, count) of the prompts above the threshold, in parts that fit the memory.

    Their numbers are appended to `selected`.
    """
    parts = scoring.parts_of(lm, rows, all_scored=True)
    for part in parts:
        nll = scoring.prompt_nll(lm, part)
        gate = torch.ones_like(nll, dtype=torch.bool)
        if bounds.ttl_threshold:
            gate = nll.detach() > bounds.ttl_threshold
        count = int(gate.sum())
        selected.append(count)
        if not count:
            del nll  # its graph, before the next part's
            continue
        weight = bounds.ttl_lambda * torch.exp(nll.detach() - bounds.ttl_threshold)
        total = (weight * nll)[gate].sum()
        yield (total / count, 1) if len(parts) == 1 else (total, count)


def mix_subspaces(adapter: Adapter, lam: float, mode: str) -> Adapter:
    """Two-subspace mixing of halves A = [A1; A2], B = [B1, B2], by A' = M A, so that it stays a LoRA of rank r.

    interp   M = (1 - lam) I + lam [[I, I], [I, I]]: paper T, eq. 11 at lam = 1, the plain adapter at 0.
    magdir   Frobenius norm and direction of plain and full mixing interpolated separately (paper D, F.1).
    An odd last row is not mixed.
    """
    out = dict(adapter)
    for key_a, a in adapter.items():
        if "lora_A" not in key_a:
            continue
        b = adapter[key_a.replace("lora_A", "lora_B")]
        h = a.shape[0] // 2
        swapped = torch.cat(
            [a[h : 2 * h], a[:h], torch.zeros_like(a[2 * h :])]
        )  # (butterfly - I) A
        if mode == "interp" or lam == 0:
            out[key_a] = a + lam * swapped
        else:
            plain, full = _update_norm(a, b), _update_norm(a + swapped, b)
            if plain == 0 or full == 0:
                continue
            p, q = (1 - lam) / plain, lam / full
            direction = (p + q) * a + q * swapped
            size = (1 - lam) * plain + lam * full
            out[key_a] = direction * (size / max(_update_norm(direction, b), 1e-30))
    return out


def _update_norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of B A without forming it."""
    return float(((b.t() @ b) * (a @ a.t())).sum().clamp_min(0).sqrt())


def train_on_support(
    target: Target, strategy: Strategy, labelled: list[Example], at_steps: list[int] = ()
) -> dict[int, Adapter]:
    """Supervised steps on labelled examples, from the target's adapter; constant rate after two warm-up steps.

    `init_scale` s is the share of the generated adapter in the start, s generated + (1 - s) plain, entry by entry: 0 is
    the plain initialisation, as if there were no generator. With a constant rate the first s steps of a longer training
    are the training of s steps, so one trajectory yields every step count in `at_steps` exactly.
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

    loss_fn = scoring.choice_loss if strategy["loss"] == "choice" else scoring.lm_loss
    trained: dict[int, Adapter] = {}
    with AdapterTrainer(lm.model, lm.layout, start) as trainer:
        for step in range(steps):
            batch = [rows[i] for i in order[step * size : (step + 1) * size]]
            loss = trainer.backward(scoring.loss_in_parts(lm, batch, loss_fn))
            if not math.isfinite(loss):
                raise FloatingPointError(f"at step {step + 1}")
            # two steps of warm-up
            trainer.step(strategy["learning_rate"] * min(1.0, (step + 1) / 3))
            if step + 1 == steps or step + 1 in at_steps:
                trained[step + 1] = trainer.adapter()
    return trained


def execute_finite(target: Target, strategy: Strategy, support: list) -> Refined:
    """`execute` of a chosen strategy. Raises: UserError: its training diverged."""
    try:
        return execute(target, strategy, support)
    except FloatingPointError as e:
        raise UserError(
            f"{target.name}: the loss of {strategy} is not finite ({e}); lower the rate "
            "(strategies.max_sft_lr, strategies.proposal_grid or baselines.sft)"
        ) from None


# ------------------------------------------------------------------------------------------------------------ scoring


def score_refined(
    lm: LM, refined: Refined, examples: list[Example], cache: dict | None = None
) -> list[Scores]:
    """Score examples with what a strategy made.

    Args: cache: scores of adapters that several ensembles share.
    """
    if refined.router is None:
        each = [
            _score_cached(lm, adapter, examples, refined.slot, cache)
            for adapter in refined.adapters
        ]
        return pool_scores(each, refined.combine)

    # routed: questions grouped by their adapter, so that each adapter is swapped in once
    texts = [scoring.input_text(lm, example) for example in examples]
    choice = route(refined, texts)
    scores: list[Scores | None] = [None] * len(examples)
    for number, adapter in enumerate(refined.adapters):
        group = [i for i, chosen in enumerate(choice) if chosen == number]
        if not group:
            continue
        found = scoring.score_examples(lm, adapter, [examples[i] for i in group])
        for i, score in zip(group, found, strict=True):
            scores[i] = score
    return scores


def pool_scores(each: list[list[Scores]], method: str) -> list[Scores]:
    """One adapter's scores, or several adapters' combined example by example."""
    if not method:
        return each[0]
    return [
        Scores(*(combine([s.of(m) for s in group], method) for m in ("raw", "norm")))
        for group in zip(*each, strict=True)
    ]


def _score_cached(
    lm: LM, adapter: Adapter, examples: list[Example], slot, cache: dict | None
) -> list[Scores]:
    """Drawn adapters are scored once per example set, however many ensembles share them."""
    if cache is None:
        return scoring.score_examples(lm, adapter, examples, slot=slot)
    key = (id(adapter), slot, tuple(example.id for example in examples))
    if key not in cache:
        # the adapter is kept beside its scores, so that its id stays its own
        cache[key] = adapter, scoring.score_examples(lm, adapter, examples, slot=slot)
    return cache[key][1]


def route(refined: Refined, texts: list[str]) -> list[int]:
    """Adapter per question: the prompt batch nearest to it in Euclidean distance (DeGAML, footnote 6).

    avg_sim_score (M1): mean distance to the batch's prompts.
    avg_prompt_embed (M2): distance to their mean embedding.
    """
    questions = refined.router.embed(texts)
    distances = []
    for batch in refined.router.batches:
        if refined.combine == "avg_sim_score":
            distances.append(torch.cdist(questions, batch).mean(1))
        else:
            distances.append((questions - batch.mean(0)).norm(dim=1))
    return torch.stack(distances).argmin(0).tolist()


def combine(scores: list[tuple[float, ...]], method: str) -> tuple[float, ...]:
    """One score per option from several adapters', so that the largest is the ensemble's answer.

    With log p_a(o) = log-softmax over the options: sum_logprobs sums them, max_confidence takes the largest over
    adapters, majority_vote is the mean probability with its largest value moved to the option most adapters voted for,
    ties by summed probability, then option order. mean_probability, a Bayesian prediction, is no method of TTS.
    """
    log_p = torch.log_softmax(torch.tensor(scores, dtype=torch.float64), -1)
    if len(scores) == 1:
        return tuple(log_p[0].tolist())
    if method == "sum_logprobs":
        return tuple((log_p.sum(0) / len(scores)).tolist())
    if method == "max_confidence":
        return tuple(log_p.max(0).values.tolist())
    mean = log_p.exp().mean(0)
    if method == "mean_probability":
        return tuple(mean.log().tolist())
    votes = torch.bincount(log_p.argmax(-1), minlength=len(mean))
    winner, top = int((votes + mean / 2).argmax()), int(mean.argmax())  # ties by summed probability
    mean[[winner, top]] = mean[
        [top, winner]
    ]  # still a distribution, and its largest entry is the vote's winner
    return tuple(mean.log().tolist())
