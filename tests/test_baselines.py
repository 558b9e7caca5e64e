"""Meta-gradients, Gaussians and the meta-trained baselines: closed forms and tiny models."""

import json

import pytest
import torch
from conftest import make_run, run_command

import baselines
import collect
import data
import evaluate
import generator
import lora
import methods
import policy
import runtime
import scoring
import strategies
from baselines import Draws, Moments
from runtime import Run

FAST = [
    "baselines.union.step_share=0.3",
    "baselines.maml.meta_steps=3",
    "baselines.maml.inner_lr=0.01",
    "baselines.maml.outer_lr=0.01",
    "baselines.abmll.meta_steps=3",
    "baselines.abmll.inner_steps=2",
    "baselines.abmll.inner_lr=0.1",
    "baselines.abmll.outer_lr=0.01",
    "data.targets=[delta]",
]


def run_stages(run: Run) -> None:
    collect.collect_adapters(run)
    generator.train_generators(run)
    policy.adapt_targets(run)
    baselines.train_baselines(run)
    evaluate.evaluate_methods(run)


def num_scores(run: Run, method: str, task: str) -> int:
    return len(runtime.read_jsonl(run.path / f"scores/{method}/{task}.jsonl"))


def differ(a: dict, b: dict) -> bool:
    return any(not torch.equal(a[key], b[key]) for key in a)


def normal(shape, seed: int):
    """Seeded float64 noise."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def mid_training(n: int) -> Moments:
    """Moments in mid-training, so that no second moment is zero."""
    rng = torch.Generator().manual_seed(0)
    mean = 0.1 * torch.randn(n, generator=rng, dtype=torch.float64)
    square = torch.rand(n, generator=rng, dtype=torch.float64) + 0.1
    return Moments(mean, square, 3)


def fresh(n: int) -> Moments:
    zeros = torch.zeros(n, dtype=torch.float64)
    return Moments(zeros, zeros)


def curved(seed: int):
    """A smooth loss of a vector that is neither linear nor quadratic."""
    w = normal((5, 5), seed)

    def loss(x):
        return (torch.tanh(w @ x) ** 2).sum() + 0.1 * torch.exp(x).sum()

    return loss


def inner_step(x, loss, moments: Moments):
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x)
    return baselines.shared_update(x, grad, moments, 0.05, 0.01)


def moments_along(theta, inner: list, moments: Moments) -> list[Moments]:
    """The state each inner step finds, then the last: constants of the second-order gradient."""
    found = [moments]
    x = theta
    for loss in inner:
        x, moments = inner_step(x, loss, moments)
        found.append(moments)
    return found


def query_value(theta, episode, along: list[Moments]) -> float:
    """Query loss after the inner steps, each from the given moments."""
    inner, query = episode
    x = theta
    for loss, moments in zip(inner, along, strict=False):
        x, _ = inner_step(x, loss, moments)
    return float(query(x.detach()))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_second_order_meta_gradient_is_that_of_finite_differences(steps):
    """The slope of the mean query loss after the inner steps, through AdamW and its decay."""
    theta = normal(5, 1)
    episodes = []
    along = []
    moments = mid_training(5)
    for first in (0, 10):
        inner = [curved(first + i) for i in range(steps)]
        episodes.append((inner, curved(first + 9)))
        # the second task continues the first one's moments
        along.append(moments_along(theta, inner, moments))
        moments = along[-1][-1]

    def value(x) -> float:
        values = [query_value(x, e, m) for e, m in zip(episodes, along, strict=True)]
        return sum(values) / 2

    grad, loss, left = baselines.meta_gradient(theta, mid_training(5), episodes, 0.05, 0.01)
    assert loss == pytest.approx(value(theta))
    assert left.t == moments.t
    torch.testing.assert_close(left.m, moments.m)
    slopes = []
    for unit in torch.eye(5, dtype=torch.float64):
        up = value(theta + 1e-6 * unit)
        down = value(theta - 1e-6 * unit)
        slopes.append((up - down) / 2e-6)
    assert grad.tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-8)


def first_order(theta, moments, episode, lr):
    """The query's gradient where the inner steps end, taken for the meta-gradient (FOMAML)."""
    inner, query = episode
    for loss in inner:
        theta = theta.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(theta), theta)
        theta, moments = baselines.shared_update(theta, grad, moments, lr, 0.0)
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(query(theta), theta)[0]


