"""The report of a run: console tables, report.md, three figures and a page, from stored files only.

    python degaml.py stage=report run=runs/demo

Writes report/results.json, report.md, report.html, figures/*.png and *.csv. No model is loaded.
report.md and the figures show results.json and figures/losses.csv. To show a stored result again:

    python -c "import report; report.render_folder('results/smollm2')"
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
import pandas as pd
from markupsafe import Markup
from pandas import DataFrame

import data
import methods
import results
import runtime
from results import DOMAINS, METRICS

matplotlib.use("Agg")  # before pyplot, which would look for a display
from matplotlib import pyplot as plt

# The template lies beside this file.
ROOT = Path(__file__).parent
NOT_RUN = "not run"
# The adapters worth showing, the most refined first.
ADAPTED = ("degaml_plus", "degaml", "generator")

# What a reader asks, and the difference that answers it.
QUESTIONS = {
    "Do generated adapters beat the frozen model?": "generator - base",
    "Do they beat the mean of the training adapters?": "generator - mean",
    "Does it matter whose prompts they come from?": "generator - wrong_prompts",
    "Does the policy improve them without training on labels?": "degaml - generator",
    "Does the Fusion VAE improve them?": "aligned - generator",
    "Is the whole better than fine-tuning on the same labels?": "degaml_plus - no_meta",
    "Is it better than the same labels in the prompt?": "degaml_plus - icl",
}

# The sections of the report, each with what to know before reading it.
HOW_TO_READ = {
    "Results": "Accuracy in % ± standard error, by the primary metric. {stand_ins}",
    "Paired differences": "Percentage points ± standard error, paired by example, mean over tasks. "
    "A gain or a loss has at least two standard errors; less is not established. About one "
    "comparison in twenty passes by chance, more of few seeds. Pooled errors count examples and "
    "seeds; each seed's value follows in parentheses.",
    "Every metric": "Averages over tasks in %. ECE: expected calibration error, over 10 bins of "
    "the likeliest option's probability under a softmax over the options' summed log-likelihoods.",
    "Strategies": "Won and lost: support examples that the kept strategy turned right or wrong. "
    "Rewarded: of all proposals, invalid ones included, those that did better on the support set. "
    "{stand_ins}",
    "Training": "A line per task, or per task that was left out (all: none was).",
    "Cost": "Core-seconds, summed over units and ranks. Meta-training counts every left-out set; "
    "methods with the same start share theirs. Labels: support examples seen per target.",
    "Data and provenance": "Numbers of examples per task, and how the run was made. {stand_ins}",
}
# Transductive use of the test inputs has to be visible to whoever reads the numbers.
PROMPTS_FROM = {
    "test": "the test split's unlabelled inputs (transductive, as in the papers)",
    "train": "the train split (inductive)",
}

# Averages of DeGAML's Tables 1 and 2 and of TEMPO's Table 2, recomputed from their six cells; see
# docs/papers-numbers.md. MAML-en-LLM is trained on q, v, o in TEMPO.
PAPERS = {
    "qwen2.5-0.5b": {
        "DeGAML": {
            "id": {
                "base": 37.23,
                "generator": 45.72,
                "degaml": 58.35,
                "no_meta": 41.25,
                "union": 38.28,
                "maml": 51.95,
                "abmll": 42.13,
            },
            "ood": {
                "base": 24.57,
                "generator": 23.37,
                "degaml": 34.23,
                "union": 23.65,
                "maml": 32.65,
                "abmll": 24.88,
            },
        },
        "TEMPO": {
            "id": {
                "base": 37.23,
                "generator": 45.72,
                "tempo": 58.35,
                "no_meta": 41.25,
                "union": 38.28,
                "maml_qvo": 51.95,
                "abmll": 42.13,
            },
            "ood": {
                "base": 24.57,
                "generator": 23.37,
                "tempo": 34.23,
                "union": 23.65,
                "maml_qvo": 32.65,
                "abmll": 24.88,
            },
        },
    },
    "qwen2.5-1.5b": {
        "DeGAML": {
            "id": {
                "base": 59.68,
                "generator": 62.45,
                "degaml": 67.68,
                "no_meta": 64.02,
                "union": 58.37,
                "maml": 65.53,
                "abmll": 62.43,
            },
            "ood": {
                "base": 42.97,
                "generator": 42.25,
                "degaml": 47.55,
                "union": 35.22,
                "maml": 42.3,
                "abmll": 34.32,
            },
        },
        "TEMPO": {
            "id": {
                "base": 59.68,
                "generator": 62.45,
                "tempo": 67.68,
                "no_meta": 64.02,
                "union": 58.37,
                "maml_qvo": 65.53,
                "abmll": 62.43,
            },
            "ood": {
                "base": 42.9,
                "generator": 42.25,
                "tempo": 47.62,
                "union": 35.22,
                "maml_qvo": 42.3,
                "abmll": 34.32,
            },
        },
    },
}


@dataclass
class Table:
    """Texts under a title. The index is the first column; `frame.columns.name` is its heading."""

    title: str
    frame: DataFrame


@dataclass
class Figure:
    """A picture with its title and caption; without data no picture, and the caption says why."""

    title: str
    caption: str
    png: Path | None = None


def make_report(run) -> dict:
    """Tables, figures and the HTML page, from stored files only. Rank 0 works."""
    if run.rank:
        return {}
    folder = run.path / "report"

    # What is known, written down first: everything below can be made from it again.
    result = results.build_results(run.path, run.cfg)
    text = json.dumps(result, indent=1, allow_nan=False)
    runtime.write_text(folder / "results.json", text + "\n")
    write_csv(results.read_losses(run.path), folder / "figures/losses.csv")

    # The page alone shows examples, because questions and answers are not in results.json.
    sections = render(result, folder)
    examples = changed_answers(run.path, result)
    runtime.write_text(folder / "report.html", page_text(result, sections, examples))

    print(console_text(result))
    print(f"\nreport:  {folder / 'report.html'}")
    # One adapter folder, to begin with.
    for method in ADAPTED:
        adapters = sorted(run.path.glob(f"adapted/{method}/*/adapter_model.safetensors"))
        if adapters:
            use = "PeftModel.from_pretrained(base_model, this folder)"
            print(f"adapter: {adapters[0].parent}   ({use})")
            break
    return {}


def render_folder(folder: str) -> None:
    """Write report.md and the figures of a stored results.json again."""
    result = runtime.read_json(Path(folder) / "results.json")
    render(result, Path(folder))


def render(result: dict, folder: Path) -> dict[str, list]:
    """Write report.md and figures/ into the folder of results.json.

    Returns: the report's sections, {heading: [Table or Figure, ...]}.
    """
    shown, seeds = shown_seeds(result)
    tables = []
    for metric in scored_metrics(result):
        tables.append(difference_table(shown["contrasts"], metric, seeds))

    seconds = [[stage, f"{spent:,.1f}"] for stage, spent in result["seconds"].items()]
    sections = {
        "Results": [*accuracy_tables(result), draw_gains(result, folder)],
        "Paired differences": tables,
        "Every metric": [average_table(result)],
        "Strategies": [kept_table(result), draw_search(result, folder)],
        "Training": [draw_losses(result, folder)],
        "Cost": [
            budget_table(result),
            answer_table(result),
            make_table("By stage", ["Stage", "Seconds"], seconds),
        ],
        "Data and provenance": source_tables(result),
    }
    runtime.write_text(folder / "report.md", markdown_text(result, sections))
    return sections


def label(method: str) -> str:
    """The name of a method in tables and figures."""
    return methods.METHODS[method].label


def task_label(result: dict, task: str) -> str:
    """The title where it is short enough, with † where other data stands in."""
    about = result["tasks"][task]
    # A long title would push the other columns off the screen.
    title = about["title"] if len(about["title"]) <= 16 else task
    return f"{title}†" if about["stand_in_for"] else title


def stand_in_note(result: dict) -> str:
    """The footnote wherever tasks are named whose data stands in for another's."""
    parts = []
    for task, about in result["tasks"].items():
        if about["stand_in_for"]:
            name = task_label(result, task).rstrip("†")
            parts.append(f"{name} is {about['source']}, standing in for {about['stand_in_for']}")
    return f"† {'; '.join(parts)}." if parts else ""


