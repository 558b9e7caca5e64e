"""results.json: the statistics of a run, from its stored scores.

One tidy frame has a row per run, method, task and test example. Numbers come from it by groupby:

- An accuracy is a mean over test examples. Its standard error is the sample std / sqrt(n).
- A difference of two methods is paired by example, so the examples' difficulty cancels.
- Runs of several seeds may share test examples. An example's values are averaged over its runs
  first, because counting it once per run would make the standard error too small. Then comes what
  the seeds differ by beyond their examples.
- An average is the mean of tasks. The tasks are fixed and their examples independent:
  se = sqrt(sum of se_task^2) / number of tasks.

Reads: tasks.json, scores/, adapted/, stages/, env.json, command.txt and the DONE records of a run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from pandas import DataFrame

import benchmarks
import methods
import runtime
from config import Config, UserError

# What an answer can be judged by. Which one is primary is fixed before a run.
METRICS = {
    "norm": "log-likelihood per character",
    "raw": "summed log-likelihood",
    "strict": "generated answer letter, strict parse",
    "lenient": "generated answer letter, lenient parse",
}
# Where a stored row says whether its example was answered rightly by a metric.
FIELDS = {
    "norm": "correct_norm",
    "raw": "correct_raw",
    "strict": "strict",
    "lenient": "lenient",
}
# The stages that log a training loss.
LOSS_UNITS = {
    "collect": "loss (nats per token)",
    "generator": "squared error",
    "align": "squared error",
}
DOMAINS = {"id": "In-domain", "ood": "Out-of-domain"}

# The pairs of methods whose difference is reported, in the order of the tables.
PAIRS = [
    ("generator", "base"),
    ("generator", "mean"),
    ("generator", "wrong_prompts"),
    ("mean", "base"),
    ("icl", "base"),
    ("generator", "icl"),
    ("degaml_plus", "icl"),
    ("no_meta", "icl"),
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
]
for start in methods.META_TRAINED:
    PAIRS += [("degaml", start), ("degaml_plus", start)]

# Every method's entry also says how it differs from these two.
REFERENCES = ("base", "generator")

# The units of meta-training behind a start. A baseline's start has a folder of its own.
GENERATED = ["adapters/*", "prompts/*", "generator/*"]
META_TRAINING = {
    "plain": [],
    "generated": GENERATED,
    "aligned": [*GENERATED, "align/*"],
    "union": ["baselines/union/*"],
    "maml": ["baselines/maml/*"],
    "maml, q v o": ["baselines/maml_qvo/*"],
    "maml, matched": ["baselines/maml/*"],
    "abmll": ["baselines/abmll/*"],
}


def build_results(run_path: Path, cfg: Config) -> dict:
    """Everything results.json says about a run folder, any part of which may be missing.

    Returns: a JSON-serialisable dict. Accuracies and differences are fractions.
    Raises: UserError: a run of `report.seed_runs` is missing, of another model, or repeats a seed.
    """
    run_path = Path(run_path)
    metric = cfg.evaluate.metric
    tasks = load_tasks(run_path)
    frame = load_frame(run_path, tasks)
    summary = summarise(frame, tasks, metric)

    # First how the run was set, then what came out, then what it cost.
    results = {
        "config": cfg.name,
        "model": cfg.model.name,
        "seed": _seed_label(cfg.model_dump()),
        "metric": metric,
        "paper": cfg.report.paper,
        "tasks": {},
        "averages": summary["averages"],
        "contrasts": summary["contrasts"],
        "seconds": {},
        "search": summarise_searches(run_path, tasks),
        "budget": read_budget(run_path),
        "answers": read_answer_costs(run_path, tasks),
        "provenance": read_provenance(run_path, tasks),
    }
    for task, about in tasks.items():
        # The lists of example ids are long, and tasks.json has them.
        entry = {key: value for key, value in about.items() if not key.endswith("_ids")}
        entry["methods"] = summary["tasks"][task]
        entry["strategy"] = {}
        for method in methods.PROPOSING:
            path = run_path / f"adapted/{method}/{task}/strategy.json"
            entry["strategy"][method] = _read_if_there(path, None)
        results["tasks"][task] = entry

    # Core-seconds of each stage's units.
    for path in sorted(run_path.glob("stages/*.json")):
        stage = runtime.read_json(path)
        results["seconds"][path.stem] = stage["seconds"]
    if cfg.report.seed_runs:
        results["seeds"] = pool_seeds(run_path, cfg, tasks)
    return results


def load_tasks(run_path: Path) -> dict[str, dict]:
    """Domain, sizes, chance and majority rates of each task; {} before any task was loaded."""
    return _read_if_there(Path(run_path) / "tasks.json", {})


def _read_if_there(path: Path, default):
    return runtime.read_json(path) if path.exists() else default


def read_losses(run_path: Path) -> DataFrame:
    """The training losses of metrics.jsonl: stage, unit, step, loss."""
    path = run_path / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a killed process leaves a broken line
        # Other rows hold rewards.
        if row["stage"] in LOSS_UNITS and row.get("loss") is not None:
            rows.append([row["stage"], row["unit"], row["step"], row["loss"]])
    losses = DataFrame(rows, columns=["stage", "unit", "step", "loss"])
    # A resumed stage logs some steps again. The last value is the one that was kept.
    curves = ["stage", "unit", "step"]
    return losses.drop_duplicates(curves, keep="last").sort_values(curves)


def load_frame(run_path: Path, tasks, run: str = "") -> DataFrame:
    """The stored scores of a run folder: a row per method, task and test example.

    Columns: run, method, task, id; correctness 0..1 by each metric (NaN where not scored);
    logp_gold; the confidence of the likeliest option and whether that option is right.
    Raises: UserError: an example id occurs twice in a file, which would break the pairing.
    """
    rows = []
    for method in methods.METHODS:
        for task in tasks:
            path = Path(run_path) / f"scores/{method}/{task}.jsonl"
            if not path.exists():
                continue
            stored = runtime.read_jsonl(path)
            ids = {row["id"] for row in stored}
            if len(ids) != len(stored):
                raise UserError(f"{path}: an example id occurs twice; delete it and evaluate again")
            for row in stored:
                key = [run, method, task, row["id"]]
                rows.append(key + _example_values(row))

    keys = ["run", "method", "task", "id"]
    values = [*METRICS, "logp_gold", "confidence", "right"]
    frame = DataFrame(rows, columns=keys + values)
    # A metric that nothing was scored by is a column of NaN, not of None.
    return frame.astype(dict.fromkeys(values, float))


def _example_values(row: dict) -> list:
    """Norm, raw, strict, lenient, logp_gold, confidence and right of one stored row.

    The confidence is the largest probability under a softmax over the options' log-likelihoods.
    """
    correct = [row.get(key) for key in FIELDS.values()]
    logp_gold = row.get("logp_gold")
    stored = row.get("raw") or [math.nan]
    raw = np.array(stored, dtype=np.float64)

    # A diverged method has no finite log-likelihoods. Minus infinity makes its mean unknown too.
    if logp_gold is not None and not math.isfinite(logp_gold):
        logp_gold = -math.inf
    if not np.isfinite(raw).all():
        return [*correct, logp_gold, None, None]

    # Relative to the largest, so that no exponential is too small to hold.
    confidence = 1 / np.exp(raw - raw.max()).sum()
    right = raw.argmax() == row["gold"]
    return [*correct, logp_gold, confidence, right]


def task_statistics(frame: DataFrame, tasks, metric: str, pairs) -> dict[str, DataFrame]:
    """Mean, standard error and number of examples of every method and of some pairs of methods.

    Returns: {"mean", "se", "n"}, each a frame of tasks by names; a name is a method or "a - b".
    """
    # One column per method, whether it was run or not.
    scores = frame.set_index(["task", "id", "run", "method"])[metric]
    by_method = scores.unstack("method")
    by_method = by_method.reindex(columns=list(methods.METHODS))

    # A difference is taken within a run: what only one of the two methods has drops out as NaN.
    columns = dict(by_method)
    for a, b in pairs:
        columns[f"{a} - {b}"] = by_method[a] - by_method[b]

    # First over the runs of an example, then over the examples of a task.
    values = DataFrame(columns)
    per_example = values.groupby(level=["task", "id"]).mean()
    per_task = per_example.groupby(level="task")
    found = {"mean": per_task.mean(), "se": per_task.sem(), "n": per_task.count()}

    # A task without any scores has a row too: NaN, which no comparison takes for a number.
    for key, table in found.items():
        found[key] = table.reindex(list(tasks))
    return found


def pick(statistics: dict, name: str, where, label: str) -> dict | None:
    """What `task_statistics` found for a method or a pair; None where nothing was scored.

    where: a task's name, or the list of a domain's tasks, to average over those with a value.
    Returns: {label: the mean, "se", and "n" examples or "tasks"}.
    """
    tasks = [where] if isinstance(where, str) else where
    scored = [task for task in tasks if statistics["n"].at[task, name] > 0]
    if not scored:
        return None

    # One task without a standard error leaves the average without one.
    mean = statistics["mean"].loc[scored, name].mean()
    errors = statistics["se"].loc[scored, name]
    variance = (errors**2).sum(skipna=False)
    se = math.sqrt(variance) / len(scored)
    entry = {label: _number(mean), "se": _number(se)}
    if isinstance(where, str):
        entry["n"] = int(statistics["n"].at[where, name])
    else:
        entry["tasks"] = len(scored)
    return entry


def _number(value: float) -> float | None:
    """JSON has no NaN: the standard error of a single example, say, is null."""
    return float(value) if math.isfinite(value) else None


def describe_gain(entry: dict) -> str:
    """A gain or a loss is at least two standard errors from 0."""
    diff = entry["diff"]
    se = entry["se"]
    if se is None:
        return "no standard error"
    # Not one example differs: the same adapter was kept, say.
    if diff == se == 0:
        return "no difference"
    if abs(diff) < 2 * se:
        return "not established, negative" if diff < 0 else "not established"
    return "gain" if diff > 0 else "loss"


def calibration_errors(frame: DataFrame) -> DataFrame:
    """Expected calibration error, in columns task, method, run, ece.

    |accuracy - confidence| in each of ten equal bins of confidence, weighted by the bin's share.
    Source: Guo et al. 2017, eq. 3.
    """
    scored = frame.dropna(subset="confidence")
    # A confidence of exactly 1 belongs to the last bin.
    which_bin = (scored["confidence"] * 10).astype(int).clip(upper=9)
    gap = scored["right"] - scored["confidence"]
    rows = scored.assign(bin=which_bin, gap=gap)

    # |mean of the gaps| times the bin's share is |sum of the gaps| over the number of all rows.
    unit = ["task", "method", "run"]
    per_bin = rows.groupby([*unit, "bin"])["gap"].sum().abs()
    total = rows.groupby(unit).size()
    errors = per_bin.groupby(unit).sum() / total
    return errors.rename("ece").reset_index()


def summarise(frame: DataFrame, tasks: dict, metric: str) -> dict:
    """The entries of every method per task and per domain, and the contrasts.

    Returns: {"tasks": {task: {method: entry}}, "averages": {domain: {method: entry}}, "contrasts"};
        an entry holds acc, se, n or tasks, acc_<metric>, se_<metric>, ece, logp_gold, vs_base and
        vs_generator. A method that was not run has none.
    """
    # Everything that is compared with anything, by every metric, in a few passes over the frame.
    pairs = list(PAIRS)
    for other in REFERENCES:
        pairs += [(method, other) for method in methods.METHODS]
    statistics: dict = {}
    for name in (*METRICS, "logp_gold"):
        statistics[name] = task_statistics(frame, tasks, name, pairs)
    errors = calibration_errors(frame)

    by_task = {task: _entries(statistics, errors, metric, task) for task in tasks}
    averages = {}
    for domain in DOMAINS:
        averages[domain] = _entries(statistics, errors, metric, in_domain(tasks, domain))
    contrasts = _contrasts(statistics, tasks)
    return {"tasks": by_task, "averages": averages, "contrasts": contrasts}


def in_domain(tasks: dict, domain: str) -> list[str]:
    """The names of a domain's tasks, in order."""
    return [name for name, about in tasks.items() if about["domain"] == domain]


