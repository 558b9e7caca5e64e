"""The statistics, checked against values worked out by hand on a canned run folder."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

import results
from config import UserError

# Correctness of each example: four of arc_e, four of boolq, two of divlogic.
SCORES = {
    "base": {"arc_e": [1, 0, 0, 1], "boolq": [1, 1, 0, 0], "divlogic": [1, 0]},
    "generator": {"arc_e": [1, 0.5, 0.5, 1], "boolq": [1, 1, 1, 0], "divlogic": [0, 0]},
    "mean": {"arc_e": [1, 1, 1, 1], "boolq": [1, 1, 1, 0]},
    "degaml": {"arc_e": [1, 1, 1, 1], "boolq": [1, 1, 1, 1], "divlogic": [1, 0]},
}
TITLES = {"arc_e": "ARC-e", "boolq": "BoolQ", "divlogic": "LogiQA"}
STRATEGY = {"family": "TTT", "lr": 0.001, "note": "<img src=x>"}
EPISODE = {"iteration": 1, "strategy": STRATEGY, "valid": True, "reward": 1}


def make_cfg(metric="norm", paper="none", seed_runs=()):
    return SimpleNamespace(
        name="canned",
        seed=999,
        model=SimpleNamespace(name="tiny-model"),
        model_dump=lambda: {"seed": 999},
        evaluate=SimpleNamespace(metric=metric),
        report=SimpleNamespace(paper=paper, seed_runs=[str(path) for path in seed_runs]),
    )


def dump(path: Path, *rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def score_rows(method: str, task: str, values: list, **more) -> list[dict]:
    rows = []
    for i, value in enumerate(values):
        row = {
            "id": f"{task}-{i}",
            "gold": 0,
            "correct_norm": value,
            "correct_raw": 1 - value,
            "pred_norm": 0 if value == 1 else 1,
            "logp_gold": -1.0,
            **more,
        }
        if method == "base":
            row["prompt"] = f"Why {i}? <script>alert(1)</script>"
            row["options"] = ["yes<b>", "no"]
        rows.append(row)
    # In another order than those of the other methods: pairing has to go by id.
    return rows[::-1] if method == "generator" else rows


def make_run(path: Path, scores=SCORES, tasks=tuple(TITLES), seed=999) -> Path:
    """A run folder of which some methods, stages and files are missing on purpose."""
    about = {}
    for task in tasks:
        stands_in = task == "divlogic"
        about[task] = {
            "domain": "ood" if stands_in else "id",
            "title": TITLES[task],
            "source": f"{task}-data",
            "form": "question and options",
            "stand_in_for": "DivLogicEval" if stands_in else None,
            "n_train": 9,
            "n_support": 5,
            "n_test": len(SCORES["base"][task]),
            "n_prompts": 7,
            "chance": 0.25,
            "majority": 0.3,
            "prompts_from": "test",
            "test_ids": ["left", "out"],
        }
    dump(path / "tasks.json", about)
    for method, by_task in scores.items():
        for task in set(by_task) & set(tasks):
            rows = score_rows(method, task, by_task[task])
            dump(path / f"scores/{method}/{task}.jsonl", *rows)

    invalid = EPISODE | {"strategy": None, "valid": False, "reward": 0}
    unrewarded = EPISODE | {"strategy": {"family": "LORA"}, "reward": 0}
    adapted = path / "adapted/degaml/arc_e"
    dump(adapted / "episodes.jsonl", EPISODE, EPISODE, invalid, unrewarded)
    dump(adapted / "strategy.json", {"strategy": STRATEGY, "wins": 2, "losses": 1})
    loss = {"stage": "collect", "unit": "arc_e"}
    dump(path / "metrics.jsonl", loss | {"step": 1, "loss": 2.0}, loss | {"step": 2, "loss": 1.0})
    dump(path / "stages/collect.json", {"seconds": 12.0})
    dump(path / "env.json", {"torch": "9.9"})
    (path / "command.txt").write_text("python degaml.py stage=all\n")
    (path / "config.yaml").write_text(f"seed: {seed}\n")
    return path


@pytest.fixture
def run_path(tmp_path):
    return make_run(tmp_path / "canned")


def build(path: Path, **settings) -> dict:
    return results.build_results(path, make_cfg(**settings))


def entry(path: Path, method: str, task: str = "arc_e", **settings) -> dict:
    """What results.json says about a method on a task."""
    return build(path, **settings)["tasks"][task]["methods"][method]


def test_accuracy_and_standard_error(run_path):
    base = entry(run_path, "base")
    # Two of four right: the variance is 4 * 0.25 / 3 = 1/3.
    assert base["acc"] == 0.5
    assert base["n"] == 4
    assert base["se"] == pytest.approx(math.sqrt(1 / 3) / 2)
    assert base["acc_raw"] == 0.5
    assert base["logp_gold"] == -1
    assert base["vs_base"] is None
    assert entry(run_path, "degaml")["acc_raw"] == 0.0


def test_difference_is_paired_by_id(run_path):
    generator = entry(run_path, "generator")
    # Differences 0, .5, .5, 0: mean .25, variance 4 * .0625 / 3.
    assert generator["acc"] == 0.75
    assert generator["vs_base"]["diff"] == pytest.approx(0.25)
    assert generator["vs_base"]["se"] == pytest.approx(math.sqrt(1 / 12) / 2)
    assert generator["vs_generator"] is None
    # On boolq 0, 0, 1, 0: mean .25, variance (3 * .0625 + .5625) / 3 = .25.
    assert entry(run_path, "generator", "boolq")["vs_base"]["se"] == 0.25


def test_only_common_examples_are_paired(run_path):
    dump(run_path / "scores/mean/arc_e.jsonl", *score_rows("mean", "arc_e", [1, 1]))
    mean = entry(run_path, "mean")
    assert mean["n"] == 2
    assert mean["vs_base"] == {"diff": 0.5, "se": pytest.approx(0.5), "n": 2}


def test_averages_over_tasks(run_path):
    averages = build(run_path)["averages"]
    base = averages["id"]["base"]
    gain = averages["id"]["generator"]["vs_base"]
    assert base["acc"] == 0.5
    assert base["tasks"] == 2
    assert base["se"] == pytest.approx(math.sqrt(1 / 12 + 1 / 12) / 2)
    assert gain["diff"] == pytest.approx(0.25)
    assert gain["se"] == pytest.approx(math.sqrt(1 / 48 + 1 / 16) / 2)
    assert averages["ood"]["generator"]["vs_base"]["diff"] == -0.5
    assert averages["ood"]["base"]["tasks"] == 1
    assert "mean" not in averages["ood"]


def test_average_skips_a_task_without_the_method(run_path):
    (run_path / "scores/generator/boolq.jsonl").unlink()
    average = build(run_path)["averages"]["id"]["generator"]
    assert average["acc"] == 0.75
    assert average["tasks"] == average["vs_base"]["tasks"] == 1


def test_contrasts(run_path):
    contrasts = build(run_path)["contrasts"]
    pairs = ("generator - base", "generator - mean", "mean - base", "degaml - generator")
    found = {(row["name"], row["metric"]) for row in contrasts}
    assert found == {(pair, metric) for pair in pairs for metric in ("norm", "raw")}
    row = results.find_contrast(contrasts, "generator - mean", "norm")
    # arc_e differs by 0, -.5, -.5, 0 and boolq not at all; the mean was not run out of domain.
    assert row["id"]["diff"] == pytest.approx(-0.125)
    assert row["id"]["se"] == pytest.approx(math.sqrt(1 / 48) / 2)
    assert row["ood"] is None
    assert set(row["tasks"]) == {"arc_e", "boolq"}
    raw = results.find_contrast(contrasts, "generator - mean", "raw")
    assert raw["id"]["diff"] == pytest.approx(0.125)


def test_letter_metrics_can_be_primary(run_path):
    for method, strict in (("base", [0, 0, 0, 1]), ("mean", [1, 0, 0, 1])):
        rows = score_rows(method, "arc_e", SCORES[method]["arc_e"], lenient=1)
        for row, value in zip(rows, strict, strict=True):
            row["strict"] = value
        dump(run_path / f"scores/{method}/arc_e.jsonl", *rows)
    base = entry(run_path, "base")
    assert base["acc_strict"] == 0.25
    assert base["acc_lenient"] == 1.0
    mean = entry(run_path, "mean", metric="strict")
    assert mean["acc"] == 0.5
    assert mean["vs_base"]["diff"] == 0.25


def test_a_single_example_has_no_standard_error(tmp_path):
    path = make_run(tmp_path / "one", {"base": {"boolq": [1]}})
    found = build(path)
    assert found["tasks"]["boolq"]["methods"]["base"]["se"] is None
    assert found["averages"]["id"]["base"]["se"] is None


def test_a_repeated_example_is_refused(run_path):
    rows = score_rows("base", "arc_e", [1, 0])
    dump(run_path / "scores/base/arc_e.jsonl", rows[0], rows[0])
    with pytest.raises(UserError, match="occurs twice"):
        build(run_path)


def calibration(tmp_path, answers: list[tuple]) -> dict:
    """base on arc_e: two options of probability p and 1 - p, of which number `gold` is right."""
    rows = score_rows("base", "arc_e", [1] * len(answers))
    for row, (p, gold) in zip(rows, answers, strict=True):
        row["raw"] = [math.log(p), math.log(1 - p)]
        row["gold"] = gold
    path = make_run(tmp_path / "calibration")
    dump(path / "scores/base/arc_e.jsonl", *rows)
    return build(path)["tasks"]["arc_e"]["methods"]


def test_calibration_error_by_hand(tmp_path):
    """Two bins: 0.9 confident and right half the time, 0.6 confident and always right."""
    found = calibration(tmp_path, [(0.9, 0), (0.9, 1), (0.6, 0), (0.6, 0), (0.6, 0)])
    assert found["base"]["ece"] == pytest.approx(2 / 5 * 0.4 + 3 / 5 * 0.4)
    assert found["mean"]["ece"] is None  # no log-likelihoods are stored
    found = calibration(tmp_path, [(1 - 1e-12, 0)])
    assert found["base"]["ece"] == pytest.approx(0, abs=1e-9)


def test_a_diverged_method_has_no_log_likelihoods(run_path):
    rows = score_rows("mean", "arc_e", [1, 0, 1, 0])
    rows[1] |= {"logp_gold": math.nan, "raw": [math.nan, math.nan]}
    dump(run_path / "scores/mean/arc_e.jsonl", *rows)
    mean = entry(run_path, "mean")
    assert mean["acc"] == 0.5
    assert mean["logp_gold"] is None
    assert mean["ece"] is None


def test_tasks_and_strategies_are_described(run_path):
    found = build(run_path)
    assert found["tasks"]["arc_e"]["n_test"] == 4
    assert "test_ids" not in found["tasks"]["arc_e"]  # tasks.json has them
    assert found["search"]["degaml"]["arc_e"] == {
        "proposed": 4,
        "rewarded": 2,
        "by_family": {
            "TTT": {"proposed": 2, "rewarded": 2},
            "invalid": {"proposed": 1, "rewarded": 0},
            "LORA": {"proposed": 1, "rewarded": 0},
        },
    }
    assert found["tasks"]["arc_e"]["strategy"]["degaml"]["wins"] == 2
    assert found["tasks"]["arc_e"]["strategy"]["degaml_plus"] is None
    assert found["seconds"] == {"collect": 12.0}


def test_budget_comes_from_the_records(run_path):
    """Seconds are sums over units, an own task's left out; a diverged training is named."""
    for left_out, step in (("arc_e", None), ("all", 7)):
        record = {"seconds": 10.0, "diverged_at": step}
        dump(run_path / f"baselines/maml/{left_out}/DONE.json", record)
    for task in ("arc_e", "boolq"):
        dump(run_path / f"adapted/maml/{task}/DONE.json", {"seconds": 3.0})
        dump(run_path / f"adapted/maml/{task}/strategy.json", {"n_support": 20})
    dump(run_path / "adapted/maml/mine/DONE.json", {"seconds": 50.0, "own_task": "mine"})
    assert build(run_path)["budget"] == {
        "maml": {
            "seconds_meta": 20.0,
            "seconds_adapt": 6.0,
            "targets": 2,
            "labels": 20,
            "diverged": {"all": 7},
        }
    }


