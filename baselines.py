"""Baselines on the adapters, data and support labels that DeGAML has, leave-one-out as it is.

no_meta        SFT from a plain initialisation: no meta-training at all
union          one LoRA trained on the union of the meta-training tasks
maml           MAML-en-LLM: bi-level, moments shared by both levels           (docs/choices.md, 15)
abmll          amortised Bayesian meta-learning: a Gaussian over the adapter  (docs/choices.md, 15)
maml_matched   maml, fine-tuned with updates as long as the staged system's
maml_qvo       maml as TEMPO's appendix H states it: modules, alpha and test steps of its own

A meta-trained start lies in baselines/<method>/<left_out>/. On a target, every start but abmll's is
fine-tuned on the support labels. The settings are those that the policy proposed for `degaml_plus`,
chosen by the same cross-validation; keeping the start is always a candidate.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
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
from scoring import LM, Row
from strategies import Strategy, Target

BETA1 = 0.9
BETA2 = 0.999
EPS = 1e-8
WEIGHT_DECAY = 0.01  # of MAML-en-LLM's shared update (TEMPO, App. H)


def train_baselines(run: Run) -> dict:
    """Every configured baseline: its meta-training per left-out set, then every target.

    Writes baselines/<method>/<left_out>/ and adapted/<method>/<task>/, both PEFT folders.
    """
    cfg = run.cfg
    wanted = policy.targets_by_cost(run)
    chosen = [m for m in methods.BASELINES if m in cfg.evaluate.methods]

    # `maml_matched` is another fine-tuning of MAML's start, which it needs too
    needed = {m.removesuffix("_matched") for m in chosen}
    starts = [m for m in methods.META_TRAINED if m in needed]
    left_out_sets = sorted({data.left_out_for(cfg, task.name) for task in wanted})
    units = list(itertools.product(starts, left_out_sets))
    for method, left_out in run.deal(units):
        if not run.finished(f"baselines/{method}/{left_out}", "baselines"):
            meta_train(run, method, left_out)

    # `deal` waits for all ranks, so every start is there
    units = list(itertools.product(wanted, chosen))
    for task, method in run.deal(units):
        if run.finished(f"adapted/{method}/{task.name}", "adapt", method):
            continue
        if method == "abmll":
            _adapt_posterior(run, task)
        elif method == "maml_matched":
            _adapt_matched(run, task)
        elif method == "maml_qvo":
            _adapt_qvo(run, task)
        else:
            _adapt_start(run, method, task)
    return {}


def method_layout(run: Run, method: str) -> Layout:
    """What a method trains: the run's adapter, or for `maml_qvo` a part of it, scaled otherwise."""
    layout = scoring.load_lm(run).layout
    if method != "maml_qvo":
        return layout
    settings = run.cfg.baselines.maml
    part = [module for module in layout.modules if module[0].endswith(tuple(settings.modules))]
    return dataclasses.replace(layout, modules=tuple(part), alpha=settings.alpha)


def method_lm(run: Run, method: str) -> LM:
    """The base model with the layout of a method's adapters."""
    return dataclasses.replace(scoring.load_lm(run), layout=method_layout(run, method))