def _entries(statistics: dict, errors: DataFrame, metric: str, where) -> dict[str, dict]:
    """{method: entry} on one task (`where` its name) or over a domain (a list of tasks)."""
    tasks = [where] if isinstance(where, str) else where
    errors = errors[errors["task"].isin(tasks)]
    entries = {}
    for method in methods.METHODS:
        # A method without the primary metric was not run here.
        entry = pick(statistics[metric], method, where, "acc")
        if entry is None:
            continue

        for name in METRICS:
            found = pick(statistics[name], method, where, "mean")
            if found is not None:
                entry[f"acc_{name}"] = found["mean"]
                entry[f"se_{name}"] = found["se"]

        # Calibration is a run's own: its errors are averaged over runs, not pooled.
        of_method = errors.loc[errors["method"] == method, "ece"]
        entry["ece"] = _number(of_method.mean())
        logp = pick(statistics["logp_gold"], method, where, "mean")
        entry["logp_gold"] = logp and logp["mean"]

        for other in REFERENCES:
            entry[f"vs_{other}"] = None
            if method != other:
                pair = f"{method} - {other}"
                entry[f"vs_{other}"] = pick(statistics[metric], pair, where, "diff")
        entries[method] = entry
    return entries


def _contrasts(statistics: dict, tasks: dict) -> list[dict]:
    """The differences of PAIRS by every metric: {"name", "metric", "id", "ood", "tasks"}.

    A pair is left out when its methods share no task or were not scored by that metric.
    """
    found = []
    for metric in METRICS:
        for a, b in PAIRS:
            pair = f"{a} - {b}"
            row: dict = {"name": pair, "metric": metric}
            for domain in DOMAINS:
                names = in_domain(tasks, domain)
                row[domain] = pick(statistics[metric], pair, names, "diff")
            row["tasks"] = {}
            for task in tasks:
                entry = pick(statistics[metric], pair, task, "diff")
                if entry is not None:
                    row["tasks"][task] = entry
            if row["tasks"]:
                found.append(row)
    return found