def scored_metrics(result: dict) -> list[str]:
    """The metrics by which methods were compared, the primary one first."""
    others = [row["metric"] for row in result["contrasts"]]
    return list(dict.fromkeys([result["metric"], *others]))


def shown_methods(result: dict) -> list[str]:
    """The methods that were run, and those whose absence deserves a row."""
    wanted = set(methods.ALWAYS_SHOWN).union(*shown_seeds(result)[0]["averages"].values())
    return [method for method in methods.METHODS if method in wanted]


def shown_seeds(result: dict) -> tuple[dict, str]:
    """What to headline, pooled over seeds where there are several: {averages, contrasts}, seeds."""
    if "seeds" not in result:
        return result, f"seed {result['seed']}"
    seeds = [str(run["seed"]) for run in result["seeds"]["runs"]]
    return result["seeds"]["pooled"], f"pooled over seeds {', '.join(seeds)}"


def sample(result: dict) -> str:
    """How many examples of which split a number stands on."""
    tasks = result["tasks"].values()
    sizes = sorted({str(about["n_test"]) for about in tasks})
    splits = sorted({about.get("test_from", "test") for about in tasks})
    return f"n = {', '.join(sizes)} {', '.join(splits)} examples per task"


def percent(entry: dict | None, total: int, metric: str = "") -> str:
    """An accuracy in percent ± standard error, by the primary metric or by another (`_raw`)."""
    if entry is None or f"acc{metric}" not in entry:
        return NOT_RUN
    text = f"{in_percent(entry[f'acc{metric}'], 1)} ± {in_percent(entry[f'se{metric}'], 1)}"
    text += of_seeds(entry, f"acc{metric}", 1)
    # A method scored on a part of the examples or tasks must not pass for all of them.
    count = entry.get("n", entry.get("tasks"))
    return text if count == total else f"{text} [{count} of {total}]"


