"""Meta-gradients, Gaussians and the meta-trained baselines, by finite differences, closed forms and tiny models."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import run_command

from baselines import (
    ALONE,
    Draws,
    Moments,
    Share,
    draw_adapter,
    gaussian_kl,
    infer_posterior,
    initial_posterior,
    load_posterior,
    meta_gradient,
    negative_log_prior,
    posterior_moments,
    shared_update,
    train_baselines,
    vector_loss,
)
from collect import collect_adapters
from config import META_TRAINED, load_config
from data import load_tasks
from evaluate import evaluate_methods
from generator import train_generators
from lora import (
    clear_adapters,
    dense_key,
    flatten_adapter,
    init_adapter,
    load_adapter,
    swap_adapter,
    unflatten_adapter,
)
from policy import adapt_targets
from runtime import Run, read_json, read_jsonl, seed_for
from scoring import lm_loss, load_lm, make_row, score_examples
from strategies import Refined, combine

FAST = [
    "baselines.union.step_share=0.3",
    "baselines.reptile.meta_steps=3",
    "baselines.reptile.inner_steps=2",
    "baselines.reptile.inner_lr=0.01",
    "baselines.maml.meta_steps=3",
    "baselines.maml.inner_lr=0.01",
    "baselines.maml.outer_lr=0.01",
    "baselines.abmll.meta_steps=3",
    "baselines.abmll.inner_steps=2",
    "baselines.abmll.inner_lr=0.1",
    "baselines.abmll.outer_lr=0.01",
    "data.targets=[alpha, delta]",
]


def make_run(args: list[str], *more: str) -> Run:
    cfg, _ = load_config([*args, *more])
    Path(cfg.run).mkdir(parents=True, exist_ok=True)
    return Run(Path(cfg.run), cfg, quiet=True)


def state(n: int, seed: int = 0) -> Moments:
    """Moments in mid-training, so that no second moment is zero."""
    g = torch.Generator().manual_seed(seed)
    return Moments(
        0.1 * torch.randn(n, generator=g, dtype=torch.float64),
        torch.rand(n, generator=g, dtype=torch.float64) + 0.1,
        3,
    )


def curved(seed: int):
    """A smooth loss of a vector that is neither linear nor quadratic."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 5, generator=g, dtype=torch.float64)
    return lambda x: (torch.tanh(w @ x) ** 2).sum() + 0.1 * torch.exp(x).sum()


# ---------------------------------------------------------------------------------------------------------------- MAML


def moments_along(theta, inner, s: Moments) -> list[Moments]:
    """The state each inner step finds, then the last one: constants of the second-order gradient."""
    found, x = [Moments(s.m, s.v, s.t)], theta
    for f in inner:
        x = x.detach().requires_grad_()
        x = shared_update(x, torch.autograd.grad(f(x), x)[0], s, 0.05, 0.01)
        found.append(Moments(s.m, s.v, s.t))
    return found


def query_value(theta, episode, moments: list[Moments]) -> float:
    """Query loss after the inner steps, each from the given moments."""
    inner, query = episode
    x = theta
    for f, s in zip(inner, moments, strict=False):
        x = x.detach().requires_grad_()
        x = shared_update(x, torch.autograd.grad(f(x), x)[0], Moments(s.m, s.v, s.t), 0.05, 0.01)
    return float(query(x.detach()))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_second_order_meta_gradient_is_that_of_finite_differences(steps):
    """The slope of the mean query loss after the inner steps, through AdamW and its decay, in float64."""
    episodes = [([curved(10 * t + i) for i in range(steps)], curved(10 * t + 9)) for t in range(2)]
    theta = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad, loss = meta_gradient(theta, state(5), episodes, 0.05, 0.01, 2)
    s = state(5)
    along = [
        moments_along(theta, e[0], s) for e in episodes
    ]  # the second task continues the first one's moments

    def value(x):
        return sum(query_value(x, e, m) for e, m in zip(episodes, along, strict=True)) / 2

    assert loss == pytest.approx(value(theta))
    slopes = [
        (value(theta + 1e-6 * unit) - value(theta - 1e-6 * unit)) / 2e-6
        for unit in torch.eye(5, dtype=torch.float64)
    ]
    assert grad.tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-8)


