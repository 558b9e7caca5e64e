"""The action space and its execution: validation, mixing, test-time training, ensembles, steering, SFT."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import tiny_rows

import scoring
import strategies
from config import load_config
from data import make_example
from lora import LoraLinear, init_adapter, swap_adapter
from scoring import Scores, gold_logprob, prompt_nll, prompt_row, score_examples
from strategies import (
    KEEP,
    METHODS,
    ROUTERS,
    Refined,
    Strategy,
    Target,
    combine,
    execute,
    mix_subspaces,
    parse_strategy,
    proposal_schema,
    route,
    schema,
    score_refined,
    train_on_prompts,
    train_on_support,
)

BOUNDS = load_config([])[0].strategies
FAMILIES = ["TTT", "LORA", "TTS", "Latent", "SFT"]
ENSEMBLES = ("max_confidence", "majority_vote", "sum_logprobs")
GOOD = {
    "TTT": {
        "family": "TTT",
        "ttl_steps": 25,
        "learning_rate": 1e-5,
        "batch_size": 4,
        "shuffle_data": True,
    },
    "LORA": {"family": "LORA", "lambda": 0.5},
    "TTS": {"family": "TTS", "num_prompt_batches": 3, "method": "majority_vote"},
    "Latent": {"family": "Latent", "slot_steps": 5, "slot_lr": 0.1},
    "SFT": {
        "family": "SFT",
        "sft_steps": 10,
        "learning_rate": 2e-4,
        "batch_size": 4,
        "loss": "choice",
        "init_scale": 0.5,
    },
}


def strategy(family: str, **fields) -> Strategy:
    return Strategy(family, tuple(fields.items()))


def ttt(steps: int, lr: float, size: int) -> Strategy:
    return strategy("TTT", ttl_steps=steps, learning_rate=lr, batch_size=size, shuffle_data=True)


def random_adapter(layout, seed: int, size: float = 0.1) -> dict:
    g = torch.Generator().manual_seed(seed)
    shapes = [pair for a, sa, b, sb in layout.keys() for pair in ((a, sa), (b, sb))]
    return {k: size * torch.randn(s, generator=g) for k, s in shapes}


def examples_of(task: str, count: int) -> list:
    return [make_example(task, r, "cloze") for r in tiny_rows(task, count)]


@pytest.fixture
def target(tiny_lm) -> Target:
    """A target with a random start adapter, four random draws, and embeddings that depend on the text."""
    texts = [e.text for e in examples_of("delta", 12)]
    drawn = {b: (random_adapter(tiny_lm.layout, 10 + b), np.arange(4) + b) for b in range(4)}

    def embed(words):
        g = [torch.Generator().manual_seed(len(w) * 1000 + ord(w[-2])) for w in words]
        return torch.nn.functional.normalize(
            torch.stack([torch.randn(6, generator=x) for x in g]), dim=-1
        )

    start = random_adapter(tiny_lm.layout, 0)
    bounds = BOUNDS.model_copy()
    return Target(
        "delta", tiny_lm, start, drawn.__getitem__, texts, embed(texts), embed, bounds, seed=1
    )


def same(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("family", FAMILIES)
def test_good_objects_are_read(family):
    """Every family's complete object is read back with all its fields."""
    s = parse_strategy(json.dumps(GOOD[family]), BOUNDS, FAMILIES)
    assert s.family == family and s.as_dict() == GOOD[family]