def of_seeds(entry: dict, field: str, digits: int, sign: str = "") -> str:
    """Each seed's value behind a pooled one, in parentheses."""
    values = entry.get("by_seed", {}).get(field, [])
    shown = ", ".join(in_percent(value, digits, sign) for value in values)
    return f" ({shown})" if shown else ""


def in_percent(value: float | None, digits: int, sign: str = "") -> str:
    """A fraction in percent. A single example has no standard error."""
    return "n/a" if value is None else f"{100 * value:{sign}.{digits}f}"


def difference(entry: dict | None) -> str:
    """A difference in percentage points and, in words, whether it is established."""
    if entry is None:
        return NOT_RUN
    points = in_percent(entry["diff"], 2, "+")
    found = f"{points} ± {in_percent(entry['se'], 2)} ({results.describe_gain(entry)})"
    return found + of_seeds(entry, "diff", 1, "+")


def findings(result: dict) -> list[str]:
    """What the numbers say, in plain sentences, unflattering ones included."""
    if not any(result["averages"].values()):
        return ["Nothing has been scored yet."]
    lines = []
    pooled, seeds = shown_seeds(result)
    metric = result["metric"]
    for domain, name in DOMAINS.items():
        averages = pooled["averages"][domain]
        shown = []
        ahead = []
        for method, entry in averages.items():
            text = f"{label(method)} {percent(entry, entry['tasks'])}"
            if method in ("base", *ADAPTED):
                shown.append(text)
            # On the examples and seeds that both have; where there is no DeGAML, nothing is ahead.
            row = results.find_contrast(pooled["contrasts"], f"degaml - {method}", metric) or {}
            if row.get(domain) and row[domain]["diff"] < 0:
                ahead.append(text)
        lines.append(f"{name} accuracy in %: {', '.join(shown) or NOT_RUN}.")
        if ahead:
            lines.append(f"{name}, baselines ahead of DeGAML, in %: {', '.join(ahead)}.")

    # The other metrics, as a check, are among the paired differences.
    lines.append(f"Paired differences in points, {metric}, {seeds}:")
    for question, pair in QUESTIONS.items():
        found = results.find_contrast(pooled["contrasts"], pair, metric) or {}
        answers = [f"{name} {difference(found.get(key))}" for key, name in DOMAINS.items()]
        lines.append(f"{question} {', '.join(answers)}.")

    if stand_in_note(result):
        lines.append(f"Averages include stand-ins. {stand_in_note(result)}")
    # An average over fewer tasks is not the papers' average.
    left_out = result["provenance"]["tasks_not_in_run"]
    if left_out:
        lines.append(f"Tasks of the papers that this run leaves out: {', '.join(left_out)}.")
    return lines


