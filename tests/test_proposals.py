"""Proposals: the grammar's numbers, distinctness, the user's template."""

import copy
import dataclasses
import json

import pytest
from conftest import make_run
from test_policy import delta

import data
import policy
import proposals
import runtime
import scoring
import strategies
from config import UserError, load_config
from methods import LABEL_FREE
from runtime import Run

PRESETS = ["smollm2", "qwen2.5-0.5b", "tempo-qwen2.5-0.5b"]


@pytest.fixture
def run(trained) -> Run:
    return make_run(trained)


def consumed(lm, schema: dict, text: str) -> bool:
    """Does the grammar accept the whole text?"""
    matcher = proposals._compile_grammar(lm, schema)
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return matcher.validate_tokens(ids) == len(ids)


@pytest.mark.parametrize(
    "value, legal",
    [
        ("1e-5", True),
        ("9e-4", True),
        ("0.00001", True),
        ("0.001", True),
        ("2e-3", False),  # above the bound
        ("0.002", False),
        ("1e-8", False),  # below it
        ("0.00001000000000000000001", False),  # would never end
        ("0.00012345", False),
    ],
)
def test_numbers_may_have_exponents_but_few_digits(tiny_lm, value, legal):
    """1e-5 is legal; a number has no more digits than its bounds need."""
    bounds = load_config([])[0].strategies
    schema = strategies.proposal_schema(bounds, ["TTT"])
    fields = f'"ttl_steps":5,"learning_rate":{value},"batch_size":4,"shuffle_data":true'
    text = f'{{"family":"TTT",{fields}}}'
    assert consumed(tiny_lm, schema, text) is legal
    if legal:
        strategies.parse_strategy(text, bounds, ["TTT"])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("grid", [True, False], ids=["grid", "open"])
def test_presets_draw_distinct_proposals(run, preset, grid):
    """With its grid and without: a random model's proposals all differ, and all are legal."""
    cfg, _ = load_config([f"config=configs/{preset}.yaml", "policy.proposals=12"])
    if not grid:
        cfg.strategies.proposal_grid = {}
    cfg.policy.distinct = True
    cfg.policy.min_per_family = 2
    cfg.policy.max_new_tokens = 300  # the tiny tokenizer writes a token per letter
    lm = scoring.load_lm(run)
    layout = policy.policy_layout(run)
    drawn = proposals.draw_proposals(lm, layout, None, "Adapt.", LABEL_FREE, cfg, ("seed", grid))
    proposed = [strategy for _, strategy in drawn]
    assert len(proposed) == 12
    assert proposals.repeated_places(proposed) == []
    families = [strategy.family for strategy in proposed]
    assert min(families.count(family) for family in LABEL_FREE) >= 2
    for text, strategy in drawn:
        assert strategies.parse_strategy(text, cfg.strategies, LABEL_FREE) == strategy


def test_sampling_again_is_bounded(run, monkeypatch):
    """With one legal proposal the others stay repeated, after TRIES rounds more."""
    rounds = []

    def sample(lm, layout, adapter, prompt, schemas, settings, seed):
        rounds.append(len(schemas))
        return [json.dumps({"family": "LORA", "lambda": 0.5})] * len(schemas)

    monkeypatch.setattr(proposals, "sample_proposals", sample)
    run.cfg.policy.proposals = 4
    drawn = proposals.draw_proposals(None, None, None, "", ["LORA"], run.cfg, ("seed",))
    assert rounds == [4]
    run.cfg.policy.distinct = True
    drawn = proposals.draw_proposals(None, None, None, "", ["LORA"], run.cfg, ("seed",))
    assert rounds == [4, 4, *[3] * proposals.TRIES]
    assert proposals.repeated_places([strategy for _, strategy in drawn]) == [1, 2, 3]