class Draws:
    """Batches of packed rows from the meta-training tasks, seeded.

    Attributes: tasks: name -> train split. tokens: how many were drawn, for the budget.
    """

    def __init__(self, run: Run, left_out: str, method: str):
        cfg = run.cfg
        names = data.training_tasks(cfg, left_out)
        tasks = data.load_tasks(run)
        self.lm = method_lm(run, method)
        self.tasks = {name: tasks[name].train for name in names}
        # both forms of MAML draw alike: what differs is what they train
        seed = "maml" if method == "maml_qvo" else method
        self.rng = runtime.rng_for(cfg.seed, seed, data.seed_name(left_out))
        self.tokens = 0

    def task(self) -> str:
        return str(self.rng.choice(list(self.tasks)))

    def rows(self, task: str, size: int) -> list[Row]:
        """`size` distinct examples of a task."""
        train = self.tasks[task]
        size = min(size, len(train))
        # without replacement: what tests an inner step is not what it trained on
        index = self.rng.choice(len(train), size, replace=False)
        rows = []
        for i in index:
            rows.append(scoring.make_row(self.lm, train[i]))
        self.tokens += sum(row.length for row in rows)
        return rows

    def union(self, size: int) -> Iterator[list[Row]]:
        """Yield batches of the tasks' concatenated rows, every pass shuffled anew, without end."""
        every = [(task, i) for task, train in self.tasks.items() for i in range(len(train))]
        rows = []
        while True:
            for number in self.rng.permutation(len(every)):
                task, i = every[number]
                rows.append(scoring.make_row(self.lm, self.tasks[task][i]))
                if len(rows) == size:
                    self.tokens += sum(row.length for row in rows)
                    yield rows
                    rows = []

    def episode(self, settings) -> list[list[Row]]:
        """Of one drawn task: a batch per inner step, and last a query batch. No row is in two.

        Args: settings: the section of the method, with inner_steps and batch_size.
        """
        batches = settings.inner_steps + 1
        rows = self.rows(self.task(), batches * settings.batch_size)
        return [rows[i::batches] for i in range(batches)]


def meta_train(run: Run, method: str, left_out: str) -> None:
    """Train one start, and keep its loss curve and its budget beside it.

    A training returns the start, row 1 of ABMLL's posterior or None, a loss per step, and the step
    whose loss or gradient was not finite, or None. The start is then the adapter before that step.
    """
    began = time.monotonic()
    unit = f"baselines/{method}/{left_out}"
    # the left-out task is in no batch
    draws = Draws(run, left_out, method)
    lm = draws.lm
    backwards = lm.backwards
    trainings = {
        "union": _train_union,
        "maml": _train_maml,
        "maml_qvo": _train_maml,
        "abmll": _train_abmll,
    }
    start, spread, losses, diverged_at = trainings[method](run, draws)

    # a diverged training is kept as it was before the bad step, and its record says so
    folder = run.path / unit
    _save_start(run, folder, start, lm.layout)
    if spread:
        runtime.save_tensors(folder / "spread.safetensors", spread)
    runtime.write_json(folder / "losses.json", [round(loss, 5) for loss in losses])
    run.finish(
        unit,
        "baselines",
        began,
        steps=len(losses),
        tokens=draws.tokens,
        backwards=lm.backwards - backwards,
        labels=sum(len(split) for split in draws.tasks.values()),
        diverged_at=diverged_at,
    )
    if diverged_at is None:
        said = f"loss {np.mean(losses[:5]):.3f} -> {np.mean(losses[-5:]):.3f}"
    else:
        said = f"diverged at step {diverged_at + 1}"
    run.log(f"{method} {data.left_out_label(left_out)}: {said}", True)


def _train_union(run, draws):
    """One adapter on the shuffled concatenation of the tasks (DeGAML, footnote 3).

    The schedule is `collect`'s, longer by the number of tasks (or by `step_share` of that).
    """
    cfg = run.cfg
    settings = cfg.collect
    lm = draws.lm

    # as many steps for every task as `collect` gives to one
    longer = cfg.baselines.union.step_share * len(draws.tasks)
    first = max(1, round(settings.pretrain_steps * longer))
    second = max(1, round(settings.finetune_steps * longer))

    losses = []
    batches = draws.union(settings.batch_size)
    # the A that every adapter of the run begins with
    start = lora.init_adapter(lm.layout, cfg.seed)
    with AdapterTrainer(lm.model, lm.layout, start) as trainer:
        for step in run.track(range(first + second), "union"):
            rows = next(batches)
            loss = trainer.backward(scoring.loss_in_parts(lm, rows, scoring.lm_loss))
            if not math.isfinite(loss):
                return trainer.adapter(), None, losses, step
            trainer.step(collect.learning_rate(settings, step, first))
            losses.append(loss)
    return trainer.adapter(), None, losses, None


@dataclass(frozen=True)
class Moments:
    """AdamW's running moments, (D,) each, and its step count: one state for both levels of MAML."""

    m: Tensor
    v: Tensor
    t: int = 0