def make_table(title: str, header: list[str], rows: list[list]) -> Table:
    """A table of texts, whose first column becomes the index."""
    frame = DataFrame(rows, columns=header, dtype=str).set_index(header[0])
    # The heading of the index belongs in the same line as those of the columns.
    frame = frame.rename_axis(index=None, columns=header[0])
    return Table(title, frame)


def accuracy_tables(result: dict) -> list[Table]:
    """A table per domain: methods down, tasks across, then what guessing would give."""
    shown = shown_methods(result)
    tables = []
    for domain, name in DOMAINS.items():
        names = results.in_domain(result["tasks"], domain)
        tasks = [result["tasks"][task] for task in names]
        # A run may have tasks of one domain only.
        if not names:
            continue

        # One row per method, its average last.
        rows = []
        for method in shown:
            cells = [percent(task["methods"].get(method), task["n_test"]) for task in tasks]
            average = percent(result["averages"][domain].get(method), len(tasks))
            rows.append([label(method), *cells, average])
        # An accuracy means something only beside what guessing gives.
        for guess, key in (("Chance", "chance"), ("Most frequent option", "majority")):
            rates = [task[key] for task in tasks]
            rates.append(sum(rates) / len(rates))
            rows.append([guess, *(in_percent(rate, 1) for rate in rates)])

        labels = [task_label(result, task) for task in names]
        header = [f"{name} tasks", *labels, f"Avg ({task_count(names)})"]
        table = make_table(f"{name} accuracy, seed {result['seed']}", header, rows)
        # The papers average six tasks, whatever this run has.
        for paper, averages in PAPERS.get(result["paper"], {}).items():
            printed = averages[domain]
            column = [f"{printed[method]:.1f}" if method in printed else "-" for method in shown]
            table.frame[f"{paper}'s avg (6 tasks)"] = [*column, "-", "-"]
        tables.append(table)
    return tables


def task_count(names) -> str:
    """How many tasks, in words."""
    return "1 task" if len(names) == 1 else f"{len(names)} tasks"


def difference_table(contrasts: list[dict], metric: str, seeds: str) -> Table:
    """Paired differences by one metric, averaged over the tasks of each domain."""
    rows = []
    for a, b in results.PAIRS:
        found = results.find_contrast(contrasts, f"{a} - {b}", metric)
        if found:
            rows.append([found["name"], *(difference(found[domain]) for domain in DOMAINS)])
        # A pair with an optional method is left out where that was not run.
        elif {a, b} <= set(methods.ALWAYS_SHOWN):
            rows.append([f"{a} - {b}", NOT_RUN, NOT_RUN])
    header = [f"Paired difference, points ({metric}, {seeds})", *DOMAINS.values()]
    return make_table(f"By {METRICS[metric]}, {seeds}", header, rows)


