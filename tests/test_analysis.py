"""TEMPO's experiments on cases whose answers are known by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_run

import analysis
import collect
import data
import lora
import runtime
import scoring
from config import UserError


def random_adapter(layout) -> dict:
    torch.manual_seed(0)
    return {k: torch.randn(v.shape) for k, v in lora.init_adapter(layout, 1).items()}


def nearby_adapter(layout) -> dict:
    """The shared A initialisation, moved a little."""
    start = lora.init_adapter(layout, 1)
    return {k: v + 0.1 * torch.randn(v.shape) for k, v in start.items()}


def adapter_by_hand(layout, value: float) -> dict:
    """An adapter whose dW is `scale * value` in the first row of every module, zero elsewhere."""
    adapter = {k: torch.zeros_like(v) for k, v in lora.init_adapter(layout, 1).items()}
    for a, _, b, _ in layout.keys():
        adapter[a][0] = value
        adapter[b][0, 0] = 1.0
    return adapter


def test_cosines_of_known_vectors():
    """Orthogonal gradients 0, equal ones 1, opposite ones -1, whatever their lengths; zero is 0."""
    a = torch.tensor([2.0, 0, 0], dtype=torch.float64)
    b = torch.tensor([0, 1e-9, 0], dtype=torch.float64)
    matrix = analysis.cosine_matrix([a, b, -3 * a, 5 * b, 0 * a])
    want = [[1, 0, -1, 0], [0, 1, 0, 1], [-1, 0, 1, 0], [0, 1, 0, 1]]
    np.testing.assert_allclose(matrix[:4, :4], want, atol=1e-12)
    assert not matrix[4].any()


def test_pair_statistics_leave_the_diagonal_out():
    """Three pairs: 0.5, 0.1, 0.3."""
    got = analysis.pair_statistics(np.array([[1, 0.5, 0.1], [0.5, 1, 0.3], [0.1, 0.3, 1]]))
    assert got == pytest.approx({"pairs": 3, "mean": 0.3, "std": 0.2, "min": 0.1, "max": 0.5})
    assert analysis.pair_statistics(np.ones((2, 2)))["std"] is None
    assert analysis.pair_statistics(np.ones((1, 1)))["mean"] is None


def test_weight_statistics_of_a_known_update(tiny_lm):
    """One row of each module is 0.02, the rest exactly zero."""
    layout = tiny_lm.layout
    got = analysis.weight_statistics(layout, adapter_by_hand(layout, 0.01))  # alpha / r = 2
    rows = sum(d_in for _, _, d_in, _ in layout.modules)
    n = sum(d_in * d_out for _, _, d_in, d_out in layout.modules)
    hoyer = (math.sqrt(n) - math.sqrt(rows)) / (math.sqrt(n) - 1)
    assert got["n"] == n
    assert got["max"] == pytest.approx(0.02)
    assert got["sparsity"] == got["relative_sparsity"] == pytest.approx(1 - rows / n)
    assert got["l1"] == pytest.approx(0.02 * rows, rel=1e-6)
    assert got["l2"] == pytest.approx(0.02 * math.sqrt(rows), rel=1e-6)
    assert got["hoyer"] == pytest.approx(hoyer, rel=1e-6)


def test_relative_measures_do_not_see_the_size(tiny_lm):
    """A thousand million times smaller: the absolute sparsity jumps to 1, the others stay."""
    layout = tiny_lm.layout
    big = random_adapter(layout)
    tiny = {k: v * (1e-9 if "lora_B" in k else 1) for k, v in big.items()}
    a = analysis.weight_statistics(layout, big)
    b = analysis.weight_statistics(layout, tiny)
    assert a["sparsity"] < 0.01
    assert b["sparsity"] == 1
    assert a["relative_sparsity"] == pytest.approx(b["relative_sparsity"], abs=1e-4)
    assert a["hoyer"] == pytest.approx(b["hoyer"], rel=1e-5)


def test_module_sets_are_told_apart(tiny_lm):
    """q, v, o alone: a mask over the vector, and statistics over those modules."""
    layout = tiny_lm.layout
    sets = analysis.module_sets(layout)
    assert sets["all modules"] == layout
    part = sets["q, v, o"]
    marked = lora.unflatten_adapter(analysis.module_mask(layout, part).float(), layout)
    for key, value in marked.items():
        inside = any(name in key for name in ("q_proj", "v_proj", "o_proj"))
        assert bool((value == inside).all())
    n = analysis.weight_statistics(part, adapter_by_hand(layout, 0.01))["n"]
    sizes = {path.rsplit(".", 1)[-1]: d_in * d_out for path, _, d_in, d_out in layout.modules}
    assert n == 2 * (sizes["q_proj"] + sizes["v_proj"] + sizes["o_proj"])


def test_signature_is_the_start_of_the_update(tiny_lm):
    """Row-major entries of (alpha / r) B A, across rows."""
    layout = tiny_lm.layout
    adapter = random_adapter(layout)
    layer, path = analysis.signature_module(layout)
    assert layer == 1
    assert path.endswith("layers.1.self_attn.q_proj")
    a, _, b, _ = next(k for k in layout.keys() if path in k[0])
    want = layout.scale * adapter[b].double() @ adapter[a].double()
    got = analysis.signature(layout, adapter, path)
    np.testing.assert_allclose(got, want.flatten()[:200].numpy(), rtol=1e-12)


def test_gradient_is_the_mean_over_examples(tiny_args):
    """Against one backward pass through the mean loss."""
    run = make_run(tiny_args)
    lm = scoring.load_lm(run)
    items = data.load_tasks(run)["alpha"].train[:3]
    torch.manual_seed(0)
    adapter = nearby_adapter(lm.layout)
    got = analysis.sft_gradient(lm, adapter, items)

    vector = lora.flatten_adapter(adapter, lm.layout).requires_grad_()
    lora.swap_adapter(lm.model, lm.layout, lora.unflatten_adapter(vector, lm.layout))
    loss = sum(scoring.lm_loss(lm, [scoring.make_row(lm, e)]) for e in items) / 3
    loss.backward()
    lora.swap_adapter(lm.model, lm.layout, None)
    torch.testing.assert_close(got, vector.grad.double(), rtol=1e-4, atol=1e-6)


def test_the_stage_writes_what_it_says(tiny_args):
    """Methods without adapters are called not run; matrices, arrays and figures agree."""
    run = make_run(tiny_args)
    collect.collect_adapters(run)
    layout = scoring.load_lm(run).layout
    torch.manual_seed(0)
    for task in ("delta", "epsilon"):
        adapter = nearby_adapter(layout)
        lora.save_adapter(run.path / f"adapted/maml/{task}", adapter, layout, run.cfg.model)
    analysis.analyze(run)

    folder = run.path / "analysis"
    found = runtime.read_json(folder / "analysis.json")
    assert found["tasks"] == ["delta", "epsilon"]
    assert set(found["gradients"]) == {"common point", "maml"}
    row = found["gradients"]["maml"]["all modules"]
    matrix = pd.read_csv(folder / row["file"], index_col="task")
    assert list(matrix.index) == list(matrix.columns) == found["tasks"]
    assert matrix.loc["delta", "epsilon"] == pytest.approx(row["mean"])

    text = (folder / "analysis.md").read_text()
    assert f"| MAML-en-LLM | all modules | 1 | {row['mean']:.4g}" in text
    assert "| TEMPO | not run |" in text
    assert "| S1 + S2 + S3 | not run | not run |" in text
    assert "| paper: coupled | its own | 15 | 0.884" in text

    stored = np.load(folder / "signatures.npz")["maml"]
    _, path = analysis.signature_module(layout)
    np.testing.assert_allclose(stored[1], analysis.signature(layout, adapter, path))
    figures = {p.name for p in folder.glob("*.png")}
    matrix_figure = row["file"].replace("csv", "png")
    assert figures >= {"signature-maml.png", "signature-lines-maml.png", matrix_figure}


def keep(run, method: str, seed: int) -> None:
    torch.manual_seed(seed)
    layout = scoring.load_lm(run).layout
    for task in ("delta", "epsilon"):
        folder = run.path / f"adapted/{method}/{task}"
        lora.save_adapter(folder, nearby_adapter(layout), layout, run.cfg.model)


def test_a_run_without_checkpoints_is_analysed_as_far_as_it_goes(tiny_args):
    """A run of a baseline alone collected nothing: the common point is left out, and it is said."""
    run = make_run(tiny_args)
    keep(run, "maml", 0)
    analysis.analyze(run)
    found = runtime.read_json(run.path / "analysis/analysis.json")
    assert set(found["gradients"]) == {"maml"}
    text = (run.path / "analysis/analysis.md").read_text()
    assert "The common point is left out: this run collected no training adapters" in text


def test_any_two_methods_of_two_runs_stand_beside_each_other(tiny_args, tmp_path):
    """analyze.methods chooses, analyze.other_run brings the same tasks of another folder."""
    other = make_run(tiny_args, f"run={tmp_path / 'second'}")
    keep(other, "maml", 1)
    more = ["analyze.methods=[maml, union]", f"analyze.other_run={other.path}"]
    run = make_run(tiny_args, *more)
    for method in ("tempo", "union", "maml"):
        keep(run, method, 2)
    analysis.analyze(run)
    found = runtime.read_json(run.path / "analysis/analysis.json")
    both = {"maml", "union", "maml of second"}
    assert set(found["gradients"]) == set(found["weights"]) == both
    assert set(found["signatures"]["cosines"]) == both
    means = {method: kinds["all modules"]["mean"] for method, kinds in found["weights"].items()}
    assert means["maml"]["l2"] != means["maml of second"]["l2"]

    run.cfg.analyze.other_run = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="analyze.other_run=.*nowhere: no such run folder"):
        analysis.analyze(run)
