"""Tables, figures, report.md and a self-contained report.html, from the stored files of a run.

Last stage of the pipeline: it loads no model, so rebuilding a report costs seconds.

    python degaml.py stage=report config=configs/smollm2.yaml

Reads:  tasks.json, scores/, adapted/, metrics.jsonl, stages/, env.json, command.txt of the run.
Writes: report/results.json, report/report.md, report/report.html, report/figures/*.png and *.csv.

Conventions, the same in every table and figure:
    - an accuracy is a mean over test examples, its standard error is sample std / sqrt(n);
    - a difference of two methods is paired by example, so the examples' difficulty cancels;
    - an average over tasks is the plain mean of the tasks, which are fixed, with independent
      documents: se = sqrt(sum of se_task^2) / number of tasks;
    - what has not been run says "not run".
"""

from __future__ import annotations

import base64
import contextlib
import csv
import html
import io
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import yaml

import methods
import runtime
from config import UserError

matplotlib.use("Agg")  # before pyplot, which would look for a display
from matplotlib import pyplot as plt

PAPER_TABLES = Path(__file__).parent / "configs" / "paper_tables.yaml"
NOT_RUN = "not run"
METRICS = {
    "norm": "log-likelihood per character",
    "raw": "summed log-likelihood",
    "strict": "generated answer letter, strict parse",
    "lenient": "generated answer letter, lenient parse",
}
FIELDS = {"norm": "correct_norm", "raw": "correct_raw"}  # row keys that differ from their name
DOMAINS = {"id": "In-domain", "ood": "Out-of-domain"}
TASK_ORDER = (
    "arc_c",
    "arc_e",
    "hellaswag",
    "boolq",
    "piqa",
    "winogrande",
    "gsm8k",
    "math",
    "divlogic",
    "socialiqa",
    "codemmlu",
    "jama",
)

METHODS = {m.id: (m.label, m.color, m.marker) for m in methods.TABLE}
ALWAYS_SHOWN = methods.ALWAYS_SHOWN
# The paper's Table 2 prints each row's relative change over the row before it.
RELATIVE_TO = {"generator": "base", "degaml": "generator"}
PAIRS = (
    ("generator", "base"),
    ("generator", "mean"),
    ("generator", "wrong_prompts"),
    ("mean", "base"),
    ("degaml", "generator"),
    ("degaml_plus", "generator"),
    ("degaml_plus", "no_meta"),
    ("degaml_plus", "degaml"),
    ("no_meta", "base"),
    ("full_data", "base"),
    ("aligned", "generator"),
    ("tempo", "generator"),
    ("tempo", "degaml"),
    ("tempo_plus", "degaml_plus"),
    ("maml_matched", "maml"),
    ("degaml", "no_meta"),
    *((a, b) for b in methods.META_TRAINED for a in ("degaml", "degaml_plus")),
)
SEARCHED = ("degaml", "degaml_plus", "tempo", "tempo_plus")
BASELINES = ("no_meta", *methods.META_TRAINED)
TABLE_1 = ("no_meta", "union", "abmll", "maml")  # the rows of paper D's Table 1 above its own
QUESTIONS = {
    "generator - base": "Generated adapters against the frozen model",
    "generator - mean": "Generated adapters against the plain mean of the training adapters "
    "(does it matter that they are generated?)",
    "generator - wrong_prompts": "Generated adapters against adapters generated from another "
    "task's prompts (does conditioning matter?)",
    "degaml - generator": "The policy's adaptation against the generated adapter it starts from",
    "aligned - generator": "Aligned adapters against generated ones (does the Fusion VAE help?)",
    "degaml_plus - no_meta": "The whole system with fine-tuning allowed against plain fine-tuning "
    "on the same support examples (does meta-training matter?)",
}
FAMILIES = {
    "TTT": "#0072B2",
    "LORA": "#E69F00",
    "TTS": "#009E73",
    "Latent": "#CC79A7",
    "SFT": "#D55E00",
    "invalid": "#7F7F7F",
}