def test_meta_gradient_of_the_language_model(tmp_path, tiny_args):
    """On a random decoder in float64 the slope along random directions is the second-order meta-gradient's."""
    run = make_run(tiny_args)
    lm = load_lm(run)
    lm.model.double()
    rows = [make_row(lm, e) for e in load_tasks(run)["alpha"].train[:6]]
    theta = flatten_adapter(init_adapter(lm.layout, 1), lm.layout).double()
    theta += 0.05 * torch.randn(
        theta.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    episode = [([vector_loss(lm, rows[:3])], vector_loss(lm, rows[3:]))]
    warm = torch.autograd.grad(episode[0][1](x := theta.clone().requires_grad_()), x)[0] ** 2 + 1e-4

    def go(vector, order=2):
        return meta_gradient(
            vector, Moments(torch.zeros_like(theta), warm.clone(), 5), episode, 0.02, 0.0, order
        )

    try:
        grad, first = go(theta)[0], go(theta, 1)[0]
        for seed in (3, 4, 5):
            d = torch.randn(
                theta.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
            d = (
                grad / grad.norm() + d / d.norm()
            )  # half along the gradient, so that the slope is not noise
            slope = (go(theta + 1e-3 * d)[1] - go(theta - 1e-3 * d)[1]) / 2e-3
            assert float(grad @ d) == pytest.approx(slope, rel=2e-3)
            assert abs(float(first @ d) - slope) > 5 * abs(float(grad @ d) - slope), (
                "first order is another gradient"
            )
    finally:
        clear_adapters(lm.model)


def summands(seed: int, part: int):
    """Halves of a curved loss that differ from each other."""
    whole, odd = curved(seed), curved(seed + 50)
    return lambda x: 0.5 * whole(x) + (1 - 2 * part) * odd(x)


def keep_and_leave(found, path: str) -> None:
    """End a rank without the interpreter's clean-up, in which a library's thread aborts it now and then."""
    torch.save(found, path)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


def meta_gradient_of_one_rank(rank: int, store: str, folder: str) -> None:
    """What one of two ranks gets that holds half of every loss."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    share = Share(Run(Path(folder), None, rank, 2), rank, 2)
    theta, found = (
        torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        {},
    )
    for order in (1, 2):
        episodes = [
            ([summands(10 * t + i, rank) for i in range(3)], summands(10 * t + 9, rank))
            for t in range(2)
        ]
        found[order] = meta_gradient(theta, state(5), episodes, 0.05, 0.01, order, share)
    keep_and_leave(found, f"{folder}/{rank}.pt")


def test_ranks_that_hold_summands_get_the_meta_gradient_of_the_sum(tmp_path):
    """Through three inner steps, both orders, in float64: the inner gradients' sum carries its graph over ranks."""
    torch.multiprocessing.spawn(
        meta_gradient_of_one_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2
    )
    theta = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for order in (1, 2):
        episodes = [([curved(10 * t + i) for i in range(3)], curved(10 * t + 9)) for t in range(2)]
        want, loss = meta_gradient(theta, state(5), episodes, 0.05, 0.01, order)
        for rank in range(2):
            got, value = torch.load(tmp_path / f"{rank}.pt")[order]
            torch.testing.assert_close(got, want)
            assert value == pytest.approx(loss)


def test_orders_agree_where_the_loss_is_linear():
    """With a constant inner gradient and no decay nothing is lost by stopping at the end of the inner steps."""
    a = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    episodes = [([lambda x: a @ x] * 2, curved(3))]
    theta = torch.ones(5, dtype=torch.float64)
    one, two = (meta_gradient(theta, state(5), episodes, 0.1, 0.0, order)[0] for order in (1, 2))
    torch.testing.assert_close(one, two)
    curved_inner = [([curved(4)] * 2, curved(3))]
    one, two = (
        meta_gradient(theta, state(5), curved_inner, 0.1, 0.0, order)[0] for order in (1, 2)
    )
    assert (one - two).norm() > 1e-3 * two.norm()


def test_no_inner_step_is_multi_task_adamw():
    """k = 0: the outer update on the mean gradient is torch's AdamW."""
    fs = [curved(1), curved(2)]
    theta = torch.ones(5, dtype=torch.float64)
    ours, s = (
        theta.clone(),
        Moments(torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)),
    )
    peer = theta.clone().requires_grad_()
    opt = torch.optim.AdamW([peer], lr=0.01, weight_decay=0.01)
    for _ in range(4):
        grad, loss = meta_gradient(ours, s, [([], f) for f in fs], 0.5, 0.01, 2)
        ours = shared_update(ours, grad, s, 0.01, 0.01)
        opt.zero_grad()
        total = sum(f(peer) for f in fs) / 2
        total.backward()
        assert loss == pytest.approx(float(total.detach()))
        opt.step()
    torch.testing.assert_close(ours, peer.detach())


def test_moments_are_shared_and_carry_no_graph():
    """Inner steps advance the state the outer step continues from."""
    s = Moments(torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    meta_gradient(
        torch.ones(5, dtype=torch.float64), s, [([curved(1)] * 2, curved(2))] * 3, 0.01, 0.0, 2
    )
    assert s.t == 6 and not s.m.requires_grad and not s.v.requires_grad and float(s.v.sum()) > 0


def test_a_zero_gradient_gives_no_nan():
    """A's first gradient is exactly zero because B is; the second-order gradient stays finite."""
    s = Moments(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))

    def product(x):
        return (x[0] * x[1] - 1) ** 2

    grad, _ = meta_gradient(
        torch.tensor([1.0, 0.0], dtype=torch.float64), s, [([product], product)], 0.1, 0.0, 2
    )
    assert torch.isfinite(grad).all() and float(grad.norm()) > 0


def test_inner_and_query_rows_are_distinct(tiny_args):
    """One draw serves both, without replacement."""
    draws = Draws(*(lambda r: (r.cfg, r))(make_run(tiny_args)), "none", "x")
    for _ in range(20):
        rows = draws.rows(draws.task(), 6)
        assert len({(r.context, r.branches) for r in rows}) == 6
    assert draws.tokens > 0


def test_the_left_out_task_is_never_drawn(tiny_args):
    """Leave-one-out holds for every meta-trained baseline, since all draw here."""
    run = make_run(tiny_args)
    draws = Draws(run, "beta", "x")
    assert set(draws.tasks) == {"alpha", "gamma"} and {draws.task() for _ in range(50)} == {
        "alpha",
        "gamma",
    }
    assert not {e.id for rows in draws.tasks.values() for e in rows} & {
        e.id for e in load_tasks(run)["beta"].test
    }


# --------------------------------------------------------------------------------------------------------------- ABMLL


def test_kl_is_the_closed_form():
    """Against torch's own, and zero between equals."""
    g = torch.Generator().manual_seed(0)
    m, s, m0, s0 = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(4))
    want = torch.distributions.kl_divergence(
        torch.distributions.Normal(m, s.exp()), torch.distributions.Normal(m0, s0.exp())
    ).sum()
    torch.testing.assert_close(gaussian_kl(m, s, m0, s0), want)
    assert float(gaussian_kl(m, s, m, s)) == pytest.approx(0, abs=1e-12)