def test_meta_gradient_of_the_language_model(tiny_args):
    """On a random float64 decoder the second-order meta-gradient is the slope along directions."""
    run = make_run(tiny_args)
    lm = scoring.load_lm(run)
    lm.model.double()
    examples = data.load_tasks(run)["alpha"].train[:6]
    rows = [scoring.make_row(lm, example) for example in examples]
    plain = lora.init_adapter(lm.layout, 1)
    theta = lora.flatten_adapter(plain, lm.layout).double()
    theta += 0.05 * normal(theta.shape, 2)
    query = baselines.vector_loss(lm, rows[3:])
    episodes = [([baselines.vector_loss(lm, rows[:3])], query)]
    x = theta.clone().requires_grad_()
    (warm,) = torch.autograd.grad(query(x), x)
    moments = Moments(torch.zeros_like(theta), warm**2 + 1e-4, 5)

    def go(vector):
        grad, loss, _ = baselines.meta_gradient(vector, moments, episodes, 0.02, 0.0)
        return grad, loss

    second, _ = go(theta)
    first = first_order(theta, moments, episodes[0], 0.02)
    for seed in (3, 4, 5):
        # half along the gradient, so that the slope is not noise
        noise = normal(theta.shape, seed)
        direction = second / second.norm() + noise / noise.norm()
        _, up = go(theta + 1e-3 * direction)
        _, down = go(theta - 1e-3 * direction)
        slope = (up - down) / 2e-3
        assert float(second @ direction) == pytest.approx(slope, rel=2e-3)
        # first order is another gradient
        error = abs(float(second @ direction) - slope)
        assert abs(float(first @ direction) - slope) > 5 * error
    lora.clear_adapters(lm.model)


def test_orders_agree_where_the_loss_is_linear():
    """With a constant inner gradient and no decay nothing is lost by stopping at the end."""
    slope = normal(5, 0)
    theta = torch.ones(5, dtype=torch.float64)

    def both(inner):
        episode = (inner, curved(3))
        two, *_ = baselines.meta_gradient(theta, mid_training(5), [episode], 0.1, 0.0)
        return first_order(theta, mid_training(5), episode, 0.1), two

    one, two = both([lambda x: slope @ x] * 2)
    torch.testing.assert_close(one, two)
    one, two = both([curved(4)] * 2)
    assert (one - two).norm() > 1e-3 * two.norm()


def test_no_inner_step_is_multi_task_adamw():
    """k = 0: the outer update on the mean gradient is torch's AdamW."""
    losses = [curved(1), curved(2)]
    episodes = [([], loss) for loss in losses]
    ours = torch.ones(5, dtype=torch.float64)
    moments = fresh(5)
    peer = ours.clone().requires_grad_()
    optimizer = torch.optim.AdamW([peer], lr=0.01, weight_decay=0.01)
    for _ in range(4):
        grad, loss, moments = baselines.meta_gradient(ours, moments, episodes, 0.5, 0.01)
        ours, moments = baselines.shared_update(ours, grad, moments, 0.01, 0.01)
        optimizer.zero_grad()
        total = (losses[0](peer) + losses[1](peer)) / 2
        total.backward()
        assert loss == pytest.approx(float(total.detach()))
        optimizer.step()
    torch.testing.assert_close(ours, peer.detach())


def test_moments_are_shared_and_carry_no_graph():
    """Inner steps advance the state that the outer step continues from."""
    theta = torch.ones(5, dtype=torch.float64)
    episodes = [([curved(1)] * 2, curved(2))] * 3
    _, _, moments = baselines.meta_gradient(theta, fresh(5), episodes, 0.01, 0.0)
    assert moments.t == 6
    assert not moments.m.requires_grad
    assert not moments.v.requires_grad
    assert float(moments.v.sum()) > 0


def test_a_zero_gradient_gives_no_nan():
    """A's first gradient is exactly zero because B is; the second-order gradient stays finite."""

    def product(x):
        return (x[0] * x[1] - 1) ** 2

    theta = torch.tensor([1.0, 0.0], dtype=torch.float64)
    episodes = [([product], product)]
    grad, *_ = baselines.meta_gradient(theta, fresh(2), episodes, 0.1, 0.0)
    assert torch.isfinite(grad).all()
    assert float(grad.norm()) > 0


