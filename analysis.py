"""TEMPO's four experiments: how adapters of staged and of coupled optimisation differ.

    python degaml.py stage=analyze run=runs/smollm2

Writes in analysis/: analysis.md and .json, gradients-*.csv and .png, signature-*.png,
signatures.npz.

1 gradient conflict, 2 weight statistics, 3 signatures of one layer, 4 stage ablation. Everything
is read from the run folder, and from a second one by `analyze.other_run`; a method without adapters
there is called not run. The coupled side is MAML-en-LLM. `analyze.methods` names others.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import collect
import data
import lora
import methods
import report
import results
import runtime
import scoring
from config import UserError
from lora import Adapter, Layout
from runtime import Run

# staged methods, then coupled ones
COMPARED = (
    "tempo",
    "tempo_plus",
    "degaml",
    "degaml_plus",
    "maml_qvo",
    "maml",
    "maml_matched",
)
QVO = ("q_proj", "v_proj", "o_proj")  # the modules TEMPO trains its coupled baseline on
STAGES = {"base": "Base model", "generator": "S1", "aligned": "S1 + S2", "tempo": "S1 + S2 + S3"}
DOMAINS = {"id": "in-domain", "ood": "out-of-domain"}
STAGE_FACTS = ("acc", "se", "tasks", "vs_base", "vs_generator")
COMMON = "common point"  # of gradients: the mean training adapter
ABSOLUTE = 1e-6  # |dW| below this counts as zero in the paper's sparsity
NUM_ENTRIES = 200  # of a signature

# TEMPO's tables 3 and 4 as printed: Qwen2.5-0.5B, six out-of-domain tasks, 15 pairs of tasks.
# Table 3 calls the standard deviation a variance, and its caption has 0.46 for the 0.476 below.
# The threshold of table 4's sparsity is not stated.
PAPER = {
    "gradients": {
        "coupled": {"pairs": 15, "mean": 0.884, "std": 0.047, "min": 0.770, "max": 0.976},
        "TEMPO": {"pairs": 15, "mean": 0.749, "std": 0.116, "min": 0.476, "max": 0.940},
    },
    "weights": {
        "coupled": {"sparsity": 0.0155, "l2": 0.575, "l1": 2512, "max": 0.0017},
        "TEMPO": {"sparsity": 0.1001, "l2": 0.400, "l1": 866, "max": 0.0031},
    },
    # Table 2's averages, recomputed from its cells; figure 1 prints no numbers of S1 + S2
    "stages": {
        "0.5B": {
            "base": ("37.2", "24.6"),
            "S1": ("45.7", "23.4"),
            "S1 + S2 + S3": ("58.4", "34.2"),
        },
        "1.5B": {
            "base": ("59.7", "42.9"),
            "S1": ("62.5", "42.3"),
            "S1 + S2 + S3": ("67.7", "47.6"),
        },
    },
}


def analyze(run: Run) -> dict:
    """All four experiments on the out-of-domain targets, or on all where there are none."""
    if run.rank:
        return {}
    tasks = data.load_tasks(run)
    targets = run.cfg.data.targets or list(tasks)
    outside = [task for task in targets if tasks[task].domain == "ood"]
    wanted = outside or targets

    # what the run made of them
    layout = scoring.load_lm(run).layout
    compared = tuple(run.cfg.analyze.methods) or COMPARED
    adapters = load_adapted(run.path, layout, wanted, compared)
    if run.cfg.analyze.other_run:
        other = Path(run.cfg.analyze.other_run)
        found = load_adapted(other, layout, wanted, compared)
        adapters |= {f"{method} of {other.name}": each for method, each in found.items()}
    folder = run.path / "analysis"
    folder.mkdir(exist_ok=True)
    found = {
        "tasks": wanted,
        "compared": compared,
        "seed": run.cfg.seed,
        "n": len(tasks[wanted[0]].support),
        "model": run.cfg.model.name,
        "gradients": gradient_conflict(run, wanted, adapters, folder),
        "weights": compare_weights(layout, adapters),
        "signatures": compare_signatures(run, adapters, folder),
        "stages": stage_ablation(run),
    }

    # for programs, for readers and on the screen
    text = format_analysis(found)
    runtime.write_json(folder / "analysis.json", found)
    runtime.write_text(folder / "analysis.md", text)
    run.log(text)
    return {"analysis": str(folder / "analysis.md")}


def load_adapted(path: Path, layout: Layout, tasks, compared) -> dict:
    """{method: {task: adapter}} of the methods that have every task's adapter in a run folder.

    Raises: UserError: no such run, or one whose adapters have another shape or scale.
    """
    if not path.is_dir():
        raise UserError(f"analyze.other_run={path}: no such run folder; give one like runs/smollm2")
    adapters = {}
    for method in compared:
        by_task = {}
        for task in tasks:
            folder = path / f"adapted/{method}/{task}"
            if (folder / "adapter_model.safetensors").is_file():
                by_task[task] = lora.load_adapter(folder, layout)
        # a comparison of fewer tasks would not be the same one
        if len(by_task) == len(tasks):
            adapters[method] = by_task
    return adapters


def common_point(run):
    """The mean of the training adapters, or None where the run collected none."""
    lm = scoring.load_lm(run)
    tasks = run.cfg.data.train_tasks
    if not all((run.path / f"adapters/{task}/manifest.json").is_file() for task in tasks):
        return None
    return lora.average_adapters([collect.last_checkpoint(run, lm, task) for task in tasks])


def module_sets(layout: Layout) -> dict:
    """The layout, and its part that TEMPO's coupled baseline trains, where it has one."""
    part = tuple(module for module in layout.modules if module[0].endswith(QVO))
    sets = {"all modules": layout}
    if part:
        sets["q, v, o"] = dataclasses.replace(layout, modules=part)
    return sets