def shared_update(
    theta: Tensor,
    grad: Tensor,
    old: Moments,
    lr: float,
    decay: float,
) -> tuple[Tensor, Moments]:
    """One AdamW update, out of place, and the moments after it.

    The gradient may carry a graph; the moments that are returned do not. So a second-order step
    differentiates through the present gradient alone, and old moments are constants.
    Source: MAML-en-LLM's shared moments as docs/choices.md, 15, reads them.
    """
    t = old.t + 1
    m = BETA1 * old.m + (1 - BETA1) * grad
    v = BETA2 * old.v + (1 - BETA2) * grad * grad
    # the bias of moments that began at zero
    mean = m / (1 - BETA1**t)
    square = v / (1 - BETA2**t)
    # A's gradient is exactly zero while B is. The root's slope is infinite there: the clamp keeps
    # it out of the graph.
    size = square.clamp_min(1e-30).sqrt() + EPS
    theta = theta - lr * (mean / size + decay * theta)
    return theta, Moments(m.detach(), v.detach(), t)


def meta_gradient(
    theta: Tensor,
    moments: Moments,
    episodes: list,
    lr: float,
    decay: float,
) -> tuple[Tensor, float, Moments]:
    """Gradient with respect to theta of the mean query loss after the inner steps.

    It is of second order: the inner updates are differentiated through.

    Args:
        episodes: one (inner losses, query loss) per task, each a function of a (D,) vector.
    Returns: the gradient, the mean query loss, and the moments after all inner steps.
    """
    total = torch.zeros_like(theta)
    value = theta.new_zeros(())
    for inner, query in episodes:
        # inner steps: theta moves for this task alone; the moments go on to the next
        start = theta.detach().requires_grad_()
        fast = start
        for loss_fn in inner:
            (grad,) = torch.autograd.grad(loss_fn(fast), fast, create_graph=True)
            fast, moments = shared_update(fast, grad, moments, lr, decay)

        # the query loss at their end, as a function of where they began
        loss = query(fast)
        (grad,) = torch.autograd.grad(loss, start)
        total += grad
        value = value + loss.detach()
    count = len(episodes)
    return total / count, float(value) / count, moments


def vector_loss(lm: LM, rows: list[Row]) -> Callable[[Tensor], Tensor]:
    """The loss of rows as a function of a (D,) adapter vector, differentiable twice.

    Double backward needs plain attention: fused kernels have none.
    """

    def loss(vector):
        # views, so that the loss is a function of the vector
        adapter = lora.unflatten_adapter(vector, lm.layout)
        lora.swap_adapter(lm.model, lm.layout, adapter)
        with sdpa_kernel(SDPBackend.MATH):
            return scoring.lm_loss(lm, rows)

    return loss


def _clip(grad):
    factor = lora.CLIP / (grad.norm() + 1e-6)
    return grad * factor.clamp(max=1.0)


def _train_maml(run, draws):
    """MAML-en-LLM: n tasks per outer step, k inner steps each, one AdamW state for both levels."""
    settings = run.cfg.baselines.maml
    lm = draws.lm
    # one vector instead of many tensors: both levels update it out of place
    start = lora.init_adapter(lm.layout, run.cfg.seed)
    theta = lora.flatten_adapter(start, lm.layout).to(lm.model.device)
    zeros = torch.zeros_like(theta)
    moments = Moments(zeros, zeros)
    losses = []
    diverged_at = None
    for step in run.track(range(settings.meta_steps), "maml"):
        episodes = []
        for _ in range(settings.tasks_per_step):
            batches = draws.episode(settings)
            *inner, query = [vector_loss(lm, rows) for rows in batches]
            episodes.append((inner, query))

        # inner steps: every task moves theta for itself, and all of them move the moments
        grad, loss, moments = meta_gradient(
            theta,
            moments,
            episodes,
            settings.inner_lr,
            WEIGHT_DECAY,
        )
        if not math.isfinite(loss + grad.norm()):
            diverged_at = step
            break

        # outer step: theta itself moves, from the moments that the inner steps left
        grad = _clip(grad)
        theta, moments = shared_update(theta, grad, moments, settings.outer_lr, WEIGHT_DECAY)
        losses.append(loss)
    lora.clear_adapters(lm.model)
    start = lora.unflatten_adapter(theta.cpu(), lm.layout)
    return start, None, losses, diverged_at


