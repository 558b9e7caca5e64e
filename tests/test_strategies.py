"""The action space and its execution: mixing, test-time training, ensembles, steering, SFT."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import tiny_rows

import data
import lora
import scoring
import strategies
from config import load_config
from lora import LoraLinear
from scoring import Scores
from strategies import KEEP, ROUTERS, TTS_METHODS, Refined, Router, Source, Strategy, Target

BOUNDS = load_config([])[0].strategies
FAMILIES = ["TTT", "LORA", "TTS", "Latent", "SFT"]
ENSEMBLES = [method for method in TTS_METHODS if method not in ROUTERS]
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


def parse(proposal, families=FAMILIES) -> Strategy:
    return strategies.parse_strategy(proposal, BOUNDS, families)


def mixing(lam) -> Strategy:
    return Strategy.from_dict({"family": "LORA", "lambda": lam})


def ttt(steps, lr, size) -> Strategy:
    good = Strategy.from_dict(GOOD["TTT"])
    return good.but(ttl_steps=steps, learning_rate=lr, batch_size=size)


def tts(count, method) -> Strategy:
    good = Strategy.from_dict(GOOD["TTS"])
    return good.but(num_prompt_batches=count, method=method)


def latent(steps) -> Strategy:
    return Strategy.from_dict(GOOD["Latent"]).but(slot_steps=steps)


def sft(steps, lr, size, loss="choice", share=1.0) -> Strategy:
    good = Strategy.from_dict(GOOD["SFT"])
    return good.but(sft_steps=steps, learning_rate=lr, batch_size=size, loss=loss, init_scale=share)


def random_adapter(layout, seed) -> dict:
    g = torch.Generator().manual_seed(seed)
    adapter = {}
    for a, a_shape, b, b_shape in layout.keys():
        adapter[a] = 0.1 * torch.randn(a_shape, generator=g)
        adapter[b] = 0.1 * torch.randn(b_shape, generator=g)
    return adapter


def examples_of(task, count) -> list:
    return [data.make_example(task, row, "cloze") for row in tiny_rows(task, count)]


def embed(examples) -> torch.Tensor:
    """Unit vectors that depend on the question."""
    vectors = []
    for example in examples:
        text = example.prompt
        g = torch.Generator().manual_seed(len(text) * 1000 + ord(text[-2]))
        vectors.append(torch.randn(6, generator=g))
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)


@pytest.fixture
def target(tiny_lm) -> Target:
    """A target with a random start adapter and four random draws."""
    drawn = {}
    for batch in range(4):
        adapter = random_adapter(tiny_lm.layout, 10 + batch)
        drawn[batch] = adapter, np.arange(4) + batch
    examples = examples_of("delta", 12)
    texts = [example.prompt for example in examples]
    source = Source(drawn.__getitem__, texts, embed(examples), embed)
    start = random_adapter(tiny_lm.layout, 0)
    return Target("delta", tiny_lm, start, BOUNDS.model_copy(), seed=1, source=source)


def same(a, b) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def copied(tensors) -> dict:
    return {key: tensor.clone() for key, tensor in tensors.items()}


def bare(model) -> bool:
    adapted = [m for m in model.modules() if isinstance(m, LoraLinear)]
    return all(m.A is None and m.B is None for m in adapted)


@pytest.mark.parametrize("family", FAMILIES)
def test_good_objects_are_read(family):
    """Every family's complete object is read back with all its fields."""
    read = parse(json.dumps(GOOD[family]))
    assert read.family == family
    assert read.as_dict() == GOOD[family]


BAD = {
    "TTT": {
        "ttl_steps": [0, 51, 2.5, "many", True, None],
        "learning_rate": [0, 2e-3, -1e-4, math.nan, "1e-4"],
        "batch_size": [0, 65],
        "shuffle_data": ["true", 1],
    },
    "LORA": {"lambda": ["half", math.nan, math.inf, False, [1]]},
    "TTS": {"num_prompt_batches": [0, 51], "method": ["vote", None, ["x"]]},
    "Latent": {"slot_steps": [-1, 21], "slot_lr": [0, 1.5]},
    "SFT": {
        "sft_steps": [0, 51],
        "learning_rate": [1e-2],
        "batch_size": [1.5],
        "loss": ["mse"],
        "init_scale": [1.5, -0.1],
    },
}