def module_mask(layout: Layout, part: Layout) -> Tensor:
    """(D,) true where a scalar of the layout belongs to the part."""
    parts = []
    for module in layout.modules:
        _, _, d_in, d_out = module
        size = layout.rank * (d_in + d_out)  # a module's A and B
        parts.append(torch.full((size,), module in part.modules))
    return torch.cat(parts)


def gradient_conflict(run, tasks, adapters, folder) -> dict:
    """Similarity of the tasks' gradients on their support examples (TEMPO, experiment 1).

    At each method's own adapters, and at one point common to all, the mean training adapter:
    adapters of different tasks differ in place as well.
    Returns: {point: {module set: pair statistics}}.
    """
    lm = scoring.load_lm(run)
    known = data.load_tasks(run)
    count = len(known[tasks[0]].support)
    about = f"n = {count} support examples, seed {run.cfg.seed}"

    # where gradients are taken: for each point an adapter per task
    points = dict(adapters)
    common = common_point(run)
    if common is not None:
        points = {COMMON: dict.fromkeys(tasks, common), **adapters}
    found = {}
    for point, at in run.track(list(points.items()), "gradients"):
        gradients = []
        for task in tasks:
            gradient = sft_gradient(lm, at[task], known[task].support)
            gradients.append(gradient)

        # one pass serves every module set: a part is columns of the whole
        found[point] = {}
        for kind, part in module_sets(lm.layout).items():
            mask = module_mask(lm.layout, part)
            matrix = cosine_matrix([gradient[mask] for gradient in gradients])
            frame = pd.DataFrame(matrix, tasks, tasks).rename_axis("task")
            stem = f"gradients-{point}-{kind}".replace(", ", "").replace(" ", "_")
            runtime.write_text(folder / f"{stem}.csv", frame.to_csv())
            title = f"Gradient cosine at {point}, {kind} ({about})"
            draw_matrix(folder / f"{stem}.png", frame, title)
            statistics = pair_statistics(matrix)
            found[point][kind] = {**statistics, "file": f"{stem}.csv"}
    return found


