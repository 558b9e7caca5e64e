"""Baselines on the adapters, data and support labels that DeGAML has, leave-one-out like everything else.

no_meta   SFT from a plain initialisation: no meta-training at all
union     one LoRA trained on the union of the meta-training tasks
maml      MAML-en-LLM: bi-level, moments shared by both levels           (docs/choices.md, 15)
abmll     amortised Bayesian meta-learning: a Gaussian over the adapter  (docs/choices.md, 15)
maml_matched   maml, fine-tuned with updates as long as the staged system's

A meta-trained start lies in baselines/<method>/<left_out>/. On a target, every start but abmll's is fine-tuned on the
support labels with the settings the policy proposed for `degaml_plus`, chosen by the same cross-validation; keeping the
start is always a candidate.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import collect
import data
import lora
import methods
import policy
import runtime
import scoring
import strategies
from config import UserError
from lora import Adapter, AdapterTrainer, Layout
from policy import Rewards
from runtime import Run
from strategies import Strategy, Target

BETAS, EPS = (0.9, 0.999), 1e-8
WEIGHT_DECAY = 0.01  # of MAML-en-LLM's shared update (TEMPO, App. H)


def train_baselines(run: Run) -> dict:
    """Every configured baseline: its meta-training per left-out set, then every target.

    Writes baselines/<method>/<left_out>/ and adapted/<method>/<task>/, both PEFT folders.
    """
    cfg = run.cfg
    tasks = data.load_tasks(run)
    wanted = sorted(
        (tasks[t] for t in cfg.data.targets or tasks),
        key=lambda t: -sum(len(e.prompt) for e in t.support),
    )
    meta = [
        m
        for m in methods.META_TRAINED
        if m in cfg.evaluate.methods or (m == "maml" and "maml_matched" in cfg.evaluate.methods)
    ]
    left = sorted({data.left_out_for(cfg, t.name) for t in wanted})
    for method, left_out in run.deal([(m, out) for m in meta for out in left]):
        if not run.finished(f"baselines/{method}/{left_out}", "baselines"):
            _meta_train(run, method, left_out)
    fine_tuned = [
        m for m in ("no_meta", *methods.META_TRAINED, "maml_matched") if m in cfg.evaluate.methods
    ]
    adapt = {"abmll": _adapt_posterior, "maml_matched": _adapt_matched}
    for method, task in run.deal([(m, t) for t in wanted for m in fine_tuned]):
        if not run.finished(f"adapted/{method}/{task.name}", "adapt", method):
            adapt.get(method, _adapt_start)(run, method, task)
    return {}


# ------------------------------------------------------------------------------------------------------- meta-training


class Draws:
    """Batches of packed rows from the meta-training tasks, seeded; `tokens` counts what was drawn, for the budget."""

    def __init__(self, run: Run, left_out: str, *key):
        cfg = run.cfg
        self.lm, self.rng, self.tokens = (
            scoring.load_lm(run),
            runtime.rng_for(cfg.seed, *key, data.seed_name(left_out)),
            0,
        )
        self.tasks = {n: data.load_tasks(run)[n].train for n in data.training_tasks(cfg, left_out)}

    def task(self) -> str:
        return str(self.rng.choice(list(self.tasks)))

    def rows(self, task: str, size: int) -> list:
        """`size` distinct examples of a task."""
        train = self.tasks[task]
        rows = [
            scoring.make_row(self.lm, train[i])
            for i in self.rng.choice(len(train), min(size, len(train)), replace=False)
        ]
        self.tokens += sum(r.length for r in rows)
        return rows


def _meta_train(run: Run, method: str, left_out: str) -> None:
    """Train one start, keep its loss curve and its budget. A diverged training is kept, and called so."""
    cfg = run.cfg
    started, lm, folder = (
        time.monotonic(),
        scoring.load_lm(run),
        run.path / f"baselines/{method}/{left_out}",
    )
    draws, losses = Draws(run, left_out, method), []
    passes = lm.backwards
    train = {"union": _train_union, "maml": _train_maml, "abmll": _train_abmll}[method]
    start, extra, failed = train(run, draws, losses)
    lora.save_adapter(folder, start, lm.layout, cfg.model.name, cfg.model.revision)
    if extra:
        runtime.save_tensors(
            folder / "spread.safetensors", {k: v.contiguous() for k, v in extra.items()}
        )
    runtime.write_json(folder / "losses.json", [round(x, 5) for x in losses])
    run.finish(
        f"baselines/{method}/{left_out}",
        "baselines",
        started,
        steps=len(losses),
        tokens=draws.tokens,
        backwards=lm.backwards - passes,
        labels=sum(map(len, draws.tasks.values())),
        diverged_at=failed,
    )
    ends = f"loss {np.mean(losses[:5]):.3f} -> {np.mean(losses[-5:]):.3f}" if losses else "no step"
    run.log(
        f"{method} without {left_out}: {ends if failed is None else f'diverged at step {failed + 1}'} in "
        f"{time.monotonic() - started:.0f} s",
        True,
    )


def _train_union(run: Run, draws: Draws, losses: list[float]) -> tuple[Adapter, dict, int | None]:
    """One adapter on the shuffled union: `collect`'s schedule, longer by the number of tasks (`step_share` of it)."""
    cfg = run.cfg
    c, lm = cfg.collect, scoring.load_lm(run)
    longer = cfg.baselines.union.step_share * len(draws.tasks)
    first, second = (max(1, round(s * longer)) for s in (c.pretrain_steps, c.finetune_steps))

    start = lora.init_adapter(lm.layout, cfg.seed)
    with AdapterTrainer(lm.model, lm.layout, start) as trainer:
        for step in run.track(range(first + second), "union"):
            rows = []
            for _ in range(c.batch_size):
                rows += draws.rows(draws.task(), 1)
            loss = trainer.backward(scoring.loss_in_parts(lm, rows, scoring.lm_loss))
            if not math.isfinite(loss):
                return trainer.adapter(), {}, step
            trainer.step(collect.learning_rate(c, step, first))
            losses.append(loss)
    return trainer.adapter(), {}, None