@pytest.mark.parametrize("family, field", [(f, name) for f in BAD for name in BAD[f]])
def test_bad_field_is_named(family, field):
    """Out of range or of the wrong type is invalid, never clipped, and the text names the field."""
    for value in BAD[family][field]:
        with pytest.raises(ValueError, match=f"{family}.*{field}"):
            parse(GOOD[family] | {field: value})


@pytest.mark.parametrize(
    "family, field", [(f, name) for f in FAMILIES for name in strategies.schema(BOUNDS)[f]]
)
def test_missing_field_is_named(family, field):
    """Every field is required."""
    proposal = dict(GOOD[family])
    del proposal[field]
    with pytest.raises(ValueError, match=f"{family}.*{field}.*missing"):
        parse(proposal)


def test_unknown_field_and_family_are_named():
    """What does not belong is refused by name; a family that was not offered is unknown too."""
    with pytest.raises(ValueError, match="LORA.*ratio"):
        parse(GOOD["LORA"] | {"ratio": 1})
    for family in ("RAG", None, ["TTT"], {}):
        with pytest.raises(ValueError, match="family"):
            parse(GOOD["LORA"] | {"family": family})
    with pytest.raises(ValueError, match="SFT"):
        parse(GOOD["SFT"], FAMILIES[:4])


def test_a_number_of_any_length_is_only_invalid():
    """A proposal is text of a model: no digit string may do more than make it invalid."""
    proposal = json.dumps(GOOD["TTT"] | {"ttl_steps": 10**400})
    with pytest.raises(ValueError, match="ttl_steps"):
        parse(proposal)


@pytest.mark.parametrize(
    "given, meant",
    [
        (GOOD["TTT"] | {"family": "TTL"}, "TTT"),
        (GOOD["LORA"] | {"family": "LoRA"}, "LORA"),
        (GOOD["Latent"] | {"family": "LS"}, "Latent"),
        ({"family": "Latent", "times": 5, "learning_rate": 0.1}, "Latent"),
        ({"family": "TTS", "num_lora_adpt": 3, "method": "majority_vote"}, "TTS"),
    ],
)
def test_aliases(given, meant):
    """Names the papers also use mean the canonical ones and give the same identity."""
    assert str(parse(given)) == str(parse(GOOD[meant]))


def test_only_the_mixing_ratio_is_clipped():
    """lambda outside [0, 1] is clipped."""
    for given, meant in {-0.5: 0.0, 1.7: 1.0, 0: 0.0, 0.25: 0.25}.items():
        assert parse({"family": "LORA", "lambda": given})["lambda"] == meant


def test_first_balanced_object_of_noisy_text():
    """Text around the object, broken braces before it and objects after it do not matter."""
    text = (
        'Sure {so}: {"family": "TTS", {"family": "LORA", "lambda": 0.25} or '
        '{"family": "LORA", "lambda": 1}'
    )
    assert parse(text) == mixing(0.25)
    for text in ("", "no object", '{"family": "LORA", "lambda": 0.', "[1, 2]"):
        with pytest.raises(ValueError, match="JSON"):
            parse(text)


def test_identity_ignores_order_and_spelling():
    """Field order, 5 or 5.0 and 1e-3 or 0.001 are one strategy, one key."""
    a = parse(
        '{"family": "TTT", "ttl_steps": 5, "learning_rate": 1e-3, "batch_size": 4, '
        '"shuffle_data": false}'
    )
    b = parse(
        '{"shuffle_data": false, "batch_size": 4.0, "learning_rate": 0.001, "ttl_steps": 5.0, '
        '"family": "TTT"}'
    )
    assert a == b
    assert hash(a) == hash(b)
    assert str(a) == str(b)
    assert json.loads(str(a)) == a.as_dict()


def test_proposal_schema_offers_the_grid():
    """A field with a grid takes its values only; one object per family, nothing left open."""
    bounds = BOUNDS.model_copy(update={"proposal_grid": {"LORA.lambda": [0.5, 1.0]}})
    options = strategies.proposal_schema(bounds, ["LORA", "TTT"])["anyOf"]
    mix, steps = (option["properties"] for option in options)
    assert mix["family"]["enum"] == ["LORA"]
    assert steps["family"]["enum"] == ["TTT"]
    assert mix["lambda"] == {"enum": [0.5, 1.0]}
    assert steps["ttl_steps"]["maximum"] == bounds.max_ttl_steps
    for option in options:
        assert option["additionalProperties"] is False
        assert option["required"] == list(option["properties"])


