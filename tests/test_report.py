"""The report, checked against values worked out by hand on a canned run folder."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

import report
from config import UserError

# Per example: arc_e has four, boolq four, divlogic two. Worked out by hand in the tests below.
SCORES = {
    "base": {"arc_e": [1, 0, 0, 1], "boolq": [1, 1, 0, 0], "divlogic": [1, 0]},
    "generator": {"arc_e": [1, 0.5, 0.5, 1], "boolq": [1, 1, 1, 0], "divlogic": [0, 0]},
    "mean": {"arc_e": [1, 1, 1, 1], "boolq": [1, 1, 1, 0]},
    "degaml": {"arc_e": [1, 1, 1, 1], "boolq": [1, 1, 1, 1], "divlogic": [1, 0]},
}
TITLES = {"arc_e": "ARC-e", "boolq": "BoolQ", "divlogic": "LogiQA"}


def make_cfg(paper="none", seed_runs=(), metric="norm", seed=999):
    return SimpleNamespace(
        name="canned",
        seed=seed,
        generator=SimpleNamespace(seed=seed),
        data=SimpleNamespace(skip_test=0),
        model=SimpleNamespace(name="tiny-model"),
        evaluate=SimpleNamespace(metric=metric),
        report=SimpleNamespace(paper=paper, seed_runs=list(seed_runs)),
    )


def dump(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = value if isinstance(value, list) else [value]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def score_rows(method: str, task: str, values: list) -> list[dict]:
    rows = []
    for i, value in enumerate(values):
        row = {
            "id": f"{task}-{i}",
            "gold": 0,
            "correct_norm": value,
            "correct_raw": 1 - value,
            "pred_norm": 0 if value == 1 else 1,
            "pred_raw": 0,
            "logp_gold": -1.0,
        }
        if method == "base":
            row |= {"prompt": f"Why {i}? <script>alert(1)</script>", "options": ["yes<b>", "no"]}
        rows.append(row)
    # Another order than the other methods: pairing has to go by id.
    return rows[::-1] if method == "generator" else rows


def make_run(path: Path, scores=None, tasks=tuple(TITLES), seed=999) -> Path:
    """A run folder of which some methods, stages and files are missing on purpose."""
    scores = scores or SCORES
    dump(
        path / "tasks.json",
        {
            name: {
                "domain": "ood" if name == "divlogic" else "id",
                "title": TITLES[name],
                "source": "logiqa-data" if name == "divlogic" else f"{name}-data",
                "stand_in_for": "DivLogicEval" if name == "divlogic" else None,
                "n_train": 9,
                "n_support": 5,
                "n_test": len(SCORES["base"][name]),
                "n_prompts": 7,
                "chance": 0.25,
                "majority": 0.3,
                "prompts_from": "test",
                "test_ids": ["left", "out"],
            }
            for name in tasks
        },
    )
    for method, by_task in scores.items():
        for task in set(by_task) & set(tasks):
            dump(path / f"scores/{method}/{task}.jsonl", score_rows(method, task, by_task[task]))
            dump(path / f"scores/{method}/{task}.meta.json", {"seconds": 2.5, "forwards": 4})
    strategy = {"family": "TTT", "lr": 0.001, "note": "<img src=x>"}
    episode = {
        "iteration": 1,
        "index": 0,
        "strategy": strategy,
        "valid": True,
        "reward": 1,
        "wins": 2,
        "losses": 1,
        "gold_logp_gain": 0.25,
        "seconds": 3.0,
        "forwards": 10,
        "backwards": 4,
        "cached": False,
    }
    dump(
        path / "adapted/degaml/arc_e/episodes.jsonl",
        [
            episode,
            episode | {"index": 1, "cached": True},
            episode | {"iteration": 2, "strategy": None, "valid": False, "reward": 0},
            episode | {"iteration": 2, "strategy": {"family": "LORA"}, "reward": 0},
        ],
    )
    dump(
        path / "adapted/degaml/arc_e/strategy.json",
        {"strategy": strategy, "wins": 2, "losses": 1, "gold_logp_gain": 0.25, "n_support": 5},
    )
    dump(
        path / "metrics.jsonl",
        [
            {"stage": "collect", "unit": "arc_e", "step": step, "loss": 2.0 / step}
            for step in (1, 2)
        ],
    )
    dump(path / "stages/collect.json", {"seconds": 12.0})
    dump(path / "env.json", {"torch": "9.9"})
    (path / "command.txt").write_text("python degaml.py stage=all\n")
    (path / "config.yaml").write_text(f"seed: {seed}\n")
    return path


@pytest.fixture
def run_path(tmp_path):
    return make_run(tmp_path / "canned")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One full report, shared by the tests that only read it."""
    path = make_run(tmp_path_factory.mktemp("runs") / "canned")
    summary = report.make_report(make_cfg("degaml-qwen2.5-0.5b"), SimpleNamespace(path=path))
    return SimpleNamespace(
        path=path / "report",
        summary=summary,
        results=json.loads((path / "report/results.json").read_text()),
        markdown=(path / "report/report.md").read_text(),
        html=(path / "report/report.html").read_text(),
    )


