"""Paper T's four experiments: how adapters of staged and coupled optimisation differ.

    python degaml.py stage=analyze config=…      -> analysis/{analysis.md, analysis.json, *.png, *.csv, signatures.npz}

1 gradient conflict, 2 weight statistics, 3 signatures of one layer, 4 stage ablation. Everything is read from the run
folder; a method without adapters there is called not run. The coupled side is MAML-en-LLM.
"""

from __future__ import annotations

import csv
import io
import math
from itertools import combinations

import numpy as np
import torch
import yaml
from matplotlib import pyplot as plt
from torch import Tensor

import collect
import data
import lora
import methods
import report
import runtime
import scoring
from lora import Adapter, Layout
from runtime import Run

STAGED, COUPLED = ("tempo", "tempo_plus", "degaml", "degaml_plus"), ("maml", "maml_matched")
COMPARED = (*STAGED, *COUPLED)
QVO = ("q_proj", "v_proj", "o_proj")  # the modules paper T trains its coupled baseline on
STAGES = {"base": "Base model", "generator": "S1", "aligned": "S1 + S2", "tempo": "S1 + S2 + S3"}
ABSOLUTE = 1e-6  # |dW| below this counts as zero in the paper's sparsity


def paper_experiments() -> dict:
    """Paper T's own numbers, as printed: {experiment: {side: {statistic: value}}}."""
    return yaml.safe_load(report.PAPER_TABLES.read_text(encoding="utf-8"))["tempo-experiments"]


def analyze(run: Run) -> dict:
    """All four experiments on the out-of-domain targets (all targets where there are none). Rank 0 works."""
    cfg = run.cfg
    if run.rank:
        return {}
    tasks = data.load_tasks(run)
    wanted = [t for t in (cfg.data.targets or tasks) if tasks[t].domain == "ood"] or list(
        cfg.data.targets or tasks
    )
    adapters = load_adapted(run, wanted)
    folder = run.path / "analysis"
    folder.mkdir(exist_ok=True)
    found = {
        "tasks": wanted,
        "seed": cfg.seed,
        "n": len(tasks[wanted[0]].support),
        "model": cfg.model.name,
        "gradients": gradient_conflict(run, wanted, adapters, folder),
        "weights": {m: weight_rows(scoring.load_lm(run).layout, a) for m, a in adapters.items()},
        "signatures": draw_signatures(run, adapters, folder),
        "stages": stage_ablation(run),
    }
    runtime.write_json(folder / "analysis.json", found)
    runtime.write_text(folder / "analysis.md", format_analysis(found))
    run.log(format_analysis(found))
    return {"analysis": str(folder / "analysis.md")}


def load_adapted(run: Run, tasks: list[str]) -> dict[str, dict[str, Adapter]]:
    """{method: {task: adapter}} of the methods that have every task's adapter in the run folder."""
    layout, out = scoring.load_lm(run).layout, {}
    for method in COMPARED:
        folders = {t: run.path / f"adapted/{method}/{t}" for t in tasks}
        if all((f / "adapter_model.safetensors").is_file() for f in folders.values()):
            out[method] = {t: lora.load_adapter(f, layout) for t, f in folders.items()}
    return out


# ------------------------------------------------------------------------------------------------ gradient conflict


def sft_gradient(lm: scoring.LM, adapter: Adapter, examples: list) -> Tensor:
    """(D,) float64 mean gradient of the supervised loss over the examples, at an adapter."""
    total = torch.zeros(lm.layout.size, dtype=torch.float64)
    for e in examples:
        vector = lora.flatten_adapter(adapter, lm.layout).to(lm.model.device).requires_grad_()
        lora.swap_adapter(lm.model, lm.layout, lora.unflatten_adapter(vector, lm.layout))
        total += (
            torch.autograd.grad(scoring.lm_loss(lm, [scoring.make_row(lm, e)]), vector)[0]
            .double()
            .cpu()
        )
    lora.swap_adapter(lm.model, lm.layout, None)
    return total / len(examples)


def module_mask(layout: Layout, names: tuple[str, ...]) -> Tensor:
    """(D,) true where a scalar belongs to one of the named modules."""
    return torch.cat(
        [
            torch.full((layout.rank * (d_in + d_out),), path.rsplit(".", 1)[-1] in names)
            for path, _, d_in, d_out in layout.modules
        ]
    )