def sft_gradient(lm, adapter, examples) -> Tensor:
    """(D,) float64 mean gradient of the supervised loss over the examples, at an adapter."""
    total = 0
    for example in examples:
        # one vector behind all of the model's A and B, so that its gradient is one vector
        vector = lora.flatten_adapter(adapter, lm.layout)
        vector = vector.to(lm.model.device).requires_grad_()
        lora.swap_adapter(lm.model, lm.layout, lora.unflatten_adapter(vector, lm.layout))
        # one example a pass, whose mean is exact whatever their lengths
        row = scoring.make_row(lm, example)
        scoring.lm_loss(lm, [row]).backward()
        total += vector.grad.double().cpu()
    lora.swap_adapter(lm.model, lm.layout, None)
    return total / len(examples)


def cosine_matrix(vectors) -> np.ndarray:
    """(n, n) cosine similarities; 0 where a vector is zero."""
    # the least length keeps a zero vector zero
    stacked = torch.stack(vectors)
    unit = torch.nn.functional.normalize(stacked, eps=1e-300)
    return (unit @ unit.T).numpy()


def pair_statistics(matrix: np.ndarray) -> dict:
    """Mean, sample standard deviation, least and largest over the pairs above the diagonal."""
    above = np.triu_indices(len(matrix), 1)
    pairs = pd.Series(matrix[above])
    statistics = pairs.agg(["mean", "std", "min", "max"]).astype(object)
    # one task makes no pair, and one pair has no spread: null in the file
    known = statistics.where(statistics.notna(), None)
    return {"pairs": len(pairs), **known}


def compare_weights(layout, adapters) -> dict:
    """Experiment 2. Returns: {method: {module set: mean over tasks, and each task's values}}."""
    found = {}
    for method, by_task in adapters.items():
        found[method] = {}
        for kind, part in module_sets(layout).items():
            per_task = {}
            for task, adapter in by_task.items():
                per_task[task] = weight_statistics(part, adapter)
            mean = pd.DataFrame(per_task).mean(axis=1)
            found[method][kind] = {"mean": mean.to_dict(), "tasks": per_task}
    return found


def weight_statistics(layout: Layout, adapter: Adapter) -> dict:
    """Statistics of dW = (alpha / r) B A over a layout's modules, in float64.

    Returns: sparsity (share of |dW| < 1e-6, as the paper's), relative_sparsity (share below 1 % of
        the root mean square), hoyer (1: one entry carries all, 0: all are equal), l1, l2, max, n.
    """
    n = 0
    small = 0
    l1 = 0.0
    squares = 0.0
    top = 0.0
    for size in update_sizes(layout, adapter):
        n += size.numel()
        small += int((size < ABSOLUTE).sum())
        l1 += float(size.sum())
        squares += float((size**2).sum())
        top = max(top, float(size.max()))

    # the root mean square is known only now, and all matrices at once are too large to keep
    below = 0
    limit = 0.01 * math.sqrt(squares / n)
    for size in update_sizes(layout, adapter):
        below += int((size < limit).sum())

    l2 = math.sqrt(squares)
    hoyer = 0.0  # of an update of zero
    if l2:
        root = math.sqrt(n)
        hoyer = (root - l1 / l2) / (root - 1)
    return {
        "sparsity": small / n,
        "relative_sparsity": below / n,
        "hoyer": hoyer,
        "l1": l1,
        "l2": l2,
        "max": top,
        "n": n,
    }


def update_sizes(layout, adapter):
    """Yield |dW| of each module, (d_out, d_in) float64."""
    for a, _, b, _ in layout.keys():
        product = adapter[b].double() @ adapter[a].double()
        yield (layout.scale * product).abs()


