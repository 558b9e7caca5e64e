"""Solved examples before every question: the same scores as of the whole text, read once."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import answers
import icl
import scoring
import strategies
from config import UserError
from data import Example
from strategies import Refined

pytestmark = pytest.mark.usefixtures("one_thread")

SUPPORT = tuple(
    Example(
        f"s{i}",
        f"Question: case {i}?\nAnswer:",
        ("never", "always"),
        i % 2,
        ("never", "always")[i % 2],
    )
    for i in range(4)
)
ASKED = [
    Example(f"t{i}", f"Question: {'long ' * i}case {i}?\nAnswer:", ("never", "always"), 0, "never")
    for i in range(5)
]


@pytest.fixture
def lm(tiny_lm):
    return dataclasses.replace(tiny_lm)


def whole_logprob(lm, before, row, branch):
    """A branch scored in one plain pass over all of the text."""
    ids = [*before, *row.context, *row.branches[branch]]
    scored = len(row.branches[branch]) - row.starts[branch]
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -scored - 1 : -1]
    return -float(F.cross_entropy(logits.float(), torch.tensor(ids[-scored:]), reduction="sum"))


@pytest.mark.parametrize("form", ["cloze", "letter"])
def test_scores_are_those_of_the_whole_text(lm, form):
    """Packed behind the shared examples, each option scores as if it stood alone behind them."""
    lm.form = form
    support = SUPPORT
    if form == "letter":
        support = tuple(
            dataclasses.replace(e, options=("[A]", "[B]"), answer=("[A]", "[B]")[e.gold])
            for e in SUPPORT
        )
    found = strategies.score_refined(lm, Refined([None], shots=support), ASKED)
    assert lm.shots is None
    assert lm.prefix is None
    with icl.in_front(lm, support, ASKED):
        assert lm.shots.examples == support
        before = scoring.encode(lm, lm.shots.text)
        rows = [scoring.make_row(lm, example) for example in ASKED]
    for row, scores in zip(rows, found, strict=True):
        for branch, score in enumerate(scores.raw):
            assert score == pytest.approx(whole_logprob(lm, before, row, branch), abs=1e-3)


def test_every_example_shows_its_right_answer(lm):
    """The text holds question and right answer of each, and nothing of the asked ones."""
    with icl.in_front(lm, SUPPORT, ASKED):
        assert lm.shots.text == "".join(f"{e.prompt} {e.answer}\n\n" for e in SUPPORT)
        assert lm.prefix.tokens == len(scoring.encode(lm, lm.shots.text))


def test_as_many_as_fit(lm, monkeypatch):
    """The first examples, as many as the model's window leaves beside the longest row."""
    two = len(scoring.encode(lm, "".join(f"{e.prompt} {e.answer}\n\n" for e in SUPPORT[:2])))
    longest = icl._longest(lm, ASKED)
    monkeypatch.setattr(icl, "_window", lambda lm: longest + 1 + two)
    with icl.in_front(lm, SUPPORT, ASKED):
        assert lm.shots.examples == SUPPORT[:2]
    monkeypatch.setattr(icl, "_window", lambda lm: longest + 3)
    complaint = "the first support example has .* tokens"
    with pytest.raises(UserError, match=complaint), icl.in_front(lm, SUPPORT, ASKED):
        pass


def test_no_window_is_overlooked(lm, monkeypatch):
    """A layer that sees less than the model reads limits the text."""
    shapes = lm.model.config.get_text_config()
    monkeypatch.setattr(shapes, "sliding_window", 77, raising=False)
    assert icl._window(lm) == 77
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 55}
    monkeypatch.setattr(shapes, "rope_parameters", rope)
    assert icl._window(lm) == 55


def test_written_answers_go_on_behind_them(lm):
    """Greedy answers are those of the whole text."""
    free = [Example(f"f{i}", f"Say {i} {'very ' * i}well", answer="x") for i in range(3)]
    support = tuple(dataclasses.replace(e, options=(), gold=None) for e in SUPPORT)
    with icl.in_front(lm, support, free, tokens=6):
        before = scoring.encode(lm, lm.shots.text)
        written = answers.generate_answers(lm, None, free, 6)
        rows = [scoring.prompt_row(lm, scoring.input_text(lm, e)) for e in free]
    for row, text in zip(rows, written, strict=True):
        ids = torch.tensor([[*before, *row.context]])
        whole = lm.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert text == lm.tokenizer.decode(whole, skip_special_tokens=True)


def test_tokens_are_counted_for_every_answer(lm):
    """A row reads itself and the examples, which are there at every answer."""
    with icl.in_front(lm, SUPPORT, ASKED):
        shots = lm.prefix.tokens
        rows = [scoring.make_row(lm, example) for example in ASKED]
        before = lm.read
        scoring.score_examples(lm, None, ASKED)
    assert lm.read - before == sum(row.length for row in rows) + shots * len(rows)
