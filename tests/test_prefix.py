"""What all rows begin with is read once: the same scores and answers, for fewer tokens."""

import dataclasses

import pytest
import torch
from test_lora import random_adapter

import answers
import prefix
import scoring
from data import Example

pytestmark = pytest.mark.usefixtures("one_thread")

ASKED = [
    Example(
        f"t{i}", f"Is case {i} {'very ' * i}good?", ("[A]", "[B]"), i % 2, ("[A]", "[B]")[i % 2]
    )
    for i in range(5)
]


@pytest.fixture
def lm(tiny_lm):
    """A chat model, whose system message begins every row."""
    return dataclasses.replace(tiny_lm, form="letter", read=0)


def unshared(monkeypatch):
    monkeypatch.setattr(prefix, "WORTHWHILE", 10_000)


def flat(scores):
    return [value for score in scores for value in score.raw]


def test_scores_are_the_same(lm, monkeypatch):
    """With an adapter, which changes what is kept of the prefix too."""
    adapter = random_adapter(lm.layout, b_scale=0.05)
    shared = scoring.score_examples(lm, adapter, ASKED)
    read = lm.read
    assert lm.prefix is None

    unshared(monkeypatch)
    whole = scoring.score_examples(lm, adapter, ASKED)
    assert flat(shared) == pytest.approx(flat(whole), abs=1e-3)
    assert [s.greedy for s in shared] == [s.greedy for s in whole]
    assert read < (lm.read - read) / 2


def test_answers_are_the_same(lm, monkeypatch):
    shared = answers.generate_answers(lm, None, ASKED, 6)
    unshared(monkeypatch)
    assert shared == answers.generate_answers(lm, None, ASKED, 6)
    assert lm.prefix is None


def test_every_row_keeps_a_token(lm):
    """One row may be the beginning of all others."""
    rows = [scoring.Row(tuple(range(n)), ((1, 2),), (0,), (1,), 0) for n in (20, 20, 40)]
    with prefix.read_once(lm, rows) as own:
        assert lm.prefix.tokens == 19
        assert [row.context[0] for row in own] == [19, 19, 19]
        assert [len(row.context) for row in own] == [1, 1, 21]


def test_short_beginnings_are_read_with_the_rows(lm):
    rows = [scoring.Row((*range(10), n), ((1, 2),), (0,), (1,), 0) for n in range(3)]
    with prefix.read_once(lm, rows) as own:
        assert own is rows
        assert lm.prefix is None


def test_steering_reads_whole_rows(lm, monkeypatch):
    """Its loss is on every token of a row, so nothing is taken off."""
    steered = scoring.score_examples(lm, None, ASKED, slot=(2, 0.01))
    unshared(monkeypatch)
    assert flat(steered) == flat(scoring.score_examples(lm, None, ASKED, slot=(2, 0.01)))


def test_a_prefix_is_gone_after_a_failure(lm):
    rows = [scoring.Row(tuple(range(20)), ((1,),), (0,), (1,), 0)] * 2
    with pytest.raises(RuntimeError), prefix.read_once(lm, rows):
        raise RuntimeError
    assert lm.prefix is None


@torch.no_grad()
def test_padded_sequences_go_on_behind_it(lm):
    """Masks of two and of four dimensions see all of the prefix."""
    kept = prefix.read_prefix(lm, range(20))
    for shape in ((2, 3), (2, 1, 3, 3)):
        mask, positions, cache = kept.before(
            torch.zeros(shape, dtype=torch.bool), torch.zeros(2, 3)
        )
        assert mask.shape == (*shape[:-1], 23)
        assert mask[..., :20].all()
        assert not mask[..., 20:].any()
        assert positions.tolist() == [[20.0] * 3] * 2
        assert cache.get_seq_length() == 20


def test_a_layer_that_keeps_nothing_is_passed_over():
    """Gemma 3n's last layers read the keys of an earlier one."""
    keys = torch.ones(1, 2, 3, 4)
    kept = prefix.Prefix(((keys, keys), (None, None)))
    mask = torch.ones(5, 1, 2, 2, dtype=torch.bool)
    mask, positions, cache = kept.before(mask, torch.zeros(5, 2, dtype=torch.long))
    assert mask.shape == (5, 1, 2, 5)
    assert positions[0].tolist() == [3, 3]
    assert len(cache.layers) == 1