def find_contrast(contrasts: list[dict], name: str, metric: str) -> dict | None:
    """The contrast of that name and metric, or None where the pair was left out."""
    for row in contrasts:
        if row["name"] == name and row["metric"] == metric:
            return row
    return None


def pool_seeds(run_path: Path, cfg: Config, tasks: dict) -> dict:
    """Averages and contrasts of this run, of each run of `report.seed_runs`, and of all together.

    Runs of one seed that test other examples (`data.skip_test`) count as one seed.
    Returns: {"runs": [{"seed", "run", "averages", "contrasts"}], one per seed, "pooled":
        {"averages", "contrasts"}}; pooled entries are those of `_count_seeds`.
    Raises: UserError: a folder is missing, of another model, or repeats a seed.
    """
    metric = cfg.evaluate.metric
    seen = set()
    by_seed: dict = {}
    folders: dict = {}
    for folder in [run_path, *map(Path, cfg.report.seed_runs)]:
        sections = cfg.model_dump()
        if folder != run_path:
            sections = _read_sections(folder, cfg.model.name)
        label = _seed_label(sections)
        if label in seen:
            raise UserError(f"report.seed_runs: {folder} repeats seed {label}")
        seen.add(label)
        seed = _seed_label(sections, examples=False)
        by_seed.setdefault(seed, []).append(load_frame(folder, tasks, str(label)))
        folders.setdefault(seed, []).append(folder.name)

    runs: list[dict] = []
    frames = []
    for seed, parts in by_seed.items():
        frames.append(pd.concat(parts))
        summary = summarise(frames[-1], tasks, metric)
        del summary["tasks"]
        runs.append({"seed": seed, "run": ", ".join(folders[seed]), **summary})

    # All runs in one frame: the statistics average an example's runs before anything else.
    pooled = summarise(pd.concat(frames), tasks, metric)
    del pooled["tasks"]

    for domain in DOMAINS:
        for method, entry in pooled["averages"][domain].items():
            _count_seeds(entry, [run["averages"][domain].get(method) for run in runs])
        for row in pooled["contrasts"]:
            entries = []
            for run in runs:
                found = find_contrast(run["contrasts"], row["name"], row["metric"])
                entries.append(found and found[domain])
            _count_seeds(row[domain], entries)
    return {"runs": runs, "pooled": pooled}