def test_seeds_are_pooled_per_example(tmp_path):
    base = {"arc_e": [1, 0, 0, 1]}
    first = make_run(tmp_path / "a", {"base": base, "generator": {"arc_e": [1, 1, 0, 1]}})
    second = make_run(
        tmp_path / "b", {"base": base, "generator": {"arc_e": [1, 1, 1, 0]}}, seed=1000
    )
    seeds = build(first, seed_runs=[second])["seeds"]
    assert [run["seed"] for run in seeds["runs"]] == [999, 1000]
    # Differences 0 1 0 0 and 0 1 1 -1; per example 0, 1, .5, -.5: mean .25, variance 1.25 / 3.
    contrasts = seeds["pooled"]["contrasts"]
    pooled = results.find_contrast(contrasts, "generator - base", "norm")["id"]
    assert pooled["diff"] == pytest.approx(0.25)
    assert pooled["se"] == pytest.approx(math.sqrt(1.25 / 3) / 2)
    assert pooled["by_seed"] == {"diff": [0.25, 0.25]}  # which adds nothing to the error
    # Per example 1, 1, .5, .5: mean .75, variance 4 * .0625 / 3, over four examples, not eight.
    average = seeds["pooled"]["averages"]["id"]["generator"]
    assert average["acc"] == 0.75
    assert average["se"] == pytest.approx(math.sqrt(1 / 12) / 2)