def cosine_matrix(vectors: list[Tensor]) -> np.ndarray:
    """(n, n) cosine similarities; 0 where a vector is zero."""
    unit = torch.stack([v / v.norm().clamp_min(1e-300) for v in vectors])
    return (unit @ unit.T).numpy()


def pair_statistics(matrix: np.ndarray) -> dict[str, float]:
    """Mean, sample standard deviation, least and largest over the pairs above the diagonal."""
    values = np.array([matrix[i, j] for i, j in combinations(range(len(matrix)), 2)])
    return {
        "pairs": len(values),
        "mean": float(values.mean()) if len(values) else None,
        "std": float(values.std(ddof=1)) if len(values) > 1 else None,
        "min": float(values.min()) if len(values) else None,
        "max": float(values.max()) if len(values) else None,
    }


def gradient_conflict(run: Run, tasks: list[str], adapters: dict, folder) -> dict:
    """Similarity of the tasks' gradients on their support examples: at each method's own adapters, and at one point
    common to all (the mean training adapter), since adapters of different tasks differ in place as well.

    Source: paper T, experiment 1 (cosines over 15 pairs of six tasks).
    """
    cfg = run.cfg
    lm, support = scoring.load_lm(run), {t: list(data.load_tasks(run)[t].support) for t in tasks}
    common = lora.average_adapters(
        [collect.last_checkpoint(run, lm, t) for t in cfg.data.train_tasks]
    )
    points = {"common point": dict.fromkeys(tasks, common), **adapters}
    masks = {
        "all modules": module_mask(lm.layout, tuple(cfg.model.modules)),
        "q, v, o": module_mask(lm.layout, QVO),
    }
    out: dict = {}
    for name, at in run.track(list(points.items()), "gradients"):
        grads = [sft_gradient(lm, at[t], support[t]) for t in tasks]
        out[name] = {}
        for kind, mask in masks.items():
            if not mask.any():
                continue
            matrix = cosine_matrix([g[mask] for g in grads])
            stem = f"gradients-{name}-{kind}".replace(", ", "").replace(" ", "_")
            out[name][kind] = {**pair_statistics(matrix), "file": f"{stem}.csv"}
            _write_csv(
                folder / f"{stem}.csv",
                [
                    ["task", *tasks],
                    *([t, *row] for t, row in zip(tasks, matrix.tolist(), strict=True)),
                ],
            )
            _heatmap(
                folder / f"{stem}.png",
                matrix,
                tasks,
                tasks,
                f"Gradient cosine at {name}, {kind} "
                f"(n = {len(support[tasks[0]])} support examples, seed {cfg.seed})",
                -1,
                1,
                numbers=True,
            )
    return out


# ------------------------------------------------------------------------------------------------ weight statistics


def weight_statistics(
    layout: Layout, adapter: Adapter, names: tuple[str, ...] | None = None
) -> dict[str, float]:
    """Statistics of dW = (alpha / r) B A over the named modules (all by default), one module's dW at a time, float64.

    Returns: sparsity (share of |dW| < 1e-6, as the paper's), relative_sparsity (share below 1 % of the root mean
        square), hoyer (1: one entry carries all, 0: all are equal), l1, l2, max, n.
    """
    blocks = [
        (adapter[a], adapter[b])
        for (path, *_), (a, _, b, _) in zip(layout.modules, layout.keys(), strict=True)
        if names is None or path.rsplit(".", 1)[-1] in names
    ]
    n, small, l1, square, top = 0, 0, 0.0, 0.0, 0.0
    for a, b in blocks:
        w = (layout.scale * (b.double() @ a.double())).abs()
        n, small = n + w.numel(), small + int((w < ABSOLUTE).sum())
        l1, square, top = (
            l1 + float(w.sum()),
            square + float((w**2).sum()),
            max(top, float(w.max())),
        )
    rms = math.sqrt(square / n) if n else 0.0
    below = sum(
        int(((layout.scale * (b.double() @ a.double())).abs() < 0.01 * rms).sum())
        for a, b in blocks
    )
    l2 = math.sqrt(square)
    hoyer = (math.sqrt(n) - l1 / l2) / (math.sqrt(n) - 1) if l2 and n > 1 else 0.0
    return {
        "sparsity": small / n,
        "relative_sparsity": below / n,
        "hoyer": hoyer,
        "l1": l1,
        "l2": l2,
        "max": top,
        "n": n,
    }