BAD = [
    ("TTT", {"ttl_steps": 0}, "ttl_steps"),
    ("TTT", {"ttl_steps": 51}, "ttl_steps"),
    ("TTT", {"ttl_steps": 2.5}, "ttl_steps"),
    ("TTT", {"ttl_steps": "many"}, "ttl_steps"),
    ("TTT", {"ttl_steps": True}, "ttl_steps"),
    ("TTT", {"ttl_steps": None}, "ttl_steps"),
    ("TTT", {"learning_rate": 0}, "learning_rate"),
    ("TTT", {"learning_rate": 2e-3}, "learning_rate"),
    ("TTT", {"learning_rate": -1e-4}, "learning_rate"),
    ("TTT", {"learning_rate": math.nan}, "learning_rate"),
    ("TTT", {"learning_rate": "1e-4"}, "learning_rate"),
    ("TTT", {"batch_size": 0}, "batch_size"),
    ("TTT", {"batch_size": 65}, "batch_size"),
    ("TTT", {"shuffle_data": "true"}, "shuffle_data"),
    ("TTT", {"shuffle_data": 1}, "shuffle_data"),
    ("LORA", {"lambda": "half"}, "lambda"),
    ("LORA", {"lambda": math.nan}, "lambda"),
    ("LORA", {"lambda": math.inf}, "lambda"),
    ("LORA", {"lambda": False}, "lambda"),
    ("LORA", {"lambda": [1]}, "lambda"),
    ("TTS", {"num_prompt_batches": 0}, "num_prompt_batches"),
    ("TTS", {"num_prompt_batches": 51}, "num_prompt_batches"),
    ("TTS", {"method": "vote"}, "method"),
    ("TTS", {"method": None}, "method"),
    ("TTS", {"method": ["x"]}, "method"),
    ("Latent", {"slot_steps": -1}, "slot_steps"),
    ("Latent", {"slot_steps": 21}, "slot_steps"),
    ("Latent", {"slot_lr": 0}, "slot_lr"),
    ("Latent", {"slot_lr": 1.5}, "slot_lr"),
    ("SFT", {"sft_steps": 0}, "sft_steps"),
    ("SFT", {"sft_steps": 51}, "sft_steps"),
    ("SFT", {"learning_rate": 1e-2}, "learning_rate"),
    ("SFT", {"batch_size": 1.5}, "batch_size"),
    ("SFT", {"loss": "mse"}, "loss"),
    ("SFT", {"init_scale": 1.5}, "init_scale"),
    ("SFT", {"init_scale": -0.1}, "init_scale"),
]


@pytest.mark.parametrize("family, change, field", BAD, ids=str)
def test_bad_field_is_named(family, change, field):
    """Out of range or of the wrong type is invalid, never clipped, and the text names the field."""
    with pytest.raises(ValueError, match=f"{family}.*{field}"):
        parse_strategy(GOOD[family] | change, BOUNDS, FAMILIES)


@pytest.mark.parametrize("family, field", [(f, k) for f in FAMILIES for k in schema(BOUNDS)[f]])
def test_missing_field_is_named(family, field):
    """Every field is required."""
    obj = {k: v for k, v in GOOD[family].items() if k != field}
    with pytest.raises(ValueError, match=f"{family}.*{field}.*missing"):
        parse_strategy(obj, BOUNDS, FAMILIES)


def test_unknown_field_and_family_are_named():
    """What does not belong is refused by name; a family that was not offered is unknown too."""
    with pytest.raises(ValueError, match="LORA.*ratio"):
        parse_strategy(GOOD["LORA"] | {"ratio": 1}, BOUNDS, FAMILIES)
    for family in ("RAG", None, ["TTT"], {}):
        with pytest.raises(ValueError, match="family"):
            parse_strategy(GOOD["LORA"] | {"family": family}, BOUNDS, FAMILIES)
    with pytest.raises(ValueError, match="SFT"):
        parse_strategy(GOOD["SFT"], BOUNDS, FAMILIES[:4])


def test_a_number_of_any_length_is_only_invalid():
    """A proposal is text of a model: no digit string may do more than make it invalid."""
    with pytest.raises(ValueError, match="ttl_steps"):
        parse_strategy(json.dumps(GOOD["TTT"] | {"ttl_steps": 10**400}), BOUNDS, FAMILIES)


