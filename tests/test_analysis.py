"""Paper T's experiments on cases whose answers are known by hand."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import (
    analyze,
    cosine_matrix,
    module_mask,
    pair_statistics,
    sft_gradient,
    signature,
    weight_statistics,
)
from collect import collect_adapters
from config import load_config
from data import load_tasks
from lora import flatten_adapter, init_adapter, save_adapter, unflatten_adapter
from runtime import Run, read_json
from scoring import lm_loss, load_lm, make_row


def make_run(args: list[str], *more: str) -> Run:
    cfg, _ = load_config([*args, *more])
    Path(cfg.run).mkdir(parents=True, exist_ok=True)
    return Run(Path(cfg.run), cfg, quiet=True)


def test_cosines_of_known_vectors():
    """Orthogonal gradients 0, equal ones 1, opposite ones -1, whatever their lengths; a zero vector 0."""
    a, b = (
        torch.tensor([2.0, 0, 0], dtype=torch.float64),
        torch.tensor([0, 1e-9, 0], dtype=torch.float64),
    )
    matrix = cosine_matrix([a, b, -3 * a, 5 * b, torch.zeros(3, dtype=torch.float64)])
    np.testing.assert_allclose(
        matrix[:4, :4], [[1, 0, -1, 0], [0, 1, 0, 1], [-1, 0, 1, 0], [0, 1, 0, 1]], atol=1e-12
    )
    assert not matrix[4].any()


def test_pair_statistics_leave_the_diagonal_out():
    """Three pairs: 0.5, 0.1, 0.3."""
    matrix = np.array([[1, 0.5, 0.1], [0.5, 1, 0.3], [0.1, 0.3, 1]])
    got = pair_statistics(matrix)
    assert (
        got["pairs"] == 3 and got["mean"] == pytest.approx(0.3) and got["std"] == pytest.approx(0.2)
    )
    assert (got["min"], got["max"]) == (0.1, 0.5)
    assert pair_statistics(np.ones((1, 1)))["mean"] is None


def by_hand(layout, value: float) -> dict:
    """An adapter whose dW is `scale * value` in the first row of every module, zero elsewhere."""
    out = {}
    for a, a_shape, b, b_shape in layout.keys():
        out[a], out[b] = torch.zeros(a_shape), torch.zeros(b_shape)
        out[a][0], out[b][0, 0] = value, 1.0
    return out


def test_weight_statistics_of_a_known_update(tiny_lm):
    """One row of each module is 0.02, the rest exactly zero."""
    layout = tiny_lm.layout
    got = weight_statistics(layout, by_hand(layout, 0.01))  # alpha / r = 2
    rows = sum(d_in for _, _, d_in, _ in layout.modules)
    n = sum(d_in * d_out for _, _, d_in, d_out in layout.modules)
    assert got["n"] == n and got["max"] == pytest.approx(0.02)
    assert got["sparsity"] == got["relative_sparsity"] == pytest.approx(1 - rows / n)
    assert got["l1"] == pytest.approx(0.02 * rows, rel=1e-6)
    assert got["l2"] == pytest.approx(0.02 * math.sqrt(rows), rel=1e-6)
    assert got["hoyer"] == pytest.approx(
        (math.sqrt(n) - math.sqrt(rows)) / (math.sqrt(n) - 1), rel=1e-6
    )


def test_relative_measures_do_not_see_the_size(tiny_lm):
    """A thousand times smaller: the absolute sparsity jumps to 1, the scale-free ones stay."""
    layout, g = tiny_lm.layout, torch.Generator().manual_seed(0)
    big = {k: torch.randn(v.shape, generator=g) for k, v in init_adapter(layout, 1).items()}
    tiny = {k: v * (1e-9 if "lora_B" in k else 1) for k, v in big.items()}
    a, b = weight_statistics(layout, big), weight_statistics(layout, tiny)
    assert a["sparsity"] < 0.01 and b["sparsity"] == 1
    assert a["relative_sparsity"] == pytest.approx(b["relative_sparsity"], abs=1e-4)
    assert a["hoyer"] == pytest.approx(b["hoyer"], rel=1e-5)


def test_module_sets_are_told_apart(tiny_lm):
    """q, v, o alone: a mask over the vector, and statistics over those modules."""
    layout = tiny_lm.layout
    mask = module_mask(layout, ("q_proj",))
    marked = unflatten_adapter(mask.float(), layout)
    assert all(
        bool(v.all()) == ("q_proj" in k) and bool(v.any()) == ("q_proj" in k)
        for k, v in marked.items()
    )
    n = weight_statistics(layout, by_hand(layout, 0.01), ("q_proj",))["n"]
    assert n == sum(i * o for p, _, i, o in layout.modules if p.endswith("q_proj"))


def test_signature_is_the_start_of_the_update(tiny_lm):
    """Row-major entries of (alpha / r) B A, across rows."""
    layout, g = tiny_lm.layout, torch.Generator().manual_seed(0)
    adapter = {k: torch.randn(v.shape, generator=g) for k, v in init_adapter(layout, 1).items()}
    a, _, b, _ = next(k for k in layout.keys() if "layers.1" in k[0] and "q_proj" in k[0])
    want = (layout.scale * adapter[b].double() @ adapter[a].double()).reshape(-1)[:50].numpy()
    np.testing.assert_allclose(signature(layout, adapter, 1, "q_proj", 50), want, rtol=1e-12)


def test_gradient_is_the_mean_over_examples(tiny_args):
    """Against one backward pass through the mean loss."""
    run = make_run(tiny_args)
    lm, items = load_lm(run), list(load_tasks(run)["alpha"].train[:3])
    g = torch.Generator().manual_seed(0)
    adapter = {
        k: v + 0.1 * torch.randn(v.shape, generator=g)
        for k, v in init_adapter(lm.layout, 1).items()
    }
    got = sft_gradient(lm, adapter, items)
    from lora import swap_adapter

    vector = flatten_adapter(adapter, lm.layout).requires_grad_()
    swap_adapter(lm.model, lm.layout, unflatten_adapter(vector, lm.layout))
    loss = sum(lm_loss(lm, [make_row(lm, e)]) for e in items) / 3
    (want,) = torch.autograd.grad(loss, vector)
    swap_adapter(lm.model, lm.layout, None)
    torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=1e-6)


def test_the_stage_writes_what_it_says(tiny_args):
    """Methods without adapters are called not run; matrices, arrays and figures are there and agree."""
    run = make_run(tiny_args)
    collect_adapters(run)
    lm, g = load_lm(run), torch.Generator().manual_seed(0)
    for task in ("delta", "epsilon"):
        adapter = {
            k: v + 0.1 * torch.randn(v.shape, generator=g)
            for k, v in init_adapter(lm.layout, 1).items()
        }
        save_adapter(run.path / f"adapted/maml/{task}", adapter, lm.layout, "x")
    analyze(run)
    folder = run.path / "analysis"
    found, text = read_json(folder / "analysis.json"), (folder / "analysis.md").read_text()
    assert found["tasks"] == ["delta", "epsilon"] and set(found["gradients"]) == {
        "common point",
        "maml",
    }
    row = found["gradients"]["maml"]["all modules"]
    matrix = list(csv.reader((folder / row["file"]).open()))
    assert matrix[0] == ["task", "delta", "epsilon"] and float(matrix[1][2]) == pytest.approx(
        row["mean"]
    )
    assert (
        f"| MAML-en-LLM | all modules | 1 | {row['mean']:.3f}" in text
        and "| TEMPO | - | not run" in text
    )
    assert (
        "| S1 + S2 + S3 | not run | not run |" in text
        and "| paper T: coupled | its own | 15 | 0.884" in text
    )
    stored = np.load(folder / "signatures.npz")["maml"]
    np.testing.assert_allclose(
        stored[1],
        signature(lm.layout, adapter, found["signatures"]["layer"], found["signatures"]["module"]),
    )
    assert {p.name for p in folder.glob("*.png")} >= {
        "signature-maml.png",
        "signature-lines-maml.png",
        row["file"].replace("csv", "png"),
    }