# ---------------------------------------------------------------------------------------------------------------- MAML


@dataclass
class Moments:
    """AdamW's running moments, (D,) each, and its step count: one state for inner and outer updates."""

    m: Tensor
    v: Tensor
    t: int = 0


def shared_update(theta: Tensor, grad: Tensor, state: Moments, lr: float, decay: float) -> Tensor:
    """One AdamW update out of place; the gradient may carry a graph, the moments kept for later do not.

    Source: MAML-en-LLM's shared moments as docs/choices.md, 15, reads them: old moments are constants, the graph of a
    second-order step runs through the present gradient alone.
    """
    state.t += 1
    m, v = (
        BETAS[0] * state.m + (1 - BETAS[0]) * grad,
        BETAS[1] * state.v + (1 - BETAS[1]) * grad * grad,
    )
    state.m, state.v = m.detach(), v.detach()
    m, v = m / (1 - BETAS[0] ** state.t), v / (1 - BETAS[1] ** state.t)
    # A's gradient is exactly zero while B is: the clamp keeps the root's infinite slope there out of the graph
    return theta - lr * (m / (v.clamp_min(1e-30).sqrt() + EPS) + decay * theta)


def meta_gradient(
    theta: Tensor, state: Moments, episodes: list, lr: float, decay: float, order: int
) -> tuple[Tensor, float]:
    """Gradient with respect to theta of the mean query loss after the inner steps, and that loss.

    Args:
        episodes: one (inner losses, query loss) per task, each a function of a (D,) vector.
        order: 2 differentiates through the inner updates; 1 takes the gradient at their end.
    """
    total, value = torch.zeros_like(theta), theta.new_zeros(())
    for inner, query in episodes:
        start = fast = theta.detach().requires_grad_()
        for loss_fn in inner:
            (grad,) = torch.autograd.grad(loss_fn(fast), fast, create_graph=order == 2)
            fast = shared_update(fast, grad, state, lr, decay)
            if order == 1:
                fast = fast.detach().requires_grad_()
        loss = query(fast)
        total += torch.autograd.grad(loss, start if order == 2 else fast)[0]
        value = value + loss.detach()
    return total / len(episodes), float(value) / len(episodes)