def test_prior_is_the_named_distributions():
    """Differences of -log p equal those of torch's normal and gamma."""

    def want(m, s):
        return -(
            torch.distributions.Normal(0.0, 1.0).log_prob(m).sum()
            + torch.distributions.Gamma(1.0, 0.01).log_prob(torch.exp(-2 * s)).sum()
        )

    g = torch.Generator().manual_seed(0)
    a, b = ((torch.randn(6, generator=g), torch.randn(6, generator=g) - 3) for _ in range(2))
    got = negative_log_prior(*a) - negative_log_prior(*b)
    torch.testing.assert_close(got, want(*a) - want(*b), rtol=1e-4, atol=1e-3)


def posterior_after_four_steps(words: list[str], share: Share) -> torch.Tensor:
    """With a KL that pulls a third of the way back at every step."""
    run = make_run(
        words,
        "baselines.abmll.inner_lr=0.01",
        "baselines.abmll.beta=0.00003",
        "baselines.abmll.clip=1000",
    )
    lm, b = load_lm(run), run.cfg.baselines.abmll
    rows = [make_row(lm, e) for e in load_tasks(run)["alpha"].train[:5]]
    try:
        return infer_posterior(
            lm, initial_posterior(lm, b, 1), [rows] * 4, b, torch.Generator().manual_seed(0), share
        )
    finally:
        clear_adapters(lm.model)