def test_exploring_offers_half_of_each_grid():
    """With `explore` a random half of every listed field is offered; in time each value is."""
    grid = [0.1, 0.25, 0.5, 0.75, 1.0]
    bounds = load_config([f"strategies.proposal_grid={{LORA.lambda: {grid}}}"])[0].strategies

    def offered(explore=None):
        option = strategies.proposal_schema(bounds, ["LORA"], explore)["anyOf"][0]
        return option["properties"]["lambda"]["enum"]

    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        half = offered(rng)
        assert len(half) == 3
        assert half == sorted(half)
        seen.update(half)
    assert seen == set(grid)
    assert offered() == grid


def small_adapter(rank):
    """One matrix's adapter, its A (rank, 6) and its B (5, rank)."""
    g = torch.Generator().manual_seed(3)
    a = torch.randn(rank, 6, generator=g)
    b = torch.randn(5, rank, generator=g)
    return {"m.lora_A.weight": a, "m.lora_B.weight": b}, a, b


def mixed_update(adapter, lam, mode) -> torch.Tensor:
    mixed = strategies.mix_subspaces(adapter, lam, mode)
    return mixed["m.lora_B.weight"] @ mixed["m.lora_A.weight"]


def fully_mixed(a, b) -> torch.Tensor:
    mixed_a = a[:2] + a[2:]
    mixed_b = b[:, :2] + b[:, 2:]
    return mixed_b @ mixed_a


@pytest.mark.parametrize("mode", ["interp", "magdir"])
def test_mix_at_both_ends(mode):
    """At 0 the plain adapter, bit for bit; at 1 dW = (B1 + B2)(A1 + A2), TEMPO's eq. 11."""
    adapter, a, b = small_adapter(4)
    assert same(strategies.mix_subspaces(adapter, 0.0, mode), adapter)
    torch.testing.assert_close(mixed_update(adapter, 1.0, mode), fully_mixed(a, b))


def test_mix_halfway_keeps_half_of_the_cross_terms():
    adapter, a, b = small_adapter(4)
    plain = b @ a
    cross_terms = fully_mixed(a, b) - plain
    torch.testing.assert_close(mixed_update(adapter, 0.5, "interp"), plain + 0.5 * cross_terms)


@pytest.mark.parametrize("lam", [0.25, 0.5, 0.75])
def test_mix_magnitude_and_direction(lam):
    """magdir interpolates the Frobenius norm, and the unit updates for the direction."""
    adapter, a, b = small_adapter(4)
    plain = b @ a
    full = fully_mixed(a, b)
    got = mixed_update(adapter, lam, "magdir")
    norm = (1 - lam) * plain.norm() + lam * full.norm()
    assert got.norm().item() == pytest.approx(norm.item(), rel=1e-5)
    direction = (1 - lam) * plain / plain.norm() + lam * full / full.norm()
    torch.testing.assert_close(got / got.norm(), direction / direction.norm())


def test_mix_leaves_an_odd_row_and_b_alone():
    """An odd last row, B, and the adapter that was given stay as they are."""
    adapter, a, b = small_adapter(5)
    before = copied(adapter)
    mixed = strategies.mix_subspaces(adapter, 0.7, "interp")
    assert torch.equal(mixed["m.lora_A.weight"][4], a[4])
    assert torch.equal(mixed["m.lora_B.weight"], b)
    assert not torch.equal(mixed["m.lora_A.weight"][:4], a[:4])
    assert same(adapter, before)


@pytest.mark.parametrize("mode", ["interp", "magdir"])
def test_mix_of_an_untrained_adapter_is_no_update(mode):
    """With B = 0 nothing appears and nothing is undefined."""
    adapter, _, b = small_adapter(4)
    untrained = adapter | {"m.lora_B.weight": torch.zeros_like(b)}
    assert torch.equal(mixed_update(untrained, 0.5, mode), torch.zeros(5, 6))