def make_report(run) -> dict:
    """Tables, figures and the HTML page, from stored files only. Rank 0 works.

    Writes report/results.json, report.md, report.html and figures/; prints the console tables.
    """
    if run.rank:
        return {}
    out = Path(run.path) / "report"
    results = build_results(run.path, run.cfg)
    runtime.write_text(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    figures = draw_figures(results, run.path, out / "figures")
    write_markdown(results, figures, out / "report.md")
    write_html(results, figures, run.path, out / "report.html")
    print(format_console_table(results))
    print(f"\nreport:  {out / 'report.html'}")
    for method in ("degaml_plus", "degaml", "generator"):
        adapters = sorted((run.path / "adapted" / method).glob("*/adapter_model.safetensors"))
        if adapters:
            print(
                f"adapter: {adapters[0].parent}   (PeftModel.from_pretrained(base_model, this folder))"
            )
            break
    return {}


# ------------------------------------------------------------------------------------ reading


def _read_json(path: Path, default):
    return runtime.read_json(path) if path.exists() else default


def load_tasks(run_path: Path) -> dict[str, dict]:
    """Read tasks.json in the fixed task order, tasks of the user's own last; {} when absent."""
    tasks = _read_json(Path(run_path) / "tasks.json", {})
    known = [name for name in TASK_ORDER if name in tasks]
    return {name: tasks[name] for name in known + sorted(set(tasks) - set(known))}


def load_scores(run_path: Path, tasks) -> dict[str, dict[str, dict[str, dict]]]:
    """Read scores/<method>/<task>.jsonl as {method: {task: {example id: row}}}.

    Raises: UserError: if an example id occurs twice in a file, which would break the pairing.
    """
    scores: dict = {}
    folder = Path(run_path) / "scores"
    found = {path.name for path in folder.iterdir() if path.is_dir()} if folder.exists() else set()
    for method in [m for m in METHODS if m in found] + sorted(found - set(METHODS)):
        for task in tasks:
            path = folder / method / f"{task}.jsonl"
            rows = runtime.read_jsonl(path) if path.exists() else []
            by_id = {row["id"]: row for row in rows}
            if len(by_id) != len(rows):
                raise UserError(f"{path}: an example id occurs twice; delete it and evaluate again")
            if by_id:
                scores.setdefault(method, {})[task] = by_id
    return scores


def load_episodes(run_path: Path, tasks) -> dict[str, dict[str, list[dict]]]:
    """Read the strategies that were tried, as {method: {task: [episode, ...]}}."""
    episodes: dict = {}
    for method in METHODS:
        for task in tasks:
            path = Path(run_path) / "adapted" / method / task / "episodes.jsonl"
            if path.exists():
                episodes.setdefault(method, {})[task] = runtime.read_jsonl(path)
    return episodes


# --------------------------------------------------------------------------------- statistics


def _mean_se(values) -> tuple[float, float | None]:
    x = np.asarray(list(values), dtype=np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None


def _mean_over_runs(per_run: list[dict[str, float]]) -> dict[str, float]:
    """One value per example, averaged over the runs that have it.

    Runs share their test documents, so seeds are averaged first and the standard error is taken
    over documents: counting a document once per seed would make it too small.
    """
    ids = dict.fromkeys(key for values in per_run for key in values)
    return {key: float(np.mean([v[key] for v in per_run if key in v])) for key in ids}


def _values(scores: dict, method: str, task: str, metric: str) -> dict[str, float]:
    field, rows = FIELDS.get(metric, metric), scores.get(method, {}).get(task, {})
    return {key: float(row[field]) for key, row in rows.items() if row.get(field) is not None}


def accuracy(runs: list[dict], method: str, task: str, metric: str) -> dict | None:
    """Mean of one score over test examples.

    Args:
        runs: score tables of `load_scores`, one per seed; usually just one.
        method: folder name under scores/.
        task: task name.
        metric: a key of METRICS; per example 0 or 1, or a fraction averaged over adapters.
    Returns: {"mean", "se", "n"}, or None where the method has no such scores on this task.
    """
    per_run = [values for run in runs if (values := _values(run, method, task, metric))]
    if not per_run:
        return None
    pooled = _mean_over_runs(per_run)
    mean, se = _mean_se(pooled.values())
    return {"mean": mean, "se": se, "n": len(pooled)}


def paired(runs: list[dict], a: str, b: str, task: str, metric: str) -> dict | None:
    """Difference of two methods, paired by example id; None where they share no example.

    Returns: {"diff", "se", "n"}, as fractions; `n` counts examples.
    """
    per_run = []
    for run in runs:
        left, right = (_values(run, m, task, metric) for m in (a, b))
        per_run.append({key: left[key] - right[key] for key in left if key in right})
    pooled = _mean_over_runs(per_run)
    if not pooled or a == b:
        return None
    diff, se = _mean_se(pooled.values())
    return {"diff": diff, "se": se, "n": len(pooled)}


def calibration_error(rows, bins: int = 10) -> float | None:
    """Expected calibration error: |accuracy - confidence| per equal-width bin of confidence, weighted by its share.

    The confidence is the largest probability under a softmax over the options' log-likelihoods, and the answer its
    option. Source: Guo et al. 2017, eq. 3. None where the rows hold no finite log-likelihoods.
    """
    answers = [
        (np.asarray(row["raw"], dtype=np.float64), row["gold"])
        for row in rows
        if row.get("raw") and all(map(math.isfinite, row["raw"]))
    ]  # a diverged method has none
    if not answers:
        return None
    confidence, right = np.empty(len(answers)), np.empty(len(answers))
    for i, (raw, gold) in enumerate(answers):
        p = np.exp(raw - raw.max())
        confidence[i], right[i] = p.max() / p.sum(), float(raw.argmax() == gold)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(
        sum(
            abs(right[which == b].mean() - confidence[which == b].mean()) * (which == b).mean()
            for b in np.unique(which)
        )
    )


def _average(entries: list[dict | None], key: str) -> dict | None:
    """Mean over fixed tasks with independent documents; `tasks` counts those that have a value."""
    entries = [entry for entry in entries if entry is not None]
    if not entries:
        return None
    ses = [entry["se"] for entry in entries]
    se = None if None in ses else math.sqrt(sum(s * s for s in ses)) / len(ses)
    return {
        key: sum(entry[key] for entry in entries) / len(entries),
        "se": se,
        "tasks": len(entries),
    }


def _in_domain(tasks: dict, domain: str) -> list[str]:
    return [name for name, task in tasks.items() if task["domain"] == domain]


def method_entry(runs: list[dict], method: str, task: str, metric: str) -> dict | None:
    """Everything results.json says about one method on one task, or None when it was not run."""
    stats = {name: accuracy(runs, method, task, name) for name in METRICS}
    if stats[metric] is None:
        return None
    entry = {"acc": stats[metric]["mean"], "se": stats[metric]["se"], "n": stats[metric]["n"]}
    for name, value in stats.items():
        if value is not None:
            entry |= {f"acc_{name}": value["mean"], f"se_{name}": value["se"]}
    found = [
        ece
        for run in runs
        if (ece := calibration_error(run.get(method, {}).get(task, {}).values())) is not None
    ]
    entry["ece"] = float(np.mean(found)) if found else None
    gold = accuracy(runs, method, task, "logp_gold")
    entry["logp_gold"] = gold["mean"] if gold and math.isfinite(gold["mean"]) else None
    for other in ("base", "generator"):
        entry[f"vs_{other}"] = paired(runs, method, other, task, metric)
    return entry


def average_over_tasks(runs: list[dict], tasks: dict, metric: str) -> dict:
    """Average accuracy per domain and method, over the tasks on which the method was run.

    Returns: {domain: {method: {"acc", "se", "tasks", "acc_norm", …, "vs_base", "vs_generator"}}}.
    """
    averages: dict = {}
    for domain in DOMAINS:
        averages[domain] = {}
        names = _in_domain(tasks, domain)
        for method in dict.fromkeys(m for run in runs for m in run):
            by_metric = {
                key: _average([accuracy(runs, method, t, key) for t in names], "mean")
                for key in METRICS
            }
            if by_metric[metric] is None:
                continue
            chosen = by_metric[metric]
            entry = {"acc": chosen["mean"], "se": chosen["se"], "tasks": chosen["tasks"]}
            for key, value in by_metric.items():
                if value is not None:
                    entry |= {f"acc_{key}": value["mean"], f"se_{key}": value["se"]}
            for other in ("base", "generator"):
                pairs = [paired(runs, method, other, t, metric) for t in names]
                entry[f"vs_{other}"] = _average(pairs, "diff")
            errors = [
                ece
                for run in runs
                for t in names
                if (ece := calibration_error(run.get(method, {}).get(t, {}).values())) is not None
            ]
            entry["ece"] = float(np.mean(errors)) if errors else None
            averages[domain][method] = entry
    return averages


def contrast_methods(runs: list[dict], tasks: dict) -> list[dict]:
    """The fixed list of paired differences, for every metric, per domain and per task.

    A pair is left out when the two methods share no task, or were not scored by that metric.
    """
    contrasts = []
    for metric in METRICS:
        for a, b in PAIRS:
            found = {t: paired(runs, a, b, t, metric) for t in tasks}
            found = {t: value for t, value in found.items() if value is not None}
            if found:
                domains = {
                    d: _average([found.get(t) for t in _in_domain(tasks, d)], "diff")
                    for d in DOMAINS
                }
                contrasts.append(
                    {"name": f"{a} - {b}", "metric": metric, **domains, "tasks": found}
                )
    return contrasts


# ------------------------------------------------------------------------------------ results


def build_results(run_path: Path, cfg) -> dict:
    """Aggregate a run folder into the content of results.json.

    Args:
        run_path: the run folder; any part of it may be missing.
        cfg: reads `name`, `seed`, `model.name`, `evaluate.metric`, `report.paper` and
            `report.seed_runs` (folders of runs that differ in the seed only).
    Returns: a JSON-serialisable dict; accuracies and differences are fractions.
    Raises: UserError: if a seed run is missing or repeats a seed.
    """
    run_path, metric = Path(run_path), cfg.evaluate.metric
    tasks = load_tasks(run_path)
    scores = load_scores(run_path, tasks)
    results = {"config": cfg.name, "model": cfg.model.name, "seed": cfg.seed, "metric": metric}
    results["tasks"] = {
        task: _task_entry(run_path, scores, task, about, metric) for task, about in tasks.items()
    }
    results["averages"] = average_over_tasks([scores], tasks, metric)
    results["contrasts"] = contrast_methods([scores], tasks)
    stages = sorted((run_path / "stages").glob("*.json"))
    for key in ("seconds", "seconds_critical_path"):
        results[key] = {path.stem: _read_json(path, {}).get(key) for path in stages}
    results["seconds_by_method"] = _scoring_seconds(run_path, scores)
    results["search"] = {
        method: {task: summarise_search(rows) for task, rows in found.items()}
        for method, found in load_episodes(run_path, tasks).items()
    }
    results["budget"] = read_budget(run_path)
    results["paper"] = load_paper(cfg.report.paper, list(tasks))
    results["provenance"] = _provenance(run_path, tasks)
    if cfg.report.seed_runs:
        results["seeds"] = pool_seeds(run_path, cfg, tasks, scores)
    return results


def _task_entry(run_path: Path, scores: dict, task: str, about: dict, metric: str) -> dict:
    entries = {method: method_entry([scores], method, task, metric) for method in scores}
    strategy = {
        method: _read_json(run_path / "adapted" / method / task / "strategy.json", None)
        for method in SEARCHED
    }
    about = {key: value for key, value in about.items() if not key.endswith("_ids")}  # long lists
    return {**about, "methods": {m: e for m, e in entries.items() if e}, "strategy": strategy}


def read_budget(run_path: Path) -> dict[str, dict]:
    """What each method spent, from its DONE records and its reward files.

    Returns: {method: {"seconds_meta", "meta_steps", "meta_tokens", "seconds_adapt", "targets", "labels", "diverged"}}:
        core-seconds, gradient steps and tokens of meta-training summed over left-out sets (None: not recorded),
        core-seconds of adaptation over all targets, support labels per target, and where a training diverged.
    """

    def records(pattern):
        found = [
            (path.parent.name, runtime.read_json(path))
            for path in sorted(run_path.glob(f"{pattern}/DONE.json"))
        ]
        return [(name, record) for name, record in found if not record.get("own_task")]

    def total(found, key):
        values = [record[key] for _, record in found if record.get(key) is not None]
        return sum(values) if values else None

    generated = records("adapters/*") + records("prompts/*") + records("generator/*")
    meta_of = {
        **dict.fromkeys(("generator", "degaml", "degaml_plus"), generated),
        **dict.fromkeys(methods.ALIGNED, generated + records("align/*")),
        **{m: records(f"baselines/{m}/*") for m in BASELINES},
        "maml_matched": records("baselines/maml/*"),
    }
    out = {}
    for method, meta in meta_of.items():
        adapted = records(f"adapted/{method}/*")
        if not adapted:
            continue
        none = 0 if method == "no_meta" else None  # it has no meta-training
        labels = [
            _read_json(run_path / "adapted" / method / task / "strategy.json", {}).get("n_support")
            for task, _ in adapted
        ]
        out[method] = {
            "seconds_meta": total(meta, "seconds") if meta else none,
            "meta_steps": total(meta, "steps") if meta else none,
            "meta_tokens": total(meta, "tokens") if meta else none,
            "seconds_adapt": total(adapted, "seconds"),
            "targets": len(adapted),
            "labels": next((n for n in labels if n is not None), None),
            "diverged": {
                name: record["diverged_at"]
                for name, record in meta
                if record.get("diverged_at") is not None
            },
        }
    return out


def _scoring_seconds(run_path: Path, scores: dict) -> dict[str, float]:
    """Seconds spent scoring the test examples, summed over tasks, where they were recorded."""
    totals = {}
    for method, tasks in scores.items():
        paths = [run_path / "scores" / method / f"{task}.meta.json" for task in tasks]
        seconds = [_read_json(p, {}).get("seconds") for p in paths]
        if any(value is not None for value in seconds):
            totals[method] = sum(value or 0.0 for value in seconds)
    return totals


def summarise_search(episodes: list[dict]) -> dict:
    """Count what the policy proposed on one task, what was rewarded, and what it cost.

    An invalid proposal counts as proposed and not rewarded. A cached episode repeats an earlier
    strategy, so its cost is not counted again.
    """
    families: dict = {}
    iterations: dict = {}
    for row in episodes:
        family = families.setdefault(_family(row), {"proposed": 0, "rewarded": 0})
        step = iterations.setdefault(row.get("iteration", 0), {"proposed": 0, "rewarded": 0})
        for counter in (family, step):
            counter["proposed"] += 1
            counter["rewarded"] += int(bool(row.get("reward")))
    paid = [row for row in episodes if not row.get("cached")]
    cost = {
        key: sum(row.get(key) or 0 for row in paid) for key in ("seconds", "forwards", "backwards")
    }
    return {
        "proposed": len(episodes),
        "valid": sum(_family(row) != "invalid" for row in episodes),
        "rewarded": sum(int(bool(row.get("reward"))) for row in episodes),
        "distinct": len({_canonical(row) for row in episodes if _family(row) != "invalid"}),
        **cost,
        "by_family": families,
        "by_iteration": [{"iteration": i, **iterations[i]} for i in sorted(iterations)],
    }


def _family(episode: dict) -> str:
    valid = episode.get("valid", True) and episode.get("strategy")
    return str(episode["strategy"].get("family", "invalid")) if valid else "invalid"


def _canonical(episode: dict) -> str:
    return json.dumps(episode.get("strategy"), sort_keys=True)


def _provenance(run_path: Path, tasks: dict) -> dict:
    command = run_path / "command.txt"
    missing = [name for name in TASK_ORDER if name not in tasks]
    return {
        "run": run_path.name,
        "command": command.read_text(encoding="utf-8").strip() if command.exists() else None,
        "env": _read_json(run_path / "env.json", {}),
        "prompts_from": sorted({str(task.get("prompts_from")) for task in tasks.values()}),
        "tasks_not_in_run": missing,
    }


def load_paper(name: str, tasks: list[str]) -> dict | None:
    """The paper's numbers for one model, as fractions, limited to the tasks of this run.

    Averages are recomputed from the printed cells over those tasks; `notes` lists the printed
    averages that differ from their own cells by more than rounding.

    Args:
        name: an entry of configs/paper_tables.yaml, or "none".
        tasks: task names of the run.
    Raises: UserError: if there is no such entry.
    """
    if name == "none":
        return None
    tables = yaml.safe_load(PAPER_TABLES.read_text(encoding="utf-8"))
    if name not in tables:
        known = ", ".join(key for key in tables if "qwen" in key)
        raise UserError(f"report.paper={name}: expected none or one of: {known}")
    table = tables[name]
    paper = {
        "name": name,
        "model": table["model"],
        "metric": tables["metric"],
        "methods": {},
        "notes": list(table.get("remarks", [])),
    }
    for method, entry in table["methods"].items():
        cells = {domain: dict(entry[domain]) for domain in DOMAINS if domain in entry}
        _note_slips(paper["notes"], method, entry, cells, table.get("prefer", []))
        paper["methods"][method] = {
            "cells": {t: v / 100 for d in cells.values() for t, v in d.items() if t in tasks},
            "printed_avg": {d: v / 100 for d, v in entry["printed_avg"].items()},
        }
    return paper


def _note_slips(notes: list, method: str, entry: dict, cells: dict, prefer: list) -> None:
    """Apply the preferred cells, then compare each printed average with the mean of its cells."""
    label = METHODS[method][0]
    for fix in (fix for fix in prefer if fix["method"] == method):
        domain = next(d for d in cells if fix["task"] in cells[d])
        cells[domain][fix["task"]] = fix["value"]
        notes.append(f"{label}, {fix['task']}: {fix['value']} is used ({fix['why']}).")
    for domain, values in cells.items():
        mean = sum(values.values()) / len(values)
        printed = entry["printed_avg"][domain]
        if abs(mean - printed) > 0.1:  # the paper truncates some averages, which costs up to 0.1
            notes.append(
                f"{label}, {DOMAINS[domain].lower()} average: the paper prints {printed}, "
                f"its cells give {mean:.1f}, which is used here."
            )


def pool_seeds(run_path: Path, cfg, tasks: dict, scores: dict) -> dict:
    """Averages and contrasts of this run, of each run with another seed, and of all of them.

    Returns: {"runs": [{"seed", "run", "averages", "contrasts"}], "pooled": {"averages",
        "contrasts"}}; pooled entries carry `seed_std`, the sample std of the runs' values.
    Raises: UserError: if a folder is missing, of another model, or two runs have the same seed.
    """
    found = [
        (
            _seed_of(
                {
                    "seed": cfg.seed,
                    "generator": {"seed": cfg.generator.seed},
                    "data": {"skip_test": cfg.data.skip_test},
                }
            ),
            run_path.name,
            scores,
        )
    ]
    for folder in map(Path, cfg.report.seed_runs):
        config = folder / "config.yaml"
        if not config.exists():
            raise UserError(f"report.seed_runs: {folder} holds no config.yaml, so it is no run")
        made = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        seed, model = _seed_of(made), (made.get("model") or {}).get("name", cfg.model.name)
        if model != cfg.model.name:
            raise UserError(
                f"report.seed_runs: {folder} is a run of {model}, not of {cfg.model.name}"
            )
        if seed in [known for known, _, _ in found]:
            raise UserError(f"report.seed_runs: {folder} repeats seed {seed}")
        found.append((seed, folder.name, load_scores(folder, tasks)))
    runs = [
        {"seed": seed, "run": name, **_summarise_runs([one], tasks, cfg.evaluate.metric)}
        for seed, name, one in found
    ]
    pooled = _summarise_runs([one for _, _, one in found], tasks, cfg.evaluate.metric)
    for domain in DOMAINS:
        for method, entry in pooled["averages"][domain].items():
            values = [r["averages"][domain].get(method) for r in runs]
            entry["seed_std"] = _std([v["acc"] for v in values if v])
        for row in pooled["contrasts"]:
            if row[domain]:
                values = [find_contrast(r["contrasts"], row["name"], row["metric"]) for r in runs]
                row[domain]["seed_std"] = _std(
                    [v[domain]["diff"] for v in values if v and v[domain]]
                )
    return {"runs": runs, "pooled": pooled}


def _seed_of(config: dict):
    """The seed of a run; with the generator's where that one alone was changed, and the test examples passed over."""
    seed = config.get("seed")
    own, skipped = (
        (config.get("generator") or {}).get("seed", seed),
        (config.get("data") or {}).get("skip_test", 0),
    )
    more = ([f"generator {own}"] if own != seed else []) + (
        [f"test from {skipped}"] if skipped else []
    )
    return f"{seed} ({', '.join(more)})" if more else seed


def _summarise_runs(runs: list[dict], tasks: dict, metric: str) -> dict:
    return {
        "averages": average_over_tasks(runs, tasks, metric),
        "contrasts": contrast_methods(runs, tasks),
    }


def _std(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def find_contrast(contrasts: list[dict], name: str, metric: str) -> dict | None:
    """The contrast of that name and metric, or None where the pair was left out."""
    return next((c for c in contrasts if (c["name"], c["metric"]) == (name, metric)), None)


# ----------------------------------------------------------------------------- words and cells


def _label(method: str) -> str:
    return METHODS[method][0] if method in METHODS else method


def _task_label(results: dict, task: str) -> str:
    """Column heading: the title when it is short enough, with † where other data stands in."""
    about = results["tasks"][task]
    title = about.get("title") or task
    return (title if len(title) <= 16 else task) + ("†" if about.get("stand_in_for") else "")


def _stand_in_notes(results: dict, names) -> list[str]:
    """The footnote of every table that names a task whose data stand in for another's."""
    about = {name: results["tasks"][name] for name in names}
    parts = [
        f"{_task_label(results, name)[:-1]} is {task.get('source')}, standing in for "
        f"{task['stand_in_for']}"
        for name, task in about.items()
        if task.get("stand_in_for")
    ]
    return [f"† {'; '.join(parts)}."] if parts else []


def _points(mean: float | None, se: float | None, signed: bool = False) -> str:
    """A fraction as percent or percentage points, with its standard error."""
    if mean is None:
        return NOT_RUN
    text = f"{100 * mean:+.2f}" if signed else f"{100 * mean:.1f}"
    spread = "n/a" if se is None else f"{100 * se:.2f}" if signed else f"{100 * se:.1f}"
    return f"{text} ± {spread}"


def _relative(value: float, reference: float) -> str:
    return f" ({100 * (value - reference) / reference:+.1f}%)" if reference else ""


def verdict(entry: dict | None) -> str:
    """Say in words whether a difference is established: at least two standard errors from 0."""
    if entry is None:
        return NOT_RUN
    diff, se = entry["diff"], entry["se"]
    if se is None:
        return "no standard error"
    if diff == 0 and se == 0:
        return "no difference"
    if abs(diff) < 2 * se:
        return "not established, negative" if diff < 0 else "not established"
    return "gain" if diff > 0 else "loss"


def shown_contrasts(results: dict) -> tuple[list[dict], str]:
    """The contrasts to headline, pooled over seeds where there are several, and the seeds."""
    if "seeds" not in results:
        return results["contrasts"], f"seed {results['seed']}"
    seeds = ", ".join(str(run["seed"]) for run in results["seeds"]["runs"])
    return results["seeds"]["pooled"]["contrasts"], f"pooled over seeds {seeds}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _shown_methods(results: dict) -> list[str]:
    present = {m for task in results["tasks"].values() for m in task["methods"]}
    known = [m for m in METHODS if m in present or m in ALWAYS_SHOWN]
    return known + sorted(present - set(METHODS))


def _accuracy_cell(results: dict, task: str, method: str, relative: bool = True) -> str:
    about = results["tasks"][task]
    entry = about["methods"].get(method)
    if entry is None:
        return NOT_RUN
    text = _points(entry["acc"], entry["se"])
    reference = about["methods"].get(RELATIVE_TO.get(method))
    if relative and reference:
        text += _relative(entry["acc"], reference["acc"])
    # A method scored on part of the test examples must not pass for a full evaluation.
    return text if entry["n"] == about.get("n_test", entry["n"]) else f"{text} [n={entry['n']}]"


def _average_cell(results: dict, domain: str, method: str, relative: bool = True) -> str:
    entry = results["averages"][domain].get(method)
    if entry is None:
        return NOT_RUN
    text, names = _points(entry["acc"], entry["se"]), _in_domain(results["tasks"], domain)
    reference = RELATIVE_TO.get(method)
    methods = [results["tasks"][name]["methods"] for name in names]
    both = [
        (m[method]["acc"], m[reference]["acc"]) for m in methods if method in m and reference in m
    ]
    if relative and both:  # over the tasks that both have, else unlike averages are compared
        text += _relative(*(sum(side) / len(both) for side in zip(*both, strict=True)))
    return text if entry["tasks"] == len(names) else f"{text} [{entry['tasks']}/{len(names)} tasks]"


def headline(results: dict) -> list[str]:
    """The findings in plain sentences, computed from the numbers, unflattering ones included."""
    if not any(results["averages"].values()):
        return ["Nothing has been scored yet: every result below is not run."]
    lines = []
    for domain, name in DOMAINS.items():
        averages = results["averages"][domain]
        if not averages:
            lines.append(f"{name} tasks: not run.")
            continue
        parts = [
            f"{_label(m)} {_points(e['acc'], e['se'])} % ({_count(e['tasks'], 'task')})"
            for m, e in averages.items()
            if m in ("base", "generator", "degaml")
        ]
        lines.append(f"{name} accuracy: {'; '.join(parts) or 'only controls were run'}.")
        ahead = [
            f"{_label(m)} {_points(averages[m]['acc'], averages[m]['se'])} %"
            for m in BASELINES
            if m in averages
            and "degaml" in averages
            and averages[m]["acc"] > averages["degaml"]["acc"]
        ]
        if ahead:
            lines.append(f"{name}, baselines ahead of DeGAML on average: {'; '.join(ahead)}.")
    lines.append(
        f"Differences ({shown_contrasts(results)[1]}) are paired by example; one within "
        "two standard errors of zero is called not established."
    )
    for name, question in QUESTIONS.items():
        if find_contrast(results["contrasts"], name, results["metric"]) is None and name.startswith(
            "aligned"
        ):
            continue  # an optional stage
        lines.append(f"{question}: {_contrast_sentence(results, name)}.")
    stand_ins = [
        f"{_task_label(results, name)} for {about['stand_in_for']}"
        for name, about in results["tasks"].items()
        if about.get("stand_in_for")
    ]
    if stand_ins:
        lines.append(f"Averages include stand-in data: {', '.join(stand_ins)}.")
    missing = [
        _label(m) for m in ALWAYS_SHOWN if not any(m in results["averages"][d] for d in DOMAINS)
    ]
    if missing:
        lines.append(f"Not run: {', '.join(missing)}.")
    if results["provenance"]["tasks_not_in_run"]:
        lines.append(
            "Tasks of the paper that this run leaves out (not run): "
            f"{', '.join(results['provenance']['tasks_not_in_run'])}."
        )
    return lines


def _contrast_sentence(results: dict, name: str) -> str:
    contrasts, _ = shown_contrasts(results)
    contrast = find_contrast(contrasts, name, results["metric"])
    if contrast is None:
        return NOT_RUN
    other = "raw" if results["metric"] == "norm" else "norm"
    check = find_contrast(contrasts, name, other) or {}
    parts = []
    for domain, title in DOMAINS.items():
        entry = contrast[domain]
        if entry is None:
            parts.append(f"{title.lower()} {NOT_RUN}")
            continue
        text = (
            f"{title.lower()} {_points(entry['diff'], entry['se'], signed=True)} points over "
            f"{_count(entry['tasks'], 'task')}, "
            f"{'an established ' * (verdict(entry) in ('gain', 'loss'))}{verdict(entry)}"
        )
        if check.get(domain):
            text += f" ({other}: {_points(check[domain]['diff'], check[domain]['se'], True)})"
        parts.append(text)
    return "; ".join(parts)


# ------------------------------------------------------------------------------------- tables


def _table(title: str, header: list, rows: list, notes: list | None = None) -> dict:
    return {"title": title, "header": header, "rows": rows, "notes": notes or []}


def _scored_metrics(results: dict) -> list[str]:
    entries = [e for task in results["tasks"].values() for e in task["methods"].values()]
    return [m for m in METRICS if m in FIELDS or any(f"acc_{m}" in entry for entry in entries)]


def _metric_note(results: dict) -> str:
    metric = results["metric"]
    return f"Accuracy in percent ± standard error, metric {metric} ({METRICS[metric]})."


AVERAGE_NOTE = (
    "Avg is the mean over tasks; its standard error takes the tasks as fixed and their "
    "documents as independent: sqrt(sum of se²) / number of tasks."
)
VERDICT_NOTE = (
    "Percentage points ± standard error of the paired difference. A difference below "
    "two standard errors is called not established; with this many comparisons about "
    "one in twenty passes that bar by chance."
)


def table_results(results: dict, domain: str) -> dict:
    """The paper's Table 2 for one domain: methods down, tasks across, then the paper's rows."""
    names = _in_domain(results["tasks"], domain)
    title = f"{DOMAINS[domain]} tasks"
    if not names:
        return _table(
            title,
            ["Method", "Avg"],
            [["All methods", NOT_RUN]],
            ["No task of this domain is part of this run."],
        )
    rows = []
    for method in _shown_methods(results):
        cells = [_accuracy_cell(results, task, method) for task in names]
        rows.append([_label(method), *cells, _average_cell(results, domain, method)])
    notes = [
        _metric_note(results),
        AVERAGE_NOTE,
        "In brackets: relative change, Generalization "
        "over the base model and Adaptation over Generalization, as the paper prints it.",
    ]
    notes += _stand_in_notes(results, names)
    if results["paper"]:
        rows += _paper_rows(results, domain, names)
        notes.append(f"Paper rows: {results['paper']['model']}, {results['paper']['metric']}.")
    header = ["Method", *(_task_label(results, task) for task in names)]
    return _table(title, [*header, f"Avg ({_count(len(names), 'task')})"], rows, notes)


def _paper_rows(results: dict, domain: str, names: list[str]) -> list[list[str]]:
    rows = []
    methods = results["paper"]["methods"]
    for method, entry in methods.items():
        cells = entry["cells"]
        if not any(task in cells for task in names):
            continue  # the paper leaves this baseline out of the domain
        reference = methods.get(RELATIVE_TO.get(method), {}).get("cells", {})
        texts = []
        for task in names:
            text = f"{100 * cells[task]:.1f}" if task in cells else "not in paper"
            both = task in cells and task in reference
            texts.append(text + (_relative(cells[task], reference[task]) if both else ""))
        both = [t for t in names if t in cells and t in reference]
        average, count = _paper_average(results, method, domain)
        text = f"{100 * average:.1f}"
        if both:
            text += _relative(*(sum(c[t] for t in both) / len(both) for c in (cells, reference)))
        suffix = "" if count == len(names) else f" [{count}/{len(names)} tasks]"
        rows.append([f"Paper: {_label(method)}", *texts, text + suffix])
    return rows


def _paper_average(results: dict, method: str, domain: str) -> tuple[float | None, int]:
    cells = results["paper"]["methods"][method]["cells"]
    values = [cells[t] for t in _in_domain(results["tasks"], domain) if t in cells]
    return (sum(values) / len(values) if values else None), len(values)


def table_paper(results: dict) -> dict:
    """Our averages and gains beside the paper's, over the same tasks, and the gap between them."""
    rows = []
    for domain, name in DOMAINS.items():
        for method, entry in results["paper"]["methods"].items():
            paper, count = _paper_average(results, method, domain)
            if paper is None:
                continue
            printed = f"{100 * entry['printed_avg'][domain]:.1f}"
            ours = _our_average(results, method, domain)
            rows.append(
                [
                    _label(method),
                    name,
                    str(count),
                    f"{100 * paper:.1f}",
                    printed,
                    NOT_RUN if ours is None else f"{100 * ours:.1f}",
                    NOT_RUN if ours is None else f"{100 * (ours - paper):+.1f}",
                ]
            )
        for a, b in RELATIVE_TO.items():
            paper = [_paper_average(results, method, domain)[0] for method in (a, b)]
            ours = [_our_average(results, method, domain) for method in (a, b)]
            if None not in paper:
                expected = 100 * (paper[0] - paper[1])
                gain = None if None in ours else 100 * (ours[0] - ours[1])
                rows.append(
                    [
                        f"Gain, {a} - {b}",
                        name,
                        "same",
                        f"{expected:+.1f}",
                        "not printed",
                        NOT_RUN if gain is None else f"{gain:+.1f}",
                        NOT_RUN if gain is None else f"{gain - expected:+.1f}",
                    ]
                )
    header = ["Method", "Domain", "Tasks", "Paper", "Paper, printed avg (6 tasks)", "Ours", "Gap"]
    notes = [
        f"Paper: {results['paper']['model']}, {results['paper']['metric']}; this run: "
        f"{results['model']}, metric {results['metric']}. Where model, metric or data differ, "
        "compare the gains rather than the levels.",
        *results["paper"]["notes"],
        *_stand_in_notes(results, results["tasks"]),
    ]
    return _table("Against the paper", header, rows, notes)


def table_main(results: dict, domain: str) -> dict:
    """Paper D's Table 1 for one domain: the baselines, DeGAML, and its difference to each; then the paper's rows.

    Our differences carry the paired standard error; the paper's are recomputed from its cells.
    """
    names = _in_domain(results["tasks"], domain)
    rows = [
        [
            _label(m),
            *(_accuracy_cell(results, t, m, relative=False) for t in names),
            _average_cell(results, domain, m, relative=False),
        ]
        for m in (*TABLE_1, "degaml")
    ]
    for method in TABLE_1:
        found = find_contrast(results["contrasts"], f"degaml - {method}", results["metric"]) or {
            "tasks": {}
        }
        cells = [*(found["tasks"].get(t) for t in names), found.get(domain)]
        rows.append(
            [
                f"DeGAML - {_label(method)}",
                *(NOT_RUN if c is None else _points(c["diff"], c["se"], True) for c in cells),
            ]
        )
    paper = (results["paper"] or {"methods": {}})["methods"]
    known = {
        m: paper[m]["cells"]
        for m in (*TABLE_1, "degaml")
        if m in paper and set(names) & set(paper[m]["cells"])
    }
    for method, cells in known.items():
        rows.append(
            [
                f"Paper: {_label(method)}",
                *(f"{100 * cells[t]:.1f}" if t in cells else "not in paper" for t in names),
                f"{100 * _paper_average(results, method, domain)[0]:.1f}",
            ]
        )
    for method, cells in known.items():
        both = [t for t in names if t in cells and t in known.get("degaml", {})]
        if method != "degaml" and both:
            gaps = {t: 100 * (known["degaml"][t] - cells[t]) for t in both}
            rows.append(
                [
                    f"Paper: DeGAML - {_label(method)}",
                    *(f"{gaps[t]:+.1f}" if t in gaps else "not in paper" for t in names),
                    f"{sum(gaps.values()) / len(gaps):+.1f}",
                ]
            )
    header = [
        "Method",
        *(_task_label(results, task) for task in names),
        f"Avg ({_count(len(names), 'task')})",
    ]
    return _table(
        f"Against the baselines, {DOMAINS[domain].lower()} (paper D, Table 1)",
        header,
        rows,
        [_metric_note(results), VERDICT_NOTE],
    )


def _our_average(results: dict, method: str, domain: str) -> float | None:
    """Our average over the tasks the paper has; None unless every one of them was run."""
    cells = results["paper"]["methods"][method]["cells"]
    entries = [
        results["tasks"][task]["methods"].get(method)
        for task in _in_domain(results["tasks"], domain)
        if task in cells
    ]
    return sum(e["acc"] for e in entries) / len(entries) if entries and all(entries) else None


def table_contrasts(results: dict) -> dict:
    """Paired differences per domain, both metrics."""
    rows = []
    for contrast in results["contrasts"]:
        row = [contrast["name"], contrast["metric"]]
        for domain in DOMAINS:
            entry = contrast[domain]
            if entry is None:
                row += [NOT_RUN, NOT_RUN]
            else:
                row += [
                    f"{_points(entry['diff'], entry['se'], True)} "
                    f"({_count(entry['tasks'], 'task')})",
                    verdict(entry),
                ]
        rows.append(row)
    done = {contrast["name"] for contrast in results["contrasts"]}
    rows += [
        [f"{a} - {b}", "any", *[NOT_RUN] * 4]
        for a, b in PAIRS
        if f"{a} - {b}" not in done and {a, b} <= set(ALWAYS_SHOWN)
    ]
    header = ["Contrast", "Metric", "In-domain", "Verdict", "Out-of-domain", "Verdict"]
    notes = [VERDICT_NOTE, AVERAGE_NOTE, *_stand_in_notes(results, results["tasks"])]
    return _table("Averages over tasks", header, rows, notes)


def table_task_contrasts(results: dict) -> dict:
    """Paired differences per task on the primary metric."""
    rows = []
    for contrast in results["contrasts"]:
        if contrast["metric"] == results["metric"]:
            row = [contrast["name"]]
            for task in results["tasks"]:
                entry = contrast["tasks"].get(task)
                star = "*" if verdict(entry) in ("gain", "loss") else ""
                row.append(
                    NOT_RUN if entry is None else _points(entry["diff"], entry["se"], True) + star
                )
            rows.append(row)
    header = ["Contrast", *(_task_label(results, task) for task in results["tasks"])]
    notes = [
        f"Metric {results['metric']}. * at least two standard errors. {VERDICT_NOTE}",
        *_stand_in_notes(results, results["tasks"]),
    ]
    return _table("Paired differences per task", header, rows, notes)


def table_tasks(results: dict) -> dict:
    """What each task is: data source, split sizes, chance and majority rates."""
    rows = []
    for task, about in results["tasks"].items():
        rows.append(
            [
                _task_label(results, task),
                DOMAINS[about["domain"]],
                str(about.get("source")),
                *(
                    str(about.get(f"n_{split}", "unknown"))
                    for split in ("test", "train", "support", "prompts")
                ),
                str(about.get("prompts_from", "unknown")),
                f"{100 * about['chance']:.1f}",
                f"{100 * about['majority']:.1f}",
                _accuracy_cell(results, task, "base"),
            ]
        )
    header = [
        "Task",
        "Domain",
        "Source",
        "Test",
        "Train",
        "Support",
        "Prompts",
        "Prompts from",
        "Chance %",
        "Majority %",
        "Base %",
    ]
    notes = [
        "Test, Train, Support, Prompts: numbers of examples. Majority: always answering the "
        "most frequent option of the test split.",
        *_stand_in_notes(results, results["tasks"]),
    ]
    return _table("Data", header, rows, notes)


def table_metrics(results: dict) -> dict:
    """Every metric that was scored, per task and method; the primary one was fixed beforehand."""
    found = [
        (task, method, entry)
        for task, about in results["tasks"].items()
        for method, entry in about["methods"].items()
    ]
    metrics = _scored_metrics(results)
    rows = [
        [
            _task_label(results, task),
            _label(method),
            str(entry["n"]),
            *(_points(entry.get(f"acc_{m}"), entry.get(f"se_{m}")) for m in metrics),
        ]
        for task, method, entry in found
    ]
    notes = [
        "Percent ± standard error. " + "; ".join(f"{m}: {METRICS[m]}" for m in metrics) + ".",
        *_stand_in_notes(results, results["tasks"]),
    ]
    return _table("All metrics", ["Task", "Method", "n", *metrics], rows, notes)


def table_strategies(results: dict) -> dict:
    """Per task and method: the strategy kept, its support evidence, and what was tried."""
    rows = []
    for task, about in results["tasks"].items():
        for method in SEARCHED:
            chosen = about["strategy"].get(method)
            if chosen is None and method not in ALWAYS_SHOWN:
                continue
            search = results["search"].get(method, {}).get(task)
            row = [_task_label(results, task), _label(method)]
            if chosen is None:
                row += [NOT_RUN] * 2
            else:
                row += [
                    _strategy_text(chosen["strategy"]),
                    f"{chosen.get('wins', 'n/a')} / {chosen.get('losses', 'n/a')}",
                ]
            if search is None:
                row += [NOT_RUN] * 3
            else:
                counts = [
                    f"{family} {c['proposed']} ({c['rewarded']})"
                    for family, c in sorted(search["by_family"].items())
                ]
                row += [", ".join(counts), str(search["distinct"]), f"{search['seconds']:.0f}"]
            rows.append(row)
    header = [
        "Task",
        "Method",
        "Strategy kept",
        "Support wins / losses",
        "Tried: proposed (rewarded)",
        "Distinct",
        "Search s",
    ]
    notes = [
        "Wins and losses: support examples that the strategy turned right or wrong, against "
        "the generated adapter.",
        *_stand_in_notes(results, results["tasks"]),
    ]
    return _table("Kept and tried", header, rows, notes)


def _strategy_text(strategy: dict) -> str:
    if strategy.get("family") == "none":
        return "none: the generated adapter was kept"
    fields = ", ".join(
        f"{key}={_compact(value)}" for key, value in strategy.items() if key != "family"
    )
    return f"{strategy.get('family')}: {fields}" if fields else str(strategy.get("family"))


def _compact(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def table_time(results: dict) -> dict:
    """Seconds per stage, of its critical path and, within evaluation, per method."""

    def show(seconds):
        return NOT_RUN if seconds is None else f"{seconds:.1f}"

    rows = [
        ["stage", name, show(s), show(results["seconds_critical_path"].get(name))]
        for name, s in results["seconds"].items()
    ]
    rows += [
        ["scoring", _label(m), f"{s:.1f}", "-"] for m, s in results["seconds_by_method"].items()
    ]
    for method, tasks in results["search"].items():
        rows.append(
            [
                "strategy search",
                _label(method),
                f"{sum(t['seconds'] for t in tasks.values()):.1f}",
                "-",
            ]
        )
    return _table(
        "Time",
        ["What", "Name", "Seconds", "Critical path"],
        rows or [["stages", NOT_RUN, NOT_RUN, NOT_RUN]],
        [
            "Seconds of work summed over units; divide by the number of ranks for the time on the clock. The "
            "critical path is the longest unit of each of a stage's phases: what remains however many ranks "
            "there are. Scoring and search are parts of their stages."
        ],
    )


def table_budget(results: dict) -> dict:
    """What each method spent, so that accuracies can be read against cost."""

    def show(value):
        return "not recorded" if value is None else f"{value:,.0f}"

    rows = [
        [
            _label(method),
            *(show(b[key]) for key in ("seconds_meta", "meta_steps", "meta_tokens")),
            show(b["seconds_adapt"] / b["targets"]),
            show(b["labels"]),
        ]
        for method, b in results["budget"].items()
    ]
    notes = [
        "Core-seconds. Meta-training is summed over the left-out sets; generator and DeGAML share theirs "
        "(collection, prompt states, generators). Tokens: of the rows drawn, all options counted. Labels: "
        "support examples seen per target."
    ]
    notes += [
        f"{_label(method)} without {left_out} diverged at step {step + 1}; its loss curve is kept."
        for method, b in results["budget"].items()
        for left_out, step in b["diverged"].items()
    ]
    return _table(
        "Budget",
        [
            "Method",
            "Meta-training s",
            "Gradient steps",
            "Tokens",
            "Adaptation s / target",
            "Labels / target",
        ],
        rows or [[NOT_RUN] * 6],
        notes,
    )


def table_calibration(results: dict) -> dict:
    """Expected calibration error per domain and method."""
    rows = [
        [
            _label(m),
            *(
                "n/a"
                if (e := results["averages"][d].get(m, {}).get("ece")) is None
                else f"{100 * e:.1f}"
                for d in DOMAINS
            ),
        ]
        for m in _shown_methods(results)
        if any(m in results["averages"][d] for d in DOMAINS)
    ]
    return _table(
        "Calibration",
        ["Method", *(f"{name} ECE %" for name in DOMAINS.values())],
        rows or [[NOT_RUN] * 3],
        [
            "Expected calibration error, 10 bins of the probability of the likeliest option under a softmax "
            "over the options' summed log-likelihoods; mean over tasks."
        ],
    )


def table_seeds(results: dict) -> dict:
    """Contrasts of each seed and pooled over seeds, primary metric."""
    seeds = results["seeds"]
    rows = []
    for row in seeds["pooled"]["contrasts"]:
        for domain, name in DOMAINS.items():
            entry = row[domain]
            if row["metric"] != results["metric"] or entry is None:
                continue
            found = [
                find_contrast(run["contrasts"], row["name"], row["metric"]) for run in seeds["runs"]
            ]
            cells = [
                _points(f[domain]["diff"], f[domain]["se"], True) if f and f[domain] else NOT_RUN
                for f in found
            ]
            spread = entry["seed_std"]
            rows.append(
                [
                    row["name"],
                    name,
                    *cells,
                    _points(entry["diff"], entry["se"], True),
                    "n/a" if spread is None else f"{100 * spread:.2f}",
                    verdict(entry),
                ]
            )
    header = [
        "Contrast",
        "Domain",
        *(f"seed {run['seed']}" for run in seeds["runs"]),
        "Pooled",
        "Std over seeds",
        "Verdict",
    ]
    notes = [
        f"Metric {results['metric']}. Pooled: the mean over runs per example first, then the "
        "standard error over examples, so no document counts twice. Std over seeds is the "
        "spread that training adds. " + VERDICT_NOTE,
        *_stand_in_notes(results, results["tasks"]),
    ]
    return _table("Seeds", header, rows, notes)


def table_provenance(results: dict) -> dict:
    """Model, seed, configuration, metric, prompts and versions."""
    about = results["provenance"]
    # Transductive use of the test inputs has to be visible to whoever reads the numbers.
    origin = {
        "test": "the test split's unlabelled inputs (transductive, as in the papers)",
        "train": "the train split (inductive)",
    }
    rows = [
        ["model", results["model"]],
        ["seed", results["seed"]],
        ["config", results["config"]],
        ["run folder", about["run"]],
        ["command", about["command"] or "not recorded"],
        ["primary metric", f"{results['metric']} ({METRICS[results['metric']]})"],
        ["prompts drawn from", "; ".join(origin.get(p, p) for p in about["prompts_from"])],
    ]
    rows += [[key, value] for key, value in sorted(about["env"].items())]
    return _table("Provenance", ["Key", "Value"], [[str(k), str(v)] for k, v in rows])


def report_sections(results: dict, figures: list[dict]) -> list[tuple[str, list]]:
    """Order of the report: [(heading, [table or figure, ...])], shared by Markdown and HTML."""
    drawn = {figure["name"]: figure for figure in figures}
    contrasts = [table_contrasts(results), drawn["contrasts"], table_task_contrasts(results)]
    if "seeds" in results:
        contrasts.append(table_seeds(results))
    outcome = [*(table_results(results, domain) for domain in DOMAINS), drawn["accuracy"]]
    if {"union", "abmll", "maml"} & {m for d in DOMAINS for m in results["averages"][d]}:
        outcome += [
            table_main(results, domain)
            for domain in DOMAINS
            if _in_domain(results["tasks"], domain)
        ]
    if results["paper"]:
        outcome.append(table_paper(results))
    outcome += [table_calibration(results), table_metrics(results)]
    strategies = [table_strategies(results), drawn["strategies"], drawn["reward_rate"]]
    losses = [figure for figure in figures if figure["name"].startswith("loss_")]
    return [
        ("Results", outcome),
        ("Contrasts", contrasts),
        ("Tasks", [table_tasks(results)]),
        ("Strategies", strategies),
        ("Training", losses),
        (
            "Time and provenance",
            [table_budget(results), table_time(results), table_provenance(results)],
        ),
    ]


def format_console_table(results: dict) -> str:
    """The table printed at the end of a run, in the layout of the paper's Table 2.

    Args:
        results: content of results.json.
    Returns: text without a trailing newline; accuracies in percent ± standard error.
    """
    metric = results["metric"]
    lines = [
        f"{results['model']}, seed {results['seed']}, metric {metric} ({METRICS[metric]}), "
        "accuracy in % ± standard error"
    ]
    present = [
        m
        for m in _shown_methods(results)
        if any(m in t["methods"] for t in results["tasks"].values())
    ]
    for domain, title in DOMAINS.items():
        names = _in_domain(results["tasks"], domain)
        if not names or not present:
            lines += ["", f"{title} tasks: {NOT_RUN}"]
            continue
        header = [
            f"{title} tasks",
            *(_task_label(results, t) for t in names),
            f"Avg ({_count(len(names), 'task')})",
        ]
        rows = [
            [
                _label(m),
                *(_accuracy_cell(results, t, m, relative=False) for t in names),
                _average_cell(results, domain, m, relative=False),
            ]
            for m in present
        ]
        lines += ["", *_align([header, *rows])]
    lines += ["", *_console_contrasts(results), *_stand_in_notes(results, results["tasks"])]
    missing = [_label(m) for m in ALWAYS_SHOWN if m not in present]
    if missing:
        lines.append(f"Not run: {', '.join(missing)}")
    return "\n".join(lines)


def _console_contrasts(results: dict) -> list[str]:
    contrasts, seeds = shown_contrasts(results)
    header = [f"Paired difference, points ({results['metric']}, {seeds})", *DOMAINS.values()]
    rows = []
    for contrast in contrasts:
        if contrast["metric"] == results["metric"]:
            cells = [
                NOT_RUN
                if contrast[d] is None
                else f"{_points(contrast[d]['diff'], contrast[d]['se'], True)} "
                f"({verdict(contrast[d])})"
                for d in DOMAINS
            ]
            rows.append([contrast["name"], *cells])
    return _align([header, *rows], left=3) if rows else [f"Paired differences: {NOT_RUN}"]


def _align(rows: list[list[str]], left: int = 1) -> list[str]:
    """Pad columns to equal width; the first `left` columns are flush left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]]


# ----------------------------------------------------------------------------------- markdown


def write_markdown(results: dict, figures: list[dict], path: Path) -> None:
    """Write report.md: findings first, then every table and a link to every figure."""
    lines = [f"# {_page_title(results)}", "", _subtitle(results), "", "## Summary", ""]
    lines += [f"- {line}" for line in headline(results)]
    for name, blocks in report_sections(results, figures):
        lines += ["", f"## {name}"]
        for block in blocks:
            lines += ["", f"### {block['title']}", ""]
            lines += _markdown_table(block) if "rows" in block else _markdown_figure(block)
    runtime.write_text(path, "\n".join(lines) + "\n")


def _page_title(results: dict) -> str:
    return f"DeGAML-LLM: {results['config']}"


def _subtitle(results: dict) -> str:
    return (
        f"Model {results['model']}, seed {results['seed']}. Primary metric: "
        f"{results['metric']} ({METRICS[results['metric']]}). Also reported: "
        + ", ".join(
            f"{m} ({METRICS[m]})" for m in _scored_metrics(results) if m != results["metric"]
        )
        + "."
    )


def _markdown_table(table: dict) -> list[str]:
    def line(cells) -> str:
        # A pipe or a line break inside a cell would end the cell.
        safe = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(safe)} |"

    body = [line(table["header"]), line(["---"] * len(table["header"]))]
    return body + [line(row) for row in table["rows"]] + ["", *("- " + n for n in table["notes"])]


def _markdown_figure(figure: dict) -> list[str]:
    if figure.get("skipped"):
        return [f"Not drawn: {figure['skipped']}"]
    return [
        f"![{figure['title']}](figures/{figure['name']}.png)",
        "",
        f"{figure['caption']} [Data](figures/{figure['name']}.csv)",
    ]


# ------------------------------------------------------------------------------------ figures

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "figure.constrained_layout.use": True,
}


INTERVAL_COLOURS = (("#0072B2", "#0072B2"), ("#999999", "white"))  # primary metric, the other


def draw_figures(results: dict, run_path: Path, folder: Path) -> list[dict]:
    """Draw every figure as PNG with a CSV of its data beside it.

    Args:
        results: content of results.json.
        run_path: run folder; its metrics.jsonl holds the loss curves.
        folder: where the files go.
    Returns: [{"name", "title", "caption", "png"}] in report order; a figure without data has
        "skipped" with the reason instead of "png".
    """
    rows = _read_metrics(Path(run_path) / "metrics.jsonl")
    figures = [
        ("accuracy", _draw_accuracy, results),
        ("contrasts", _draw_contrasts, results),
        ("strategies", _draw_strategies, results),
        ("reward_rate", _draw_reward_rate, results),
    ]
    figures += [
        (f"loss_{stage}", _draw_losses, (results, stage, rows))
        for stage in ("collect", "generator", "policy")
    ]
    done = []
    for name, draw, data in figures:
        with plt.rc_context(STYLE):
            drawn = draw(data)
        if "skipped" not in drawn:
            drawn["png"] = folder / f"{name}.png"
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(drawn.pop("csv"))
            runtime.write_text(folder / f"{name}.csv", text.getvalue())
            save_png(drawn.pop("figure"), drawn["png"])
        done.append({"name": name, **drawn})
    return done


def save_png(figure, path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # No version in the file: the same run gives the same bytes.
    figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    os.replace(partial, path)


def _read_metrics(path: Path) -> list[dict]:
    """Rows of metrics.jsonl; a process killed in mid-line leaves a broken one, which is skipped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _sizes(results: dict) -> str:
    sizes = sorted({about["n_test"] for about in results["tasks"].values() if "n_test" in about})
    span = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}" if sizes else "?"
    return f"n = {span} test examples per task"


def _draw_accuracy(results: dict) -> dict:
    title = "Accuracy per task and method"
    methods = [
        m
        for m in _shown_methods(results)
        if any(m in t["methods"] for t in results["tasks"].values())
    ]
    blocks = {d: names for d in DOMAINS if (names := _in_domain(results["tasks"], d))}
    if not methods:
        return {"title": title, "skipped": "no scores are stored yet."}
    columns = max(map(len, blocks.values()))
    width = max(6.5, 1.6 * columns + 1)
    figure, axes = plt.subplots(
        len(blocks), 1, figsize=(width, 3.2 * len(blocks) + 0.7), squeeze=False
    )
    data = [["domain", "task", "method", "acc", "se", "n", "chance"]]
    offsets = np.linspace(-0.36, 0.36, len(methods)) if len(methods) > 1 else [0.0]
    for axis, (domain, names) in zip(axes[:, 0], blocks.items(), strict=True):
        for x, task in enumerate(names):
            about = results["tasks"][task]
            axis.axvline(x + 0.5, color="#DDDDDD", lw=0.6)
            axis.hlines(
                100 * about["chance"],
                x - 0.45,
                x + 0.45,
                color="#555555",
                ls=":",
                lw=1.2,
                label="chance" if x == 0 else None,
            )
            for offset, method in zip(offsets, methods, strict=True):
                entry = about["methods"].get(method)
                if entry:
                    _dot(axis, x + offset, entry, method)
                    data.append(
                        [
                            domain,
                            task,
                            method,
                            entry["acc"],
                            entry["se"],
                            entry["n"],
                            about["chance"],
                        ]
                    )
        axis.set_xticks(range(len(names)), [_task_label(results, t) for t in names])
        axis.set(xlim=(-0.5, columns - 0.5), ylabel="accuracy (%)")
        axis.set_title(
            f"{DOMAINS[domain]} ({_sizes(results)}, seed {results['seed']})", loc="left", fontsize=9
        )
        axis.grid(visible=False, axis="x")
    handles = [
        plt.Line2D([], [], ls="", marker=_marker(m), color=_colour(m), label=_label(m))
        for m in methods
    ]
    handles.append(plt.Line2D([], [], ls=":", color="#555555", label="chance"))
    figure.legend(handles=handles, loc="outside lower center", ncols=int(width // 2.5))
    caption = (
        f"{_metric_note(results)} Bars are one standard error, dotted lines chance; "
        f"{_sizes(results)}, seed {results['seed']}. "
        f"{' '.join(_stand_in_notes(results, results['tasks']))}"
    )
    return {"title": title, "caption": caption, "figure": figure, "csv": data}


def _colour(method: str) -> str:
    return METHODS[method][1] if method in METHODS else "#999999"


def _marker(method: str) -> str:
    return METHODS[method][2] if method in METHODS else "h"


def _dot(axis, x: float, entry: dict, method: str) -> None:
    axis.errorbar(
        x,
        100 * entry["acc"],
        yerr=100 * (entry["se"] or 0.0),
        fmt=_marker(method),
        color=_colour(method),
        ms=5,
        lw=1.2,
    )


def _draw_contrasts(results: dict) -> dict:
    title = "Paired differences, 95% intervals"
    contrasts, seeds = shown_contrasts(results)
    metrics = [results["metric"], "raw" if results["metric"] == "norm" else "norm"]
    names = list(dict.fromkeys(c["name"] for c in contrasts))
    domains = [d for d in DOMAINS if any(c[d] for c in contrasts)]
    if not names or not domains:
        return {"title": title, "skipped": "no pair of methods has been scored on the same task."}
    figure, axes = plt.subplots(
        1,
        len(domains),
        sharey=True,
        squeeze=False,
        figsize=(3 + 3.2 * len(domains), 1.3 + 0.42 * len(names)),
    )
    data = [["contrast", "metric", "domain", "diff", "se", "tasks"]]
    for axis, domain in zip(axes[0], domains, strict=True):
        axis.axvline(0, color="#555555", lw=1)
        for y, name in enumerate(names):
            for metric in metrics:
                entry = (find_contrast(contrasts, name, metric) or {}).get(domain)
                if entry:
                    primary = metric == results["metric"]
                    _interval(axis, y + (-0.13 if primary else 0.17), entry, primary)
                    data.append([name, metric, domain, entry["diff"], entry["se"], entry["tasks"]])
            if not any(row[0] == name and row[2] == domain for row in data):
                axis.text(0, y, f"  {NOT_RUN}", va="center", color="#555555")
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="difference (percentage points)", ylim=(len(names) - 0.5, -0.5))
        axis.set_title(
            f"{DOMAINS[domain]} ({_count(_most_tasks(contrasts, domain), 'task')})",
            loc="left",
            fontsize=9,
        )
        axis.grid(visible=False, axis="y")
    handles = [
        plt.Line2D([], [], marker="o", color=colour, mfc=face, label=f"{m} ({METRICS[m]})")
        for m, (colour, face) in zip(metrics, INTERVAL_COLOURS, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    caption = (
        "Mean over tasks of the difference paired by example, ± 1.96 standard errors; "
        f"{_sizes(results)}, {seeds}."
    )
    return {"title": title, "caption": caption, "figure": figure, "csv": data}


def _most_tasks(contrasts: list[dict], domain: str) -> int:
    return max(c[domain]["tasks"] for c in contrasts if c[domain])


def _interval(axis, y: float, entry: dict, primary: bool) -> None:
    colour, face = INTERVAL_COLOURS[0 if primary else 1]
    axis.errorbar(
        100 * entry["diff"],
        y,
        xerr=196 * (entry["se"] or 0.0),
        fmt="o",
        color=colour,
        mfc=face,
        ms=5,
        lw=1.5,
    )


def _draw_strategies(results: dict) -> dict:
    title = "Strategies proposed and rewarded"
    search = {m: tasks for m, tasks in results["search"].items() if tasks}
    if not search:
        return {"title": title, "skipped": "no strategy has been tried yet."}
    names = list(results["tasks"])
    figure, axes = plt.subplots(
        1,
        len(search),
        sharey=True,
        squeeze=False,
        figsize=(2 + 4 * len(search), 1.4 + 0.55 * len(names)),
    )
    data = [["method", "task", "family", "proposed", "rewarded"]]
    families = list(FAMILIES) + sorted(
        {f for tasks in search.values() for s in tasks.values() for f in s["by_family"]}
        - set(FAMILIES)
    )
    for axis, (method, tasks) in zip(axes[0], search.items(), strict=True):
        for y, task in enumerate(names):
            counts = tasks[task]["by_family"] if task in tasks else {}
            for kind, shift in (("proposed", -0.19), ("rewarded", 0.19)):
                _stack(axis, y + shift, counts, kind, families)
            data += [[method, task, f, c["proposed"], c["rewarded"]] for f, c in counts.items()]
            if not counts:
                axis.text(0, y, f" {NOT_RUN}", va="center", color="#555555")
        axis.set_yticks(range(len(names)), [_task_label(results, t) for t in names])
        axis.set(xlabel="strategies (count)", ylim=(len(names) - 0.5, -0.5))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(_label(method), loc="left", fontsize=9)
        axis.grid(visible=False, axis="y")
    used = {row[2] for row in data[1:]}
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=FAMILIES.get(f, "#F0E442"), label=f)
        for f in families
        if f in used
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)))
    caption = (
        "Upper, pale bar: strategies proposed, by family; lower, solid bar: those rewarded "
        f"for improving the support examples; seed {results['seed']}. "
        + " ".join(_stand_in_notes(results, names))
    )
    return {"title": title, "caption": caption, "figure": figure, "csv": data}


def _stack(axis, y: float, counts: dict, kind: str, families: list[str]) -> None:
    left = 0
    for family in families:
        value = counts.get(family, {}).get(kind, 0)
        axis.barh(
            y,
            value,
            0.36,
            left=left,
            color=FAMILIES.get(family, "#F0E442"),
            alpha=0.4 if kind == "proposed" else 1.0,
            lw=0,
        )
        left += value


def _draw_reward_rate(results: dict) -> dict:
    title = "Reward rate per policy iteration"
    search = {
        m: tasks
        for m, tasks in results["search"].items()
        if any(s["by_iteration"] for s in tasks.values())
    }
    if not search:
        return {"title": title, "skipped": "no strategy has been tried yet."}
    figure, axis = plt.subplots(figsize=(6, 3.4))
    data = [["method", "task", "iteration", "proposed", "rewarded"]]
    for method, tasks in search.items():
        totals: Counter = Counter()
        for task, summary in tasks.items():
            steps = summary["by_iteration"]
            axis.plot(
                [s["iteration"] for s in steps],
                [100 * s["rewarded"] / s["proposed"] for s in steps],
                color=_colour(method),
                lw=0.8,
                alpha=0.35,
                marker=".",
            )
            for s in steps:
                totals[s["iteration"], "proposed"] += s["proposed"]
                totals[s["iteration"], "rewarded"] += s["rewarded"]
                data.append([method, task, s["iteration"], s["proposed"], s["rewarded"]])
        steps = sorted({iteration for iteration, _ in totals})
        axis.plot(
            steps,
            [100 * totals[i, "rewarded"] / totals[i, "proposed"] for i in steps],
            color=_colour(method),
            lw=2,
            marker=_marker(method),
            label=_label(method),
        )
    axis.set(xlabel="iteration", ylabel="rewarded strategies (%)", ylim=(0, None))
    axis.set_xticks(sorted({row[2] for row in data[1:]}))
    axis.legend()
    count = len({row[1] for row in data[1:]})
    caption = (
        f"Share of proposed strategies, invalid ones included, that were rewarded; thick: "
        f"all of {_count(count, 'task')} together, thin: each task; "
        f"seed {results['seed']}."
    )
    return {"title": title, "caption": caption, "figure": figure, "csv": data}


def _draw_losses(args: tuple[dict, str, list[dict]]) -> dict:
    results, stage, rows = args
    unit = {"collect": "task", "generator": "left-out task", "policy": "task"}[stage]
    title = f"Training loss: {stage}, by {unit}"
    # A resumed stage logs some steps again; the last value is the one that was kept.
    points = {
        (str(r.get("unit", "")), r["step"]): r["loss"]
        for r in rows
        if r.get("stage") == stage and "step" in r and r.get("loss") is not None
    }
    if not points:
        return {"title": title, "skipped": f"metrics.jsonl holds no loss of the {stage} stage."}
    figure, axis = plt.subplots(figsize=(7, 3.4))
    data = [["unit", "step", "loss"], *([u, s, v] for (u, s), v in sorted(points.items()))]
    units = [u for u in (*TASK_ORDER, "none") if any(row[0] == u for row in data[1:])]
    units += sorted({row[0] for row in data[1:]} - set(units))
    palette = list(dict.fromkeys(colour for _, colour, _ in METHODS.values()))
    for index, name in enumerate(units):
        steps, losses = zip(*[(s, v) for u, s, v in data[1:] if u == name], strict=True)
        colour, dashes = palette[index % len(palette)], "--" if index >= len(palette) else "-"
        axis.plot(steps, losses, color=colour, lw=0.6, alpha=0.3)
        axis.plot(steps, _smooth(losses), color=colour, ls=dashes, lw=1.6, label=name or "all")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(
        xlabel="training step",
        ylabel="squared error (unitless)" if stage == "generator" else "loss (nats per token)",
    )
    # Reconstruction error falls by orders of magnitude, where a linear axis shows only the start.
    if stage == "generator" and min(points.values()) > 0:
        axis.set_yscale("log")
    axis.legend(title=unit, loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption = (
        f"Thin: logged values, {len(points)} in all; thick: their running mean; "
        f"seed {results['seed']}."
    )
    return {"title": title, "caption": caption, "figure": figure, "csv": data}


def _smooth(values) -> np.ndarray:
    """Centred running mean over about a twentieth of the curve, shorter at both ends."""
    half = len(values) // 40
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


# --------------------------------------------------------------------------------------- HTML

CSS = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6570; --line: #dde2e7; --page: #fbfbfa;
  --card: #ffffff; --accent: #0060a0; --gain: #00694e; --loss: #a83f00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b0; --line: #343b43;
  --page: #14171a; --card: #1c2024; --accent: #6db8ee; --gain: #4cc9a3; --loss: #f0925c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2.2rem 1.1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .5rem; }
p.sub, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: .82rem; margin: .35rem 0 0; }
.tiles { display: grid; gap: .8rem; margin: 1.4rem 0;
  grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.tile, .scroll, details { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.tile { padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { font-size: .82rem; color: var(--soft); display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .7rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--card);
  min-width: min(12rem, 28vw); max-width: 15rem; white-space: normal; }
td.long { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
td.missing { color: var(--soft); font-style: italic; }
td small { display: block; color: var(--soft); }
.gain, .tile .gain { color: var(--gain); font-weight: 600; }
.loss, .tile .loss { color: var(--loss); font-weight: 600; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
figure { margin: 0; } figure .scroll { background: #fff; padding: .6rem; }
figure img { display: block; max-width: 100%; min-width: 560px; margin: 0 auto; }
details { margin: .6rem 0; padding: .2rem 1rem; }
summary { cursor: pointer; padding: .5rem 0; } details > *:last-child { margin-bottom: 1rem; }
.example { border-left: 3px solid var(--line); padding-left: .8rem; margin: .9rem 0;
  font-size: .88rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font-size: .82rem; }
ul { padding-left: 1.2rem; } li { margin: .3rem 0; }
"""

SCRIPT = """
document.querySelectorAll("th button").forEach(function (button) {
  button.addEventListener("click", function () {
    var th = button.parentElement, table = th.closest("table"), body = table.tBodies[0];
    var up = th.getAttribute("aria-sort") === "descending";
    table.querySelectorAll("th").forEach(function (h) { h.removeAttribute("aria-sort"); });
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    function key(row) { return row.cells[th.cellIndex].textContent.trim(); }
    var rows = Array.from(body.rows), numeric = rows.some(function (r) {
      return !isNaN(parseFloat(key(r))); });
    rows.sort(function (a, b) {
      if (!numeric) { return (up ? 1 : -1) * key(a).localeCompare(key(b)); }
      var x = parseFloat(key(a)), y = parseFloat(key(b));
      if (isNaN(x) || isNaN(y)) { return isNaN(x) - isNaN(y); }  // what was not run stays last
      return up ? x - y : y - x;
    });
    rows.forEach(function (row) { body.appendChild(row); });
  });
});
"""


def write_html(results: dict, figures: list[dict], run_path: Path, path: Path) -> None:
    """Write report.html: one page that needs no other file and no network.

    Args:
        results: content of results.json.
        figures: what `draw_figures` returned.
        run_path: run folder, for the strategies tried and the example predictions.
        path: file to write.
    """
    body = [
        f"<h1>{_esc(_page_title(results))}</h1>",
        f'<p class="sub">{_esc(_subtitle(results))}</p>',
        _html_tiles(results),
        "<ul>",
        *map(_html_finding, headline(results)),
        "</ul>",
    ]
    for name, blocks in report_sections(results, figures):
        body.append(f"<h2>{_esc(name)}</h2>")
        body += [_html_table(b) if "rows" in b else _html_figure(b) for b in blocks]
        if name == "Strategies":
            body += ["<h3>Each task in detail</h3>", *_html_tasks(results, Path(run_path))]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_esc(_page_title(results))}</title><style>{CSS}</style></head>\n"
        "<body><main>\n" + "\n".join(body) + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )
    runtime.write_text(path, page)


def _esc(text) -> str:
    return html.escape(str(text), quote=True)


def _html_finding(line: str) -> str:
    question, colon, answer = line.partition(": ")
    lead = f"<b>{_esc(question)}:</b> " if colon else _esc(question)
    return f"<li>{lead}{_esc(answer)}</li>"


def _html_tiles(results: dict) -> str:
    tiles = []
    for name in ("generator - base", "degaml - generator"):
        contrast = find_contrast(shown_contrasts(results)[0], name, results["metric"]) or {}
        for domain, title in DOMAINS.items():
            entry = contrast.get(domain)
            value = _points(entry["diff"], entry["se"], True) + " points" if entry else NOT_RUN
            after = verdict(entry) if entry else "no common task"
            tiles.append(
                f'<div class="tile"><span>{_esc(name)}, {title.lower()}</span>'
                f"<b>{_esc(value)}</b>"
                f'<span class="{_esc(after)}">{_esc(after)}</span></div>'
            )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _html_table(table: dict) -> str:
    head = "".join(
        f'<th scope="col"><button type="button">{_esc(cell)}</button></th>'
        for cell in table["header"]
    )
    rows = "\n".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in table["rows"])
    notes = "".join(f'<p class="note">{_esc(note)}</p>' for note in table["notes"])
    return (
        f'<h3>{_esc(table["title"])}</h3><div class="scroll" tabindex="0"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>{notes}"
    )


def _html_cell(cell: str) -> str:
    kind = (
        "missing"
        if cell.startswith(NOT_RUN)
        else cell
        if cell in ("gain", "loss")
        else "long"
        if len(cell) > 40
        else ""
    )
    text = _esc(cell)
    if re.match(r"[+-]?\d", cell):  # what follows a number in brackets goes below it
        text = re.sub(r" ([(\[].*)$", r" <small>\1</small>", text)
    return f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"


def _html_figure(figure: dict) -> str:
    title = f"<h3>{_esc(figure['title'])}</h3>"
    if figure.get("skipped"):
        return f'{title}<p class="note">Not drawn: {_esc(figure["skipped"])}</p>'
    data = base64.b64encode(figure["png"].read_bytes()).decode("ascii")
    return (
        f'{title}<figure><div class="scroll" tabindex="0"><img alt="{_esc(figure["title"])}" '
        f'src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{_esc(figure['caption'])}</figcaption></figure>"
    )


def _html_tasks(results: dict, run_path: Path) -> list[str]:
    """One drill-down per task: the strategies tried and examples whose answer changed."""
    episodes = load_episodes(run_path, results["tasks"])
    scores = load_scores(run_path, results["tasks"])
    blocks = []
    for task, about in results["tasks"].items():
        tried = [(m, row) for m, tasks in episodes.items() for row in tasks.get(task, [])]
        parts = [f"<b>{_esc(_task_label(results, task))}</b>"]
        parts += [
            f"{_esc(_label(m))} {_points(about['methods'][m]['acc'], None).split(' ±')[0]} %"
            for m in ("base", "generator", "degaml")
            if m in about["methods"]
        ]
        inside = "".join(f'<p class="note">{_esc(n)}</p>' for n in _stand_in_notes(results, [task]))
        inside += (
            _html_table(_tried_table(tried))
            if tried
            else f'<h3>Strategies tried</h3><p class="note">{NOT_RUN}</p>'
        )
        inside += _html_examples(scores, task, results["metric"])
        blocks.append(f"<details><summary>{' · '.join(parts)}</summary>{inside}</details>")
    return blocks


def _tried_table(tried: list[tuple[str, dict]], limit: int = 60) -> dict:
    """Distinct strategies, the best on the support examples first."""
    groups: dict = {}
    for method, row in tried:
        groups.setdefault((method, _canonical(row), _family(row) == "invalid"), []).append(row)

    def merit(item):
        row = item[1][0]
        return (
            -(row.get("reward") or 0),
            (row.get("losses") or 0) - (row.get("wins") or 0),
            -(row.get("gold_logp_gain") or 0.0),
        )

    rows = []
    for (method, text, invalid), same in sorted(groups.items(), key=merit)[:limit]:
        best = same[0]
        gain = best.get("gold_logp_gain")
        shown = f"invalid: {text}" if invalid else _strategy_text(best["strategy"])
        rows.append(
            [
                _label(method),
                shown,
                str(len(same)),
                *(str(best.get(key, "n/a")) for key in ("reward", "wins", "losses")),
                "n/a" if gain is None else f"{gain:+.3f}",
                f"{sum(r.get('seconds') or 0 for r in same if not r.get('cached')):.1f}",
            ]
        )
    notes = [
        "Wins and losses are counted on the support examples; gain is the mean change of the "
        "right answer's log-likelihood."
    ]
    if len(groups) > limit:
        notes.append(f"{len(groups) - limit} more distinct strategies are in episodes.jsonl.")
    header = ["Method", "Strategy", "Proposed", "Reward", "Wins", "Losses", "Gain", "Seconds"]
    return _table("Strategies tried", header, rows, notes)


def _html_examples(scores: dict, task: str, metric: str, limit: int = 5) -> str:
    """The first examples in file order, neither the best nor the worst, that changed answer."""
    method = next(
        (
            m
            for m in ("degaml", "degaml_plus", "generator")
            if task in scores.get(m, {}) and task in scores.get("base", {})
        ),
        None,
    )
    if method is None:
        return f'<h3>Changed predictions</h3><p class="note">{NOT_RUN}</p>'
    field = f"pred_{metric}" if metric in FIELDS else "pred_norm"
    base, adapted = scores["base"][task], scores[method][task]
    changed = [
        (base[key], adapted[key])
        for key in base
        if key in adapted and base[key].get(field) != adapted[key].get(field)
    ]
    fixed = sum(b[field] != b["gold"] and a[field] == b["gold"] for b, a in changed)
    broken = sum(b[field] == b["gold"] and a[field] != b["gold"] for b, a in changed)
    title = f"<h3>Changed predictions: base model and {_esc(_label(method))}</h3>"
    text = (
        f'<p class="note">{len(changed)} of {len(base)} predictions differ: {fixed} wrong to '
        f"right, {broken} right to wrong. Shown: the first {min(limit, len(changed))} in "
        "file order.</p>"
    )
    return title + text + "".join(_html_example(b, a, field) for b, a in changed[:limit])


def _html_example(base: dict, adapted: dict, field: str) -> str:
    options = base.get("options") or []

    def answer(index) -> str:
        inside = isinstance(index, int) and 0 <= index < len(options)
        return _esc(options[index] if inside else index)

    prompt = str(base.get("prompt", ""))
    prompt = prompt if len(prompt) <= 900 else prompt[:900] + " …"
    return (
        f'<div class="example"><pre>{_esc(prompt)}</pre>base: {answer(base[field])}<br>'
        f"adapted: {answer(adapted[field])}<br>right: {answer(base['gold'])} "
        f'<span class="note">({_esc(base["id"])})</span></div>'
    )
