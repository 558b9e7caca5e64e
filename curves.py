"""What a study found: statistics, tables and two figures, from its stored cells.

Writes study/study.json, study.md, label_curve.png and task_curve.png. A standard error has two
parts: the test examples, and the draws of labels and prompts. Targets are fixed and weigh alike.
Levels are of both blocks of test examples. A difference is a finding if it passes two standard
errors in the first block and again in the second.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import report
import runtime
from runtime import Run

# starts in the order of the tables: label, colour, marker
STARTS = {
    "plain": ("plain LoRA", "#009E73", "P"),
    "mean": ("mean adapter", "#56B4E9", "v"),
    "wrong_prompts": ("generated, wrong prompts", "#E69F00", "^"),
    "maml": ("MAML-en-LLM", "#8A6D3B", "h"),
    "generated": ("generated", "#0072B2", "s"),
    "union": ("union", "#000000", "o"),
    "around_union": ("generated around union", "#D55E00", "D"),
    "icl": ("labels in the prompt", "#7F7F7F", "X"),
}
# of the task curve: wrong_prompts without labels only, the others with TASK_LABELS too
TASK_STARTS = ("mean", "union", "generated", "wrong_prompts")
TASK_LABELS = 20
# what is compared, a - b
LABEL_PAIRS = (
    ("mean", "plain"),
    ("icl", "plain"),
    ("generated", "plain"),
    ("generated", "mean"),
    ("generated", "union"),
    ("generated", "maml"),
    ("generated", "icl"),
    ("union", "plain"),
    ("union", "icl"),
    ("around_union", "union"),
    ("around_union", "generated"),
)
TASK_PAIRS = (("generated", "mean"), ("generated", "wrong_prompts"), ("generated", "union"))


def mean_and_error(marks: list[np.ndarray]) -> tuple[float, float]:
    """Mean over targets, and its standard error.

    What an example does in one draw alone counts in both parts, so the error is a little too large.
    Args: marks: per target (draws, examples) of 0 and 1, or of differences of such.
    """
    means = []
    variance = 0.0
    for of_target in marks:
        draws, examples = of_target.shape
        means.append(of_target.mean())
        variance += of_target.mean(0).var(ddof=1) / examples
        if draws > 1:
            variance += of_target.mean(1).var(ddof=1) / draws
    return float(np.mean(means)), float(np.sqrt(variance)) / len(marks)


def write_study(run: Run, cells: list, settings: dict) -> None:
    """Statistics of the study's cells, as JSON, Markdown and figures.

    Args: cells: `study.Cell`s, draw by draw.
    """
    folder = run.path / "study"
    folder.mkdir(exist_ok=True)
    first = read_marks(run.path, cells, "right")
    second = read_marks(run.path, cells, "fresh")
    both = {key: np.concatenate([first[key], second[key]], 1) for key in first}
    targets = run.cfg.data.targets
    unseen = [name for name in targets if name not in run.cfg.data.train_tasks]
    left_out = [name for name in targets if name in run.cfg.data.train_tasks]
    base = f"first_{len(run.cfg.data.train_tasks)}"

    found = {
        "model": run.cfg.model.name,
        "metric": run.cfg.evaluate.metric,
        "seed": run.cfg.seed,
        "draws": max((len(array) for array in first.values()), default=1),
        "skip_test": run.cfg.data.skip_test,
        "environment": runtime.environment(run),
        "n_test": _test_sizes(run.path, "right"),
        "n_fresh": _test_sizes(run.path, "fresh"),
        "settings": settings,
        "core_seconds": round(_seconds(run.path)),
        "labels": [],
        "label_pairs": [],
        "tasks": [],
        "task_pairs": [],
        "slopes": [],
        "search": [],
    }
    domains = {"unseen": [(base, name) for name in unseen]}
    domains["left_out"] = [(f"without_{name}", name) for name in left_out]
    if "labels" in run.cfg.study.parts:
        for domain, places in domains.items():
            for labels in run.cfg.study.labels:
                where = {"domain": domain, "labels": labels}
                found["labels"] += _levels(both, places, labels, where, run.cfg.study.starts)
                found["label_pairs"] += _pairs(first, second, places, labels, where, LABEL_PAIRS)
    if "tasks" in run.cfg.study.parts:
        for size, labels in itertools.product(run.cfg.study.set_sizes, (0, TASK_LABELS)):
            places = [(f"first_{size}", name) for name in unseen]
            where = {"size": size, "labels": labels}
            found["tasks"] += _levels(both, places, labels, where, TASK_STARTS)
            found["task_pairs"] += _pairs(first, second, places, labels, where, TASK_PAIRS)
        for labels in (0, TASK_LABELS):
            found["slopes"] += fit_slopes(both, unseen, run.cfg.study.set_sizes, labels)

    if "search" in run.cfg.study.parts:
        found["search"] = summarise_search(run.path, unseen, run.cfg.study.strategies)

    runtime.write_json(folder / "study.json", found)
    runtime.write_text(folder / "study.md", as_markdown(found))
    draw_figures(found, folder)
    run.log(f"study: {folder}/study.md")


def draw_figures(found: dict, folder: Path) -> None:
    """Both figures, from what study.json holds."""
    plt.rcParams.update(report.STYLE)
    if found["labels"]:
        draw_labels(found, folder / "label_curve.png")
    if found["tasks"]:
        draw_tasks(found, folder / "task_curve.png")


def read_marks(path: Path, cells: list, block: str) -> dict[tuple, np.ndarray]:
    """{(set, start, target, labels): (draws, examples)} of finished cells.

    Args: block: right (the first test examples) or fresh (the second).
    """
    # those of this study alone: a folder may hold cells of other draws or starts
    draws: dict = {}
    for cell in cells:
        marks = runtime.read_json(path / cell.folder / "DONE.json")[block]
        key = (cell.set, cell.start, cell.target, cell.labels)
        draws.setdefault(key, []).append([int(mark) for mark in marks])
    return {key: np.array(rows) for key, rows in draws.items()}


def _test_sizes(path, block):
    """{target: test examples of a block}, of cells and of the search."""
    sizes = {}
    for record in [*path.glob("cells/*/*/*/*/DONE.json"), *path.glob("search/*/*/DONE.json")]:
        target = record.parent.parts[-2]
        sizes[target] = len(runtime.read_json(record)[block])
    return dict(sorted(sizes.items()))


def _seconds(path):
    total = 0.0
    for record in path.glob("**/DONE.json"):
        total += runtime.read_json(record)["seconds"]
    return total


def _of_start(marks, places, start, labels):
    """Marks of a start on every target of a domain; None where a cell is missing."""
    # the base model with no label in the prompt is the plain start
    if start == "icl" and not labels:
        start = "plain"
    keys = [(name, start, target, labels) for name, target in places]
    if not keys or any(key not in marks for key in keys):
        return None
    return [marks[key] for key in keys]


def _levels(marks, places, labels, where, starts):
    rows = []
    for start in STARTS:
        arrays = _of_start(marks, places, start, labels)
        if start not in starts or arrays is None:
            continue
        mean, error = mean_and_error(arrays)
        by_task = {}
        for (_, target), array in zip(places, arrays, strict=True):
            by_task[target] = round(float(array.mean()), 4)
        draws = max(len(array) for array in arrays)
        row = {"start": start, "draws": draws, "acc": mean, "se": error, "by_task": by_task}
        rows.append(where | row)
    return rows


def _pairs(first, second, places, labels, where, pairs):
    rows = []
    for a, b in pairs:
        difference = _difference(first, places, labels, a, b)
        if difference is None:
            continue
        mean, error = difference
        again, again_error = _difference(second, places, labels, a, b)
        row = {"a": a, "b": b, "difference": mean, "se": error}
        row |= {"fresh": again, "fresh_se": again_error, "by_task": {}}
        for place in places:
            seen = _difference(first, [place], labels, a, b)
            fresh = _difference(second, [place], labels, a, b)
            row["by_task"][place[1]] = [round(value, 4) for value in (*seen, *fresh)]
        rows.append(where | row)
    return rows


def _difference(marks, places, labels, a, b):
    """(mean, standard error) of start a less start b on the same examples; None without cells."""
    arrays = _values(marks, places, labels, a, b)
    if arrays is None:
        return None
    return mean_and_error(arrays)


def _values(marks, places, labels, a, b=""):
    """Per target: marks of start a, less those of start b if any; None where a cell is missing."""
    first = _of_start(marks, places, a, labels)
    if not b or first is None:
        return first
    second = _of_start(marks, places, b, labels)
    if second is None:
        return None
    # what has one draw stands against every draw of the other
    return [x - y for x, y in zip(first, second, strict=True)]


def fit_slopes(
    marks: dict[tuple, np.ndarray], targets: list[str], sizes: list[int], labels: int
) -> list[dict]:
    """Change per doubling of the training tasks, by least squares: of starts and of differences."""
    doublings = np.log2(sizes)
    centred = doublings - doublings.mean()
    if not centred.any():
        return []  # one size has no slope
    weights = centred / (centred**2).sum()

    rows = []
    for a, b in [*itertools.product(TASK_STARTS, [""]), *TASK_PAIRS]:
        by_size = []
        for size in sizes:
            places = [(f"first_{size}", target) for target in targets]
            by_size.append(_values(marks, places, labels, a, b))
        if any(values is None for values in by_size):
            continue
        # a target's slope is a weighted sum over the sizes, example by example
        slopes = []
        for number in range(len(targets)):
            slope = 0.0
            for weight, values in zip(weights, by_size, strict=True):
                slope = slope + weight * values[number]
            slopes.append(slope)
        mean, error = mean_and_error(slopes)
        rows.append({"labels": labels, "a": a, "b": b, "slope": mean, "se": error})
    return rows


def is_finding(row: dict) -> bool:
    """Does a difference pass two standard errors in both blocks, with one sign?"""
    seen = row["difference"] / max(row["se"], 1e-9)
    again = row["fresh"] / max(row["fresh_se"], 1e-9)
    return min(seen, again) > 2 or max(seen, again) < -2


def summarise_search(path: Path, targets: list[str], strategies: list[dict]) -> list[dict]:
    """Per target: the start, what an oracle finds among strategies, and what 20 labels find.

    The oracle takes the strategy with most right answers in the first block of test examples.
    What it gains is read off the second block, which it has not seen.
    """
    rows = []
    for target in targets:
        files = sorted(path.glob(f"search/{target}/*/DONE.json"))
        records = [runtime.read_json(file) for file in files]
        kept = [record for record in records if record["strategy"]["family"] == "none"]
        if not kept:
            continue
        # the folder may hold others, which a longer list named before
        tried = [record for record in records if record["strategy"] in strategies]
        if not tried:
            continue
        oracle = max(tried, key=lambda record: record["right"].count("1"))
        labels = max(tried, key=_support_key)
        rows.append(
            {
                "target": target,
                "tried": len(tried),
                "start": kept[0]["right"].count("1") / len(kept[0]["right"]),
                "oracle": oracle["strategy"],
                "seen": _gain(oracle, kept[0], "right"),
                "fresh": _gain(oracle, kept[0], "fresh"),
                "by_labels": labels["strategy"],
                "wins": _net_wins(labels, kept[0]),
                "by_labels_seen": _gain(labels, kept[0], "right"),
                "by_labels_fresh": _gain(labels, kept[0], "fresh"),
            }
        )
    return rows


def _support_key(record):
    return sum(record["support"]["correct"]), sum(record["support"]["gold_logp"])


def _net_wins(record, kept):
    return sum(record["support"]["correct"]) - sum(kept["support"]["correct"])


def _gain(record, kept, block):
    """Mean and standard error of what a strategy gains over the start, in one block."""
    after = np.array([int(digit) for digit in record[block]])
    before = np.array([int(digit) for digit in kept[block]])
    mean, error = mean_and_error([(after - before)[None]])
    return {"mean": mean, "se": error}


def draw_labels(found: dict, path: Path) -> None:
    """Accuracy against labels, a panel per domain."""
    titles = {"unseen": "Tasks unlike the training tasks", "left_out": "Training tasks left out"}
    domains = [d for d in titles if any(row["domain"] == d for row in found["labels"])]
    figure, axes = plt.subplots(1, len(domains), figsize=(4.2 * len(domains), 3.6), squeeze=False)
    for axis, domain in zip(axes.flat, domains, strict=True):
        rows = [row for row in found["labels"] if row["domain"] == domain]
        _draw_lines(axis, rows, "labels")
        axis.set_title(f"{titles[domain]} ({len(rows[0]['by_task'])})")
        axis.set_xlabel("labelled examples of the task")
    axes.flat[0].set_ylabel("accuracy, %")
    _draw_legend(figure, axes.flat[0])
    report.save_png(figure, path)


def draw_tasks(found: dict, path: Path) -> None:
    """Accuracy on unseen tasks against training tasks, without labels and with 20."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), sharex=True)
    for axis, labels in zip(axes, (0, TASK_LABELS), strict=True):
        rows = [row for row in found["tasks"] if row["labels"] == labels]
        _draw_lines(axis, rows, "size")
        axis.set_title("no labels" if not labels else f"{labels} labels")
        axis.set_xlabel("training tasks")
    axes[0].set_ylabel("accuracy on unseen tasks, %")
    _draw_legend(figure, axes[0])
    report.save_png(figure, path)