def test_ttt_sample_weights(target, monkeypatch):
    """S = 0.1 exp(nll - 3) above the threshold, 0 at or below, detached; mean over the selected."""

    def loss_of(values):
        nll = torch.tensor(values, requires_grad=True)
        monkeypatch.setattr(scoring, "prompt_nll", lambda lm, rows: nll)
        rows = list(range(len(values)))
        losses = list(strategies._surprise_losses(target.lm, rows, 3.0, 0.1, []))
        if not losses:
            return None, nll
        ((total, count),) = losses
        return total / count, nll

    loss, nll = loss_of([3.5, 2.9, 3.0])
    assert loss.item() == pytest.approx(0.16487 * 3.5, rel=1e-4)
    loss.backward()
    assert nll.grad.tolist() == pytest.approx([0.16487, 0.0, 0.0], rel=1e-4)

    loss, nll = loss_of([3.5, 4.5, 1.0])
    loss.backward()
    want = [0.16487 / 2, 0.1 * math.exp(1.5) / 2, 0.0]
    assert nll.grad.tolist() == pytest.approx(want, rel=1e-4)

    assert loss_of([2.9, 3.0])[0] is None


def test_ttt_without_a_selected_prompt_changes_nothing(target):
    """No prompt above the threshold: the adapter is the given one, and the notes say so."""
    target.bounds.ttl_threshold = 100.0
    out = strategies.train_on_prompts(target, ttt(3, 1e-3, 4))
    assert same(out.adapters[0], target.start)
    assert out.notes == {"selected": 0, "seen": 12}


def prompts_nll(target, adapter) -> torch.Tensor:
    """(prompts,) mean NLL of each unlabelled prompt under an adapter."""
    lm = target.lm
    rows = [scoring.prompt_row(lm, text) for text in target.source.texts]
    lora.swap_adapter(lm.model, lm.layout, adapter)
    with torch.no_grad():
        nll = scoring.prompt_nll(lm, rows)
    lora.swap_adapter(lm.model, lm.layout, None)
    return nll


def test_ttt_lowers_the_prompts_nll(target):
    """Without a gate, steps on the prompts lower their mean NLL, from the given adapter on."""
    target.bounds.ttl_threshold = 0.0
    out = strategies.train_on_prompts(target, ttt(20, 1e-2, 6))
    before = prompts_nll(target, target.start).mean()
    after = prompts_nll(target, out.adapters[0]).mean()
    assert after < before - 0.1
    assert out.notes == {"selected": 120, "seen": 120}


def distance(a, b) -> float:
    return sum((a[key] - b[key]).abs().sum().item() for key in a)


@pytest.mark.parametrize("chosen", [ttt(3, 1e-2, 5), sft(3, 1e-2, 5)], ids=lambda s: s.family)
def test_parts_of_a_batch_train_like_the_whole(target, monkeypatch, chosen):
    """A batch that a GPU cannot hold: the same mean over what a gate leaves, from unequal parts."""
    labelled = examples_of("delta", 5)
    target.bounds.ttl_threshold = float(prompts_nll(target, None).median())
    whole = strategies.execute(target, chosen, labelled)

    def in_two(lm, rows, all_scored=False):
        return [rows[:3], rows[3:]]

    monkeypatch.setattr(scoring, "parts_of", in_two)
    parts = strategies.execute(target, chosen, labelled)
    assert parts.notes == whole.notes
    moved = distance(whole.adapters[0], target.start)
    off = distance(parts.adapters[0], whole.adapters[0])
    assert moved > 0
    assert off < 0.01 * moved  # not none: AdamW steps on the rounding of a zero gradient


def test_ttt_continues_from_the_given_adapter(target):
    """One tiny step moves every entry by at most the learning rate: no fresh initialisation."""
    target.bounds.ttl_threshold = 0.0
    adapter = strategies.train_on_prompts(target, ttt(1, 1e-6, 4)).adapters[0]
    moved = []
    for key, start in target.start.items():
        moved.append(float((adapter[key] - start).abs().max()))
    assert 0 < max(moved) < 2e-6


EXECUTED = [
    KEEP,
    ttt(2, 1e-2, 4),
    mixing(0.5),
    latent(2),
    sft(2, 1e-2, 4),
    *(tts(2, method) for method in TTS_METHODS),
]