def _count_seeds(entry: dict | None, of_runs: list[dict | None]) -> None:
    """Let the standard errors of a pooled entry count seeds too, and keep each seed's value.

    Adds `by_seed`, {field: a value per seed, None where it lacks the method, the pair or a task}.
    """
    if entry is None:
        return
    # a seed that left a task out is not compared with those that did not
    whole = [run if run and run["tasks"] == entry["tasks"] else None for run in of_runs]
    errors = {"acc": "se", "diff": "se"}
    for metric in METRICS:
        errors[f"acc_{metric}"] = f"se_{metric}"

    entry["by_seed"] = {}
    for value, error in errors.items():
        if value not in entry:
            continue
        having = [run for run in whole if run and value in run]
        entry["by_seed"][value] = [run and run.get(value) for run in whole]
        own = [run[error] for run in having]
        if len(having) > 1 and None not in (entry[error], *own):
            entry[error] = error_with_seeds(entry[error], [run[value] for run in having], own)

    for other in REFERENCES:
        key = f"vs_{other}"
        _count_seeds(entry.get(key), [run and run.get(key) for run in whole])


def error_with_seeds(error: float, values: list[float], errors: list[float]) -> float:
    """The standard error of a mean over seeds, from that over examples alone.

    Seeds differ by their trainings and by their test examples. The second part is in the pooled
    error already, in full where no example is shared: what their own errors explain is taken off
    the variance of the seeds (method of moments, as for random effects in a meta-analysis).
    Args: values, errors: each seed's value, and its standard error over examples.
    """
    count = len(values)
    of_seeds = np.var(values, ddof=1) / count
    explained = (np.mean(np.square(errors)) - error**2) / (count - 1)
    return math.sqrt(error**2 + max(0.0, of_seeds - explained))