def average_table(result: dict) -> Table:
    """Averages over tasks by every metric, and the calibration error."""
    metrics = scored_metrics(result)
    pooled, seeds = shown_seeds(result)
    header = ["Method"]
    for name in DOMAINS.values():
        header += [f"{name}, {column}" for column in (*metrics, "ECE")]
    rows = []
    for method in shown_methods(result):
        row = [label(method)]
        for domain, averages in pooled["averages"].items():
            entry = averages.get(method)
            total = len(results.in_domain(result["tasks"], domain))
            row += [percent(entry, total, f"_{metric}") for metric in metrics]
            row.append(in_percent(entry["ece"], 1) if entry else NOT_RUN)
        rows.append(row)
    return make_table(f"Averages over tasks, {seeds}", header, rows)


def kept_table(result: dict) -> Table:
    """The strategy kept on each task, its evidence on the support set, and how many were tried."""
    rows = []
    for task, about in result["tasks"].items():
        for method, kept in about["strategy"].items():
            row = [task_label(result, task), label(method)]
            # The evidence is the support set's, since the test set chooses nothing.
            if kept:
                row.append(strategy_text(kept["strategy"]))
                row.append(f"{kept.get('wins', 'n/a')} / {kept.get('losses', 'n/a')}")
                search = result["search"].get(method, {}).get(task)
                row.append(f"{search['rewarded']} of {search['proposed']}" if search else NOT_RUN)
                rows.append(row)
            elif method in methods.ALWAYS_SHOWN:
                rows.append([*row, NOT_RUN, NOT_RUN, NOT_RUN])
    return make_table("Kept", ["Task", "Method", "Strategy", "Won / lost", "Rewarded"], rows)


def strategy_text(strategy: dict) -> str:
    """A strategy's family and fields in one line."""
    if strategy["family"] == "none":
        return "none: the adapter it started from was kept"
    fields = [f"{key}={value}" for key, value in strategy.items() if key != "family"]
    return f"{strategy['family']}: {', '.join(fields)}"


def budget_table(result: dict) -> Table:
    """What each method spent, so that accuracies can be read against cost."""
    rows = []
    for method, spent in result["budget"].items():
        meta = f"{spent['seconds_meta']:,.0f}"
        per_target = f"{spent['seconds_adapt'] / spent['targets']:,.1f}"
        # A diverged baseline is no fair opponent; the reader must know.
        failed = [data.left_out_label(left_out) for left_out in spent["diverged"]]
        labels = spent["labels"] or "none"
        rows.append([label(method), meta, per_target, labels, ", ".join(failed) or "no"])
    header = ["Method", "Meta-training", "Adaptation per target", "Labels", "Diverged"]
    return make_table("By method", header, rows)


def answer_table(result: dict) -> Table:
    """What an answer costs: with labels in the prompt it is paid every time.

    Answers that a method shares with another are that one's cost, so methods may differ in number.
    """
    rows = []
    for method, spent in result.get("answers", {}).items():  # not in older results
        tokens = f"{spent['read_tokens']:,.0f}"
        rows.append([label(method), spent["answers"], tokens, f"{spent['seconds']:.3f}"])
    return make_table("Per answer", ["Method", "Answers", "Tokens read", "Seconds"], rows)