def vector_loss(lm: scoring.LM, rows: list, loss_fn=scoring.lm_loss):
    """The loss of rows as a function of a (D,) adapter vector, differentiable twice.

    Double backward needs plain attention: fused kernels have none.
    """

    def loss(vector: Tensor) -> Tensor:
        lora.swap_adapter(lm.model, lm.layout, lora.unflatten_adapter(vector, lm.layout))
        with sdpa_kernel(SDPBackend.MATH):
            return loss_fn(lm, rows)

    return loss


def _clip(grad: Tensor, limit: float) -> Tensor:
    return grad * (limit / (grad.norm() + 1e-6)).clamp(max=1.0)


def _train_maml(run: Run, draws: Draws, losses: list[float]) -> tuple[Adapter, dict, int | None]:
    """MAML-en-LLM: n tasks per step, k inner steps each, query batches that share no row with the inner ones."""
    cfg = run.cfg
    b, lm = cfg.baselines.maml, scoring.load_lm(run)
    theta = lora.flatten_adapter(lora.init_adapter(lm.layout, cfg.seed), lm.layout).to(
        lm.model.device
    )
    state = Moments(torch.zeros_like(theta), torch.zeros_like(theta))
    try:
        for step in run.track(range(b.meta_steps), "maml"):
            episodes = []
            for _ in range(b.tasks_per_step):
                rows = draws.rows(draws.task(), b.batch_size * (b.inner_steps + 1))
                parts = [
                    vector_loss(lm, rows[i :: b.inner_steps + 1]) for i in range(b.inner_steps + 1)
                ]
                episodes.append((parts[:-1], parts[-1]))
            grad, loss = meta_gradient(theta, state, episodes, b.inner_lr, WEIGHT_DECAY, b.order)
            if not (math.isfinite(loss) and torch.isfinite(grad).all()):
                return lora.unflatten_adapter(theta.cpu(), lm.layout), {}, step
            theta = shared_update(theta, _clip(grad, lora.CLIP), state, b.outer_lr, WEIGHT_DECAY)
            losses.append(loss)
    finally:
        lora.clear_adapters(lm.model)
    return lora.unflatten_adapter(theta.cpu(), lm.layout), {}, None


# --------------------------------------------------------------------------------------------------------------- ABMLL


def gaussian_kl(mean: Tensor, log_sd: Tensor, mean0: Tensor, log_sd0: Tensor) -> Tensor:
    """KL(N(mean, sd²) || N(mean0, sd0²)) of diagonal Gaussians, summed."""
    spread = (torch.exp(2 * log_sd) + (mean - mean0) ** 2) / (2 * torch.exp(2 * log_sd0))
    return (log_sd0 - log_sd + spread - 0.5).sum()


def negative_log_prior(mean: Tensor, log_sd: Tensor) -> Tensor:
    """-log p(theta) without constants: mean ~ N(0, 1), precision exp(-2 log_sd) ~ Gamma(1, 0.01) (ABML's release)."""
    return 0.5 * (mean**2).sum() + 0.01 * torch.exp(-2 * log_sd).sum()


def infer_posterior(
    lm: scoring.LM, prior: Tensor, batches: list, b, rng: torch.Generator
) -> Tensor:
    """A task's (2, D) posterior: one gradient step per batch on E[NLL] + beta KL, from the prior (as ABML starts)."""
    phi = prior.detach()
    for rows in batches:
        phi = phi.detach().requires_grad_()
        loss = expected_nll(lm, phi, rows, b, rng) + b.beta * posterior_kl(lm, phi, prior, b)
        (grad,) = torch.autograd.grad(loss, phi)
        phi = phi - b.inner_lr * _clip(grad, lora.CLIP)
    return phi.detach()


def posterior_kl(lm: scoring.LM, phi: Tensor, prior: Tensor, b) -> Tensor:
    """KL between two (2, D) posteriors, over the entries their space is about."""
    pairs = zip(
        *(posterior_moments(x, lm.layout, b.space, b.init_log_sd) for x in (phi, prior)),
        strict=True,
    )
    return sum(gaussian_kl(*q, *p) for q, p in pairs)


def expected_nll(lm: scoring.LM, phi: Tensor, rows: list, b, rng: torch.Generator) -> Tensor:
    """The loss at one draw from phi: a Monte-Carlo estimate of its mean."""
    lora.swap_adapter(
        lm.model, lm.layout, draw_adapter(phi, lm.layout, b.space, b.init_log_sd, rng)
    )
    return scoring.lm_loss(lm, rows)