def _read_sections(folder: Path, model: str) -> dict:
    """The configuration of another run. Raises: UserError: it is none, or of another model."""
    if not (folder / "config.yaml").exists():
        raise UserError(f"report.seed_runs: {folder} holds no config.yaml, so it is no run")
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text) or {}
    other = config.get("model", {}).get("name", model)
    if other != model:
        raise UserError(f"report.seed_runs: {folder} is a run of {other}, not of {model}")
    return config


def _seed_label(config: dict, examples: bool = True):
    """A run's seed, and what else tells the run apart: its generator's seed, test rows skipped.

    Args: examples: tell runs apart that test other examples?
    """
    # Two runs may share the seed of everything but the generator, or test on other examples.
    seed = config.get("seed")
    generator_seed = config.get("generator", {}).get("seed", seed)
    skipped = config.get("data", {}).get("skip_test", 0)
    more = []
    if generator_seed != seed:
        more.append(f"generator {generator_seed}")
    if skipped and examples:
        more.append(f"test from {skipped}")
    if config.get("data", {}).get("test_from") == "train":
        more.append("training examples")
    return f"{seed} ({', '.join(more)})" if more else seed


def summarise_searches(run_path: Path, tasks) -> dict[str, dict[str, dict]]:
    """{method: {task: what its policy proposed there and what was rewarded}}.

    The counts are {"proposed", "rewarded", "by_family": {family: the same two}}. An invalid
    proposal counts as proposed, under the family `invalid`, and not as rewarded.
    """
    searches: dict = {}
    for method in methods.PROPOSING:
        for task in tasks:
            path = run_path / f"adapted/{method}/{task}/episodes.jsonl"
            if not path.exists():
                continue
            total = {"proposed": 0, "rewarded": 0}
            families: dict = {}
            for episode in runtime.read_jsonl(path):
                family = episode["strategy"]["family"] if episode["valid"] else "invalid"
                of_family = families.setdefault(family, {"proposed": 0, "rewarded": 0})
                for counts in (total, of_family):
                    counts["proposed"] += 1
                    counts["rewarded"] += episode["reward"]
            searches.setdefault(method, {})[task] = {**total, "by_family": families}
    return searches