def test_inner_and_query_rows_are_distinct(tiny_args):
    """One draw serves both, without replacement."""
    run = make_run(tiny_args, "baselines.maml.inner_steps=2", "baselines.maml.batch_size=2")
    draws = Draws(run, "all", "x")
    for _ in range(20):
        batches = draws.episode(run.cfg.baselines.maml)
        assert [len(batch) for batch in batches] == [2, 2, 2]
        rows = {(row.context, row.branches) for row in sum(batches, [])}
        assert len(rows) == 6
    assert draws.tokens > 0


def test_the_left_out_task_is_never_drawn(tiny_args):
    """Leave-one-out holds for every meta-trained baseline, since all draw here."""
    run = make_run(tiny_args)
    draws = Draws(run, "beta", "x")
    assert set(draws.tasks) == {"alpha", "gamma"}
    assert {draws.task() for _ in range(50)} == {"alpha", "gamma"}
    drawn = {example.id for train in draws.tasks.values() for example in train}
    left_out = data.load_tasks(run)["beta"]
    assert drawn.isdisjoint(example.id for example in left_out.test)


def test_kl_is_the_closed_form():
    """Against torch's own, and zero between equals."""
    mean, log_sd, mean0, log_sd0 = normal((4, 7), 0)
    here = torch.distributions.Normal(mean, log_sd.exp())
    there = torch.distributions.Normal(mean0, log_sd0.exp())
    want = torch.distributions.kl_divergence(here, there).sum()
    torch.testing.assert_close(baselines.gaussian_kl(mean, log_sd, mean0, log_sd0), want)
    itself = baselines.gaussian_kl(mean, log_sd, mean, log_sd)
    assert float(itself) == pytest.approx(0, abs=1e-12)