def source_tables(result: dict) -> list[Table]:
    """Where each task's data comes from and how it was split; how the run was made."""
    splits = ("train", "support", "prompts", "test")
    rows = []
    for task, about in result["tasks"].items():
        sizes = [about[f"n_{split}"] for split in splits]
        # The form of its rows is not in older run folders.
        source = about["source"]
        if "form" in about:
            source += f": {about['form']}"
        rows.append([task_label(result, task), DOMAINS[about["domain"]], source, *sizes])
    header = ["Task", "Domain", "Source", *map(str.capitalize, splits)]
    tasks = make_table("Tasks", header, rows)

    about = result["provenance"]
    entries = {
        "model": result["model"],
        "seed": result["seed"],
        "configuration": result["config"],
        "run folder": about["run"],
        "command": about["command"] or "not recorded",
        "prompts drawn from": "; ".join(PROMPTS_FROM[origin] for origin in about["prompts_from"]),
        **about["env"],
    }
    return [tasks, make_table("Provenance", ["Key", "Value"], list(entries.items()))]


def console_text(result: dict) -> str:
    """The tables printed at the end of a run."""
    metric = result["metric"]
    how = f"metric {metric} ({METRICS[metric]}), accuracy in % ± standard error"
    lines = [f"{result['model']}, seed {result['seed']}, {how}", ""]
    for table in accuracy_tables(result):
        lines += [*aligned(table.frame), ""]

    # The differences by the primary metric; report.md has them by the others too.
    shown, seeds = shown_seeds(result)
    frame = difference_table(shown["contrasts"], metric, seeds).frame
    # Flush left, so that the signs stand below each other.
    lines += [*aligned(frame, str.ljust), stand_in_note(result)]
    return "\n".join(lines).rstrip()


def cells_of(frame: DataFrame) -> list[list[str]]:
    """The rows of a table: the heading, then the cells, the index first."""
    return [[frame.columns.name, *frame.columns], *frame.reset_index().to_numpy().tolist()]


def aligned(frame: DataFrame, flush=str.rjust) -> list[str]:
    """The lines of a table, with a rule under the heading. `flush` pads all but the index."""
    columns = []
    for column in zip(*cells_of(frame), strict=True):
        width = max(len(cell) for cell in column)
        pad = flush if columns else str.ljust
        columns.append([pad(cell, width) for cell in column])
    lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    width = max(len(line) for line in lines)
    return [lines[0], "-" * width, *lines[1:]]


def markdown_text(result: dict, sections: dict[str, list]) -> str:
    """report.md: findings first, then every table and a link to every figure."""
    lines = [f"# {page_title(result)}", "", subtitle(result), ""]
    lines += [f"- {line}" for line in findings(result)]
    for heading, blocks in sections.items():
        note = HOW_TO_READ[heading].format(stand_ins=stand_in_note(result))
        lines += ["", f"## {heading}", "", note.strip()]
        for block in blocks:
            lines += ["", f"### {block.title}", ""]
            # A table, or a figure with or without its picture.
            if isinstance(block, Table):
                lines.append(markdown_table(block.frame))
            elif block.png:
                name = f"figures/{block.png.stem}"
                lines += [f"![{block.title}]({name}.png)", ""]
                lines.append(f"{block.caption} [Numbers]({name}.csv)")
            else:
                lines.append(block.caption)
    return "\n".join(lines) + "\n"


def markdown_table(frame: DataFrame) -> str:
    """A frame as a Markdown table, its index first under `frame.columns.name`."""
    heading, *rows = cells_of(frame)
    lines = []
    for row in [heading, ["---"] * len(heading), *rows]:
        # A pipe or a line break inside a cell would end the cell.
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page_title(result: dict) -> str:
    """What the page and report.md are called."""
    return f"DeGAML: {result['config']}"


def subtitle(result: dict) -> str:
    """The line under the title."""
    about = f"Model {result['model']}, seed {result['seed']}, {sample(result)}"
    metric = result["metric"]
    return f"{about}. Primary metric: {metric} ({METRICS[metric]})."