def test_a_policy_with_a_favourite_still_proposes_distinct_settings(run, monkeypatch):
    """What it proposes twice is sampled again from any family: the favourite has few settings."""
    real = proposals.sample_proposals
    favourite = json.dumps({"family": "LORA", "lambda": 0.5})

    def sample(lm, layout, adapter, prompt, schemas, *more):
        texts = real(lm, layout, adapter, prompt, schemas, *more)
        free = [len(schema["anyOf"]) > 1 for schema in schemas]
        return [favourite if is_free else text for is_free, text in zip(free, texts, strict=True)]

    monkeypatch.setattr(proposals, "sample_proposals", sample)
    cfg, _ = load_config(["config=configs/smollm2.yaml", "policy.proposals=12"])
    cfg.policy.max_new_tokens = 300  # the tiny tokenizer writes a token per letter
    cfg.policy.min_per_family = 0
    lm = scoring.load_lm(run)
    layout = policy.policy_layout(run)
    for distinct, repeated in [(False, 11), (True, 0)]:
        cfg.policy.distinct = distinct
        drawn = proposals.draw_proposals(lm, layout, None, "Adapt.", LABEL_FREE, cfg, ("seed",))
        assert len(proposals.repeated_places([strategy for _, strategy in drawn])) == repeated


TEMPLATE = """Be brief.
---
Context: {context}
Now: {state}
{families}
Answer for {task} like {"family": "LORA", "lambda": 0.5}."""


def prompt_of(run, template):
    target, support = delta(run)
    task = data.load_tasks(run)["delta"]
    scores = scoring.score_examples(target.lm, target.start, support)
    return proposals.proposal_prompt(target.lm, task, LABEL_FREE, scores, "norm", template)


def test_a_template_replaces_the_wording(run, tmp_path):
    """Its fields are filled, its JSON stays, its system message is used."""
    runtime.write_text(tmp_path / "mine.txt", TEMPLATE)
    text = prompt_of(run, str(tmp_path / "mine.txt"))
    ours = prompt_of(run, "")
    assert "Be brief." in text
    assert proposals.SYSTEM not in text
    assert proposals.SYSTEM in ours
    assert 'like {"family": "LORA", "lambda": 0.5}.' in text
    for family in LABEL_FREE:
        assert proposals.DESCRIPTIONS[family] in text
    state = ours.split("State: ")[1].split("\n")[0]
    assert f"Now: {state}" in text
    assert "{" not in text.split("Now")[0]


@pytest.mark.parametrize(
    "text, faults",
    [
        ("{context} {families} {mood} {tasks}", "unknown fields {mood}, {tasks};"),
        ("{context} {state}", "missing fields {families};"),
        ("{stat}", "unknown fields {stat}; missing fields {context}, {families};"),
    ],
)
def test_a_template_with_wrong_fields_is_refused(tmp_path, text, faults):
    """It is said which fields are unknown and which are missing, and what a template has."""
    runtime.write_text(tmp_path / "mine.txt", text)
    with pytest.raises(UserError, match="policy.prompt=") as error:
        proposals.read_template(str(tmp_path / "mine.txt"))
    assert faults in str(error.value)
    assert str(error.value).endswith("a template has {task}, {context}, {state}, {families}")
    with pytest.raises(UserError, match="cannot be read"):
        proposals.read_template(str(tmp_path / "none.txt"))


def test_a_tokenizer_that_no_grammar_follows(run, monkeypatch):
    """Found before the hours: nothing ends a text, or the grammar's library cannot read it."""
    lm = scoring.load_lm(run)
    proposals.check_tokenizer(lm, run.cfg)
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="it has no eos_token"):
        proposals.check_tokenizer(dataclasses.replace(lm, tokenizer=tokenizer), run.cfg)

    def unreadable(*args):
        raise ValueError("can't determine decoder type")

    monkeypatch.setattr(proposals, "_grammar_tokenizer", unreadable)
    with pytest.raises(UserError, match="its tokenizer .can't determine decoder type"):
        proposals.check_tokenizer(lm, run.cfg)