@pytest.mark.parametrize(
    "given, meant",
    [
        (GOOD["TTT"] | {"family": "TTL"}, GOOD["TTT"]),
        (GOOD["LORA"] | {"family": "LoRA"}, GOOD["LORA"]),
        (GOOD["Latent"] | {"family": "LS"}, GOOD["Latent"]),
        ({"family": "Latent", "times": 5, "learning_rate": 0.1}, GOOD["Latent"]),
        ({"family": "TTS", "num_lora_adpt": 3, "method": "majority_vote"}, GOOD["TTS"]),
    ],
)
def test_aliases(given, meant):
    """Names the papers also use mean the canonical ones and give the same identity."""
    assert str(parse_strategy(given, BOUNDS, FAMILIES)) == str(
        parse_strategy(meant, BOUNDS, FAMILIES)
    )


def test_only_the_mixing_ratio_is_clipped():
    """lambda outside [0, 1] is clipped."""
    objects = [{"family": "LORA", "lambda": v} for v in (-0.5, 1.7, 0, 0.25)]
    assert [parse_strategy(o, BOUNDS, FAMILIES)["lambda"] for o in objects] == [0.0, 1.0, 0.0, 0.25]


def test_first_balanced_object_of_noisy_text():
    """Text around the object, broken braces before it and objects after it do not matter."""
    text = (
        'Sure {so}: {"family": "TTS", {"family": "LORA", "lambda": 0.25} or '
        '{"family": "LORA", "lambda": 1}'
    )
    assert parse_strategy(text, BOUNDS, FAMILIES) == strategy("LORA", **{"lambda": 0.25})
    for text in ("", "no object", '{"family": "LORA", "lambda": 0.', "[1, 2]"):
        with pytest.raises(ValueError, match="JSON"):
            parse_strategy(text, BOUNDS, FAMILIES)


def test_identity_ignores_order_and_spelling():
    """Field order, 5 or 5.0 and 1e-3 or 0.001 are one strategy, one key."""
    one = '{"family": "TTT", "ttl_steps": 5, "learning_rate": 1e-3, "batch_size": 4, "shuffle_data": false}'
    two = (
        '{"shuffle_data": false, "batch_size": 4.0, "learning_rate": 0.001, "ttl_steps": 5.0, '
        '"family": "TTT"}'
    )
    a, b = (parse_strategy(t, BOUNDS, FAMILIES) for t in (one, two))
    assert a == b and hash(a) == hash(b) and str(a) == str(b)
    assert json.loads(str(a)) == a.as_dict()


def test_proposal_schema_offers_the_grid():
    """A field with a grid takes its values only; one object per family with nothing left open."""
    bounds = BOUNDS.model_copy(update={"proposal_grid": {"LORA.lambda": [0.5, 1.0]}})
    options = proposal_schema(bounds, ["LORA", "TTT"])["anyOf"]
    assert [o["properties"]["family"]["enum"] for o in options] == [["LORA"], ["TTT"]]
    assert options[0]["properties"]["lambda"] == {"enum": [0.5, 1.0]}
    assert options[1]["properties"]["ttl_steps"]["maximum"] == bounds.max_ttl_steps
    for o in options:
        assert o["additionalProperties"] is False and o["required"] == list(o["properties"])


# ----------------------------------------------------------------------------------------------------- mixing