def weight_rows(layout: Layout, adapters: dict[str, Adapter]) -> dict[str, dict]:
    """Per module set: the mean over tasks, and each task's values."""
    out = {}
    for kind, names in (("all modules", None), ("q, v, o", QVO)):
        if names and not module_mask(layout, names).any():
            continue
        per_task = {t: weight_statistics(layout, a, names) for t, a in adapters.items()}
        keys = next(iter(per_task.values()))
        out[kind] = {
            "mean": {k: sum(v[k] for v in per_task.values()) / len(per_task) for k in keys},
            "tasks": per_task,
        }
    return out


# ------------------------------------------------------------------------------------------------------- signatures


def signature(
    layout: Layout, adapter: Adapter, layer: int, module: str, count: int = 200
) -> np.ndarray:
    """First `count` entries of dW of one module, row by row."""
    for (path, at, _, _), (a, _, b, _) in zip(layout.modules, layout.keys(), strict=True):
        if at == layer and path.endswith(module):
            rows = -(-count // adapter[a].shape[1])
            return (
                (layout.scale * (adapter[b][:rows].double() @ adapter[a].double()))
                .reshape(-1)[:count]
                .numpy()
            )
    raise ValueError(f"layer {layer} has no {module}")


def draw_signatures(run: Run, adapters: dict, folder) -> dict:
    """Line plot and heatmap of every method's signatures of layer 12 (the middle one in a smaller model)."""
    layout = scoring.load_lm(run).layout
    layers = sorted({layer for _, layer, _, _ in layout.modules})
    layer = 12 if 12 in layers else layers[len(layers) // 2]
    module = next(
        m
        for m in ("q_proj", layout.modules[0][0].rsplit(".", 1)[-1])
        if any(p.endswith(m) and at == layer for p, at, _, _ in layout.modules)
    )
    arrays = {
        m: np.stack([signature(layout, a, layer, module) for a in by_task.values()])
        for m, by_task in adapters.items()
    }
    if not arrays:
        return {}
    np.savez(folder / "signatures.npz", **arrays)
    top = max(float(np.abs(x).max()) for x in arrays.values())
    for method, rows in arrays.items():
        names = list(adapters[method])
        about = f"{_name(method)}: first {rows.shape[1]} entries of dW, layer {layer} {module}, seed {run.cfg.seed}"
        _heatmap(folder / f"signature-{method}.png", rows, names, None, about, -top, top)
        figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
        for name, row in zip(names, rows, strict=True):
            axis.plot(row, lw=0.8, label=name)
        axis.set(title=about, xlabel="entry", ylabel="dW")
        figure.legend(loc="outside lower center", ncols=len(names), fontsize=7)
        report.save_png(figure, folder / f"signature-lines-{method}.png")
    # how alike the tasks are in the method: 1 = the paper's coupled "barcode"
    alike = {
        m: pair_statistics(cosine_matrix([torch.from_numpy(r) for r in rows]))
        for m, rows in arrays.items()
    }
    return {
        "layer": layer,
        "module": module,
        "entries": int(next(iter(arrays.values())).shape[1]),
        "cosines": alike,
    }


# ---------------------------------------------------------------------------------------------------- stage ablation


def stage_ablation(run: Run) -> dict:
    """Average accuracies of base, S1, S1 + S2 and S1 + S2 + S3 from the stored scores."""
    cfg = run.cfg
    tasks = report.load_tasks(run.path)
    averages = report.average_over_tasks(
        [report.load_scores(run.path, tasks)], tasks, cfg.evaluate.metric
    )
    return {
        domain: {
            m: {k: found[m][k] for k in ("acc", "se", "tasks", "vs_base", "vs_generator")}
            for m in STAGES
            if m in found
        }
        for domain, found in averages.items()
    }


# ------------------------------------------------------------------------------------------------------------ output


def _name(method: str) -> str:
    return methods.METHODS[method].label if method in methods.METHODS else method


def _show(value, digits: int = 3) -> str:
    return (
        report.NOT_RUN
        if value is None
        else f"{value:.{digits}g}"
        if abs(value) < 1e-2
        else f"{value:.{digits}f}"
    )


def format_analysis(found: dict) -> str:
    """The experiments as Markdown tables beside the paper's numbers."""
    seed, n = found["seed"], found["n"]
    lines = [
        "# Experiments on how staged and coupled optimisation differ",
        "",
        f"{found['model']}, seed {seed}, tasks {', '.join(found['tasks'])}.",
        "",
        "## 1. Gradient conflict",
        "",
        f"Cosines between tasks of the supervised loss's gradient on n = {n} support examples each, over the "
        "adapter's A and B.",
        "",
        "| at | modules | pairs | mean | std | min | max |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, kinds in found["gradients"].items():
        lines += [
            f"| {_name(name)} | {kind} | {s['pairs']} | "
            + " | ".join(_show(s[k]) for k in ("mean", "std", "min", "max"))
            + " |"
            for kind, s in kinds.items()
        ]
    lines += [
        f"| {_name(m)} | - | {report.NOT_RUN} | | | | |"
        for m in COMPARED
        if m not in found["gradients"]
    ]
    paper = paper_experiments()
    lines += [
        f"| paper T: {side} | its own | 15 | {s['mean']} | {s['std']} | {s['min']} | {s['max']} |"
        for side, s in paper["gradients"].items()
    ]
    lines += [
        "",
        "The paper's coupled side trains q, v, o and its staged side all modules; rows with the same module "
        "set are the matched comparison. Its caption prints a least cosine of 0.46, its table 0.476.",
        "",
        "## 2. Weight statistics of dW = (alpha / r) B A",
        "",
        f"Means over tasks; sparsity is the share of |dW| < {ABSOLUTE:g} (it rewards small norms), the relative "
        "one of |dW| below 1 % of its root mean square.",
        "",
        "| method | modules | sparsity | relative | Hoyer | L1 | L2 | max |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = ("sparsity", "relative_sparsity", "hoyer", "l1", "l2", "max")
    for method, kinds in found["weights"].items():
        lines += [
            f"| {_name(method)} | {kind} | "
            + " | ".join(_show(w["mean"][k], 4) for k in keys)
            + " |"
            for kind, w in kinds.items()
        ]
    lines += [
        f"| {_name(m)} | - | {report.NOT_RUN} | | | | | |"
        for m in COMPARED
        if m not in found["weights"]
    ]
    lines += [
        f"| paper T: {side} | its own | {s['sparsity']} | | | {s['l1']:g} | {s['l2']} | {s['max']} |"
        for side, s in paper["weights"].items()
    ]
    s = found["signatures"]
    lines += ["", "## 3. Signatures", ""]
    if s:
        lines += [
            f"First {s['entries']} entries of dW of layer {s['layer']} {s['module']} "
            "(signature-*.png, signatures.npz); cosines between tasks:",
            "",
            "| method | mean | min | max |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {_name(m)} | " + " | ".join(_show(c[k]) for k in ("mean", "min", "max")) + " |"
            for m, c in s["cosines"].items()
        ]
    lines += [] if s else [report.NOT_RUN]
    lines += [
        "",
        "## 4. Stage ablation",
        "",
        "| stages | in-domain | out-of-domain |",
        "|---|---|---|",
    ]
    for method, label in STAGES.items():
        cells = [found["stages"].get(d, {}).get(method) for d in ("id", "ood")]
        shown = [
            report.NOT_RUN if c is None else f"{100 * c['acc']:.1f} ± {100 * c['se']:.1f}"
            for c in cells
        ]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _write_csv(path, rows: list[list]) -> None:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    runtime.write_text(path, out.getvalue())


def _heatmap(
    path,
    values: np.ndarray,
    rows: list[str],
    columns: list[str] | None,
    title: str,
    low: float,
    high: float,
    numbers: bool = False,
) -> None:
    size = (5.5, 4.5) if columns else (8, 0.4 * len(rows) + 1.2)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(
        values, vmin=low, vmax=high, cmap="RdBu_r", aspect="equal" if columns else "auto"
    )
    axis.set_yticks(range(len(rows)), rows)
    if columns:
        axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    if numbers:
        for i, j in np.ndindex(values.shape):
            axis.text(
                j,
                i,
                f"{values[i, j]:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if abs(values[i, j]) > 0.6 else "black",
            )
    axis.set_title(title, fontsize=8)
    axis.grid(visible=False)
    figure.colorbar(image)
    report.save_png(figure, path)