def initial_posterior(lm: scoring.LM, b, seed: int) -> Tensor:
    """(2, D): the shared plain start, and a spread of e^init_log_sd (product: on average, and at least that)."""
    mean = lora.flatten_adapter(lora.init_adapter(lm.layout, seed), lm.layout)
    if b.space == "factor":
        return torch.stack([mean, torch.full_like(mean, b.init_log_sd)])
    spread = lora.init_adapter(lm.layout, runtime.seed_for(seed, "spread"))
    rng = torch.Generator().manual_seed(runtime.seed_for(seed, "spread B"))
    for a, _, key, _ in lm.layout.keys():
        size = math.exp(b.init_log_sd) / (
            lm.layout.scale * float(spread[a].std()) * math.sqrt(lm.layout.rank)
        )
        spread[key] = size * torch.randn(spread[key].shape, generator=rng)
    return torch.stack([mean, lora.flatten_adapter(spread, lm.layout)])


def _train_abmll(run: Run, draws: Draws, losses: list[float]) -> tuple[Adapter, dict, int | None]:
    """Amortised Bayesian meta-learning: a diagonal Gaussian over the entries of A and B, or of dW (`space`).

    Each step infers the posterior of one batch of tasks (K first-order steps), then moves theta along the gradient of
    query NLL + beta KL at that posterior, plus beta KL and prior at theta; AdamW outside.
    """
    cfg = run.cfg
    b, lm = cfg.baselines.abmll, scoring.load_lm(run)
    theta = initial_posterior(lm, b, cfg.seed).to(lm.model.device)
    opt = torch.optim.AdamW([theta], lr=b.outer_lr, weight_decay=0.0)
    rng = torch.Generator(run.device).manual_seed(runtime.seed_for(cfg.seed, "abmll", *draws.tasks))

    def split() -> tuple[Adapter, Adapter]:
        mean, spread = (lora.unflatten_adapter(row, lm.layout) for row in theta.detach().cpu())
        return mean, spread

    try:
        for step in run.track(range(b.meta_steps), "abmll"):
            total, value = torch.zeros_like(theta), theta.new_zeros(())
            for _ in range(b.tasks_per_step):
                rows = draws.rows(draws.task(), b.batch_size * (b.inner_steps + 1))
                parts = [rows[i :: b.inner_steps + 1] for i in range(b.inner_steps + 1)]
                prior = theta.detach().clone().requires_grad_()
                phi = infer_posterior(lm, prior.detach(), parts[:-1], b, rng).requires_grad_()
                nll = expected_nll(lm, phi, parts[-1], b, rng)
                loss = nll + b.beta * posterior_kl(lm, phi, prior, b)
                for moments in posterior_moments(prior, lm.layout, b.space, b.init_log_sd):
                    loss = loss + b.beta * negative_log_prior(*moments)
                total += sum(torch.autograd.grad(loss, (phi, prior)))
                value += nll.detach()
            value = float(value)
            if not (math.isfinite(value) and torch.isfinite(total).all()):
                return *split(), step
            theta.grad = _clip(total / b.tasks_per_step, lora.CLIP)
            opt.step()
            losses.append(value / b.tasks_per_step)
    finally:
        lora.clear_adapters(lm.model)
    return *split(), None


def _adapt_posterior(run: Run, method: str, task) -> None:
    """ABMLL on a target: the K steps of its meta-training, on the support set."""
    cfg = run.cfg
    started, lm, b = time.monotonic(), scoring.load_lm(run), cfg.baselines.abmll
    source = run.path / f"baselines/abmll/{data.left_out_for(cfg, task.name)}"
    folder = run.path / f"adapted/abmll/{task.name}"
    prior = load_posterior(source, lm.layout).to(lm.model.device)
    rng = torch.Generator(run.device).manual_seed(runtime.seed_for(cfg.seed, "abmll", task.name))
    rows = [scoring.make_row(lm, e) for e in task.support]
    try:
        mean, spread = (
            lora.unflatten_adapter(v.cpu(), lm.layout)
            for v in infer_posterior(lm, prior, [rows] * b.inner_steps, b, rng)
        )
    finally:
        lora.clear_adapters(lm.model)
    lora.save_adapter(folder, mean, lm.layout, cfg.model.name, cfg.model.revision)
    runtime.save_tensors(
        folder / "spread.safetensors", {k: v.contiguous() for k, v in spread.items()}
    )
    runtime.write_json(
        folder / "strategy.json", {"n_support": len(rows), "inner_steps": b.inner_steps}
    )
    run.finish(f"adapted/abmll/{task.name}", "adapt", started, method)
    run.log(f"abmll {task.name}: {b.inner_steps} steps in {time.monotonic() - started:.0f} s", True)