def posterior_moments(
    posterior: Tensor,
    layout: Layout,
    settings,
) -> list[tuple[Tensor, Tensor]]:
    """(mean, log sd) of what a (2, D) posterior is a diagonal Gaussian over.

    factor: one pair of (D,), the entries of A and B; row 1 is their log sd.
    product: a pair of (d_out, d_in) per module, the entries of dW. Row 1 holds a second pair of
        factors, sd = |(alpha/r) B A| + e^init_log_sd: ABMLL's structured spread. The absolute value
        keeps it positive.

    Args: settings: the section of ABMLL, here and below.
    """
    if settings.space == "factor":
        return [(posterior[0], posterior[1])]
    mean = lora.unflatten_adapter(posterior[0], layout)
    spread = lora.unflatten_adapter(posterior[1], layout)
    moments = []
    # of every module's whole matrix: what the adapter adds to it, and how sure that is
    for a, _, b, _ in layout.keys():
        update = layout.scale * mean[b] @ mean[a]
        sd = (layout.scale * spread[b] @ spread[a]).abs()
        log_sd = (sd + math.exp(settings.init_log_sd)).log()
        moments.append((update, log_sd))
    return moments


def draw_adapter(
    posterior: Tensor,
    layout: Layout,
    settings,
    rng: torch.Generator,
) -> Adapter:
    """One reparameterised draw: gradients flow through it to the posterior.

    In product space it is of full rank: the mean's A and B, and noise as a dense update.
    """

    def noise(log_sd):
        # drawn where the generator lives: `evaluate` draws on the CPU, alike on every machine
        unit = torch.randn(log_sd.shape, generator=rng, device=rng.device)
        return log_sd.exp() * unit.to(log_sd.device)

    moments = posterior_moments(posterior, layout, settings)
    if settings.space == "factor":
        mean, log_sd = moments[0]
        return lora.unflatten_adapter(mean + noise(log_sd), layout)
    adapter = lora.unflatten_adapter(posterior[0], layout)
    for (path, *_), (_, log_sd) in zip(layout.modules, moments, strict=True):
        adapter[lora.dense_key(path)] = noise(log_sd)
    return adapter


def split_posterior(posterior: Tensor, layout: Layout) -> list[Adapter]:
    """The two rows of a (2, D) posterior in the shape of adapters, for a folder."""
    rows = posterior.detach().cpu()
    return [lora.unflatten_adapter(row, layout) for row in rows]


def load_posterior(folder: Path, layout: Layout) -> Tensor:
    """(2, D) of a PEFT folder that holds the mean, with spread.safetensors beside it."""
    mean = lora.load_adapter(folder, layout)
    spread = runtime.load_tensors(folder / "spread.safetensors")
    rows = [lora.flatten_adapter(adapter, layout) for adapter in (mean, spread)]
    return torch.stack(rows)


def gaussian_kl(
    mean: Tensor,
    log_sd: Tensor,
    mean0: Tensor,
    log_sd0: Tensor,
) -> Tensor:
    """KL(N(mean, sd²) || N(mean0, sd0²)) of diagonal Gaussians, summed."""
    square = torch.exp(2 * log_sd) + (mean - mean0) ** 2
    ratio = square / (2 * torch.exp(2 * log_sd0))
    return (log_sd0 - log_sd + ratio - 0.5).sum()


def negative_log_prior(mean: Tensor, log_sd: Tensor) -> Tensor:
    """-log p(theta) without constants, as in ABML's release.

    mean ~ N(0, 1), precision exp(-2 log_sd) ~ Gamma(1, 0.01).
    """
    precision = torch.exp(-2 * log_sd)
    return 0.5 * (mean**2).sum() + 0.01 * precision.sum()


def _objective(lm, phi, prior, rows, settings, rng):
    """E[NLL] + beta KL(phi || prior) of rows, and the NLL alone: the loss at one draw from phi."""
    adapter = draw_adapter(phi, lm.layout, settings, rng)
    lora.swap_adapter(lm.model, lm.layout, adapter)
    nll = scoring.lm_loss(lm, rows)

    # over the entries that the space is about
    here = posterior_moments(phi, lm.layout, settings)
    there = posterior_moments(prior, lm.layout, settings)
    kl = 0
    for q, p in zip(here, there, strict=True):
        kl = kl + gaussian_kl(*q, *p)
    return nll + settings.beta * kl, nll