def read_budget(run_path: Path) -> dict[str, dict]:
    """What each method spent, from the DONE records of its units.

    Returns: {method: {"seconds_meta", "seconds_adapt", "targets", "labels", "diverged"}}:
        core-seconds of meta-training over all left-out sets and of adaptation over all targets,
        support labels per target, and {left-out set: step} where a training diverged.
    """
    budget = {}
    for method in methods.TABLE:
        adapted = _records(run_path, f"adapted/{method.id}/*")
        if not adapted:
            continue
        spent = {
            "seconds_meta": 0.0,
            "seconds_adapt": sum(record["seconds"] for record in adapted.values()),
            "targets": len(adapted),
            "labels": None,
            "diverged": {},
        }

        # Methods with the same start share its meta-training; each is charged all of it.
        for pattern in META_TRAINING[method.start]:
            for folder, record in _records(run_path, pattern).items():
                spent["seconds_meta"] += record["seconds"]
                if record.get("diverged_at") is not None:
                    spent["diverged"][folder.name] = record["diverged_at"]

        # Every target sees the same number of labels; the label-free methods see none.
        for folder in adapted:
            strategy = _read_if_there(folder / "strategy.json", {})
            spent["labels"] = strategy.get("n_support", spent["labels"])
        budget[method.id] = spent
    return budget


def read_answer_costs(run_path: Path, tasks: dict) -> dict[str, dict]:
    """What an answer to a test example costs, by method.

    Returns: {method: {"answers", "read_tokens", "seconds"}}, the last two per answer. A method
        whose answers are another's, as the adapter is the same, has no costs of its own.
    """
    costs = {}
    for method in methods.METHODS:
        total = {"answers": 0, "read_tokens": 0, "seconds": 0.0}
        for task, about in tasks.items():
            spent = _read_if_there(run_path / f"scores/{method}/{task}.meta.json", {})
            if not spent.get("read_tokens"):
                continue
            total["answers"] += about["n_test"]
            total["read_tokens"] += spent["read_tokens"]
            total["seconds"] += spent["seconds"]
        if total["answers"]:
            for key in ("read_tokens", "seconds"):
                total[key] = round(total[key] / total["answers"], 4)
            costs[method] = total
    return costs


def _records(run_path: Path, pattern: str) -> dict[Path, dict]:
    """{folder: DONE record} of the finished units that belong to the run itself."""
    found = {}
    for path in sorted(run_path.glob(f"{pattern}/DONE.json")):
        record = runtime.read_json(path)
        # A user's own task, adapted in this folder later, is no part of the run.
        if not record.get("own_task"):
            found[path.parent] = record
    return found


def read_provenance(run_path: Path, tasks: dict) -> dict:
    """How the run was made, and which of the papers' tasks it leaves out."""
    path = run_path / "command.txt"
    command = path.read_text(encoding="utf-8") if path.exists() else ""
    origins = {about["prompts_from"] for about in tasks.values()}
    return {
        "run": run_path.name,
        "command": command.strip(),
        "env": _read_if_there(run_path / "env.json", {}),
        "prompts_from": sorted(origins),
        "tasks_not_in_run": [name for name in benchmarks.TABLE if name not in tasks],
    }