def draw_gains(result: dict, folder: Path) -> Figure:
    """Differences to the base model with their intervals, per domain and method."""
    shown, seeds = shown_seeds(result)
    rows = []
    for domain, averages in shown["averages"].items():
        for method, entry in averages.items():
            gain = entry["vs_base"]
            if gain:
                numbers = {key: gain[key] for key in ("diff", "se", "tasks")}
                rows.append({"domain": domain, "method": method, **numbers})

    def paint(axis, domain, panel):
        # The colours are the methods' own, as everywhere.
        names = panel["method"].map(label)
        colors = [methods.METHODS[method].color for method in panel["method"]]
        gains = 100 * panel["diff"]
        reach = 196 * panel["se"]
        # The line of the base model, then an interval and a dot per method.
        axis.axvline(0, color="#555555", lw=1)
        axis.hlines(names, gains - reach, gains + reach, colors=colors)
        axis.scatter(gains, names, c=colors)
        axis.set_ylim(len(names) - 0.5, -0.5)  # the first on top
        tasks = results.in_domain(result["tasks"], domain)
        axis.set_title(f"{DOMAINS[domain]}, {task_count(tasks)}", loc="left")
        axis.set_xlabel("percentage points, 95% interval")

    png = draw_panels(DataFrame(rows), "domain", len, paint, folder / "figures/gains.png")
    caption = "Not drawn: no method was scored beside the base model."
    if png:
        how = "Paired by example, mean over tasks ± 1.96 standard errors"
        caption = f"{how}; {sample(result)}, {seeds}."
    return Figure("Difference to the base model", caption, png)


def draw_search(result: dict, folder: Path) -> Figure:
    """What each method's policy proposed and what was rewarded, by family, over all tasks."""
    rows = []
    for method, tasks in result["search"].items():
        for task, summary in tasks.items():
            for family, counts in summary["by_family"].items():
                rows.append({"method": method, "task": task, "family": family, **counts})

    def height(panel):
        return panel["family"].nunique()

    def paint(axis, method, panel):
        # The rewarded lie inside the proposed, always in the same order of families.
        sums = panel.groupby("family")[["proposed", "rewarded"]].sum()
        sums = sums.reindex([*methods.WITH_LABELS, "invalid"]).dropna()
        color = methods.METHODS[method].color
        axis.barh(sums.index, sums["proposed"], color=color, alpha=0.3)
        axis.barh(sums.index, sums["rewarded"], 0.4, color=color)
        axis.invert_yaxis()
        axis.set_xlabel("number of strategies: proposed (pale), rewarded (solid)")
        axis.set_title(f"{label(method)}, {task_count(panel['task'].unique())}", loc="left")

    png = draw_panels(DataFrame(rows), "method", height, paint, folder / "figures/strategies.png")
    caption = "Not drawn: no strategy was proposed."
    if png:
        caption = "Sums over tasks; a reward means better on the support set; "
        caption += f"seed {result['seed']}."
    return Figure("Strategies proposed and rewarded", caption, png)


def draw_losses(result: dict, folder: Path) -> Figure:
    """Training losses of the stages, from figures/losses.csv."""
    path = folder / "figures/losses.csv"
    losses = pd.read_csv(path) if path.exists() else DataFrame()
    colors = list(dict.fromkeys(method.color for method in methods.TABLE))

    def paint(axis, stage, panel):
        axis.set_prop_cycle(color=colors)
        for unit, curve in panel.groupby("unit"):
            axis.plot(curve["step"], curve["loss"], lw=1.2, label=unit)
        # A squared error falls by orders of magnitude; a linear axis shows only the start.
        if results.LOSS_UNITS[stage] == "squared error" and panel["loss"].min() > 0:
            axis.set_yscale("log")
        axis.set(xlabel="training step", ylabel=results.LOSS_UNITS[stage])
        # Above the curves, which may lie anywhere.
        axis.legend(title=stage, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, alignment="left")

    png = draw_panels(losses, "stage", lambda panel: 8, paint, path.with_suffix(".png"))
    caption = "Not drawn: no training loss is stored."
    if png:
        caption = f"As logged, one line per task or left-out task; seed {result['seed']}."
    return Figure("Training loss", caption, png)


STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def draw_panels(frame: DataFrame, by: str, height, paint, path: Path) -> Path | None:
    """Write a picture with a panel per value of a column, and beside it its numbers.

    paint(axis, value, rows) draws a panel; height(rows) is its height in lines of text.
    Returns: the picture's path; None where there is nothing to draw.
    """
    if frame.empty:
        return None
    plt.rcParams.update(STYLE)
    groups = list(frame.groupby(by, sort=False))
    heights = [0.7 + 0.2 * height(rows) for _, rows in groups]
    # Narrow, so that its letters can be read on a telephone.
    size = (4.6, sum(heights))
    figure, axes = plt.subplots(len(groups), squeeze=False, figsize=size, height_ratios=heights)
    for axis, (value, rows) in zip(axes.flat, groups, strict=True):
        paint(axis, value, rows)
    write_csv(frame, path.with_suffix(".csv"))
    save_png(figure, path)
    return path


def write_csv(frame: DataFrame, path: Path) -> None:
    """Write whole or not at all."""
    runtime.write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def save_png(figure, path: Path) -> None:
    """Write whole or not at all, without a version inside: the same run gives the same bytes."""
    with runtime.whole(path) as partial:
        figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)


def changed_answers(run_path: Path, result: dict) -> list[dict]:
    """Per task, the first three examples in file order that adaptation turned right or wrong.

    Returns: [{"task", "method", "total", "won", "lost", "examples": [row, ...]}]; a row holds
        what was stored of the example for the base model and, ending in "_after", once adapted.
    """
    correct = results.FIELDS[result["metric"]]
    found = []
    for task, about in result["tasks"].items():
        adapted = [method for method in ADAPTED if method in about["methods"]]
        if not adapted or "base" not in about["methods"]:
            continue
        # Side by side, one row per example that both have.
        before = DataFrame(runtime.read_jsonl(run_path / f"scores/base/{task}.jsonl"))
        after = DataFrame(runtime.read_jsonl(run_path / f"scores/{adapted[0]}/{task}.jsonl"))
        rows = before.merge(after, on="id", suffixes=("", "_after"))
        # A fraction where several adapters of one method are averaged.
        change = rows[f"{correct}_after"] - rows[correct]
        entry = {
            "task": task_label(result, task),
            "method": label(adapted[0]),
            "total": len(rows),
            "won": (change > 0).sum(),
            "lost": (change < 0).sum(),
            "examples": rows[change != 0].head(3).to_dict("records"),
        }
        found.append(entry)
    return found


def page_text(result: dict, sections: dict[str, list], examples: list[dict]) -> str:
    """report.html: one page that needs no other file and no network."""
    # Texts of tasks and models are not to be trusted: all are escaped.
    loader = jinja2.FileSystemLoader(ROOT)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    return template.render(
        title=page_title(result),
        subtitle=subtitle(result),
        findings=findings(result),
        sections=sections,
        how_to_read=HOW_TO_READ,
        stand_ins=stand_in_note(result),
        examples=examples,
        metric=result["metric"],
        page_table=page_table,
        inlined=inlined,
    )


def page_table(table: Table) -> Markup:
    """A table as HTML. pandas escapes its texts; verdicts get a class for their colour."""
    # pandas would cut long texts.
    with pd.option_context("display.max_colwidth", None):
        html = table.frame.to_html(border=0)
    # A number and its error stay on one line.
    html = html.replace(" ± ", "&nbsp;±&nbsp;")
    html = html.replace(f"<td>{NOT_RUN}</td>", f'<td class="missing">{NOT_RUN}</td>')
    for word in ("gain", "loss"):
        html = html.replace(f"({word})", f'<b class="{word}">{word}</b>')
    return Markup(html)


def inlined(figure: Figure) -> str:
    """A picture as a data address, so that the page is one file."""
    encoded = base64.b64encode(figure.png.read_bytes()).decode("ascii")
    return f"data:image/png;base64,{encoded}"
