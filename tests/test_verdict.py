"""Use it, no difference shown, or keep the base model: intervals that hold at small counts."""

import random
from types import SimpleNamespace

import pytest
from test_own_task import adapt, export, fresh_rows, write_rows

import data
import lora
import scoring
import verdict
from config import load_config
from data import Example
from runtime import Run, read_jsonl, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "right, count, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(right, count, low, high):
    """The four examples of Newcombe 1998, Statistics in Medicine 17, 857-872, table I."""
    assert verdict.wilson(right, count) == pytest.approx((low, high), abs=5e-5)


def test_difference_of_equals():
    """The same answers: no difference, and an interval on both sides of it."""
    difference, low, high = verdict.compare([True, False] * 10, [True, False] * 10)
    assert difference == 0 and low < 0 < high


@pytest.mark.parametrize("count", [8, 20, 60])
def test_interval_holds_at_small_counts(count):
    """The true difference lies inside in 95 of 100 samples, whatever the two share."""
    rng = random.Random(0)
    inside = 0
    for _ in range(2000):
        a, b = [], []
        for _ in range(count):
            easy = rng.random() < 0.5
            a.append(easy or rng.random() < 0.4)  # 0.70
            b.append(easy or rng.random() < 0.2)  # 0.60
        _, low, high = verdict.compare(a, b)
        inside += low <= 0.1 <= high
    assert inside / 2000 >= 0.935


def judged(tmp_path, gold, **answers):
    """The verdict on `generator`, from stored rows with these picks."""
    for method, picks in answers.items():
        rows = []
        for i, pick in enumerate(picks):
            rows.append({"id": str(i), "gold": gold[i], "pred_norm": pick})
        write_jsonl(tmp_path / f"scores/{method}/mine.jsonl", rows)
    return verdict_on(tmp_path, gold, list(answers))


def verdict_on(tmp_path, gold, methods=("base", "generator"), metric="norm"):
    """The verdict on `generator`, of a test with these answers, from the rows that are stored."""
    evaluate = SimpleNamespace(methods=methods, metric=metric)
    run = SimpleNamespace(path=tmp_path, cfg=SimpleNamespace(evaluate=evaluate))
    test = [Example(str(i), "q", ("no", "yes"), place) for i, place in enumerate(gold)]
    return verdict.judge(run, SimpleNamespace(name="mine", test=test), "generator")


def test_a_written_answer_is_that_of_the_exported_adapter(tmp_path):
    """The first of two: its answers count, not what both have in common."""
    gold = [0] * 40
    written = {"generator": {"strict": 0.5, "first_strict": 1}}
    written["base"] = {"strict": 0.0, "first_strict": 0}
    for method, answer in written.items():
        rows = [{"id": str(i), "gold": 0, **answer} for i in range(40)]
        write_jsonl(tmp_path / f"scores/{method}/mine.jsonl", rows)
    found = verdict_on(tmp_path, gold, metric="strict")
    assert found.decision == verdict.USE_IT
    assert "right in 40 of 40 held-out rows and the base model in 0" in found.text


def test_the_most_frequent_answer_without_options():
    answers = ["4", "4", "4", "7"]
    test = [Example(str(i), "q", answer=answer) for i, answer in enumerate(answers)]
    assert verdict.majority_rate(SimpleNamespace(test=test)) == 0.75


def test_three_verdicts(tmp_path):
    """By whether the interval of the difference lies above zero, below it, or on both sides."""
    gold = [0] * 40
    right, wrong = [0] * 40, [1] * 40
    half = [0, 1] * 20
    assert judged(tmp_path / "a", gold, base=half, generator=right).decision == verdict.USE_IT
    assert judged(tmp_path / "b", gold, base=half, generator=half).decision == verdict.NO_DIFFERENCE
    assert judged(tmp_path / "c", gold, base=half, generator=wrong).decision == verdict.KEEP_BASE
    found = judged(tmp_path / "d", gold, base=half, generator=right, icl=right)
    assert "verdict: use it. generator is right in 40 of 40 held-out rows" in found.text
    assert "better still" not in found.text
    found = judged(tmp_path / "e", gold, base=wrong, generator=half, icl=right)
    assert "Labels in the prompt (icl) is better still: +50.0 points" in found.text


def test_two_rows_show_nothing(tmp_path):
    """A6: 50 points on two rows are no difference; the rate of one answer stands beside it."""
    found = judged(tmp_path, [0, 0], base=[0, 0], generator=[0, 1])
    assert found.decision == verdict.NO_DIFFERENCE
    assert "-50.0 points (-9" in found.text
    assert "2 held-out rows by norm; always the most frequent answer: 100.0 %" in found.table[0]


def test_nothing_to_measure_it_on(tmp_path):
    found = judged(tmp_path, [], generator=[])
    assert found.decision == verdict.NOT_MEASURED and found.table == ()


def test_a_worse_adapter_is_exported_only_when_asked_for(copy, tmp_path, capsys, monkeypatch):
    """Nothing is written by default; asked for by its name, the card warns."""
    own = write_rows(tmp_path / "mine.jsonl", fresh_rows(30))
    monkeypatch.setattr(verdict, "compare", lambda a, b: (-0.3, -0.4, -0.2))
    assert adapt(copy, own) == 0
    said = capsys.readouterr().out
    assert "verdict: keep the base model" in said
    assert "not exported; stage=export" in said
    assert not (copy / "export/mine").exists()
    assert export(copy, f"task={own}", "method=degaml_plus") == 0
    assert "**Warning:**" in (copy / "export/mine/README.md").read_text()


def test_all_labelled_rows_are_judged_on(copy, tmp_path):
    """Beyond the support set every row is held out, whatever the run's own num_test."""
    own = write_rows(tmp_path / "mine.jsonl", fresh_rows(100))
    cfg, _ = load_config([f"run={copy}", "stage=adapt", f"task={own}"])
    assert cfg.data.num_test == 12
    task = data.load_task(cfg, "mine")
    assert (len(task.support), len(task.test)) == (8, 92)
    # a task of the run keeps its split
    cfg, _ = load_config([f"run={copy}", "stage=export", "task=delta"])
    assert [e.id for e in data.load_task(cfg, "delta").test] == [
        row["id"] for row in read_jsonl(copy / "scores/base/delta.jsonl")
    ]


def test_an_adapter_that_does_nothing_is_called_so(copy):
    """A8: by how far the next token's logits move, and how far another task's adapter lies."""
    cfg, _ = load_config([f"run={copy}", "stage=export", "task=delta"])
    run = Run(copy, cfg)
    lm = scoring.load_lm(run)
    task = data.load_tasks(run)["delta"]
    nothing = lora.init_adapter(lm.layout, 0)
    lines = verdict.describe_shift(run, task, nothing)
    assert "moves the logits by 0 on average and changes 0 likeliest tokens" in lines[0]
    assert "warning: this adapter does next to nothing" in lines[-1]
    moved = {key: tensor + 0.1 for key, tensor in nothing.items()}
    lines = verdict.describe_shift(run, task, moved)
    assert len(lines) == 2 and "moves the logits by 0 on" not in lines[0]
    assert "'s prompts give it lies" in lines[1]


def test_rows_of_an_earlier_file_are_no_evidence(tmp_path):
    """The file was replaced: what was stored of the old one is not its verdict."""
    gold = [0] * 10
    judged(tmp_path, gold, base=[1] * 10, generator=gold)
    for left in ([], gold[:5]):
        found = verdict_on(tmp_path, left)
        assert found.decision == verdict.NOT_MEASURED