def infer_posterior(
    lm: LM,
    prior: Tensor,
    batches: list[list[Row]],
    settings,
    rng: torch.Generator,
) -> Tensor:
    """A task's (2, D) posterior: from the prior, one SGD step per batch on E[NLL] + beta KL."""
    phi = prior.detach()
    for rows in batches:
        # first order: where phi came from is forgotten
        phi = phi.detach().requires_grad_()
        loss, _ = _objective(lm, phi, prior, rows, settings, rng)
        (grad,) = torch.autograd.grad(loss, phi)
        phi = phi - settings.inner_lr * _clip(grad)
    return phi.detach()


def initial_posterior(lm: LM, settings, seed: int) -> Tensor:
    """(2, D): the plain start that all methods share, and a spread of e^init_log_sd.

    In product space that is its least value; its mean is 1.8 times as large.
    """
    layout = lm.layout
    plain = lora.init_adapter(layout, seed)
    mean = lora.flatten_adapter(plain, layout)
    if settings.space == "factor":
        log_sd = torch.full_like(mean, settings.init_log_sd)
        return torch.stack([mean, log_sd])

    # a second pair of factors; a B of zeros would have no gradient with its A
    spread = lora.init_adapter(layout, runtime.seed_for(seed, "spread"))
    rng = torch.Generator().manual_seed(runtime.seed_for(seed, "spread B"))
    for a, _, b, b_shape in layout.keys():
        # an entry of B A sums r products, so its size is sd(B) sd(A) sqrt(r)
        sd = float(spread[a].std())
        unit = layout.scale * sd * math.sqrt(layout.rank)
        size = math.exp(settings.init_log_sd) / unit
        spread[b] = size * torch.randn(b_shape, generator=rng)
    return torch.stack([mean, lora.flatten_adapter(spread, layout)])


def _train_abmll(run, draws):
    """Amortised Bayesian meta-learning: theta is the prior of every task's posterior.

    Both are diagonal Gaussians over the entries of A and B, or of dW (`space`). First order: no
    gradient flows through the inference of a posterior.
    """
    settings = run.cfg.baselines.abmll
    lm = draws.lm
    seed = runtime.seed_for(run.cfg.seed, "abmll", *draws.tasks)
    rng = torch.Generator(run.device).manual_seed(seed)
    theta = initial_posterior(lm, settings, run.cfg.seed)
    theta = theta.to(lm.model.device)
    optimizer = torch.optim.AdamW([theta], lr=settings.outer_lr, weight_decay=0.0)
    losses = []
    diverged_at = None
    for step in run.track(range(settings.meta_steps), "abmll"):
        total = torch.zeros_like(theta)
        value = theta.new_zeros(())
        for _ in range(settings.tasks_per_step):
            # inner steps: from the prior to this task's posterior
            *inner, query = draws.episode(settings)
            phi = infer_posterior(lm, theta, inner, settings, rng)

            # what the posterior is worth on other rows of the task
            phi.requires_grad_()
            prior = theta.detach().clone().requires_grad_()
            loss, nll = _objective(lm, phi, prior, query, settings, rng)
            for moments in posterior_moments(prior, lm.layout, settings):
                loss = loss + settings.beta * negative_log_prior(*moments)

            # phi began at theta, so first order its gradient is theta's too
            grads = torch.autograd.grad(loss, (phi, prior))
            total += sum(grads)
            value += nll.detach()
        if not math.isfinite(value + total.norm()):
            diverged_at = step
            break

        # outer step: the mean gradient over the tasks, clipped as everywhere
        theta.grad = _clip(total / settings.tasks_per_step)
        optimizer.step()
        losses.append(float(value) / settings.tasks_per_step)
    lora.clear_adapters(lm.model)
    return *split_posterior(theta, lm.layout), losses, diverged_at