def posterior_of_one_rank(rank: int, words: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    share = Share(Run(Path(folder), None, rank, 2), rank, 2)
    keep_and_leave(posterior_after_four_steps(words, share), f"{folder}/{rank}.pt")


def test_two_ranks_infer_one_posterior(tmp_path, tiny_args):
    """Rows are shared out, and the KL is counted once."""
    torch.multiprocessing.spawn(posterior_of_one_rank, (tiny_args, str(tmp_path)), nprocs=2)
    run = make_run(tiny_args)
    want, prior = (
        posterior_after_four_steps(tiny_args, ALONE),
        initial_posterior(load_lm(run), run.cfg.baselines.abmll, 1),
    )
    for rank in range(2):
        assert (torch.load(tmp_path / f"{rank}.pt") - want).norm() < 1e-3 * (want - prior).norm()


@pytest.mark.parametrize("space", ["factor", "product"])
def test_posterior_fits_the_task(tiny_args, space):
    """Its steps lower the loss of the task, and a heavy KL holds it at the prior."""
    run = make_run(tiny_args)
    lm, b = load_lm(run), run.cfg.baselines.abmll.model_copy(update={"inner_lr": 0.3})
    rows = [make_row(lm, e) for e in load_tasks(run)["alpha"].train[:8]]
    mean = flatten_adapter(init_adapter(lm.layout, 1), lm.layout)
    b = b.model_copy(update={"space": space})
    prior = initial_posterior(lm, b, 1)

    def fit(beta):
        rng = torch.Generator().manual_seed(0)
        return infer_posterior(
            lm, prior, [rows] * 10, b.model_copy(update={"beta": beta}), rng, ALONE
        )

    try:
        free, held = fit(0.0), fit(1e4)
        with torch.no_grad():
            before, after = (float(vector_loss(lm, rows, lm_loss)(v)) for v in (mean, free[0]))
    finally:
        clear_adapters(lm.model)
    assert after < before - 0.1
    assert (held[0] - mean).norm() < 0.5 * (free[0] - mean).norm()


def test_prediction_is_the_mean_probability():
    """Probabilities are averaged, not log-probabilities or votes."""
    scores = [(0.0, -1.0, -9.0), (-3.0, 0.0, -9.0)]
    p = torch.softmax(torch.tensor(scores, dtype=torch.float64), -1).mean(0)
    assert combine(scores, "mean_probability") == pytest.approx(p.log().tolist())


def test_product_space_is_a_gaussian_over_dw(tiny_args):
    """Draws of (alpha/r) B A + dense have the stated mean and sd in every entry, and reach the model's output."""
    run = make_run(tiny_args, "baselines.abmll.init_log_sd=-3")
    lm, b = load_lm(run), run.cfg.baselines.abmll
    posterior = initial_posterior(lm, b.model_copy(update={"space": "product"}), 1)
    posterior += 0.05 * torch.randn(posterior.shape, generator=torch.Generator().manual_seed(5))
    (path, *_), (ka, _, kb, _) = lm.layout.modules[0], next(lm.layout.keys())
    mean, log_sd = posterior_moments(posterior, lm.layout, "product", b.init_log_sd)[0]
    rng = torch.Generator().manual_seed(0)
    draws = [draw_adapter(posterior, lm.layout, "product", b.init_log_sd, rng) for _ in range(400)]
    updates = torch.stack([lm.layout.scale * d[kb] @ d[ka] + d[dense_key(path)] for d in draws])
    off = (updates.mean(0) - mean) / (log_sd.exp() / 20)
    assert float(off.std()) == pytest.approx(1, abs=0.15), "standard errors of the mean"
    assert float((updates.std(0) / log_sd.exp()).mean()) == pytest.approx(1, abs=0.03)
    assert float(log_sd.min()) >= b.init_log_sd and float(log_sd.max()) > b.init_log_sd + 0.1
    layer, x = lm.model.get_submodule(path), torch.randn(2, mean.shape[1], generator=rng)
    try:
        swap_adapter(lm.model, lm.layout, draws[0])
        torch.testing.assert_close(
            layer(x), layer.base(x) + x @ updates[0].t(), rtol=1e-4, atol=1e-5
        )
    finally:
        clear_adapters(lm.model)
    torch.testing.assert_close(layer(x), layer.base(x))


def test_product_space_end_to_end(tiny_args):
    """Meta-training moves both pairs of factors; a target is predicted from full-rank draws."""
    run = make_run(
        tiny_args,
        *FAST,
        "evaluate.methods=[base, degaml_plus, abmll]",
        "data.targets=[delta]",
        "baselines.abmll.space=product",
    )
    for stage in (
        collect_adapters,
        train_generators,
        adapt_targets,
        train_baselines,
        evaluate_methods,
    ):
        stage(run)
    lm = load_lm(run)
    learned = load_posterior(run.path / "baselines/abmll/none", lm.layout)
    moved = (learned - initial_posterior(lm, run.cfg.baselines.abmll, run.cfg.seed)).norm(dim=1)
    assert (moved > 1e-3).all() and torch.isfinite(learned).all()
    assert len(read_jsonl(run.path / "scores/abmll/delta.jsonl")) == 12


# -------------------------------------------------------------------------------------------------------- end to end


def test_every_baseline_is_trained_adapted_and_scored(tiny_args):
    """Meta-training without the target, a PEFT folder per target, scores, and nothing is done twice."""
    methods = f"evaluate.methods=[base, degaml_plus, no_meta, {', '.join(META_TRAINED)}]"
    run = make_run(tiny_args, *FAST, methods)
    for stage in (
        collect_adapters,
        train_generators,
        adapt_targets,
        train_baselines,
        evaluate_methods,
    ):
        stage(run)
    lm, plain = load_lm(run), init_adapter(load_lm(run).layout, run.cfg.seed)
    for method in META_TRAINED:
        for left_out in ("alpha", "none"):
            folder = run.path / f"baselines/{method}/{left_out}"
            done = read_json(folder / "DONE.json")
            start = load_adapter(folder, lm.layout)
            assert any(not torch.equal(start[k], plain[k]) for k in plain), (
                f"{method} learned nothing"
            )
            assert done["diverged_at"] is None and done["tokens"] > 0 and done["backwards"] > 0
            assert len(json.loads((folder / "losses.json").read_text())) == done["steps"]
        for task in ("alpha", "delta"):
            assert len(read_jsonl(run.path / f"scores/{method}/{task}.jsonl")) == 12
    test = list(load_tasks(run)["delta"].test)
    posterior = load_posterior(run.path / "adapted/abmll/delta", lm.layout)
    rng = torch.Generator().manual_seed(seed_for(run.cfg.seed, "posterior"))
    samples = [draw_adapter(posterior, lm.layout, "factor", -7.0, rng) for _ in range(5)]
    each = [score_examples(lm, a, test) for a in Refined(samples).adapters]
    want = [
        max(
            range(len(e.options)),
            key=lambda o, i=i: combine([s[i].norm for s in each], "mean_probability")[o],
        )
        for i, e in enumerate(test)
    ]
    assert [r["pred_norm"] for r in read_jsonl(run.path / "scores/abmll/delta.jsonl")] == want
    before = {p: p.stat().st_mtime_ns for p in run.path.glob("**/*.safetensors")}
    train_baselines(run)
    assert {p: p.stat().st_mtime_ns for p in run.path.glob("**/*.safetensors")} == before


def test_a_fixed_setting_needs_no_policy(tiny_args):
    """One setting in baselines.sft is applied as it is, without degaml_plus and without selection."""
    sft = {"sft_steps": 2, "learning_rate": 1e-3, "batch_size": 4, "loss": "lm"}
    run = make_run(
        tiny_args,
        *FAST,
        f"baselines.sft={json.dumps([sft])}",
        "evaluate.methods=[base, maml]",
        "data.targets=[delta]",
    )
    collect_adapters(run)
    train_generators(run)
    train_baselines(run)
    kept = read_json(run.path / "adapted/maml/delta/strategy.json")["strategy"]
    assert kept == {"family": "SFT", **sft, "init_scale": 1.0} and not list(
        run.path.glob("adapted/rewards*")
    )
    lm = load_lm(run)
    start = load_adapter(run.path / "baselines/maml/none", lm.layout)
    tuned = load_adapter(run.path / "adapted/maml/delta", lm.layout)
    assert any(not torch.equal(start[k], tuned[k]) for k in start)


def test_no_settings_without_adaptation(tiny_args, capsys):
    """Where the baselines' SFT settings are the policy's, its stage comes first: nothing is recorded as untrained."""
    words = [*tiny_args, "evaluate.methods=[degaml_plus, no_meta]"]
    assert run_command([*words, "stage=collect"]) == 0
    assert (
        run_command([*words, "stage=adapt"]) == 2
        and "run stage=generator" in capsys.readouterr().err
    )
    assert run_command([*words, "stage=generator"]) == 0
    assert run_command([*words, "stage=baselines"]) == 2
    assert "run stage=adapt first" in capsys.readouterr().err


def test_matched_update_norm(tiny_args):
    """MAML's start moves as far as the generated adapter lies from the mean adapter, by its rate alone."""
    run = make_run(
        tiny_args,
        *FAST,
        "evaluate.methods=[base, degaml_plus, maml_matched]",
        "data.targets=[delta]",
    )
    for stage in (
        collect_adapters,
        train_generators,
        adapt_targets,
        train_baselines,
        evaluate_methods,
    ):
        stage(run)
    lm = load_lm(run)
    kept = read_json(run.path / "adapted/maml_matched/delta/strategy.json")
    start = load_adapter(run.path / "baselines/maml/none", lm.layout)
    moved = load_adapter(run.path / "adapted/maml_matched/delta", lm.layout)
    norm = float((flatten_adapter(moved, lm.layout) - flatten_adapter(start, lm.layout)).norm())
    assert norm == pytest.approx(kept["update_norm"]) == pytest.approx(kept["matched_to"], rel=0.05)
    assert not (run.path / "adapted/maml").exists()
    assert len(read_jsonl(run.path / "scores/maml_matched/delta.jsonl")) == 12


@pytest.mark.parametrize("method", META_TRAINED)
def test_a_diverged_training_is_reported_not_dropped(tiny_args, monkeypatch, method):
    """The start before the failure is kept with its loss curve, and DONE says at which step it went."""
    import baselines

    run = make_run(
        tiny_args, *FAST, f"evaluate.methods=[base, degaml_plus, {method}]", "data.targets=[delta]"
    )
    real, calls = baselines.lm_loss, []

    def breaks(lm, rows):
        calls.append(1)
        loss = real(lm, rows)
        return loss * float("nan") if len(calls) > 4 else loss

    monkeypatch.setattr(baselines, "lm_loss", breaks)
    baselines._meta_train(run, method, "none")
    done = read_json(run.path / f"baselines/{method}/none/DONE.json")
    losses = read_json(run.path / f"baselines/{method}/none/losses.json")
    assert done["diverged_at"] == len(losses) and all(x == x for x in losses)
    start = load_adapter(run.path / f"baselines/{method}/none", load_lm(run).layout)
    assert all(torch.isfinite(v).all() for v in start.values())


def test_flatten_and_unflatten_are_inverse(tiny_lm):
    """And gradients flow through the views."""
    adapter = init_adapter(tiny_lm.layout, 3)
    vector = flatten_adapter(adapter, tiny_lm.layout)
    assert vector.shape == (tiny_lm.layout.size,)
    back = unflatten_adapter(vector, tiny_lm.layout)
    assert set(back) == set(adapter) and all(torch.equal(back[k], adapter[k]) for k in adapter)
    leaf = vector.clone().requires_grad_()
    sum((v**2).sum() for v in unflatten_adapter(leaf, tiny_lm.layout).values()).backward()
    torch.testing.assert_close(leaf.grad, 2 * vector)