def test_pooled_errors_count_seeds(tmp_path):
    """By hand: the second seed gains on every example, the first on none."""
    base = {"arc_e": [1, 0, 0, 0]}
    first = make_run(tmp_path / "a", {"base": base, "generator": base})
    gains = {"arc_e": [1, 1, 1, 1]}
    second = make_run(tmp_path / "b", {"base": base, "generator": gains}, seed=1000)
    seeds = build(first, seed_runs=[second])["seeds"]
    pooled = results.find_contrast(seeds["pooled"]["contrasts"], "generator - base", "norm")["id"]
    # Examples 0, .5, .5, .5: variance 1/16 over four, 1/64. Seeds 0, .75: 9/32 over two, 9/64. The
    # seeds' own examples explain 1/64 of that: 0 and 1/16 on average, less the pooled 1/64.
    assert pooled["by_seed"] == {"diff": [0, 0.75]}
    assert pooled["se"] == pytest.approx(math.sqrt(1 / 64 + 9 / 64 - 1 / 64))
    gain = seeds["pooled"]["averages"]["id"]["generator"]["vs_base"]
    assert gain["se"] == pooled["se"]  # of the figure
    # Without its seeds this would pass for a gain.
    assert pooled["diff"] == 0.375
    assert results.describe_gain(pooled) == "not established"
    average = seeds["pooled"]["averages"]["id"]["base"]
    assert average["by_seed"]["acc"] == average["by_seed"]["acc_norm"] == [0.25, 0.25]
    # One run's own entries are as without pooling.
    assert "by_seed" not in seeds["runs"][1]["averages"]["id"]["generator"]


