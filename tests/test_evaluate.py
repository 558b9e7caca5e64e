"""What is scored is what was chosen; test labels are read by the evaluation alone."""

import json
import re
from pathlib import Path

import pytest
from conftest import make_run

import baselines
import collect
import data
import evaluate
import generator
import policy
import runtime
import scoring
import strategies
from data import Example
from runtime import Run
from scoring import Scores
from strategies import KEEP, Strategy


@pytest.fixture
def run(trained) -> Run:
    return make_run(trained)


def choose(run: Run, task: str, chosen: Strategy) -> None:
    """Store a choice of method degaml as `adapt` does, where no adapter is stored beside it."""
    path = run.path / f"adapted/degaml/{task}/strategy.json"
    runtime.write_json(path, {"strategy": chosen.as_dict()})


def tts(count: int, method: str) -> Strategy:
    fields = {"num_prompt_batches": count, "method": method}
    return Strategy.from_dict({"family": "TTS", **fields})


LATENT = Strategy.from_dict({"family": "Latent", "slot_steps": 2, "slot_lr": 0.1})


def test_ensembles_are_never_taken_for_one_another(run):
    """Results shared between methods are those of the same adapters and the same combination."""
    task = data.load_tasks(run)["delta"]
    target = policy.make_target(run, task)
    memo = {}
    for method in ("sum_logprobs", "majority_vote", "max_confidence", "avg_prompt_embed"):
        for count in (1, 2, 3, 4):
            choose(run, "delta", tts(count, method))
            shared = evaluate._test_rows(run, task, target, "degaml", memo)
            alone = evaluate._test_rows(run, task, target, "degaml", {})
            assert shared == alone, (count, method)


@pytest.mark.parametrize("chosen", [LATENT, tts(2, "max_confidence")], ids=lambda s: s.family)
def test_what_was_chosen_is_what_is_evaluated(run, chosen):
    """Test scores of a stored choice are those of executing it again; steering is part of it."""
    task = data.load_tasks(run)["delta"]
    target = policy.make_target(run, task)
    choose(run, "delta", chosen)
    rows = evaluate._test_rows(run, task, target, "degaml", {})
    refined = strategies.execute(target, chosen)
    scores = strategies.score_refined(target.lm, refined, list(task.test))
    for row, score, example in zip(rows, scores, task.test, strict=True):
        pick = score.pick("norm")
        assert row["raw"] == [round(value, 4) for value in score.raw]
        assert row["pred_norm"] == pick
        assert row["correct_norm"] == float(pick == example.gold)


def test_generator_is_averaged_over_prompt_batches(run):
    """Correctness of `generator` is the mean over prompt batches; a kept adapter counts as it."""
    task = data.load_tasks(run)["beta"]
    target = policy.make_target(run, task)
    rows = evaluate._test_rows(run, task, target, "generator", {})
    batches = []
    for number in range(2):
        adapter, _ = target.source.draw(number)
        batches.append(scoring.score_examples(target.lm, adapter, list(task.test)))
    for row, example, *scores in zip(rows, task.test, *batches, strict=True):
        right = [score.pick("norm") == example.gold for score in scores]
        assert row["correct_norm"] == sum(right) / 2

    choose(run, "beta", KEEP)
    assert evaluate._test_rows(run, task, target, "degaml", {}) == rows


def test_a_written_answer_of_two_adapters():
    """Averaged for the tables, and the first alone, which is the one that is exported."""
    example = Example("a", "Why?", ("[A]", "[B]"), 1)
    first = Scores((0.0, 0.0), (0.0, 0.0), text="[B]", strict=1, lenient=1)
    second = Scores((0.0, 0.0), (0.0, 0.0), text="so [A]", strict=None, lenient=0)
    assert evaluate._judge_texts(example, [first, second]) == {
        "strict": 0.5,
        "first_strict": 1,
        "lenient": 0.5,
        "first_lenient": 1,
        "text": "[B]",
    }


def adapted_files(folder: Path) -> dict:
    """Everything a target's adaptation left, without the times it took."""
    found = {}
    for path in sorted(folder.glob("adapted/**/*")):
        key = re.sub(r"rewards-\w+", "rewards", str(path.relative_to(folder)))
        if path.suffix == ".safetensors":
            found[key] = path.read_bytes()
        elif path.name == "prompt.txt":
            found[key] = path.read_text()
        elif path.suffix == ".jsonl":
            rows = runtime.read_jsonl(path)
            for row in rows:
                row.pop("seconds", None)
            found[key] = rows
        elif path.name == "strategy.json":
            found[key] = runtime.read_json(path)
    return found


def corrupted_files(run: Run, folder: Path) -> dict[str, str]:
    """{task: file} of the run's data with another gold option in every test row."""
    folder.mkdir()
    files = {}
    for name, task in data.load_tasks(run).items():
        tested = {example.id for example in task.test}
        lines = []
        for row in runtime.read_jsonl(Path(run.cfg.data.jsonl[name])):
            if row["id"] in tested:
                row["gold"] = (row["gold"] + 1) % len(row["choices"])
            lines.append(row)
        runtime.write_jsonl(folder / f"{name}.jsonl", lines)
        files[name] = str(folder / f"{name}.jsonl")
    return files


def test_test_labels_reach_evaluation_only(tiny_args, tmp_path):
    """With every test gold changed all up to the baselines is byte-identical; evaluation is not."""
    loose = [
        "policy.select_margin=0",
        "policy.sft_margin=0",
        "data.targets=[alpha, delta, epsilon]",
    ]
    clean = make_run(tiny_args, *loose)
    files = json.dumps(corrupted_files(clean, tmp_path / "corrupted"))
    wrong = make_run(tiny_args, *loose, f"run={tmp_path / 'wrong'}", f"data.jsonl={files}")
    for name, task in data.load_tasks(wrong).items():
        same = data.load_tasks(clean)[name]
        assert task.support == same.support
        for a, b in zip(task.test, same.test, strict=True):
            assert a.id == b.id
            assert a.gold != b.gold

    for run in (clean, wrong):
        collect.collect_adapters(run)
        generator.train_generators(run)
        policy.adapt_targets(run)
        baselines.train_baselines(run)
        evaluate.evaluate_methods(run)

    found = adapted_files(clean.path)
    assert len([key for key in found if key.endswith(".safetensors")]) == 3 * 4
    chosen = {found[key]["strategy"]["family"] for key in found if key.endswith("strategy.json")}
    assert chosen > {"none"}
    assert adapted_files(wrong.path) == found

    scores = "scores/degaml_plus/delta.jsonl"
    for a, b in zip(
        runtime.read_jsonl(clean.path / scores),
        runtime.read_jsonl(wrong.path / scores),
        strict=True,
    ):
        assert a["raw"] == b["raw"]
        assert a["gold"] != b["gold"]