# ------------------------------------------------------------------------------------------------------------- targets


def candidate_sft(run: Run, task: str, share: float = 1.0) -> list[Strategy]:
    """The SFT settings a baseline may use on a task, longest first: those of `baselines.sft`, else what the policy
    proposed. All start from the whole baseline, or with `share` 0 from the plain initialisation.

    Raises: UserError: nothing was proposed yet.
    """
    settings = [{"family": "SFT", **s.model_dump()} for s in run.cfg.baselines.sft]
    if not settings:
        source = f"adapted/degaml_plus/{task}"
        if not run.finished(source, "adapt", "degaml_plus", redo=False):
            raise UserError(
                f"{run.path / source}: not adapted yet, and the SFT settings of the baselines are those "
                "proposed there; run stage=adapt first, or give baselines.sft"
            )
        settings = [
            e["strategy"]
            for e in runtime.read_jsonl(run.path / source / "episodes.jsonl")
            if e["valid"] and e["strategy"]["family"] == "SFT"
        ]
    found = [Strategy.from_dict(s | {"init_scale": share}) for s in settings]
    return sorted({str(s): s for s in found}.values(), key=lambda s: -s["sft_steps"])


def _adapt_start(run: Run, method: str, task) -> None:
    """SFT from a baseline's start, its setting chosen by cross-validation on the support set."""
    cfg = run.cfg
    started, lm, support = time.monotonic(), scoring.load_lm(run), list(task.support)
    if method == "no_meta":
        start, name, share = lora.init_adapter(lm.layout, cfg.seed), f"{task.name}.no_meta", 0.0
    else:
        start, share = (
            lora.load_adapter(
                run.path / f"baselines/{method}/{data.left_out_for(cfg, task.name)}", lm.layout
            ),
            1.0,
        )
        name = f"{task.name}.{method}-{lora.adapter_hash(start)[:8]}"  # rewards know nothing of cfg.baselines
    target = Target(task.name, lm, start, cfg.strategies, cfg.seed)
    candidates = candidate_sft(run, task.name, share)
    if len(cfg.baselines.sft) == 1:  # nothing to choose: fine-tune as told
        strategy, result = candidates[0], {"wins": None, "losses": None, "gold_logp_gain": None}
    else:
        reference = scoring.score_examples(lm, target.start, support)
        rewards = Rewards(run, name, target, support, reference)
        steps = sorted({s["sft_steps"] for s in candidates})
        results = {
            str(s): rewards.of(s, steps) for s in run.track(candidates, f"{method} {task.name}")
        }
        strategy, result = policy.choose(results, cfg.policy)
    folder = run.path / f"adapted/{method}/{task.name}"
    adapter = strategies.execute_finite(target, strategy, support).adapters[0]
    lora.save_adapter(folder, adapter, lm.layout, cfg.model.name, cfg.model.revision)
    runtime.write_json(
        folder / "strategy.json",
        {
            "strategy": strategy.as_dict(),
            "wins": result["wins"],
            "losses": result["losses"],
            "n_support": len(support),
            "gold_logp_gain": result["gold_logp_gain"],
        },
    )
    run.finish(f"adapted/{method}/{task.name}", "adapt", started, method)
    run.log(
        f"{method} {task.name}: {strategy} (+{result['wins']} -{result['losses']} of {len(support)}) in "
        f"{time.monotonic() - started:.0f} s",
        True,
    )