def compare_signatures(run, adapters, folder) -> dict:
    """Experiment 3: the first entries of one layer's dW, drawn and compared between tasks.

    Returns: layer, module, entries, and pair statistics of the tasks' cosines by method: 1 is the
        paper's coupled "barcode".
    """
    if not adapters:
        return {}
    layout = scoring.load_lm(run).layout
    layer, path = signature_module(layout)
    module = path.rsplit(".", 1)[-1]

    # (tasks, entries) of each method
    arrays = {}
    for method, by_task in adapters.items():
        rows = [signature(layout, adapter, path) for adapter in by_task.values()]
        arrays[method] = np.stack(rows)
    np.savez(folder / "signatures.npz", **arrays)

    # all methods have the same module, and are drawn on one colour scale
    entries = rows[0].size
    about = f"first {entries} entries of dW, layer {layer} {module}, seed {run.cfg.seed}"
    top = max(np.abs(array).max() for array in arrays.values())
    cosines = {}
    for method, rows in arrays.items():
        frame = pd.DataFrame(rows, list(adapters[method]))
        title = f"{label_of(method)}: {about}"
        height = 0.4 * len(frame) + 1.2
        figure, _ = heatmap(frame, top, (8, height), title)
        report.save_png(figure, folder / f"signature-{method}.png")
        draw_lines(folder / f"signature-lines-{method}.png", frame, title)
        vectors = [torch.from_numpy(row) for row in rows]
        cosines[method] = pair_statistics(cosine_matrix(vectors))
    return {"layer": layer, "module": module, "entries": entries, "cosines": cosines}


