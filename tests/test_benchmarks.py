"""The twelve benchmarks: built options that give nothing away, and the answers of worked solutions.

How their rows on the hub become records is tested with the hub, in test_data.py.
"""

import collections
import re

import pytest

import benchmarks
import data
from benchmarks import FREE_ANSWER
from config import load_config


def read(name):
    return data.read_records(load_config([])[0], name).splits["all"]


@pytest.fixture(scope="module")
def built(assets):
    """{task: all records with built options} of gsm8k and math."""
    return {name: benchmarks.add_distractors(read(name), 999) for name in FREE_ANSWER}


def same_number(text: str) -> str:
    text = re.sub(r"[\s$]|\\left|\\right|\\!|\\,", "", text)
    return text.replace("dfrac", "frac").replace("tfrac", "frac")


@pytest.mark.parametrize("name", FREE_ANSWER)
def test_distractors_hold_the_gold_answer_once(built, name):
    """Four options, gold among them once, and no two that mean the same."""
    assert len(built[name]) == len(read(name))
    for row in built[name]:
        assert len(row["choices"]) == 4 and row["choices"].count(row["answer"]) == 1
        assert row["choices"][row["gold"]] == row["answer"]
        assert len({same_number(choice) for choice in row["choices"]}) == 4, row["id"]


@pytest.mark.parametrize("name", FREE_ANSWER)
def test_distractors_look_like_answers(built, name):
    """Beside an integer stand integers, written as one writes them: none with a leading zero."""
    for row in built[name]:
        if re.fullmatch(r"-?\d+", row["answer"]):
            for choice in row["choices"]:
                assert re.fullmatch(r"0|-?[1-9]\d*", choice), row


@pytest.mark.parametrize("name", FREE_ANSWER)
def test_no_place_gives_the_answer_away(built, name):
    """Gold is as often at each place, and no rank by size holds it much more often than chance."""
    places = collections.Counter(row["gold"] for row in built[name])
    assert all(0.2 < places[i] / len(built[name]) < 0.3 for i in range(4))
    ranks = collections.Counter()
    for row in built[name]:
        if all(re.fullmatch(r"-?\d+", choice) for choice in row["choices"]):
            ranks[sorted(map(int, row["choices"])).index(int(row["answer"]))] += 1
    assert max(ranks.values()) / ranks.total() < 0.4, ranks


def test_distractors_are_deterministic(built):
    """The same seed and records give the same options; another seed gives others."""
    records = read("gsm8k")
    assert benchmarks.add_distractors(records, 999) == built["gsm8k"]
    assert benchmarks.add_distractors(records, 1) != built["gsm8k"]


def test_distractors_need_material():
    """A record that cannot get three wrong options is left out, not padded with duplicates."""
    records = [{"id": name, "question": "Who?", "answer": name} for name in ("Ada", "Bob")]
    assert benchmarks.add_distractors(records, 0) == []


@pytest.mark.parametrize(
    "text, box",
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}.", "2"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{\{1, \{2\}\}} end", r"\{1, \{2\}\}"),
        (r"\boxed 7$ is it", "7"),
        (r"\fbox{x^{2^{3}}}", "x^{2^{3}}"),
        ("no box", ""),
        (r"\boxed{3", "3"),
        (r"\boxed{ 4 }", "4"),
        ("", ""),
        (r"\boxed{}", ""),
    ],
)
def test_last_boxed(text, box):
    """The last box counts, with its braces balanced."""
    assert benchmarks.last_boxed(text) == box