def test_prior_is_the_named_distributions():
    """Differences of -log p equal those of torch's normal and gamma."""

    def want(mean, log_sd):
        of_mean = torch.distributions.Normal(0.0, 1.0).log_prob(mean)
        precision = torch.exp(-2 * log_sd)
        of_precision = torch.distributions.Gamma(1.0, 0.01).log_prob(precision)
        return -(of_mean.sum() + of_precision.sum())

    a = normal((2, 6), 0).float()
    b = normal((2, 6), 1).float()
    a[1] -= 3
    b[1] -= 3
    got = baselines.negative_log_prior(*a) - baselines.negative_log_prior(*b)
    torch.testing.assert_close(got, want(*a) - want(*b), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("space", ["factor", "product"])
def test_posterior_fits_the_task(tiny_args, space):
    """Its steps lower the loss of the task, and a heavy KL holds it at the prior."""
    run = make_run(tiny_args, f"baselines.abmll.space={space}", "baselines.abmll.inner_lr=0.3")
    lm = scoring.load_lm(run)
    settings = run.cfg.baselines.abmll
    examples = data.load_tasks(run)["alpha"].train[:8]
    rows = [scoring.make_row(lm, example) for example in examples]
    prior = baselines.initial_posterior(lm, settings, 1)

    def fit(beta: float):
        """The mean of the posterior."""
        changed = settings.model_copy(update={"beta": beta})
        rng = torch.Generator().manual_seed(0)
        return baselines.infer_posterior(lm, prior, [rows] * 10, changed, rng)[0]

    free = fit(0.0)
    held = fit(1e4)
    loss = baselines.vector_loss(lm, rows)
    with torch.no_grad():
        before = float(loss(prior[0]))
        after = float(loss(free))
    lora.clear_adapters(lm.model)
    assert after < before - 0.1
    far = (free - prior[0]).norm()
    near = (held - prior[0]).norm()
    assert near < 0.5 * far


def test_prediction_is_the_mean_probability():
    """Probabilities are averaged, not log-probabilities or votes."""
    scores = [(0.0, -1.0, -9.0), (-3.0, 0.0, -9.0)]
    p = torch.softmax(torch.tensor(scores, dtype=torch.float64), -1).mean(0)
    found = strategies.combine(scores, "mean_probability")
    assert found == pytest.approx(p.log().tolist())


def test_product_space_is_a_gaussian_over_dw(tiny_args):
    """Draws have the stated mean and sd in every entry of dW, and reach the model's output."""
    space = "baselines.abmll.space=product"
    run = make_run(tiny_args, space, "baselines.abmll.init_log_sd=-3")
    lm = scoring.load_lm(run)
    layout = lm.layout
    settings = run.cfg.baselines.abmll
    posterior = baselines.initial_posterior(lm, settings, 1)
    rng = torch.Generator().manual_seed(5)
    posterior += 0.05 * torch.randn(posterior.shape, generator=rng)
    mean, log_sd = baselines.posterior_moments(posterior, layout, settings)[0]
    assert float(log_sd.min()) >= -3
    assert float(log_sd.max()) > -3 + 0.1

    # what 400 draws add to the first matrix
    rng = torch.Generator().manual_seed(0)
    path = layout.modules[0][0]
    a, _, b, _ = next(layout.keys())
    updates = []
    for _ in range(400):
        drawn = baselines.draw_adapter(posterior, layout, settings, rng)
        dense = drawn[lora.dense_key(path)]
        updates.append(layout.scale * drawn[b] @ drawn[a] + dense)
    updates = torch.stack(updates)
    sd = log_sd.exp()
    standard_error = sd / 20
    off = (updates.mean(0) - mean) / standard_error
    assert float(off.std()) == pytest.approx(1, abs=0.15)
    spread = updates.std(0) / sd
    assert float(spread.mean()) == pytest.approx(1, abs=0.03)

    layer = lm.model.get_submodule(path)
    x = torch.randn(2, mean.shape[1], generator=rng)
    lora.swap_adapter(lm.model, layout, drawn)
    want = layer.base(x) + x @ updates[-1].t()
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
    lora.clear_adapters(lm.model)
    torch.testing.assert_close(layer(x), layer.base(x))


def test_product_space_end_to_end(tiny_args):
    """Meta-training moves both pairs of factors; a target is predicted from full-rank draws."""
    run = make_run(
        tiny_args,
        *FAST,
        "evaluate.methods=[base, degaml_plus, abmll]",
        "baselines.abmll.space=product",
    )
    run_stages(run)
    lm = scoring.load_lm(run)
    start = baselines.initial_posterior(lm, run.cfg.baselines.abmll, run.cfg.seed)
    learned = baselines.load_posterior(run.path / "baselines/abmll/all", lm.layout)
    assert torch.isfinite(learned).all()
    moved = (learned - start).norm(dim=1)
    assert (moved > 1e-3).all()
    assert num_scores(run, "abmll", "delta") == 12


def test_every_baseline_is_trained_adapted_and_scored(tiny_args):
    """Meta-training without the target, a PEFT folder per target, scores; nothing is done twice."""
    chosen = ["base", "degaml_plus", "no_meta", *methods.META_TRAINED]
    run = make_run(
        tiny_args, *FAST, "data.targets=[alpha, delta]", f"evaluate.methods={json.dumps(chosen)}"
    )
    run_stages(run)
    lm = scoring.load_lm(run)
    plain = lora.init_adapter(lm.layout, run.cfg.seed)
    for method in methods.META_TRAINED:
        for left_out in ("alpha", "all"):
            folder = run.path / f"baselines/{method}/{left_out}"
            assert differ(plain, lora.load_adapter(folder, lm.layout)), f"{method} learned nothing"
            done = runtime.read_json(folder / "DONE.json")
            assert done["diverged_at"] is None
            assert done["tokens"] > 0
            assert done["backwards"] > 0
            assert len(runtime.read_json(folder / "losses.json")) == done["steps"]
        for task in ("alpha", "delta"):
            assert num_scores(run, method, task) == 12

    files = list(run.path.glob("**/*.safetensors"))
    before = [path.stat().st_mtime_ns for path in files]
    baselines.train_baselines(run)
    assert [path.stat().st_mtime_ns for path in files] == before
    assert_predicted_by_mean_probability(run)


def assert_predicted_by_mean_probability(run: Run) -> None:
    """What is evaluated are five draws from the target's posterior."""
    lm = scoring.load_lm(run)
    test = list(data.load_tasks(run)["delta"].test)
    posterior = baselines.load_posterior(run.path / "adapted/abmll/delta", lm.layout)
    rng = torch.Generator().manual_seed(runtime.seed_for(run.cfg.seed, "posterior"))
    each = []
    for _ in range(5):
        drawn = baselines.draw_adapter(posterior, lm.layout, run.cfg.baselines.abmll, rng)
        each.append(scoring.score_examples(lm, drawn, test))
    picks = []
    for i in range(len(test)):
        scores = [found[i].norm for found in each]
        pooled = strategies.combine(scores, "mean_probability")
        picks.append(pooled.index(max(pooled)))
    rows = runtime.read_jsonl(run.path / "scores/abmll/delta.jsonl")
    assert [row["pred_norm"] for row in rows] == picks


def test_a_fixed_setting_needs_no_policy(tiny_args):
    """One setting in baselines.sft is applied as it is, without degaml_plus, without selection."""
    sft = {"sft_steps": 2, "learning_rate": 1e-3, "batch_size": 4, "loss": "lm"}
    run = make_run(
        tiny_args, *FAST, f"baselines.sft={json.dumps([sft])}", "evaluate.methods=[base, maml]"
    )
    collect.collect_adapters(run)
    generator.train_generators(run)
    baselines.train_baselines(run)
    kept = runtime.read_json(run.path / "adapted/maml/delta/strategy.json")
    assert kept["strategy"] == {"family": "SFT", **sft, "init_scale": 1.0}
    assert not list(run.path.glob("adapted/rewards*"))
    layout = scoring.load_lm(run).layout
    start = lora.load_adapter(run.path / "baselines/maml/all", layout)
    assert differ(start, lora.load_adapter(run.path / "adapted/maml/delta", layout))


def test_no_settings_without_adaptation(tiny_args, capsys):
    """Where the SFT settings are the policy's, its stage comes first: nothing is left untrained."""
    words = [*tiny_args, "evaluate.methods=[degaml_plus, no_meta]"]
    assert run_command([*words, "stage=collect"]) == 0
    assert run_command([*words, "stage=adapt"]) == 2
    assert "run stage=generator" in capsys.readouterr().err
    assert run_command([*words, "stage=generator"]) == 0
    assert run_command([*words, "stage=baselines"]) == 2
    assert "run stage=adapt first" in capsys.readouterr().err


def test_matched_update_norm(tiny_args):
    """MAML's start moves as far as the generated adapter lies from the mean adapter."""
    run = make_run(tiny_args, *FAST, "evaluate.methods=[base, degaml_plus, maml_matched]")
    run_stages(run)
    layout = scoring.load_lm(run).layout
    folder = run.path / "adapted/maml_matched/delta"
    kept = runtime.read_json(folder / "strategy.json")
    start = lora.load_adapter(run.path / "baselines/maml/all", layout)
    moved = lora.load_adapter(folder, layout)
    update = lora.flatten_adapter(moved, layout) - lora.flatten_adapter(start, layout)
    assert float(update.norm()) == pytest.approx(kept["update_norm"])
    assert kept["update_norm"] == pytest.approx(kept["matched_to"], rel=0.05)
    assert not (run.path / "adapted/maml").exists()
    assert num_scores(run, "maml_matched", "delta") == 12


@pytest.mark.parametrize("method", methods.META_TRAINED)
def test_a_diverged_training_is_reported_not_dropped(tiny_args, monkeypatch, method):
    """The start before the failure is kept with its losses, and DONE says at which step it went."""
    run = make_run(tiny_args, *FAST, f"evaluate.methods=[base, degaml_plus, {method}]")
    real = scoring.lm_loss
    calls = []

    def breaks(lm, rows):
        calls.append(rows)
        loss = real(lm, rows)
        return loss * float("nan") if len(calls) > 4 else loss

    monkeypatch.setattr(scoring, "lm_loss", breaks)
    baselines.meta_train(run, method, "all")
    folder = run.path / f"baselines/{method}/all"
    losses = runtime.read_json(folder / "losses.json")
    assert runtime.read_json(folder / "DONE.json")["diverged_at"] == len(losses)
    assert all(loss == loss for loss in losses)
    start = lora.load_adapter(folder, scoring.load_lm(run).layout)
    assert all(torch.isfinite(value).all() for value in start.values())


def test_flatten_and_unflatten_are_inverse(tiny_lm):
    """And gradients flow through the views."""
    layout = tiny_lm.layout
    adapter = lora.init_adapter(layout, 3)
    vector = lora.flatten_adapter(adapter, layout)
    assert vector.shape == (layout.size,)
    back = lora.unflatten_adapter(vector, layout)
    assert set(back) == set(adapter)
    assert not differ(back, adapter)
    leaf = vector.clone().requires_grad_()
    views = lora.unflatten_adapter(leaf, layout).values()
    sum((view**2).sum() for view in views).backward()
    torch.testing.assert_close(leaf.grad, 2 * vector)