def signature_module(layout: Layout) -> tuple:
    """(layer, path): q_proj, where adapted, of TEMPO's layer 12 or a smaller model's middle one."""
    layers = sorted({layer for _, layer, _, _ in layout.modules})
    layer = 12
    if layer not in layers:
        layer = layers[len(layers) // 2]
    paths = [path for path, at, _, _ in layout.modules if at == layer]
    # where the queries are not adapted, the layer's first module
    queries = [path for path in paths if path.endswith("q_proj")]
    return layer, (queries or paths)[0]


def signature(layout: Layout, adapter: Adapter, path: str) -> np.ndarray:
    """The first entries of a module's dW, row by row."""
    a = adapter[f"{lora.PREFIX}{path}.lora_A.weight"].double()
    b = adapter[f"{lora.PREFIX}{path}.lora_B.weight"].double()
    # no more rows of the update than the entries need
    rows = math.ceil(NUM_ENTRIES / a.shape[1])
    update = layout.scale * (b[:rows] @ a)
    return update.flatten()[:NUM_ENTRIES].numpy()


def stage_ablation(run: Run) -> dict:
    """Experiment 4: average accuracies of base, S1, S1 + S2 and S1 + S2 + S3, as scored."""
    tasks = results.load_tasks(run.path)
    frame = results.load_frame(run.path, tasks)
    averages = results.summarise(frame, tasks, run.cfg.evaluate.metric)["averages"]
    found = {}
    for domain, by_method in averages.items():
        found[domain] = {}
        # a stage that was not run has no average
        for method in STAGES:
            if method in by_method:
                average = by_method[method]
                found[domain][method] = {key: average[key] for key in STAGE_FACTS}
    return found


def format_analysis(found: dict) -> str:
    """The experiments as Markdown tables beside the paper's numbers."""
    missing = ""
    if COMMON not in found["gradients"]:
        missing = f"The {COMMON} is left out: this run collected no training adapters to average.\n"
    means = {}
    for method, kinds in found["weights"].items():
        means[method] = {kind: weights["mean"] for kind, weights in kinds.items()}
    return f"""# Experiments on how staged and coupled optimisation differ

{found["model"]}, seed {found["seed"]}, tasks {", ".join(found["tasks"])}.

## 1. Gradient conflict

Cosines between tasks of the supervised loss's gradient on n = {found["n"]} support examples each,
over the adapter's A and B. {missing}
{comparison_table(found["gradients"], PAPER["gradients"], found["compared"])}

The paper's coupled side trains q, v, o and its staged side all modules; rows with the same module
set are the matched comparison. Its caption prints a least cosine of 0.46, its table 0.476.

## 2. Weight statistics of dW = (alpha / r) B A

Means over tasks. sparsity is the share of |dW| < {ABSOLUTE:g} (it rewards small norms),
relative_sparsity that of |dW| below 1 % of its root mean square.

{comparison_table(means, PAPER["weights"], found["compared"])}

## 3. Signatures

{signature_table(found["signatures"])}

## 4. Stage ablation

{stage_table(found["stages"])}
"""


def comparison_table(found, paper, compared) -> str:
    """{point: {module set: statistics}}, then what was not run, then the paper's numbers."""
    rows = []
    for point, kinds in found.items():
        label = label_of(point)
        for kind, statistics in kinds.items():
            rows.append({"adapters": label, "modules": kind, **statistics})
    for method in compared:
        if method not in found:
            rows.append({"adapters": label_of(method), "modules": report.NOT_RUN})
    for side, printed in paper.items():
        rows.append({"adapters": f"paper: {side}", "modules": "its own", **printed})
    # sizes and files are in analysis.json
    frame = pd.DataFrame(rows).drop(columns=["n", "file"], errors="ignore")
    return markdown_table(frame)


def signature_table(found) -> str:
    if not found:
        return report.NOT_RUN
    rows = []
    for method, statistics in found["cosines"].items():
        rows.append({"method": label_of(method), **statistics})
    place = f"layer {found['layer']} {found['module']}"
    return f"""First {found["entries"]} entries of dW of {place} (signature-*.png, signatures.npz);
cosines between tasks:

{markdown_table(pd.DataFrame(rows))}"""


def stage_table(found) -> str:
    rows = []
    for method, label in STAGES.items():
        row = {"stages": label}
        for domain, title in DOMAINS.items():
            average = found.get(domain, {}).get(method)
            row[title] = report.percent(average, average and average["tasks"])
        rows.append(row)
    for size, stages in PAPER["stages"].items():
        for stage, (inside, outside) in stages.items():
            rows.append({"stages": f"paper, {size}: {stage}", "in-domain": inside})
            rows[-1]["out-of-domain"] = outside
    return markdown_table(pd.DataFrame(rows))


def label_of(point: str) -> str:
    """A method's label; the name of a point that is no method's."""
    if point in methods.METHODS:
        return methods.METHODS[point].label
    return point


def show(cell) -> str:
    """A number in four digits; nothing where there is none."""
    if isinstance(cell, str):
        return cell
    return "" if pd.isna(cell) else f"{cell:.4g}"


def markdown_table(frame: pd.DataFrame) -> str:
    """The report's table of a frame whose first column names the rows."""
    texts = frame.map(show)
    return report.markdown_table(report.make_table("", list(texts), texts.values).frame)


def heatmap(frame, limit, size, title):
    """(figure, axis) of values between -limit and limit, a row per task."""
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(frame, vmin=-limit, vmax=limit, cmap="RdBu_r", aspect="auto")
    axis.set_yticks(range(len(frame)), frame.index)
    axis.set_title(title, fontsize=8)
    axis.grid(visible=False)
    figure.colorbar(image)
    return figure, axis


def draw_matrix(path, frame, title) -> None:
    """Cosines between tasks, with their numbers."""
    figure, axis = heatmap(frame, 1, (5.5, 4.5), title)
    axis.set_xticks(range(len(frame)), frame.columns, rotation=45, ha="right")
    style = {"ha": "center", "va": "center", "fontsize": 7}
    for (i, j), value in np.ndenumerate(frame):
        # legible on the scale's dark ends
        color = "white" if abs(value) > 0.6 else "black"
        axis.text(j, i, f"{value:.2f}", color=color, **style)
    report.save_png(figure, path)


def draw_lines(path, frame, title) -> None:
    """One method's signatures, a line per task."""
    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    axis.plot(frame.T, lw=0.8, label=frame.index)
    axis.set(title=title, xlabel="entry", ylabel="dW")
    figure.legend(loc="outside lower center", ncols=len(frame), fontsize=7)
    report.save_png(figure, path)