@pytest.mark.parametrize("chosen", EXECUTED, ids=str)
def test_execution_leaves_the_base_bit_unchanged(target, chosen):
    """After any strategy the bare model gives the same logits; the start adapter is untouched."""
    model = target.lm.model
    ids = torch.arange(40).view(2, 20)
    start = copied(target.start)
    weights = copied(model.state_dict())
    with torch.no_grad():
        before = model(ids).logits
    support = examples_of("delta", 6)

    refined = strategies.execute(target, chosen, support)
    scores = strategies.score_refined(target.lm, refined, support)

    assert [len(s.raw) for s in scores] == [len(e.options) for e in support]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert same(model.state_dict(), weights)
    assert bare(model)
    assert same(target.start, start)


def test_a_failed_training_leaves_the_base_bare(target):
    """A loss that is not finite ends training without leaving its adapter in the model."""
    first = next(iter(target.start))
    target.start[first] = torch.full_like(target.start[first], math.nan)
    with pytest.raises(FloatingPointError):
        strategies.execute(target, sft(1, 1e-3, 2, "lm"), examples_of("delta", 4))
    assert bare(target.lm.model)


def logs(*rows) -> list[tuple]:
    """Log-probabilities of rows of probabilities, one row per adapter."""
    return [tuple(math.log(p) for p in row) for row in rows]


def best(scores, method) -> int:
    pooled = strategies.combine(scores, method)
    return pooled.index(max(pooled))


TABLE = logs((0.5, 0.4, 0.1), (0.5, 0.4, 0.1), (0.001, 0.3, 0.699))


def test_combine_by_hand():
    """Three adapters on which the three ensembles disagree."""
    assert best(TABLE, "majority_vote") == 0  # two votes of three
    assert best(TABLE, "sum_logprobs") == 1  # ln .4 + ln .4 + ln .3 is the largest sum
    assert best(TABLE, "max_confidence") == 2  # .699 is the largest probability

    pooled = strategies.combine(TABLE, "sum_logprobs")
    sums = [sum(column) for column in zip(*TABLE, strict=True)]
    want = [(value - sums[0]) / 3 for value in sums]
    assert [value - pooled[0] for value in pooled] == pytest.approx(want)
    assert strategies.combine(TABLE, "max_confidence") == pytest.approx(logs((0.5, 0.4, 0.699))[0])


def test_majority_ties():
    """Equal votes go to the larger summed probability, then to the first option."""
    tie = logs((0.6, 0.3, 0.1), (0.1, 0.8, 0.1))
    assert best(tie, "majority_vote") == 1
    assert best([(1.0, 0.0), (0.0, 1.0)], "majority_vote") == 0
    # one vote weighs more than any summed probability
    three = logs((0.05, 0.5, 0.45), (0.05, 0.5, 0.45), (0.05, 0.01, 0.94))
    assert best(three, "majority_vote") == 1


@pytest.mark.parametrize("method", ENSEMBLES)
def test_combine_reads_probabilities(method):
    """An adapter counts through its softmax over the options: adding a constant changes nothing."""
    shifted = [tuple(x + 10 * i for x in row) for i, row in enumerate(TABLE)]
    want = strategies.combine(TABLE, method)
    assert strategies.combine(shifted, method) == pytest.approx(want)


def log_softmax(values) -> list[float]:
    return torch.log_softmax(torch.tensor(values, dtype=torch.float64), 0).tolist()


@pytest.mark.parametrize("method", ENSEMBLES)
def test_ensemble_of_one_is_the_adapter(target, method):
    """m = 1: log-softmax and argmax are the single adapter's, for scores and for whole examples."""
    row = (-3.0, -1.5, -2.0)
    assert strategies.combine([row], method) == pytest.approx(log_softmax(row))

    items = examples_of("delta", 8)
    adapter, _ = target.source.draw(0)
    alone = scoring.score_examples(target.lm, adapter, items)
    refined = strategies.execute(target, tts(1, method))
    pooled = strategies.score_refined(target.lm, refined, items)
    for got, want in zip(pooled, alone, strict=True):
        for metric in ("raw", "norm"):
            assert got.of(metric) == pytest.approx(log_softmax(want.of(metric)), abs=1e-9)
            assert got.pick(metric) == want.pick(metric)