def _save_start(run, folder, adapter, layout):
    """Write a PEFT folder of the run's whole layout, where what is not trained has B = 0."""
    whole = scoring.load_lm(run).layout
    full = lora.init_adapter(whole, run.cfg.seed)
    ratio = layout.scale / whole.scale
    for a, _, b, _ in layout.keys():
        full[a] = adapter[a]
        full[b] = ratio * adapter[b]
    lora.save_adapter(folder, full, whole, run.cfg.model)
    return full


def _load_start(run, method, task):
    """A method's meta-trained start for a target, in the method's own layout."""
    layout = method_layout(run, method)
    whole = scoring.load_lm(run).layout
    full = lora.load_adapter(_start_folder(run, method, task), whole)
    ratio = whole.scale / layout.scale
    start = {}
    for a, _, b, _ in layout.keys():
        start[a] = full[a]
        start[b] = ratio * full[b]
    return start


def _start_folder(run, method, task):
    """Where a method's meta-trained start for a target lies: trained without the target."""
    left_out = data.left_out_for(run.cfg, task.name)
    return run.path / f"baselines/{method}/{left_out}"


def _adapt_posterior(run, task):
    """ABMLL on a target: the K steps of its meta-training, on the support set."""
    began = time.monotonic()
    settings = run.cfg.baselines.abmll
    lm = scoring.load_lm(run)
    # the learnt theta is the target's prior
    prior = load_posterior(_start_folder(run, "abmll", task), lm.layout)
    seed = runtime.seed_for(run.cfg.seed, "abmll", task.name)
    rng = torch.Generator(run.device).manual_seed(seed)
    rows = [scoring.make_row(lm, example) for example in task.support]
    batches = [rows] * settings.inner_steps
    prior = prior.to(lm.model.device)
    posterior = infer_posterior(lm, prior, batches, settings, rng)
    lora.clear_adapters(lm.model)

    # the folder holds the mean; `evaluate` draws from the posterior
    mean, spread = split_posterior(posterior, lm.layout)
    folder = run.path / f"adapted/abmll/{task.name}"
    runtime.save_tensors(folder / "spread.safetensors", spread)
    facts = {
        "n_support": len(rows),
        "inner_steps": len(batches),
    }
    policy.keep_adapted(run, "abmll", task, mean, facts, began)


def candidate_sft(
    run: Run,
    task: str,
    share: float = 1.0,
) -> list[Strategy]:
    """The SFT settings that a baseline may use on a task, longest first.

    Those of `baselines.sft`, else what the policy proposed. All start from the whole baseline, or
    with `share` 0 from the plain initialisation.
    Raises: UserError: nothing was proposed yet.
    """
    settings = [{"family": "SFT", **sft.model_dump()} for sft in run.cfg.baselines.sft]
    if not settings:
        source = f"adapted/degaml_plus/{task}"
        if not run.finished(source, "adapt", "degaml_plus", redo=False):
            raise UserError(
                f"{run.path / source}: not adapted yet, and the SFT settings of the baselines are "
                "those proposed there; run stage=adapt first, or give baselines.sft"
            )
        episodes = runtime.read_jsonl(run.path / source / "episodes.jsonl")
        settings = [episode["strategy"] for episode in episodes]

    found = []
    for fields in settings:
        if fields.get("family") == "SFT":
            found.append(Strategy.from_dict({**fields, "init_scale": share}))
    # proposals that differed in their start alone are one setting here
    distinct = dict.fromkeys(found)
    return sorted(distinct, key=policy.training_length, reverse=True)


