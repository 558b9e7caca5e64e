"""What a study found: statistics, tables and two figures, from its stored cells.

Writes study/study.json, study.md, label_curve.png and task_curve.png. A standard error has two
parts: the test examples, and the draws of labels and prompts. Targets are fixed and weigh alike.
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
# of the task curve: the control wrong_prompts without labels, the others also with TASK_LABELS
TASK_STARTS = ("mean", "union", "generated", "wrong_prompts")
TASK_LABELS = 20
# what is compared, a - b
LABEL_PAIRS = (
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


def write_study(run: Run, settings: dict) -> None:
    """Statistics of all finished cells, as JSON, Markdown and figures."""
    folder = run.path / "study"
    folder.mkdir(exist_ok=True)
    marks = read_marks(run.path)
    targets = run.cfg.data.targets
    unseen = [name for name in targets if name not in run.cfg.data.train_tasks]
    left_out = [name for name in targets if name in run.cfg.data.train_tasks]
    base = f"first_{len(run.cfg.data.train_tasks)}"

    found = {
        "model": run.cfg.model.name,
        "metric": run.cfg.evaluate.metric,
        "seed": run.cfg.seed,
        "draws": max((len(array) for array in marks.values()), default=1),
        "skip_test": run.cfg.data.skip_test,
        "environment": runtime.environment(run),
        "n_test": _test_sizes(marks),
        "settings": settings,
        "core_seconds": round(_seconds(run.path)),
        "labels": [],
        "label_pairs": [],
        "tasks": [],
        "task_pairs": [],
        "search": summarise_search(run.path, unseen),
    }
    domains = {"unseen": [(base, name) for name in unseen]}
    domains["left_out"] = [(f"without_{name}", name) for name in left_out]
    if "labels" in run.cfg.study.parts:
        for domain, places in domains.items():
            for labels in run.cfg.study.labels:
                where = {"domain": domain, "labels": labels}
                found["labels"] += _levels(marks, places, labels, where, run.cfg.study.starts)
                found["label_pairs"] += _pairs(marks, places, labels, where, LABEL_PAIRS)
    if "tasks" in run.cfg.study.parts:
        for size, labels in itertools.product(run.cfg.study.set_sizes, (0, TASK_LABELS)):
            places = [(f"first_{size}", name) for name in unseen]
            where = {"size": size, "labels": labels}
            found["tasks"] += _levels(marks, places, labels, where, TASK_STARTS)
            found["task_pairs"] += _pairs(marks, places, labels, where, TASK_PAIRS)

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


def read_marks(path: Path) -> dict[tuple, np.ndarray]:
    """{(set, start, target, labels): (draws, examples)} of the finished cells."""
    draws: dict = {}
    for record in sorted(path.glob("cells/*/*/*/*/DONE.json")):
        name, start, target, place = record.parent.parts[-4:]
        labels, draw = place.split("-")
        right = [int(digit) for digit in runtime.read_json(record)["right"]]
        draws.setdefault((name, start, target, int(labels)), {})[int(draw)] = right
    return {key: np.array([of[draw] for draw in sorted(of)]) for key, of in draws.items()}


def _test_sizes(marks):
    return {target: array.shape[1] for (_, _, target, _), array in marks.items()}


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
    for start in [start for start in STARTS if start in starts]:
        arrays = _of_start(marks, places, start, labels)
        if arrays is not None:
            mean, error = mean_and_error(arrays)
            by_task = {}
            for (_, target), array in zip(places, arrays, strict=True):
                by_task[target] = round(float(array.mean()), 4)
            draws = max(len(array) for array in arrays)
            row = {"start": start, "draws": draws, "acc": mean, "se": error, "by_task": by_task}
            rows.append(where | row)
    return rows


def _pairs(marks, places, labels, where, pairs):
    rows = []
    for a, b in pairs:
        first = _of_start(marks, places, a, labels)
        second = _of_start(marks, places, b, labels)
        if first is None or second is None:
            continue
        # what has one draw stands against every draw of the other
        differences = [x - y for x, y in zip(first, second, strict=True)]
        mean, error = mean_and_error(differences)
        rows.append({**where, "a": a, "b": b, "difference": mean, "se": error})
    return rows


def summarise_search(path: Path, targets: list[str]) -> list[dict]:
    """Per target: the start, what an oracle finds, and what 20 labels find.

    The oracle takes the strategy with most right answers in the first half of the test examples.
    What it gains is read off the second half, which it has not seen.
    """
    rows = []
    for target in targets:
        records = [runtime.read_json(file) for file in path.glob(f"search/{target}/*/DONE.json")]
        kept = [record for record in records if record["strategy"]["family"] == "none"]
        if not kept:
            continue
        tried = [record for record in records if record["strategy"]["family"] != "none"]
        start = _marks_of(kept[0])
        half = len(start) // 2
        oracle = max(tried, key=lambda record: _marks_of(record)[:half].sum())
        labels = max(tried, key=_support_key)
        rows.append(
            {
                "target": target,
                "tried": len(tried),
                "start": float(start.mean()),
                "oracle": oracle["strategy"],
                "seen": _gain(oracle, start, slice(None, half)),
                "fresh": _gain(oracle, start, slice(half, None)),
                "by_labels": labels["strategy"],
                "wins": _net_wins(labels, kept[0]),
                "by_labels_gain": _gain(labels, start, slice(None)),
                "best_in_hindsight": max(_gain(r, start, slice(None))["mean"] for r in tried),
            }
        )
    return rows


def _marks_of(record):
    return np.array([int(digit) for digit in record["right"]])


def _support_key(record):
    return sum(record["support"]["correct"]), sum(record["support"]["gold_logp"])


def _net_wins(record, kept):
    return sum(record["support"]["correct"]) - sum(kept["support"]["correct"])


def _gain(record, start, part):
    difference = (_marks_of(record) - start)[part]
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return {"mean": float(difference.mean()), "se": float(error)}


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
    tests = ", ".join(f"{target} {count}" for target, count in found["n_test"].items())
    about = found["environment"]
    lines = [
        "# Study",
        "",
        f"Model {found['model']}, metric {found['metric']}, seed {found['seed']}, "
        f"up to {found['draws']} draws. Test examples: {tests}. Computed in {about['dtype']} on "
        f"{about['device']}; {found['core_seconds']} seconds of all ranks. "
        "± is one standard error over examples and draws. **Bold** differences pass two.",
        "",
    ]
    if found["labels"]:
        lines += _level_table("Accuracy by labels", found["labels"], "domain", "labels")
        lines += _pair_table("Differences by labels", found["label_pairs"], "domain", "labels")
    if found["tasks"]:
        lines += _level_table("Accuracy by training tasks", found["tasks"], "labels", "size")
        lines += _pair_table("Differences by training tasks", found["task_pairs"], "labels", "size")
    if found["search"]:
        lines += _search_table(found["search"])
    return "\n".join(lines)


def _level_table(title, rows, group, column):
    def cell(row):
        return f"{100 * row['acc']:.1f} ± {100 * row['se']:.1f}"

    return _table(title, rows, group, column, lambda row: STARTS[row["start"]][0], cell)


def _pair_table(title, rows, group, column):
    def cell(row):
        text = f"{100 * row['difference']:+.1f} ± {100 * row['se']:.1f}"
        return f"**{text}**" if abs(row["difference"]) > 2 * row["se"] else text

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


def _search_table(rows):
    def points(gain):
        return f"{100 * gain['mean']:+.1f} ± {100 * gain['se']:.1f}"

    lines = ["## What label-free strategies could gain", ""]
    lines.append(
        "| target | start | oracle's strategy | where it chose | on fresh examples | "
        "chosen by 20 labels | net wins | its gain |"
    )
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row['target']} | {100 * row['start']:.1f} | {_short(row['oracle'])} | "
            f"{points(row['seen'])} | {points(row['fresh'])} | {_short(row['by_labels'])} | "
            f"{row['wins']:+d} | {points(row['by_labels_gain'])} |"
        )
    lines.append("")
    return lines


def _short(strategy):
    fields = [str(value) for key, value in strategy.items() if key != "family"]
    return " ".join([strategy["family"], *fields])