@pytest.mark.parametrize("method", TTS_METHODS)
def test_tts_draws_independent_batches(target, method):
    """m batches give the first m drawn adapters, and a router their prompts, in order."""
    got = strategies.execute(target, tts(3, method))
    assert got.combine == method
    assert len(got.adapters) == 3
    assert (got.router is not None) == (method in ROUTERS)
    for batch, adapter in enumerate(got.adapters):
        drawn, prompts = target.source.draw(batch)
        assert same(adapter, drawn)
        if got.router:
            assert torch.equal(got.router.batches[batch], target.source.pooled[prompts])


def routed(batches, questions, method) -> list[int]:
    """The batch chosen for each question; both are given by their embeddings."""
    batches = [torch.tensor(batch) for batch in batches]
    router = Router(batches, lambda examples: torch.tensor(questions))
    refined = Refined([{}] * len(batches), method, router=router)
    return strategies.route(refined, ["?"] * len(questions))


@pytest.mark.parametrize("method", ROUTERS)
def test_route_takes_the_nearest_batch(method):
    """argmin of the Euclidean distance, per question."""
    right = [[1.0, 0.1], [1.0, -0.1]]
    up = [[0.1, 1.0], [-0.1, 1.0]]
    questions = [[0.0, 1.0], [1.0, 0.0], [0.9, 0.2]]
    assert routed([right, up], questions, method) == [1, 0, 0]


def test_routers_differ_where_a_batch_is_spread():
    """M1 averages distances, M2 measures the distance to the average."""
    spread = [[2.0, 0.0], [-2.0, 0.0]]
    close = [[0.0, 1.0], [0.0, 1.0]]
    question = [[0.0, 0.1]]  # M1: 2.0 against 0.9; M2: 0.1 against 0.9
    assert routed([spread, close], question, "avg_sim_score") == [1]
    assert routed([spread, close], question, "avg_prompt_embed") == [0]


def test_mean_embedding_is_never_farther(monkeypatch):
    """Jensen: M2 <= M1 for every question and batch."""
    seen = []
    real = torch.stack

    def spy(tensors, *args, **kwargs):
        seen.append(real(tensors, *args, **kwargs))
        return seen[-1]

    g = torch.Generator().manual_seed(0)
    pooled = torch.randn(20, 5, generator=g)
    batches = [pooled[0:20:2], pooled[:7], pooled[12:20]]
    router = Router(batches, lambda examples: torch.ones(3, 5))
    monkeypatch.setattr(torch, "stack", spy)
    for method in ROUTERS:
        strategies.route(Refined([{}] * 3, method, router=router), ["?"] * 3)
    m1, m2 = seen
    assert m1.shape == m2.shape == (3, 3)
    assert bool((m2 <= m1 + 1e-6).all())
    assert bool((m2 < m1).any())


def test_routed_scores_come_back_in_order(target, monkeypatch):
    """Each question is scored by its own adapter, one swap per adapter, in input order."""
    items = examples_of("delta", 7)
    wanted = [2, 0, 2, 2, 0, 3, 0]
    calls = []

    def score(lm, adapter, examples, slot=None):
        calls.append(adapter["number"])
        scores = []
        for example in examples:
            place = int(example.id.removeprefix("delta-"))
            scores.append(Scores((adapter["number"],), (place,)))
        return scores

    monkeypatch.setattr(strategies, "route", lambda refined, examples: wanted)
    monkeypatch.setattr(scoring, "score_examples", score)
    adapters = [{"number": i} for i in range(4)]
    refined = Refined(adapters, "avg_sim_score", router=Router([], embed))
    got = strategies.score_refined(target.lm, refined, items)
    assert [s.raw[0] for s in got] == wanted
    assert [s.norm[0] for s in got] == list(range(7))
    assert calls == [0, 2, 3]


def test_latent_zero_steps_is_the_adapter(target):
    """No steps, no steering; some steps change the scores."""
    items = examples_of("delta", 6)
    plain = scoring.score_examples(target.lm, target.start, items)

    def steered(steps):
        refined = strategies.execute(target, latent(steps))
        return strategies.score_refined(target.lm, refined, items)

    assert steered(0) == plain
    assert steered(3) != plain