@pytest.mark.parametrize(
    ("error", "values", "wanted"),
    [
        (0.1, [0.0, 0.2], math.sqrt(0.01 + 0.01)),  # the same examples: all of it is the seeds'
        (0.1 / math.sqrt(2), [0.0, 0.4], 0.2),  # other examples: the spread of the seeds alone
        (0.1 / math.sqrt(2), [0.0, 0.1], 0.1 / math.sqrt(2)),  # which the examples explain
    ],
)
def test_examples_count_once_in_a_pooled_error(error, values, wanted):
    """Two seeds, each with an error of 0.1 over its own examples."""
    assert results.error_with_seeds(error, values, [0.1, 0.1]) == pytest.approx(wanted)


def test_two_blocks_of_test_examples_are_one_seed(tmp_path):
    base = {"arc_e": [1, 0, 0, 0]}
    first = make_run(tmp_path / "a", {"base": base, "generator": {"arc_e": [1, 1, 0, 0]}})
    block = make_run(tmp_path / "b", {"base": base, "generator": {"arc_e": [1, 1, 1, 1]}})
    (block / "config.yaml").write_text("seed: 999\ndata: {skip_test: 4}\n")
    for path in block.glob("scores/*/*.jsonl"):
        path.write_text(path.read_text().replace('"arc_e-', '"arc_e-later-'))
    second = make_run(tmp_path / "c", {"base": base, "generator": base}, seed=1000)
    seeds = build(first, seed_runs=[block, second])["seeds"]
    assert [run["seed"] for run in seeds["runs"]] == [999, 1000]
    assert seeds["runs"][0]["run"] == "a, b"
    pooled = results.find_contrast(seeds["pooled"]["contrasts"], "generator - base", "norm")["id"]
    assert pooled["by_seed"] == {"diff": [0.5, 0]}
    assert seeds["pooled"]["averages"]["id"]["base"]["by_seed"]["acc"] == [0.25, 0.25]