def _adapt_start(run, method, task):
    """SFT from a baseline's start, its setting chosen by cross-validation on the support set."""
    cfg = run.cfg
    began = time.monotonic()
    lm = scoring.load_lm(run)
    support = list(task.support)
    if method == "no_meta":
        share = 0.0  # so its rewards are those of the policy's plain twins
        start = lora.init_adapter(lm.layout, cfg.seed)
        name = f"{task.name}.no_meta"
    else:
        share = 1.0
        start = lora.load_adapter(_start_folder(run, method, task), lm.layout)
        # the folder of the rewards knows nothing of cfg.baselines; the file's name must
        name = f"{task.name}.{method}-{lora.adapter_hash(start)[:8]}"
    # told settings are carried out as they are told, at one rate; proposed ones as the policy's
    fixed = bool(cfg.baselines.sft)
    if fixed:
        name += ".fixed"
    target = Target(task.name, lm, start, cfg.strategies, cfg.seed, warm_up=not fixed)

    # the same choice as the policy's, among the settings that it proposed
    candidates = candidate_sft(run, task.name, share)
    if len(cfg.baselines.sft) == 1:  # nothing to choose: fine-tune as told
        strategy = candidates[0]
        result = dict.fromkeys(policy.NO_GAIN)
    else:
        rewards = Rewards(run, name, target, support)
        results = rewards.of_all(candidates, f"{method} {task.name}")
        strategy, result = policy.choose(results, cfg.policy)

    # the final training sees the whole support set
    refined = strategies.execute_finite(target, strategy, support)
    facts = {
        "strategy": strategy.as_dict(),
        "n_support": len(support),
        **result,
    }
    policy.keep_adapted(run, method, task, refined.adapters[0], facts, began)


def _adapt_qvo(run, task):
    """MAML-en-LLM on a target as TEMPO's appendix H has it: some steps on all support examples."""
    began = time.monotonic()
    settings = run.cfg.baselines.maml
    lm = method_lm(run, "maml_qvo")
    support = list(task.support)
    strategy = Strategy.from_dict(
        {
            "family": "SFT",
            "sft_steps": settings.test_steps,
            "learning_rate": settings.inner_lr,
            "batch_size": len(support),
            "loss": "lm",
            "init_scale": 1.0,
        }
    )
    start = _load_start(run, "maml_qvo", task)
    target = Target(task.name, lm, start, run.cfg.strategies, run.cfg.seed, warm_up=False)
    refined = strategies.execute_finite(target, strategy, support)

    # in the run's own layout, so that whatever reads adapters reads this one
    folder = run.path / f"adapted/maml_qvo/{task.name}"
    full = _save_start(run, folder, refined.adapters[0], lm.layout)
    facts = {"strategy": strategy.as_dict(), "n_support": len(support)}
    policy.keep_adapted(run, "maml_qvo", task, full, facts, began)


def _adapt_matched(run, task):
    """MAML's start, moved as far as the generated adapter lies from the mean adapter.

    Ten steps at 1e-5 leave every task's adapter where the start was. This separates what coupled
    training does from how far it was allowed to move. Distance: Euclidean, over all D entries.
    AdamW's update is nearly proportional to its rate, so a few corrections match it to 5 %; both
    distances are kept.
    """
    cfg = run.cfg
    began = time.monotonic()
    lm = scoring.load_lm(run)
    support = list(task.support)
    # how far the generator moved: from what it would give with no knowledge of the task
    generated = policy.make_target(run, task).start
    mean = collect.mean_adapter(run, lm, task.name)
    goal = _distance(generated, mean, lm.layout)

    start = lora.load_adapter(_start_folder(run, "maml", task), lm.layout)
    target = Target(task.name, lm, start, cfg.strategies, cfg.seed, warm_up=not cfg.baselines.sft)
    candidates = candidate_sft(run, task.name)
    if not candidates:
        raise UserError(
            f"maml_matched {task.name}: the policy proposed no SFT setting; "
            "give one in baselines.sft"
        )
    # the longest training, at whatever rate takes it as far
    longest = candidates[0]
    rate = longest["learning_rate"]
    for _ in range(5):
        strategy = longest.but(learning_rate=rate)
        refined = strategies.execute_finite(target, strategy, support)
        moved = _distance(refined.adapters[0], start, lm.layout)
        if abs(moved / goal - 1) < 0.05:
            break
        rate *= goal / moved

    facts = {
        "strategy": strategy.as_dict(),
        "n_support": len(support),
        "update_norm": moved,
        "matched_to": goal,
    }
    policy.keep_adapted(run, "maml_matched", task, refined.adapters[0], facts, began)


def _distance(a, b, layout):
    difference = lora.flatten_adapter(a, layout) - lora.flatten_adapter(b, layout)
    return float(difference.norm())
