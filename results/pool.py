"""Several seeds in one table: the numbers of README and docs/results.md.

    .venv/bin/python results/pool.py

Reads the results.json of each seed's runs, writes results/seeds.json and prints Markdown. A value
is the mean of the seeds that have it. Its error takes the seeds' test examples for different ones:
they share a fifth at most. What the seeds differ by comes on top (`results.error_with_seeds`).
"""

import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import results
import runtime

# the runs of each seed; the first that has a method or a pair counts
RUNS = {
    "999": ("smollm2", "smollm2-icl"),
    "1": ("smollm2-seed1",),
    "2": ("smollm2-seed2",),
}
METHODS = {
    "base": "Base model",
    "icl": "Labels in the prompt: `icl`",
    "generator": "Generalization: `generator`",
    "degaml": "Adaptation: `degaml`",
    "degaml_plus": "Adaptation, SFT allowed: `degaml_plus`",
    "no_meta": "baseline: `no_meta`",
    "union": "baseline: `union`",
    "mean": "control: `mean`",
    "wrong_prompts": "control: `wrong_prompts`",
}


def main() -> None:
    found = pool_runs()
    runtime.write_json(HERE / "seeds.json", found)
    rows = [*average_rows(found), "", *difference_rows(found, "norm")]
    rows += ["", "By summed log-likelihood:", *difference_rows(found, "raw")]
    print("\n".join(rows))


def pool_runs() -> dict:
    """{"seeds", "averages": {domain: {method: entry}}, "contrasts": {metric: {pair: {domain}}}}."""
    stored = {}
    for seed, names in RUNS.items():
        stored[seed] = [json.loads((HERE / name / "results.json").read_text()) for name in names]

    averages: dict = {domain: {} for domain in results.DOMAINS}
    for domain, of_methods in averages.items():
        for method in METHODS:
            of_seeds = [find_average(runs, domain, method) for runs in stored.values()]
            of_methods[method] = pool(of_seeds, "acc")
            if method != "base":
                gains = [entry and entry["vs_base"] for entry in of_seeds]
                of_methods[method]["vs_base"] = pool(gains, "diff")

    contrasts: dict = {"norm": {}, "raw": {}}
    for metric, rows in contrasts.items():
        for a, b in results.PAIRS:
            if a not in METHODS or b not in METHODS:
                continue
            pair = rows[f"{a} - {b}"] = {}
            for domain in results.DOMAINS:
                of_seeds = []
                for runs in stored.values():
                    of_seeds.append(find_difference(runs, domain, metric, f"{a} - {b}"))
                pair[domain] = pool(of_seeds, "diff")
    return {"seeds": list(RUNS), "averages": averages, "contrasts": contrasts}


def find_average(runs: list[dict], domain: str, method: str) -> dict | None:
    """A seed's entry of a method; None where it was not run."""
    for run in runs:
        if method in run["averages"][domain]:
            return run["averages"][domain][method]
    return None


def find_difference(runs: list[dict], domain: str, metric: str, pair: str) -> dict | None:
    """A seed's entry of a pair of methods; None where no run has both."""
    for run in runs:
        row = results.find_contrast(run["contrasts"], pair, metric)
        if row and row[domain]:
            return row[domain]
    return None


def pool(of_seeds: list[dict | None], field: str) -> dict:
    """Mean of the seeds that have an entry, its standard error, and each seed's value."""
    having = [entry for entry in of_seeds if entry]
    values = [entry[field] for entry in having]
    errors = [entry["se"] for entry in having]
    error = math.hypot(*errors) / len(having)  # over examples
    if len(having) > 1:
        error = results.error_with_seeds(error, values, errors)
    by_seed = [entry and entry[field] for entry in of_seeds]
    return {field: sum(values) / len(values), "se": error, "by_seed": by_seed}


def average_rows(found: dict) -> list[str]:
    """A Markdown row per method: in-domain, each seed, out of domain, each seed."""
    rows = []
    for method, label in METHODS.items():
        cells = []
        for domain in results.DOMAINS:
            entry = found["averages"][domain][method]
            cells += [with_error(entry, "acc", ""), each_seed(entry, "")]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return rows


def difference_rows(found: dict, metric: str) -> list[str]:
    """The same per pair of methods; bold where it passes two standard errors."""
    rows = []
    for pair, of_domains in found["contrasts"][metric].items():
        cells = []
        for entry in of_domains.values():
            text = with_error(entry, "diff", "+")
            if results.describe_gain(entry) in ("gain", "loss"):
                text = f"**{text}**"
            cells += [text, each_seed(entry, "+")]
        rows.append(f"| {pair.replace(' - ', ' − ')} | {' | '.join(cells)} |")
    return rows


def with_error(entry: dict, field: str, sign: str) -> str:
    """In percent."""
    return f"{100 * entry[field]:{sign}.1f} ± {100 * entry['se']:.1f}"


def each_seed(entry: dict, sign: str) -> str:
    """In percent, with a dash for a seed that has none."""
    seeds = []
    for value in entry["by_seed"]:
        seeds.append("–" if value is None else f"{100 * value:{sign}.1f}")
    return ", ".join(seeds)


if __name__ == "__main__":
    main()