def _draw_legend(figure, axis):
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)


def _draw_lines(axis, rows, key):
    """A line per start, at evenly spaced places, with bars of one standard error."""
    values = sorted({row[key] for row in rows})
    for number, (start, (label, color, marker)) in enumerate(STARTS.items()):
        of_start = [row for row in rows if row["start"] == start]
        if not of_start:
            continue
        # side by side, so that bars do not hide each other
        shift = 0.04 * (number - len(STARTS) / 2)
        x = [values.index(row[key]) + shift for row in of_start]
        y = [100 * row["acc"] for row in of_start]
        error = [100 * row["se"] for row in of_start]
        axis.errorbar(x, y, error, label=label, color=color, marker=marker, ms=4, lw=1.2)
    axis.set_xticks(range(len(values)), [str(value) for value in values])


def as_markdown(found: dict) -> str:
    """All numbers of a study in tables, in percent and points, ± one standard error."""
    sizes = []
    for target, count in found["n_test"].items():
        sizes.append(f"{target} {count} + {found['n_fresh'][target]}")
    about = found["environment"]
    lines = [
        "# Study",
        "",
        f"Model {found['model']}, metric {found['metric']}, seed {found['seed']}. "
        f"Test examples in two blocks: {', '.join(sizes)}. Computed in {about['dtype']} on "
        f"{about['device']}; {found['core_seconds']} seconds of all ranks. ± is one standard "
        "error over examples, and over draws where there are several.",
        "",
    ]
    if found["labels"] or found["tasks"]:
        lines += [
            f"Up to {found['draws']} draws of labels and prompts. Accuracies are of both blocks. A "
            "difference stands for the first block, then for the second. **Bold** differences "
            "pass two standard errors in both blocks.",
            "",
        ]
    if found["labels"]:
        lines += _level_table("Accuracy by labels", found["labels"], "domain", "labels")
        lines += _pair_table("Differences by labels", found["label_pairs"], "domain", "labels")
    if found["tasks"]:
        lines += _level_table("Accuracy by training tasks", found["tasks"], "labels", "size")
        lines += _pair_table("Differences by training tasks", found["task_pairs"], "labels", "size")
        lines += _slope_table(found["slopes"])
    if found["search"]:
        lines += _search_table(found["search"])
    return "\n".join(lines)


