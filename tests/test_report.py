"""What the report shows of a canned run: console, report.md, figures and page."""

import csv
import importlib.util
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_results as canned

import report
import results

ROOT = Path(report.__file__).parent


def make_report(path: Path, **settings) -> SimpleNamespace:
    """The report of a run folder: its result, its texts and where they are."""
    report.make_report(SimpleNamespace(path=path, rank=0, cfg=canned.make_cfg(**settings)))
    folder = path / "report"
    result = json.loads((folder / "results.json").read_text())
    return SimpleNamespace(
        folder=folder,
        result=result,
        markdown=(folder / "report.md").read_text(),
        html=(folder / "report.html").read_text(),
        console=report.console_text(result),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One full report, shared by the tests that only read it."""
    path = canned.make_run(tmp_path_factory.mktemp("runs") / "canned")
    return make_report(path, paper="qwen2.5-0.5b")


def row_of(markdown: str, start: str, table: str) -> list[str]:
    """Cells of the first row that begins with `start` in the table under heading `table`."""
    section = markdown.split(f"### {table}\n", 1)[1].split("\n### ", 1)[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {start} |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return cells[1:]


@pytest.mark.parametrize(
    ("diff", "se", "words"),
    [
        (0.03, 0.01, "gain"),
        (-0.03, 0.01, "loss"),
        (0.02, 0.01, "gain"),
        (0.019, 0.01, "not established"),
        (-0.01, 0.01, "not established, negative"),
        (0.0, 0.01, "not established"),
        (0.0, 0.0, "no difference"),
        (0.1, None, "no standard error"),
    ],
)
def test_verdict(diff, se, words):
    assert results.describe_gain({"diff": diff, "se": se}) == words


def test_console_has_the_numbers(made):
    lines = made.console.splitlines()
    assert "metric norm (log-likelihood per character)" in lines[0]
    assert "seed 999" in lines[0]
    in_domain, out_of_domain = [line for line in lines if line.startswith("Base model")]
    number = r"[\d.]+ ± [\d.]+"
    assert re.findall(number, in_domain) == ["50.0 ± 28.9", "50.0 ± 28.9", "50.0 ± 20.4"]
    assert re.findall(number, out_of_domain) == ["50.0 ± 50.0", "50.0 ± 50.0"]
    row = next(line for line in lines if line.startswith("generator - base"))
    assert re.search(r"\+25\.00 ± 14\.43 \(not established\) +-50\.00 ± 50", row)
    row = next(line for line in lines if line.startswith("Chance"))
    assert row.split()[1:4] == ["25.0"] * 3


def test_a_part_does_not_pass_for_all(tmp_path):
    """Some examples of a task, or some tasks of a domain: the cell says how many."""
    path = canned.make_run(tmp_path / "run")
    (path / "scores/generator/boolq.jsonl").unlink()
    rows = canned.score_rows("mean", "arc_e", [1, 1])
    canned.dump(path / "scores/mean/arc_e.jsonl", *rows)
    console = make_report(path).console
    assert "100.0 ± 0.0 [2 of 4]" in console
    assert "75.0 ± 14.4 [1 of 2]" in console


def test_what_was_not_run_says_so(made):
    text = made.markdown
    assert row_of(text, "Full-data LoRA", "In-domain accuracy, seed 999")[:3] == ["not run"] * 3
    mean = row_of(text, "Mean adapter (control)", "Out-of-domain accuracy, seed 999")
    assert mean[:2] == ["not run"] * 2
    by_norm = "By log-likelihood per character, seed 999"
    assert row_of(text, "no_meta - base", by_norm) == ["not run"] * 2
    assert row_of(text, "BoolQ", "Kept")[1:] == ["not run"] * 3
    assert "leaves out: arc_c, hellaswag" in text
    assert not re.search(r"\| *\|", text), "a table cell is blank"


def test_questions_are_answered(made):
    answer = "In-domain -12.50 ± 7.22 (not established, negative), Out-of-domain not run."
    assert f"- Do they beat the mean of the training adapters? {answer}\n" in made.markdown
    by_raw = row_of(made.markdown, "generator - mean", "By summed log-likelihood, seed 999")
    assert by_raw[0].startswith("+12.50")


def test_report_says_which_data_was_used(made):
    """Source and form of each task, beside its sizes."""
    cells = row_of(made.markdown, "ARC-e", "Tasks")
    assert cells[:2] == ["In-domain", "arc_e-data: question and options"]


def test_stand_ins_are_marked_wherever_they_are_named(made):
    note = "† LogiQA is divlogic-data, standing in for DivLogicEval"
    assert f"Averages include stand-ins. {note}" in made.markdown
    for section in made.markdown.split("\n## ")[1:]:
        if "LogiQA" in section.replace(note, ""):
            assert "LogiQA†" in section, section
            assert note in section, section
    assert "LogiQA†" in made.console
    assert note in made.console


def test_a_baseline_ahead_is_said_at_once(tmp_path):
    """The summary names it before anything else about the next domain."""
    scores = {
        "base": {"arc_e": [1, 0, 0, 0]},
        "degaml": {"arc_e": [1, 1, 0, 0]},
        "maml": {"arc_e": [1, 1, 1, 0]},
        "union": {"arc_e": [1, 0, 0, 0]},
    }
    lines = report.findings(canned.build(canned.make_run(tmp_path / "a", scores)))
    assert lines[1].startswith("In-domain, baselines ahead of DeGAML, in %: MAML-en-LLM 75.0")
    assert "Union" not in lines[1]
    assert lines[2] == "Out-of-domain accuracy in %: not run."


def test_a_diverged_training_is_named():
    spent = {"seconds_meta": 20.0, "seconds_adapt": 6.0, "targets": 2, "labels": 20}
    budget = {"maml": {**spent, "diverged": {"all": 7}}}
    frame = report.budget_table({"budget": budget}).frame
    assert frame.loc["MAML-en-LLM"].tolist() == ["20", "3.0", "20", "on all tasks"]


def test_seeds_are_shown_pooled_and_each(tmp_path):
    base = {"arc_e": [1, 0, 0, 0]}
    first = canned.make_run(tmp_path / "a", {"base": base, "generator": base})
    gains = {"arc_e": [1, 1, 1, 1]}
    second = canned.make_run(tmp_path / "b", {"base": base, "generator": gains}, seed=1000)
    made = make_report(first, seed_runs=[second])
    seeds = "pooled over seeds 999, 1000"
    assert seeds in made.console
    assert f"### By log-likelihood per character, {seeds}\n" in made.markdown
    assert "### In-domain accuracy, seed 999\n" in made.markdown
    # A pooled number, and what each seed has.
    gain = row_of(made.markdown, "generator - base", f"By log-likelihood per character, {seeds}")
    assert gain[0] == "+37.50 ± 37.50 (not established) (+0.0, +75.0)"
    average = row_of(made.markdown, "Generalization (generator)", f"Averages over tasks, {seeds}")
    assert average[0] == "62.5 ± 37.5 (25.0, 100.0) [1 of 2]"


def test_page_needs_no_network_and_escapes_text(made):
    links = []
    parser = HTMLParser()

    def keep_links(tag, attributes):
        links.extend(v for k, v in attributes if k in ("src", "href", "srcset", "action"))

    parser.handle_starttag = keep_links
    parser.feed(made.html)
    assert len(links) == 3  # the figures
    assert all(link.startswith("data:image/png;base64,") for link in links)
    for word in ("http://", "https://", "@import", "url("):
        assert word not in made.html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in made.html
    assert "&lt;img src=x&gt;" in made.html
    assert "<script>alert" not in made.html
    assert "<img src=x>" not in made.html
    assert "prefers-color-scheme: dark" in made.html
    # On boolq degaml turned the last two from wrong to right.
    text = " ".join(made.html.split())
    assert "2 of 4 answers changed, 2 wrong to right, 0 right to wrong" in text


def test_figures_have_their_data_beside_them(made):
    figures = made.folder / "figures"
    pictures = {path.stem for path in figures.glob("*.png")}
    assert pictures == {"gains", "strategies", "losses"}
    assert pictures == {path.stem for path in figures.glob("*.csv")}
    gains = list(csv.DictReader((figures / "gains.csv").open()))
    found = {(row["domain"], row["method"]): float(row["diff"]) for row in gains}
    assert found["id", "generator"] == pytest.approx(0.25)
    assert len(found) == 5
    losses = list(csv.DictReader((figures / "losses.csv").open()))
    assert [(row["step"], row["loss"]) for row in losses] == [("1", "2.0"), ("2", "1.0")]
    assert not list(made.folder.rglob("*.tmp"))


def test_a_line_cut_short_in_metrics_is_skipped(tmp_path):
    path = canned.make_run(tmp_path / "run")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "coll')
        file.write('\n{"stage": "collect", "unit": "arc_e", "step": 2, "loss": 0.5}\n')
    losses = results.read_losses(path)
    # A step that was logged again counts once.
    assert losses[["unit", "step", "loss"]].values.tolist() == [
        ["arc_e", 1, 2.0],
        ["arc_e", 2, 0.5],
    ]


def test_both_papers_have_a_column(made):
    """DeGAML's and TEMPO's averages, each in the row of the method that it is about."""

    def last(method):
        return row_of(made.markdown, method, "In-domain accuracy, seed 999")[-2:]

    assert "DeGAML's avg (6 tasks) | TEMPO's avg (6 tasks)" in made.markdown
    assert last("Base model") == ["37.2", "37.2"]
    assert last("Adaptation (DeGAML)") == ["58.4", "-"]
    assert last("Wrong prompts (control)") == ["-", "-"]


@pytest.mark.parametrize("name", report.PAPERS)
def test_papers_averages_are_those_of_its_cells(name):
    """report.PAPERS against the cells in the docs; where one is marked *, Table 1's 24.5 counts."""
    text = (ROOT / "docs/papers-numbers.md").read_text()
    section = text.split(f"`report.paper={name}`", 1)[1].split("\n## ")[0]
    domains = re.split(r"\| (?:In|Out-of)-domain \|", section)[1:]
    for averages, table in zip(report.PAPERS[name]["DeGAML"].values(), domains, strict=True):
        rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", table, re.M)
        assert {method for method, _ in rows} == set(averages)
        for method, cells in rows:
            values = [float(c.replace("29.2*", "24.5")) for c in cells.split("|")[1:7]]
            assert sum(values) / 6 == pytest.approx(averages[method], abs=0.01)


@pytest.mark.parametrize("name", report.PAPERS)
def test_tempo_averages_are_those_of_its_cells(name):
    """Of `tempo` the cells in the docs; the other rows are DeGAML's, but for the larger base."""
    text = (ROOT / "docs/papers-numbers.md").read_text()
    size = name.removeprefix("qwen2.5-").upper()
    section = text.split("## TEMPO, Table 2")[1].split(f"| Qwen2.5-{size} |")[1]
    tempo = re.findall(r"^\| `tempo` \|(.*)\|$", section, re.M)[:2]
    twins = {"maml_qvo": "maml"}
    for (domain, averages), cells in zip(report.PAPERS[name]["TEMPO"].items(), tempo, strict=True):
        values = [float(cell) for cell in cells.split("|")[:6]]
        assert sum(values) / 6 == pytest.approx(averages["tempo"], abs=0.01)
        for method in averages.keys() - {"tempo"}:
            other = report.PAPERS[name]["DeGAML"][domain][twins.get(method, method)]
            larger_base = (name, domain, method) == ("qwen2.5-1.5b", "ood", "base")
            assert averages[method] == (42.9 if larger_base else other)


def test_a_single_task_with_a_single_method(tmp_path):
    path = canned.make_run(tmp_path / "one", {"base": {"boolq": [1, 1, 0, 0]}}, tasks=("boolq",))
    text = make_report(path).markdown
    cells = row_of(text, "Base model", "In-domain accuracy, seed 999")
    assert cells == ["50.0 ± 28.9", "50.0 ± 28.9"]
    assert "Out-of-domain accuracy in %: not run." in text
    assert "Avg (1 task)" in text
    assert "Not drawn: no method was scored beside the base model." in text


def test_an_empty_run_and_a_single_example(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_text("seed: 999\n")
    assert "Nothing has been scored yet" in make_report(tmp_path / "empty").html
    one = canned.make_run(tmp_path / "one", {"base": {"boolq": [1]}, "mean": {"boolq": [0]}})
    assert "100.0 ± n/a" in make_report(one).console


def test_the_same_run_gives_the_same_files(tmp_path):
    path = canned.make_run(tmp_path / "run")

    def files() -> dict:
        make_report(path)
        return {file.name: file.read_bytes() for file in (path / "report").rglob("*.*")}

    first = files()
    assert len(first) == 9
    assert files() == first


@pytest.mark.parametrize(
    "name",
    [
        "smollm2",
        "smollm2-fresh",
        "smollm2-fresh-ood",
        "smollm2-icl",
        "smollm2-seed1",
        "smollm2-seed2",
    ],
)
def test_committed_reports_are_those_of_their_results(tmp_path, name):
    """results.json and the losses are enough to render report.md and the figures again."""
    folder = ROOT / "results" / name
    (tmp_path / "figures").mkdir()
    for file in ("results.json", "figures/losses.csv"):
        if (folder / file).exists():
            shutil.copy(folder / file, tmp_path / file)
    report.render_folder(str(tmp_path))
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()
    for path in folder.glob("figures/*.csv"):
        assert (tmp_path / "figures" / path.name).read_text() == path.read_text()


def test_training_examples_do_not_pass_for_test_examples():
    """A report of data.test_from=train says what its numbers stand on."""
    tasks = {"arc_e": {"n_test": 8, "test_from": "train"}}
    assert report.sample({"tasks": tasks}) == "n = 8 train examples per task"
    tasks = {"arc_e": {"n_test": 8}}
    assert report.sample({"tasks": tasks}) == "n = 8 test examples per task"


def test_the_table_of_three_seeds_is_that_of_its_runs():
    """results/seeds.json, which README and docs/results.md quote, is made of committed runs."""
    spec = importlib.util.spec_from_file_location("pool", ROOT / "results/pool.py")
    pool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pool)
    stored = json.loads((ROOT / "results/seeds.json").read_text())
    assert pool.pool_runs() == stored
    shown = (ROOT / "docs/results.md").read_text().splitlines()
    missing = {*pool.average_rows(stored), *pool.difference_rows(stored, "norm")} - {*shown}
    assert missing == set()
    readme = (ROOT / "README.md").read_text()
    for method in ("base", "icl", "generator", "no_meta", "degaml_plus", "union"):
        averages = [stored["averages"][domain][method] for domain in results.DOMAINS]
        cells = [pool.with_error(entry, "acc", "") for entry in averages]
        assert f"| {' | '.join(cells)} |" in readme
    # By hand: two seeds with one error, which differ by more than that.
    entries = [{"acc": 0.5, "se": 0.01}, None, {"acc": 0.6, "se": 0.01}]
    found = pool.pool(entries, "acc")
    assert found["by_seed"] == [0.5, None, 0.6]
    assert found["acc"] == 0.55
    assert found["se"] == pytest.approx(0.05)