def row_of(markdown: str, start: str, table: str) -> list[str]:
    """Cells of the first row that begins with `start` in the table under heading `table`."""
    section = markdown.split(f"### {table}\n", 1)[1].split("\n### ", 1)[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_accuracy_and_standard_error(made):
    entry = made.results["tasks"]["arc_e"]["methods"]["base"]
    # Two of four right: variance with ddof 1 is 4 * 0.25 / 3 = 1/3, so se = sqrt(1/3) / 2.
    assert entry["acc"] == 0.5 and entry["n"] == 4
    assert entry["se"] == pytest.approx(math.sqrt(1 / 3) / 2)
    assert entry["acc_raw"] == 0.5 and entry["vs_base"] is None
    assert made.results["tasks"]["arc_e"]["methods"]["degaml"]["acc_raw"] == 0.0


def test_difference_is_paired_by_id(made):
    generator = made.results["tasks"]["arc_e"]["methods"]["generator"]
    # Differences 0, .5, .5, 0: mean .25, variance 4 * .0625 / 3, se = sqrt(1/12) / 2.
    assert generator["acc"] == 0.75
    assert generator["vs_base"]["diff"] == pytest.approx(0.25)
    assert generator["vs_base"]["se"] == pytest.approx(math.sqrt(1 / 12) / 2)
    assert generator["vs_generator"] is None
    # boolq: 0, 0, 1, 0: mean .25, variance (3 * .0625 + .5625) / 3 = .25, se = .25.
    assert made.results["tasks"]["boolq"]["methods"]["generator"]["vs_base"]["se"] == 0.25


def test_only_common_examples_are_paired(run_path):
    dump(run_path / "scores/mean/arc_e.jsonl", score_rows("mean", "arc_e", [1, 1]))
    results = report.build_results(run_path, make_cfg())
    mean = results["tasks"]["arc_e"]["methods"]["mean"]
    assert mean["n"] == 2 and mean["vs_base"] == {"diff": 0.5, "se": pytest.approx(0.5), "n": 2}
    assert "100.0 ± 0.0 [n=2]" in report.format_console_table(results)


def test_averages_over_tasks(made):
    averages = made.results["averages"]
    base, generator = averages["id"]["base"], averages["id"]["generator"]
    assert base["acc"] == 0.5 and base["tasks"] == 2
    assert base["se"] == pytest.approx(math.sqrt(1 / 12 + 1 / 12) / 2)
    assert generator["vs_base"]["diff"] == pytest.approx(0.25)
    assert generator["vs_base"]["se"] == pytest.approx(math.sqrt(1 / 48 + 1 / 16) / 2)
    assert averages["ood"]["generator"]["vs_base"]["diff"] == -0.5
    assert "mean" not in averages["ood"] and averages["ood"]["base"]["tasks"] == 1
    assert made.summary["id_degaml"] == 1.0


def test_average_skips_a_task_without_the_method(run_path):
    (run_path / "scores/generator/boolq.jsonl").unlink()
    results = report.build_results(run_path, make_cfg())
    entry = results["averages"]["id"]["generator"]
    assert entry["acc"] == 0.75 and entry["tasks"] == 1 and entry["vs_base"]["tasks"] == 1
    assert "75.0 ± 14.4 [1/2 tasks]" in report.format_console_table(results)


def test_contrasts_and_their_verdicts(made):
    names = {(c["name"], c["metric"]) for c in made.results["contrasts"]}
    assert names == {
        (name, metric)
        for metric in ("norm", "raw")
        for name in ("generator - base", "generator - mean", "mean - base", "degaml - generator")
    }
    contrast = report.find_contrast(made.results["contrasts"], "generator - mean", "norm")
    # arc_e differs by 0, -.5, -.5, 0 and boolq not at all; the mean was not run out of domain.
    assert contrast["id"]["diff"] == pytest.approx(-0.125) and contrast["ood"] is None
    assert contrast["id"]["se"] == pytest.approx(math.sqrt(1 / 48) / 2)
    assert set(contrast["tasks"]) == {"arc_e", "boolq"}
    raw = report.find_contrast(made.results["contrasts"], "generator - mean", "raw")
    assert raw["id"]["diff"] == pytest.approx(0.125)
    assert "in-domain -12.50 ± 7.22 points over 2 tasks, not established, negative" in made.markdown


@pytest.mark.parametrize(
    ("diff", "se", "words"),
    [
        (0.03, 0.01, "gain"),
        (-0.03, 0.01, "loss"),
        (0.019, 0.01, "not established"),
        (-0.01, 0.01, "not established, negative"),
        (0.0, 0.01, "not established"),
        (0.0, 0.0, "no difference"),
        (0.1, None, "no standard error"),
    ],
)
def test_verdict(diff, se, words):
    assert report.verdict({"diff": diff, "se": se}) == words


def test_what_was_not_run_says_so(made):
    assert row_of(made.markdown, "Own LoRA (full data)", "In-domain tasks")[1:] == ["not run"] * 3
    assert (
        row_of(made.markdown, "Mean adapter (control)", "Out-of-domain tasks")[1:]
        == ["not run"] * 2
    )
    assert row_of(made.markdown, "no_meta - base", "Averages over tasks")[2:] == ["not run"] * 4
    assert row_of(made.markdown, "BoolQ", "Kept and tried")[2:] == ["not run"] * 5
    summary = made.markdown.split("## Results")[0]
    assert "Not run: Adaptation, SFT allowed, Wrong prompts (control)" in summary
    assert "leaves out (not run): arc_c, hellaswag" in summary
    assert "Not drawn: metrics.jsonl holds no loss of the generator stage." in made.markdown
    assert not re.search(r"\| *\|", made.markdown), "a table cell is blank"


def test_stand_ins_are_marked_wherever_they_are_named(made):
    assert "stand-in data: LogiQA† for DivLogicEval" in made.markdown
    note = "† LogiQA is logiqa-data, standing in for DivLogicEval"
    for section in re.split(r"\n(?=##)", made.markdown.split("## Results", 1)[1]):
        if "LogiQA" in section.replace(note, ""):
            assert "LogiQA†" in section and note in section, section
    assert "LogiQA†" in report.format_console_table(made.results)


def test_strategies_are_counted(made):
    search = made.results["search"]["degaml"]["arc_e"]
    assert search["by_family"] == {
        "TTT": {"proposed": 2, "rewarded": 2},
        "LORA": {"proposed": 1, "rewarded": 0},
        "invalid": {"proposed": 1, "rewarded": 0},
    }
    assert (search["proposed"], search["valid"], search["rewarded"]) == (4, 3, 2)
    assert search["distinct"] == 2 and search["seconds"] == 9.0  # the cached one cost nothing
    assert search["by_iteration"] == [
        {"iteration": 1, "proposed": 2, "rewarded": 2},
        {"iteration": 2, "proposed": 2, "rewarded": 0},
    ]
    assert made.results["tasks"]["arc_e"]["strategy"]["degaml"]["wins"] == 2
    assert made.results["tasks"]["arc_e"]["strategy"]["degaml_plus"] is None
    assert made.results["seconds"] == {"collect": 12.0}
    assert made.results["tasks"]["arc_e"]["n_test"] == 4
    assert "test_ids" not in made.results["tasks"]["arc_e"]  # tasks.json has them
    assert made.results["seconds_by_method"]["base"] == 7.5


def test_html_needs_no_network_and_escapes_text(made):
    links = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: links.extend(
        value for key, value in attributes if key in ("src", "href", "srcset", "action")
    )
    parser.feed(made.html)
    assert len(links) == 5  # accuracy, contrasts, strategies, reward rate and one loss curve
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "http://" not in made.html and "https://" not in made.html
    assert "@import" not in made.html and "url(" not in made.html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in made.html
    assert "<script>alert" not in made.html and "<img src=x>" not in made.html
    assert "prefers-color-scheme: dark" in made.html
    # boolq: degaml turned the last two from wrong to right.
    assert "2 of 4 predictions differ: 2 wrong to right, 0 right to wrong." in made.html


def test_figures_have_their_data_beside_them(made):
    figures = made.path / "figures"
    assert (
        {path.stem for path in figures.glob("*.png")}
        == {path.stem for path in figures.glob("*.csv")}
        == {"accuracy", "contrasts", "strategies", "reward_rate", "loss_collect"}
    )
    rows = list(csv.DictReader((figures / "accuracy.csv").open()))
    found = [row for row in rows if (row["task"], row["method"]) == ("arc_e", "generator")]
    assert [float(row["acc"]) for row in found] == [0.75] and len(rows) == 11
    losses = list(csv.DictReader((figures / "loss_collect.csv").open()))
    assert [(row["step"], row["loss"]) for row in losses] == [("1", "2.0"), ("2", "1.0")]
    assert not list(made.path.rglob("*.tmp"))


def test_a_line_cut_short_in_metrics_is_skipped(run_path):
    with (run_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "coll')
        file.write('\n{"stage": "collect", "unit": "arc_e", "step": 2, "loss": 0.5}\n')
    report.make_report(make_cfg(), SimpleNamespace(path=run_path))
    losses = (run_path / "report/figures/loss_collect.csv").read_text().splitlines()
    assert losses[1:] == ["arc_e,1,2.0", "arc_e,2,0.5"]  # a step logged again counts once


def test_seeds_are_pooled_per_example(tmp_path):
    first = make_run(
        tmp_path / "a", {"base": {"arc_e": [1, 0, 0, 1]}, "generator": {"arc_e": [1, 1, 0, 1]}}
    )
    second = make_run(
        tmp_path / "b",
        {"base": {"arc_e": [1, 0, 0, 1]}, "generator": {"arc_e": [1, 1, 1, 0]}},
        seed=1000,
    )
    results = report.build_results(first, make_cfg(seed_runs=[str(second)]))
    # Differences 0 1 0 0 and 0 1 1 -1; per example 0, 1, .5, -.5: mean .25, variance 1.25 / 3.
    pooled = report.find_contrast(
        results["seeds"]["pooled"]["contrasts"], "generator - base", "norm"
    )["id"]
    assert pooled["diff"] == pytest.approx(0.25)
    assert pooled["se"] == pytest.approx(math.sqrt(1.25 / 3) / 2)
    assert pooled["seed_std"] == pytest.approx(0.0)
    entry = results["seeds"]["pooled"]["averages"]["id"]["generator"]
    # Per example 1, 1, .5, .5: mean .75, variance 4 * .0625 / 3, over four documents, not eight.
    assert entry["acc"] == 0.75 and entry["se"] == pytest.approx(math.sqrt(1 / 12) / 2)
    assert [run["seed"] for run in results["seeds"]["runs"]] == [999, 1000]
    assert "pooled over seeds 999, 1000" in report.format_console_table(results)
    (second / "config.yaml").write_text("seed: 999\ngenerator: {seed: 1}\n")
    results = report.build_results(first, make_cfg(seed_runs=[str(second)]))
    assert [run["seed"] for run in results["seeds"]["runs"]] == [999, "999 (generator 1)"]
    (second / "config.yaml").write_text("seed: 999\ndata: {skip_test: 200}\n")
    results = report.build_results(first, make_cfg(seed_runs=[str(second)]))
    assert [run["seed"] for run in results["seeds"]["runs"]] == [999, "999 (test from 200)"]
    with pytest.raises(UserError, match="repeats seed 999"):
        report.build_results(first, make_cfg(seed_runs=[str(first)]))
    with pytest.raises(UserError, match=r"no config\.yaml"):
        report.build_results(first, make_cfg(seed_runs=[str(tmp_path / "nowhere")]))


def test_calibration_error_by_hand():
    """Two bins: 0.9 confident and right half the time, 0.6 confident and always right."""

    def row(p, gold):
        return {"raw": [math.log(p), math.log(1 - p)], "gold": gold}

    rows = [row(0.9, 0), row(0.9, 1), row(0.6, 0), row(0.6, 0), row(0.6, 0)]
    assert report.calibration_error(rows) == pytest.approx(2 / 5 * 0.4 + 3 / 5 * 0.4)
    assert report.calibration_error([row(1 - 1e-12, 0)]) == pytest.approx(0, abs=1e-9)
    assert report.calibration_error([{"gold": 0}]) is None


def test_a_baseline_ahead_is_said_first(tmp_path):
    """The summary names it before any other finding about that domain."""
    path = make_run(
        tmp_path / "a",
        {
            "base": {"arc_e": [1, 0, 0, 0]},
            "degaml": {"arc_e": [1, 1, 0, 0]},
            "maml": {"arc_e": [1, 1, 1, 0]},
            "union": {"arc_e": [1, 0, 0, 0]},
        },
    )
    lines = report.headline(report.build_results(path, make_cfg()))
    assert lines[1].startswith("In-domain, baselines ahead of DeGAML on average: MAML-en-LLM 75.0")
    assert "Union" not in lines[1]


def test_main_table_has_the_papers_delta_rows(tmp_path):
    """Ours with paired standard errors, the paper's recomputed from its cells; what was not run says so."""
    scores = SCORES | {"degaml": {"arc_e": [1, 0, 0, 0]}, "maml": {"arc_e": [1, 1, 1, 0]}}
    run = SimpleNamespace(path=make_run(tmp_path / "r", scores, tasks=("arc_e", "divlogic")))
    report.make_report(make_cfg("degaml-qwen2.5-0.5b"), run)
    title = "Against the baselines, in-domain (paper D, Table 1)"
    text = (run.path / "report/report.md").read_text()
    assert row_of(text, "DeGAML - MAML-en-LLM", title)[1].startswith("-50.00 ± 28.87")  # 0 -1 -1 0
    assert row_of(text, "DeGAML - ABMLL", title)[1:] == ["not run", "not run"]
    assert row_of(text, "Paper: MAML-en-LLM", title)[1] == "63.7"
    assert row_of(text, "Paper: DeGAML - MAML-en-LLM", title)[1] == "+11.0"  # 74.7 - 63.7
    out = "Against the baselines, out-of-domain (paper D, Table 1)"
    assert row_of(text, "Paper: DeGAML - Union Train LoRA", out)[1] == "+8.4"  # 28.7 - 20.3
    with pytest.raises(StopIteration):
        row_of(text, "Paper: No Meta-Train LoRA", out)  # the paper gives it in-domain only


def test_budget_comes_from_the_records(tmp_path):
    """Seconds and steps are sums over units; a diverged training is named in the table."""
    path = make_run(tmp_path / "a")
    for left_out, at in (("arc_e", None), ("none", 7)):
        dump(
            path / f"baselines/maml/{left_out}/DONE.json",
            {"seconds": 10.0, "steps": 8, "tokens": 100, "diverged_at": at},
        )
    for task in ("arc_e", "boolq"):
        dump(path / f"adapted/maml/{task}/DONE.json", {"seconds": 3.0})
        dump(path / f"adapted/maml/{task}/strategy.json", {"n_support": 20})
    results = report.build_results(path, make_cfg())
    assert results["budget"]["maml"] == {
        "seconds_meta": 20.0,
        "meta_steps": 16,
        "meta_tokens": 200,
        "seconds_adapt": 6.0,
        "targets": 2,
        "labels": 20,
        "diverged": {"none": 7},
    }
    table = report.table_budget(results)
    assert ["MAML-en-LLM", "20", "16", "200", "3", "20"] in table["rows"]
    assert any("MAML-en-LLM without none diverged at step 8" in note for note in table["notes"])


def test_console_table_has_the_numbers(made):
    text = report.format_console_table(made.results)
    lines = {line.split("  ")[0]: line for line in text.splitlines() if line}
    assert "metric norm (log-likelihood per character)" in text and "seed 999" in text
    in_domain, out_of_domain = [line for line in text.splitlines() if line.startswith("Base model")]
    assert re.findall(r"[\d.]+ ± [\d.]+", in_domain) == [
        "50.0 ± 28.9",
        "50.0 ± 28.9",
        "50.0 ± 20.4",
    ]
    assert re.findall(r"[\d.]+ ± [\d.]+", out_of_domain) == ["50.0 ± 50.0", "50.0 ± 50.0"]
    assert re.search(r"generator - base +\+25\.00 ± 14\.43 \(not established\) +-50\.00 ± 50", text)
    assert "not run" in lines["Mean adapter (control)"]
    assert "Not run: Adaptation, SFT allowed" in text


def test_paper_numbers_are_recomputed(made):
    assert row_of(made.markdown, "Paper: Base model", "In-domain tasks")[1:] == [
        "54.8",
        "37.0",
        "45.9",
    ]
    assert (
        row_of(made.markdown, "Paper: Generalization (generator)", "In-domain tasks")[1]
        == "63.2 (+15.3%)"
    )
    # Our base has 50.0 on the same two tasks: (54.8 + 37.0) / 2 = 45.9.
    assert row_of(made.markdown, "Base model", "Against the paper")[2:] == [
        "2",
        "45.9",
        "37.2",
        "50.0",
        "+4.1",
    ]
    assert "the paper prints 25.7, its cells give 23.4" in made.markdown


@pytest.mark.parametrize(
    ("name", "method", "domain", "average"),
    [
        ("degaml-qwen2.5-0.5b", "generator", "ood", 23.37),  # printed 25.7
        ("degaml-qwen2.5-0.5b", "degaml", "ood", 34.23),  # with MATH 24.5, not 29.2
        ("degaml-qwen2.5-0.5b", "union", "ood", 23.65),  # printed 29.9
        ("degaml-qwen2.5-1.5b", "union", "ood", 35.22),  # printed 36.1
        ("degaml-qwen2.5-1.5b", "degaml", "id", 67.68),
    ],
)
def test_paper_averages(name, method, domain, average):
    tasks = report.TASK_ORDER[:6] if domain == "id" else report.TASK_ORDER[6:]
    cells = report.load_paper(name, list(tasks))["methods"][method]["cells"]
    assert len(cells) == 6 and 100 * sum(cells.values()) / 6 == pytest.approx(average, abs=0.01)


def test_every_slip_of_the_paper_is_noted():
    notes = {
        name: " ".join(report.load_paper(name, [])["notes"])
        for name in ("degaml-qwen2.5-0.5b", "degaml-qwen2.5-1.5b")
    }
    printed = {
        name: re.findall(r"average: the paper prints ([\d.]+)", text)
        for name, text in notes.items()
    }
    assert printed == {"degaml-qwen2.5-0.5b": ["25.7", "29.9"], "degaml-qwen2.5-1.5b": ["36.1"]}
    with pytest.raises(UserError, match="expected none or one of: degaml-qwen"):
        report.load_paper("no-such-paper", [])


def test_letter_metrics_are_reported_and_can_be_primary(run_path):
    for method, strict in (("base", [0, 0, 0, 1]), ("generator", [1, 0, 0, 1])):
        rows = score_rows(method, "arc_e", SCORES[method]["arc_e"])
        by_id = sorted(rows, key=lambda row: row["id"])
        dump(
            run_path / f"scores/{method}/arc_e.jsonl",
            [row | {"strict": s, "lenient": 1} for row, s in zip(by_id, strict, strict=True)],
        )
    results = report.build_results(run_path, make_cfg())
    assert results["tasks"]["arc_e"]["methods"]["base"]["acc_strict"] == 0.25
    assert results["tasks"]["arc_e"]["methods"]["base"]["acc_lenient"] == 1.0
    results = report.build_results(run_path, make_cfg(metric="strict"))
    entry = results["tasks"]["arc_e"]["methods"]["generator"]
    assert entry["acc"] == 0.5 and entry["vs_base"]["diff"] == 0.25
    assert "generated answer letter" in report.format_console_table(results)


def test_a_single_task_with_a_single_method(tmp_path):
    path = make_run(tmp_path / "one", {"base": {"boolq": [1, 1, 0, 0]}}, tasks=("boolq",))
    summary = report.make_report(make_cfg(), SimpleNamespace(path=path))
    assert summary["id_base"] == 0.5 and Path(summary["report"]).exists()
    markdown = (path / "report/report.md").read_text()
    assert row_of(markdown, "Base model", "In-domain tasks")[1:] == ["50.0 ± 28.9", "50.0 ± 28.9"]
    assert "Out-of-domain tasks: not run." in markdown and "Avg (1 task)" in markdown
    assert "Generated adapters against the frozen model: not run." in markdown


def test_an_empty_run_and_a_single_example(tmp_path):
    (tmp_path / "empty").mkdir()
    summary = report.make_report(
        make_cfg("degaml-qwen2.5-1.5b"), SimpleNamespace(path=tmp_path / "empty")
    )
    assert "Nothing has been scored yet" in Path(summary["report"]).read_text()
    path = make_run(tmp_path / "one", {"base": {"boolq": [1]}, "generator": {"boolq": [0]}})
    results = report.build_results(path, make_cfg())
    assert results["tasks"]["boolq"]["methods"]["base"]["se"] is None  # one value has no spread
    assert "100.0 ± n/a" in report.format_console_table(results)


def test_a_repeated_example_is_refused(run_path):
    rows = score_rows("base", "arc_e", [1, 0])
    dump(run_path / "scores/base/arc_e.jsonl", [rows[0], rows[0]])
    with pytest.raises(UserError, match="occurs twice"):
        report.build_results(run_path, make_cfg())


def test_the_same_run_gives_the_same_files(run_path):
    def made_files() -> dict:
        report.make_report(make_cfg(), SimpleNamespace(path=run_path))
        return {path.name: path.read_bytes() for path in (run_path / "report").rglob("*.*")}

    first = made_files()
    assert len(first) > 5 and made_files() == first