def _adapt_matched(run: Run, method: str, task) -> None:
    """MAML's start, fine-tuned at the rate that moves it as far as the generated adapter lies from the mean adapter.

    Ten steps at 1e-5 leave every task's adapter where the start was; this separates what coupled
    training does from how far it was allowed to move. Distance: Euclidean, over all D entries. AdamW's update is nearly
    proportional to its rate, so a few corrections match it to 5 %; both distances are kept.
    """
    cfg = run.cfg
    started, lm, support = time.monotonic(), scoring.load_lm(run), list(task.support)
    target = policy.make_target(run, task)
    goal = _distance(target.start, collect.mean_adapter(run, lm, task.name), lm)
    target.start = lora.load_adapter(
        run.path / f"baselines/maml/{data.left_out_for(cfg, task.name)}", lm.layout
    )
    strategy = next(iter(candidate_sft(run, task.name)), None)
    if strategy is None:
        raise UserError(
            f"maml_matched {task.name}: the policy proposed no SFT setting; give one in baselines.sft"
        )
    rate_ = strategy["learning_rate"]
    for _ in range(5):
        strategy = strategy.but(learning_rate=rate_)
        adapter = strategies.execute_finite(target, strategy, support).adapters[0]
        moved = _distance(adapter, target.start, lm)
        if abs(moved / goal - 1) < 0.05:
            break
        rate_ *= goal / moved
    folder = run.path / f"adapted/{method}/{task.name}"
    lora.save_adapter(folder, adapter, lm.layout, cfg.model.name, cfg.model.revision)
    facts = {"update_norm": moved, "matched_to": goal}
    runtime.write_json(
        folder / "strategy.json",
        {"strategy": strategy.as_dict(), "n_support": len(support), **facts},
    )
    run.finish(f"adapted/{method}/{task.name}", "adapt", started, method)
    run.log(
        f"{method} {task.name}: moved {moved:.3g}, generated adapter {goal:.3g} from the mean, in "
        f"{time.monotonic() - started:.0f} s",
        True,
    )


def _distance(a: Adapter, b: Adapter, lm: scoring.LM) -> float:
    return float((lora.flatten_adapter(a, lm.layout) - lora.flatten_adapter(b, lm.layout)).norm())


# ------------------------------------------------------------------------------------------------ Gaussians of adapters


def posterior_moments(
    posterior: Tensor, layout: Layout, space: str, log_floor: float
) -> list[tuple[Tensor, Tensor]]:
    """(mean, log sd) of what a (2, D) posterior is a diagonal Gaussian over.

    factor: one pair of (D,), the entries of A and B; row 1 is their log sd. product: a pair of (d_out, d_in) per
    module, the entries of dW; row 1 holds a second pair of factors, sd = |(alpha/r) B A| + e^log_floor (ABMLL's
    structured spread; the absolute value keeps it positive).
    """
    if space == "factor":
        return [(posterior[0], posterior[1])]
    mean, spread = (lora.unflatten_adapter(row, layout) for row in posterior)
    return [
        (
            layout.scale * mean[b] @ mean[a],
            ((layout.scale * spread[b] @ spread[a]).abs() + math.exp(log_floor)).log(),
        )
        for a, _, b, _ in layout.keys()
    ]


def draw_adapter(
    posterior: Tensor, layout: Layout, space: str, log_floor: float, rng: torch.Generator
) -> Adapter:
    """One reparameterised draw, through which gradients flow to the posterior. In product space it is of full rank."""

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng, device=rng.device).to(like.device)

    moments = posterior_moments(posterior, layout, space, log_floor)
    if space == "factor":
        ((mean, log_sd),) = moments
        return lora.unflatten_adapter(mean + log_sd.exp() * noise(mean), layout)
    return lora.unflatten_adapter(posterior[0], layout) | {
        lora.dense_key(path): log_sd.exp() * noise(log_sd)
        for (path, *_), (_, log_sd) in zip(layout.modules, moments, strict=True)
    }


def load_posterior(folder: Path, layout: Layout) -> Tensor:
    """(2, D) of a PEFT folder that holds the mean, with spread.safetensors beside it."""
    return torch.stack(
        [
            lora.flatten_adapter(a, layout)
            for a in (
                lora.load_adapter(folder, layout),
                runtime.load_tensors(folder / "spread.safetensors"),
            )
        ]
    )