@pytest.mark.parametrize("loss", ["lm", "choice"])
def test_sft_prefix_property(target, loss):
    """The adapter after s steps of a longer trajectory is bit-equal to a training of s steps."""
    items = examples_of("delta", 7)

    def train(steps, at_steps=()):
        return strategies.train_on_support(target, sft(steps, 1e-2, 4, loss), items, at_steps)

    long = train(6, [1, 2, 4, 6])
    assert sorted(long) == [1, 2, 4, 6]
    for steps in (1, 2, 4):
        short = train(steps)
        assert list(short) == [steps]
        assert same(short[steps], long[steps])
    assert not same(long[4], long[6])
    assert same(train(6)[6], long[6])


def test_sft_learns_the_support(target):
    """Supervised steps raise the log-probability of the labelled answers."""
    items = examples_of("delta", 6)

    def mean_gold(adapter):
        scores = scoring.score_examples(target.lm, adapter, items)
        return float(np.mean(scoring.gold_logprob(scores, items, "raw")))

    refined = strategies.execute(target, sft(12, 1e-2, 64), items)
    assert mean_gold(refined.adapters[0]) > mean_gold(target.start) + 0.5


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_sft_starts_from_a_share_of_the_generated_adapter(target, share):
    """With a vanishing rate what comes out is the start, between plain and generated."""
    chosen = sft(1, 1e-30, 2, "lm", share)
    got = strategies.execute(target, chosen, examples_of("delta", 4)).adapters[0]
    plain = lora.init_adapter(target.lm.layout, target.seed)
    for key, generated in target.start.items():
        want = share * generated + (1 - share) * plain[key]
        torch.testing.assert_close(got[key], want, rtol=1e-6, atol=1e-20)


def test_half_of_the_prompts_pass_the_median(target):
    """The threshold is the prompts' median surprise at the start, measured once per target."""
    target.bounds.ttl_threshold = "median"
    nll = prompts_nll(target, target.start)
    assert len(nll) <= strategies.MEDIAN_OF, "all of them count"
    passes = target.lm.forwards
    threshold = strategies.surprise_threshold(target)
    assert threshold == pytest.approx(np.median(nll.numpy()), rel=1e-5)
    assert target.lm.forwards - passes == len(nll)
    assert strategies.surprise_threshold(target) == threshold
    assert target.lm.forwards - passes == len(nll)

    # at a vanishing rate every prompt is seen once as it is
    out = strategies.train_on_prompts(target, ttt(1, 1e-12, len(nll)))
    assert out.notes == {"selected": len(nll) // 2, "seen": len(nll)}
    # a number is taken as it is
    target.bounds.ttl_threshold = 3.0
    assert strategies.surprise_threshold(target) == 3.0


def test_what_changes_nothing_is_known(target):
    """An adapter equal to the start and steering of no step are no change."""
    target.bounds.ttl_threshold = 100.0

    def changes(chosen):
        return strategies.changes(target, strategies.execute(target, chosen))

    assert not changes(ttt(3, 1e-3, 4))
    assert not changes(KEEP)
    assert not changes(mixing(0.0))
    assert not changes(latent(0))
    assert changes(mixing(0.5))
    assert changes(latent(1))
    assert changes(tts(2, "majority_vote"))
    target.bounds.ttl_threshold = 0.0
    assert changes(ttt(3, 1e-3, 4))


def test_costs_are_counted(target):
    """Passes in rows: trainings count both ways, ensembles score each drawn adapter once."""
    lm = target.lm
    target.bounds.ttl_threshold = 3.0
    items = examples_of("delta", 6)

    def cost(chosen, score=True):
        forwards = lm.forwards
        backwards = lm.backwards
        refined = strategies.execute(target, chosen, items)
        if score:
            strategies.score_refined(lm, refined, items, target.cache)
        return lm.forwards - forwards, lm.backwards - backwards

    assert cost(sft(3, 1e-3, 4, "lm"), score=False) == (12, 12)
    assert cost(sft(3, 1e-3, 9, "lm"), score=False) == (18, 18)
    assert cost(ttt(2, 1e-3, 5)) == (10 + 6, 10)
    assert cost(mixing(0.5)) == (6, 0)
    assert cost(latent(2)) == (6, 0)
    assert cost(tts(3, "majority_vote")) == (18, 0)
    assert cost(tts(3, "sum_logprobs")) == (0, 0)  # scored already
    assert cost(tts(4, "max_confidence")) == (6, 0)
    assert cost(tts(4, "avg_sim_score")) == (6, 0)