def _level_table(title, rows, group, column):
    def cell(row):
        return f"{100 * row['acc']:.1f} ± {100 * row['se']:.1f}"

    return _table(title, rows, group, column, lambda row: STARTS[row["start"]][0], cell)


def _pair_table(title, rows, group, column):
    def cell(row):
        seen = f"{100 * row['difference']:+.1f} ± {100 * row['se']:.1f}"
        again = f"{100 * row['fresh']:+.1f} ± {100 * row['fresh_se']:.1f}"
        text = f"{seen}, {again}"
        return f"**{text}**" if is_finding(row) else text

    return _table(title, rows, group, column, lambda row: f"{row['a']} - {row['b']}", cell)


def _table(title, rows, group, column, label, cell):
    """A table per value of `group`, with a column per value of `column`."""
    lines = []
    for value in dict.fromkeys(row[group] for row in rows):
        part = [row for row in rows if row[group] == value]
        columns = sorted({row[column] for row in part})
        lines += [f"## {title}: {group} {value}", ""]
        lines.append(f"| {column} | " + " | ".join(map(str, columns)) + " |")
        lines.append("|---" * (1 + len(columns)) + "|")
        for name in dict.fromkeys(label(row) for row in part):
            cells = {row[column]: cell(row) for row in part if label(row) == name}
            lines.append(f"| {name} | " + " | ".join(cells.get(c, "") for c in columns) + " |")
        lines.append("")
    return lines