def halves(rank: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(rank, 6, generator=g), torch.randn(5, rank, generator=g)
    return {"m.lora_A.weight": a, "m.lora_B.weight": b}, a, b


def update(adapter: dict) -> torch.Tensor:
    return adapter["m.lora_B.weight"] @ adapter["m.lora_A.weight"]


def test_mix_identity_at_zero():
    """lambda 0 is the plain adapter, bit for bit."""
    adapter, *_ = halves(4)
    for mode in ("interp", "magdir"):
        assert same(mix_subspaces(adapter, 0.0, mode), adapter)


def test_mix_is_the_butterfly_at_one():
    """lambda 1: dW = (B1 + B2)(A1 + A2), paper T eq. 11; halfway keeps half of the cross terms."""
    adapter, a, b = halves(4)
    a1, a2, b1, b2 = a[:2], a[2:], b[:, :2], b[:, 2:]
    full = (b1 + b2) @ (a1 + a2)
    for mode in ("interp", "magdir"):
        torch.testing.assert_close(update(mix_subspaces(adapter, 1.0, mode)), full)
    half = b1 @ a1 + b2 @ a2 + 0.5 * (b1 @ a2 + b2 @ a1)
    torch.testing.assert_close(update(mix_subspaces(adapter, 0.5, "interp")), half)
    torch.testing.assert_close(update(mix_subspaces(adapter, 0.5, "halves")), 0.5 * full)
    fifth = (b1 + b2) @ (0.2 * a1 + 0.8 * a2)
    torch.testing.assert_close(update(mix_subspaces(adapter, 0.2, "halves")), fifth)


@pytest.mark.parametrize("lam", [0.25, 0.5, 0.75])
def test_mix_magnitude_and_direction(lam):
    """magdir: the Frobenius norm is interpolated, the direction is that of the interpolated unit updates."""
    adapter, a, b = halves(4)
    plain, full = b @ a, (b[:, :2] + b[:, 2:]) @ (a[:2] + a[2:])
    got = update(mix_subspaces(adapter, lam, "magdir"))
    assert float(got.norm()) == pytest.approx(
        float((1 - lam) * plain.norm() + lam * full.norm()), rel=1e-5
    )
    direction = (1 - lam) * plain / plain.norm() + lam * full / full.norm()
    torch.testing.assert_close(got / got.norm(), direction / direction.norm())


@pytest.mark.parametrize("mode", ["interp", "halves"])
def test_mix_leaves_an_odd_row_and_b_alone(mode):
    """An odd last row, B, and the adapter that was given stay as they are."""
    adapter, a, b = halves(5)
    before = {k: v.clone() for k, v in adapter.items()}
    out = mix_subspaces(adapter, 0.7, mode)
    assert torch.equal(out["m.lora_A.weight"][4], a[4]) and torch.equal(out["m.lora_B.weight"], b)
    assert not torch.equal(out["m.lora_A.weight"][:4], a[:4])
    assert same(adapter, before)


@pytest.mark.parametrize("mode", ["interp", "halves", "magdir"])
def test_mix_of_an_untrained_adapter_is_no_update(mode):
    """With B = 0 nothing appears and nothing is undefined."""
    adapter, _, b = halves(4)
    out = mix_subspaces(adapter | {"m.lora_B.weight": torch.zeros_like(b)}, 0.5, mode)
    assert torch.equal(update(out), torch.zeros(5, 6))


# ----------------------------------------------------------------------------------------- test-time training


def test_ttt_sample_weights(target, monkeypatch):
    """S = 0.1 exp(nll - 3) above the threshold, 0 at or below, detached; mean over the selected prompts."""
    caught = {}

    def catch(model, layout, adapter, batches, loss_fn, **kwargs):
        caught["loss_fn"] = loss_fn
        return adapter

    monkeypatch.setattr(strategies, "train_adapter", catch)
    train_on_prompts(target, ttt(1, 1e-3, 4))

    def loss_of(values):
        nll = torch.tensor(values, requires_grad=True)
        monkeypatch.setattr(strategies, "prompt_nll", lambda lm, rows: nll)
        parts = [loss / count for loss, count in caught["loss_fn"](list(range(len(values))))]
        return parts[0] if parts else None, nll

    loss, nll = loss_of([3.5, 2.9, 3.0])
    assert loss.item() == pytest.approx(0.16487 * 3.5, rel=1e-4)
    loss.backward()
    assert nll.grad.tolist() == pytest.approx([0.16487, 0.0, 0.0], rel=1e-4)
    loss, nll = loss_of([3.5, 4.5, 1.0])
    loss.backward()
    assert nll.grad.tolist() == pytest.approx([0.16487 / 2, 0.1 * math.exp(1.5) / 2, 0.0], rel=1e-4)
    assert loss_of([2.9, 3.0])[0] is None


def test_ttt_without_a_selected_prompt_changes_nothing(target):
    """No prompt above the threshold: the adapter is the given one, and the notes say so."""
    target.bounds.ttl_threshold = 100.0
    out = train_on_prompts(target, ttt(3, 1e-3, 4))
    assert same(out.adapters[0], target.start)
    assert out.notes == {"selected": 0, "seen": 12}


def test_ttt_lowers_the_prompts_nll(target):
    """Without a gate, steps on the prompts lower their mean NLL, from the given adapter on."""
    target.bounds.ttl_threshold = 0.0
    lm, rows = target.lm, [prompt_row(target.lm, t) for t in target.texts]

    def mean_nll(adapter):
        swap_adapter(lm.model, lm.layout, adapter)
        with torch.no_grad():
            value = float(prompt_nll(lm, rows).mean())
        swap_adapter(lm.model, lm.layout, None)
        return value

    many = train_on_prompts(target, ttt(20, 1e-2, 6))
    assert mean_nll(many.adapters[0]) < mean_nll(target.start) - 0.1
    assert many.notes == {"selected": 120, "seen": 120}


@pytest.mark.parametrize("family", ["TTT", "SFT"])
def test_parts_of_a_batch_train_like_the_whole(target, monkeypatch, family):
    """Where a GPU cannot hold a batch: the same mean over what a gate leaves, from unequal parts."""
    lm, labelled = target.lm, examples_of("delta", 5)
    with torch.no_grad():
        target.bounds.ttl_threshold = float(
            prompt_nll(lm, [prompt_row(lm, t) for t in target.texts]).median()
        )
    chosen = (
        ttt(3, 1e-2, 5)
        if family == "TTT"
        else strategy(
            "SFT", sft_steps=3, learning_rate=1e-2, batch_size=5, loss="choice", init_scale=1.0
        )
    )
    whole = execute(target, chosen, labelled)
    for module in (strategies, scoring):
        monkeypatch.setattr(
            module, "parts_of", lambda lm, rows, all_scored=False: [rows[:3], rows[3:]]
        )
    parts = execute(target, chosen, labelled)
    assert parts.notes == whole.notes and not same(whole.adapters[0], target.start)
    off, moved = (
        sum(float((a[k] - b[k]).abs().sum()) for k in a)
        for a, b in ((parts.adapters[0], whole.adapters[0]), (whole.adapters[0], target.start))
    )
    assert off < 0.01 * moved  # not none: AdamW steps on the rounding of a zero gradient


def test_ttt_continues_from_the_given_adapter(target):
    """One tiny step moves every entry by at most the learning rate: no fresh initialisation."""
    target.bounds.ttl_threshold = 0.0
    out = train_on_prompts(target, ttt(1, 1e-6, 4))
    moved = max(float((out.adapters[0][k] - v).abs().max()) for k, v in target.start.items())
    assert 0 < moved < 2e-6


# -------------------------------------------------------------------------------------------- the frozen base

EXECUTED = [
    KEEP,
    ttt(2, 1e-2, 4),
    strategy("LORA", **{"lambda": 0.5}),
    strategy("Latent", slot_steps=2, slot_lr=0.1),
    strategy("SFT", sft_steps=2, learning_rate=1e-2, batch_size=4, loss="choice", init_scale=1.0),
    *(strategy("TTS", num_prompt_batches=2, method=m) for m in METHODS),
]


@pytest.mark.parametrize("choice", EXECUTED, ids=str)
def test_execution_leaves_the_base_bit_unchanged(target, choice):
    """After any strategy the bare model gives the same logits, and the start adapter is untouched."""
    model, ids = target.lm.model, torch.arange(40).view(2, 20)
    start = {k: v.clone() for k, v in target.start.items()}
    with torch.no_grad():
        before = model(ids).logits
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    support = examples_of("delta", 6)
    scores = score_refined(target, execute(target, choice, support), support)
    assert [len(s.raw) for s in scores] == [len(e.options) for e in support]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(m.A is None and m.B is None for m in model.modules() if isinstance(m, LoraLinear))
    assert same(target.start, start)


def test_a_failed_training_leaves_the_base_bare(target):
    """A loss that is not finite ends training without leaving its adapter in the model."""
    start = dict(target.start)
    start[next(iter(start))] = torch.full_like(next(iter(start.values())), math.nan)
    target.start = start
    with pytest.raises(FloatingPointError):
        execute(
            target,
            strategy(
                "SFT", sft_steps=1, learning_rate=1e-3, batch_size=2, loss="lm", init_scale=1.0
            ),
            examples_of("delta", 4),
        )
    assert all(m.A is None for m in target.lm.model.modules() if isinstance(m, LoraLinear))


# -------------------------------------------------------------------------------------------------- ensembles

TABLE = [
    tuple(math.log(p) for p in row)
    for row in ((0.5, 0.4, 0.1), (0.5, 0.4, 0.1), (0.001, 0.3, 0.699))
]


def pick(values) -> int:
    return max(range(len(values)), key=values.__getitem__)


def test_combine_by_hand():
    """Three adapters on which the three ensembles disagree."""
    assert pick(combine(TABLE, "majority_vote")) == 0  # two votes of three
    assert pick(combine(TABLE, "sum_logprobs")) == 1  # ln .4 + ln .4 + ln .3 is the largest sum
    assert pick(combine(TABLE, "max_confidence")) == 2  # .699 is the largest probability
    sums = combine(TABLE, "sum_logprobs")
    want = [
        sum(math.log(p) for p in column)
        for column in ((0.5, 0.5, 0.001), (0.4, 0.4, 0.3), (0.1, 0.1, 0.699))
    ]
    assert [s - sums[0] for s in sums] == pytest.approx([(w - want[0]) / 3 for w in want])
    assert combine(TABLE, "max_confidence") == pytest.approx(
        [math.log(p) for p in (0.5, 0.4, 0.699)]
    )


def test_majority_ties():
    """Equal votes go to the larger summed probability, and to the first option if that ties as well."""
    tie = [tuple(math.log(p) for p in row) for row in ((0.6, 0.3, 0.1), (0.1, 0.8, 0.1))]
    assert pick(combine(tie, "majority_vote")) == 1
    assert pick(combine([(1.0, 0.0), (0.0, 1.0)], "majority_vote")) == 0
    three = [
        tuple(math.log(p) for p in row)
        for row in ((0.05, 0.5, 0.45), (0.05, 0.5, 0.45), (0.05, 0.01, 0.94))
    ]
    assert pick(combine(three, "majority_vote")) == 1, (
        "one vote weighs more than any summed probability"
    )


@pytest.mark.parametrize("method", ENSEMBLES)
def test_combine_reads_probabilities(method):
    """An adapter counts through its softmax over the options: adding a constant changes nothing."""
    shifted = [tuple(x + 10 * i for x in row) for i, row in enumerate(TABLE)]
    assert combine(shifted, method) == pytest.approx(combine(TABLE, method))


@pytest.mark.parametrize("method", ENSEMBLES)
def test_ensemble_of_one_is_the_adapter(target, method):
    """m = 1: log-softmax and argmax are the single adapter's, for scores and for whole examples."""
    row = (-3.0, -1.5, -2.0)
    assert combine([row], method) == pytest.approx(torch.log_softmax(torch.tensor(row), 0).tolist())
    items = examples_of("delta", 8)
    alone = score_examples(target.lm, target.draw(0)[0], items)
    got = score_refined(
        target, execute(target, strategy("TTS", num_prompt_batches=1, method=method)), items
    )
    for g, a in zip(got, alone, strict=True):
        for metric in ("raw", "norm"):
            want = torch.log_softmax(torch.tensor(a.of(metric), dtype=torch.float64), 0).tolist()
            assert g.of(metric) == pytest.approx(want, abs=1e-9) and g.pick(metric) == a.pick(
                metric
            )


@pytest.mark.parametrize("method", METHODS)
def test_tts_draws_independent_batches(target, method):
    """m batches give the first m drawn adapters and their prompts, in order."""
    got = execute(target, strategy("TTS", num_prompt_batches=3, method=method))
    assert (
        all(same(a, target.draw(b)[0]) for b, a in enumerate(got.adapters))
        and len(got.adapters) == 3
    )
    assert [p.tolist() for p in got.prompts] == [target.draw(b)[1].tolist() for b in range(3)]
    assert got.combine == method


def routed(target, pooled: list, questions: list, method: str) -> list[int]:
    """Choices between batches 0 (the first two prompts) and 1 (the next two)."""
    target.pooled = torch.tensor(pooled)
    target.embed = lambda texts: torch.tensor(questions)
    refined = Refined([{}, {}], method, prompts=[np.array([0, 1]), np.array([2, 3])])
    return route(target, refined, ["?"] * len(questions))


@pytest.mark.parametrize("method", ROUTERS)
def test_route_takes_the_nearest_batch(target, method):
    """argmin of the Euclidean distance, per question."""
    pooled = [[1.0, 0.1], [1.0, -0.1], [0.1, 1.0], [-0.1, 1.0]]
    assert routed(target, pooled, [[0.0, 1.0], [1.0, 0.0], [0.9, 0.2]], method) == [1, 0, 0]


def test_routers_differ_where_a_batch_is_spread(target):
    """M1 averages distances, M2 measures the distance to the average."""
    pooled = [[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    question = [[0.0, 0.1]]  # M1: 2.0 against 0.9; M2: 0.1 against 0.9
    assert routed(target, pooled, question, "avg_sim_score") == [1]
    assert routed(target, pooled, question, "avg_prompt_embed") == [0]


def test_mean_embedding_is_never_farther(target, monkeypatch):
    """Jensen: M2 <= M1 for every question and batch."""
    seen, real = [], torch.stack

    def spy(tensors, *args, **kwargs):
        seen.append(real(tensors, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(torch, "stack", spy)
    g = torch.Generator().manual_seed(0)
    target.pooled, target.embed = torch.randn(20, 5, generator=g), lambda texts: torch.ones(3, 5)
    prompts = [np.arange(0, 20, 2), np.arange(7), np.arange(12, 20)]
    for method in ROUTERS:
        route(target, Refined([{}] * 3, method, prompts=prompts), ["?"] * 3)
    m1, m2 = seen
    assert (
        m1.shape == m2.shape == (3, 3) and bool((m2 <= m1 + 1e-6).all()) and bool((m2 < m1).any())
    )


def test_routed_scores_come_back_in_order(target, monkeypatch):
    """Each question is scored by its own adapter, one swap per adapter used, results in input order."""
    items, calls = examples_of("delta", 7), []
    wanted = [2, 0, 2, 2, 0, 3, 0]
    monkeypatch.setattr(strategies, "route", lambda target, refined, texts: wanted)

    def score(lm, adapter, examples):
        calls.append(adapter["number"])
        return [Scores((float(adapter["number"]),), (float(e.id.split("-")[1]),)) for e in examples]

    monkeypatch.setattr(strategies, "score_examples", score)
    refined = Refined(
        [{"number": i} for i in range(4)], "avg_sim_score", prompts=[np.arange(2)] * 4
    )
    got = score_refined(target, refined, items)
    assert [s.raw[0] for s in got] == wanted and [s.norm[0] for s in got] == list(range(7))
    assert calls == [0, 2, 3]


# ------------------------------------------------------------------------------------------- steering and SFT


def test_latent_zero_steps_is_the_adapter(target):
    """No steps, no steering; some steps change the scores."""
    items = examples_of("delta", 6)
    plain = score_examples(target.lm, target.start, items)
    none, some = (
        score_refined(target, execute(target, strategy("Latent", slot_steps=n, slot_lr=0.1)), items)
        for n in (0, 3)
    )
    assert none == plain and some != plain


@pytest.mark.parametrize("loss", ["lm", "choice"])
def test_sft_prefix_property(target, loss):
    """The adapter after s steps of a longer trajectory is bit-equal to a training of s steps."""
    items = examples_of("delta", 7)

    def train(steps, at=()):
        s = strategy(
            "SFT", sft_steps=steps, learning_rate=1e-2, batch_size=4, loss=loss, init_scale=1.0
        )
        return train_on_support(target, s, items, list(at))

    long = train(6, (1, 2, 4, 6))
    assert sorted(long) == [1, 2, 4, 6]
    for steps in (1, 2, 4):
        short = train(steps)
        assert list(short) == [steps] and same(short[steps], long[steps])
    assert not same(long[4], long[6]) and same(train(6)[6], long[6])


def test_sft_learns_the_support(target):
    """Supervised steps raise the log-probability of the labelled answers."""
    items = examples_of("delta", 6)
    s = strategy(
        "SFT", sft_steps=12, learning_rate=1e-2, batch_size=64, loss="choice", init_scale=1.0
    )
    out = execute(target, s, items)
    after, before = (score_examples(target.lm, a, items) for a in (out.adapters[0], target.start))
    assert (
        np.mean(gold_logprob(after, items, "raw"))
        > np.mean(gold_logprob(before, items, "raw")) + 0.5
    )


def test_sft_starts_from_a_share_of_the_generated_adapter(target):
    """With a vanishing rate what comes out is the start: between the plain initialisation and the generated adapter."""
    plain = init_adapter(target.lm.layout, target.seed)
    for share in (0.0, 0.5, 1.0):
        s = strategy(
            "SFT", sft_steps=1, learning_rate=1e-30, batch_size=2, loss="lm", init_scale=share
        )
        got = execute(target, s, examples_of("delta", 4)).adapters[0]
        for k, v in target.start.items():
            torch.testing.assert_close(
                got[k], share * v + (1 - share) * plain[k], rtol=1e-6, atol=1e-20
            )


def test_costs_are_counted(target):
    """Passes in rows: trainings count forwards and backwards, ensembles score each drawn adapter once."""
    lm, items = target.lm, examples_of("delta", 6)

    def cost(s, score=True):
        before = (lm.forwards, lm.backwards)
        refined = execute(target, s, items)
        if score:
            score_refined(target, refined, items)
        return lm.forwards - before[0], lm.backwards - before[1]

    assert cost(
        strategy("SFT", sft_steps=3, learning_rate=1e-3, batch_size=4, loss="lm", init_scale=1.0),
        False,
    ) == (12, 12)
    assert cost(
        strategy("SFT", sft_steps=3, learning_rate=1e-3, batch_size=9, loss="lm", init_scale=1.0),
        False,
    ) == (18, 18)
    assert cost(ttt(2, 1e-3, 5)) == (10 + 6, 10)
    assert cost(strategy("LORA", **{"lambda": 0.5})) == (6, 0)
    assert cost(strategy("Latent", slot_steps=2, slot_lr=0.1)) == (6, 0)
    assert cost(strategy("TTS", num_prompt_batches=3, method="majority_vote")) == (18, 0)
    assert cost(strategy("TTS", num_prompt_batches=3, method="sum_logprobs")) == (0, 0), (
        "scored already"
    )
    assert cost(strategy("TTS", num_prompt_batches=4, method="max_confidence")) == (6, 0)
    assert cost(strategy("TTS", num_prompt_batches=4, method="avg_sim_score")) == (6, 0)


def test_exploring_offers_half_of_each_grid():
    """With `explore` a random half of every listed field is offered, and over many draws each value is."""
    grid = {"LORA.lambda": [0.1, 0.25, 0.5, 0.75, 1.0]}
    bounds = load_config(["strategies.proposal_grid={LORA.lambda: [0.1, 0.25, 0.5, 0.75, 1.0]}"])[
        0
    ].strategies
    rng = np.random.default_rng(0)
    seen = [
        proposal_schema(bounds, ["LORA"], rng)["anyOf"][0]["properties"]["lambda"]["enum"]
        for _ in range(40)
    ]
    assert all(len(s) == 3 and s == sorted(s) for s in seen)
    assert {v for s in seen for v in s} == set(grid["LORA.lambda"])
    assert (
        proposal_schema(bounds, ["LORA"])["anyOf"][0]["properties"]["lambda"]["enum"]
        == grid["LORA.lambda"]
    )