def test_a_seed_that_left_a_task_out_is_not_compared(tmp_path):
    """Its average is over other tasks, so it says nothing about the spread of the seeds."""
    both = {"arc_e": [1, 1, 1, 0], "boolq": [0, 0, 0, 1]}
    first = make_run(tmp_path / "a", {"union": both})
    second = make_run(tmp_path / "b", {"union": {"arc_e": both["arc_e"]}}, seed=1000)
    alone = build(first)["averages"]["id"]["union"]
    pooled = build(first, seed_runs=[second])["seeds"]["pooled"]["averages"]["id"]["union"]
    assert pooled["by_seed"]["acc"] == [0.5, None]
    assert pooled["se"] == alone["se"]


def test_a_method_of_one_seed_is_paired_within_it(tmp_path):
    """The other seed's values of the shared method do not enter the difference."""
    first = make_run(tmp_path / "a", {"degaml": {"arc_e": [1, 1]}, "union": {"arc_e": [0, 1]}})
    second = make_run(tmp_path / "b", {"degaml": {"arc_e": [0, 0]}}, seed=1000)
    pooled = build(first, seed_runs=[second])["seeds"]["pooled"]
    row = results.find_contrast(pooled["contrasts"], "degaml - union", "norm")
    assert row["id"]["diff"] == 0.5
    assert pooled["averages"]["id"]["degaml"]["acc"] == 0.5
    assert pooled["averages"]["id"]["union"]["by_seed"]["acc"] == [0.5, None]


@pytest.mark.parametrize(
    ("config", "seed"),
    [
        ("seed: 999\ngenerator: {seed: 1}\n", "999 (generator 1)"),
        ("seed: 999\ndata: {test_from: train}\n", "999 (training examples)"),
    ],
)
def test_runs_of_one_seed_are_told_apart(run_path, tmp_path, config, seed):
    other = make_run(tmp_path / "b")
    (other / "config.yaml").write_text(config)
    runs = build(run_path, seed_runs=[other])["seeds"]["runs"]
    assert [run["seed"] for run in runs] == [999, seed]


def test_seed_runs_that_cannot_be_pooled(run_path, tmp_path):
    with pytest.raises(UserError, match="repeats seed 999"):
        build(run_path, seed_runs=[run_path])
    with pytest.raises(UserError, match=r"no config\.yaml"):
        build(run_path, seed_runs=[tmp_path / "nowhere"])
    other = make_run(tmp_path / "b")
    (other / "config.yaml").write_text("seed: 1\nmodel: {name: another}\n")
    with pytest.raises(UserError, match="a run of another, not of tiny-model"):
        build(run_path, seed_runs=[other])