def _slope_table(rows):
    def label(row):
        return f"{row['a']} - {row['b']}" if row["b"] else STARTS[row["a"]][0]

    def cell(row):
        return f"{100 * row['slope']:+.2f} ± {100 * row['se']:.2f}"

    rows = [row | {"domain": "unseen"} for row in rows]
    return _table(
        "Points per doubling of the training tasks", rows, "domain", "labels", label, cell
    )


def _search_table(rows):
    def points(gain):
        return f"{100 * gain['mean']:+.1f} ± {100 * gain['se']:.1f}"

    lines = ["## What label-free strategies could gain", ""]
    lines.append(
        "| target | start | oracle's strategy | where it chose | second block | "
        "chosen by 20 labels | net wins | first block | second block |"
    )
    lines.append("|---" * 9 + "|")
    for row in rows:
        lines.append(
            f"| {row['target']} | {100 * row['start']:.1f} | {_short(row['oracle'])} | "
            f"{points(row['seen'])} | {points(row['fresh'])} | {_short(row['by_labels'])} | "
            f"{row['wins']:+d} | {points(row['by_labels_seen'])} | "
            f"{points(row['by_labels_fresh'])} |"
        )
    lines.append("")
    return lines


def _short(strategy):
    fields = [str(value) for key, value in strategy.items() if key != "family"]
    return " ".join([strategy["family"], *fields])
