"""Stage 2 of TEMPO: a Fusion VAE that moves generated adapters towards fine-tuned ones.

    python degaml.py stage=align config=configs/tempo-qwen2.5-0.5b.yaml

Writes align/<left_out>/vae.safetensors, one VAE per left-out set.

An adapter enters as one standardised vector of D weights in token order. The encoder makes it
1,024 times shorter and pools it to 32 positions. The latent is joined with the task vector: what
the adapter does to the model's hidden states. The mirrored decoder writes D weights again.
"""

from __future__ import annotations

import copy
import math
import time
from itertools import chain, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import collect
import conditions
import data
import generator
import lora
import methods
import packing
import runtime
import scoring
from config import UserError
from lora import Adapter, Layout
from runtime import Run

CHANNELS = (1, 32, 64, 128, 256, 512)
WIDEST = CHANNELS[-1]
POOLED = 32
STRIDE = 4
BLOCK = STRIDE ** (len(CHANNELS) - 1)  # weights that share a position after the encoder: 1,024


class FusionVAE(nn.Module):
    """(B, D) standardised adapters and (B, d) task vectors -> (B, D) aligned adapters.

    Implements: TEMPO, stage 2. Differs: the described decoder ends at 32,768 values, so its 32
    positions are interpolated to ceil(D / 1024), and a learned table tells neighbouring positions
    apart (docs/choices.md, 16).
    """

    def __init__(self, size, task_width, latent, pos_table, residual):
        super().__init__()
        self.size = size
        self.blocks = math.ceil(size / BLOCK)
        self.residual = residual
        features = WIDEST * POOLED

        self.encoder = nn.ModuleList()
        for few, many in pairwise(CHANNELS):
            self.encoder.append(nn.Conv1d(few, many, STRIDE, STRIDE))

        self.task = nn.Linear(task_width, WIDEST)
        self.mean = nn.Linear(features + WIDEST, latent)
        self.log_var = nn.Linear(features + WIDEST, latent)
        self.expand = nn.Linear(latent + WIDEST, features)
        self.position = None
        if pos_table:
            table = torch.zeros(WIDEST, self.blocks)
            self.position = nn.Parameter(table)

        self.decoder = nn.ModuleList()
        for many, few in pairwise(reversed(CHANNELS)):
            self.decoder.append(nn.ConvTranspose1d(many, few, STRIDE, STRIDE))
        if residual:
            # The untrained network is the identity: a short training cannot destroy the adapter.
            last = self.decoder[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x, task, noise=None):
        """Returns (aligned, mean, log variance) of the latent.

        `noise` (B, latent) draws the latent; without it the latent is its mean.
        """
        # Encode, channels last: (B, blocks * 1024, 1) -> (B, blocks, 512).
        missing = self.blocks * BLOCK - self.size
        y = F.pad(x, (0, missing)).unsqueeze(-1)
        for conv in self.encoder:
            y = F.leaky_relu(shorten(y, conv))
        y = y.transpose(1, 2)
        pooled = F.adaptive_avg_pool1d(y, POOLED).flatten(1)

        # Fuse with the task vector, and draw the latent.
        task = self.task(task)
        fused = torch.cat([pooled, task], 1)
        mean = self.mean(fused)
        log_var = self.log_var(fused)
        latent = mean
        if noise is not None:
            latent = mean + torch.exp(0.5 * log_var) * noise

        # Spread 32 positions over all the blocks; the table tells them apart.
        y = self.expand(torch.cat([latent, task], 1))
        y = y.view(len(x), WIDEST, POOLED)
        y = F.interpolate(y, size=self.blocks, mode="linear", align_corners=False)
        if self.position is not None:
            y = y + self.position
        y = y.transpose(1, 2)

        # Decode: (B, blocks, 512) -> (B, blocks * 1024, 1).
        for conv in self.decoder:
            y = lengthen(F.leaky_relu(y), conv)
        out = y[:, : self.size, 0]
        if self.residual:
            out = x + out
        return out, mean, log_var


def shorten(x, conv):
    """A convolution of the encoder on (B, L, C), channels last: (B, L / 4, C')."""
    # Kernel and stride are equal, so windows do not overlap: it is one matrix product.
    weight = conv.weight.transpose(1, 2).flatten(1)  # (C', 4 C)
    windows = x.reshape(len(x), -1, weight.shape[1])
    return F.linear(windows, weight, conv.bias)


def lengthen(x, conv):
    """A transposed convolution of the decoder on (B, L, C), channels last: (B, 4 L, C')."""
    weight = conv.weight.transpose(1, 2).flatten(1)  # (C, 4 C')
    windows = x @ weight
    return windows.view(len(x), -1, conv.out_channels) + conv.bias


def kl_to_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)): summed over the latent, averaged over the batch."""
    per_value = mean**2 + log_var.exp() - 1 - log_var
    return 0.5 * per_value.sum(1).mean()


class Aligner(nn.Module):
    """A Fusion VAE with the statistics that standardise what goes into it.

    Attributes:
        mean, std: (D,) of the weights, constant within a parameter tensor.
        task_mean, task_std: (d,) of the task vectors.
    """

    def __init__(self, align, layout: Layout, mean, std, task_mean, task_std):
        super().__init__()
        self.layout = layout
        self.vae = FusionVAE(
            layout.size,
            len(task_mean),
            align.latent,
            align.pos_table,
            align.residual,
        )
        # Buffers: one state_dict holds all there is to save.
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_buffer("task_mean", task_mean)
        self.register_buffer("task_std", task_std)

    def standardise(self, weights: Tensor) -> Tensor:
        return (weights - self.mean) / self.std

    def standardise_task(self, vectors: Tensor) -> Tensor:
        return (vectors - self.task_mean) / self.task_std


def to_vector(adapter: Adapter, layout: Layout) -> Tensor:
    """(D,) weights in token order, so that the VAE's blocks fall together with tokens."""
    tokens = generator.to_tokens(adapter, layout)
    return tokens.reshape(-1)


@torch.no_grad()
def task_vector(run: Run, prompts: str, adapter: Adapter) -> Tensor:
    """(d,) what an adapter does to a task: the change it makes to a prompt's last hidden state.

    The mean over `align.prompts` prompts. Training and use share this definition.
    Args: prompts: the prompt set (`conditions.prompt_set`), here and below.
    """
    lm = scoring.load_lm(run)
    texts = prompt_texts(run, prompts)
    rows = [scoring.prompt_row(lm, text) for text in texts]

    # The bare model's states are the same for every adapter.
    key = f"base states/{prompts}"
    if key not in run.cache:
        run.cache[key] = last_states(lm, rows, None)
    bare = run.cache[key]
    adapted = last_states(lm, rows, adapter)
    return (adapted - bare).mean(0)


def prompt_texts(run, prompts):
    """The unlabelled prompts that a task vector is made from."""
    texts = conditions.task_texts(run, prompts)
    return texts[: run.cfg.align.prompts]


def last_states(lm, rows, adapter):
    """(n, d) float32 states after the last norm, at each row's last token."""
    states = {}
    lora.swap_adapter(lm.model, lm.layout, adapter)
    try:
        for batch in packing.plan_batches(rows, lm.budget):
            members = [rows[i] for i in batch]
            hidden, starts = scoring.hidden_states(lm, members)
            for i, start in zip(batch, starts, strict=True):
                last = hidden[start + rows[i].length - 1]
                states[i] = last.float().cpu()
    finally:
        lora.clear_adapters(lm.model)
    return torch.stack([states[i] for i in sorted(states)])


def checkpoint_vector(run, prompts, checkpoint):
    """A checkpoint's task vector. It is the same for every left-out set: kept in align/vectors/."""
    adapter_id = lora.adapter_hash(checkpoint)
    prompts_id = runtime.seed_for(*prompt_texts(run, prompts))
    name = f"{prompts}.{adapter_id}.{prompts_id:x}.safetensors"
    path = run.path / "align/vectors" / name
    if not path.exists():
        vector = task_vector(run, prompts, checkpoint)
        runtime.save_tensors(path, {"v": vector})
    return runtime.load_tensors(path)["v"]


class Pair(NamedTuple):
    """One piece of training material, in raw weights: (D,) to (D,), given a (d,) task vector."""

    source: Tensor
    task_vector: Tensor
    goal: Tensor


def collect_pairs(run: Run, left_out: str):
    """Training material of every meta-training task, and a checkpoint of each that it leaves out.

    Returns: {task: list of Pair} and {task: held-out checkpoint}. The pairs, by `align.pairs`:
        gen2ckpt: from an adapter generated from a random prompt batch to a random checkpoint, and
            as often from that checkpoint to itself.
        ckpt2ckpt: from a random checkpoint to itself.
        alg1: from a generated adapter to itself, as TEMPO's Algorithm 1 prints it.
    """
    cfg = run.cfg
    kind = cfg.align.pairs
    lm = scoring.load_lm(run)
    pairs = {}
    held = {}
    for task in data.training_tasks(cfg, left_out):
        prompts = conditions.prompt_set(cfg, task, left_out)
        checkpoints = list(collect.load_checkpoints(run, lm, task))
        held[task] = checkpoints[0]
        if len(checkpoints) > 1:
            checkpoints = checkpoints[1:]

        pairs[task] = []
        flat = [to_vector(checkpoint, lm.layout) for checkpoint in checkpoints]
        rng = runtime.rng_for(cfg.seed, "align pairs", data.seed_name(left_out), task)
        for draw in range(cfg.align.draws):
            chosen = int(rng.integers(len(checkpoints)))
            goal = flat[chosen]

            if kind in ("gen2ckpt", "alg1"):
                generated, _ = generator.generate_adapter(run, task, draw, left_out=left_out)
                vector = task_vector(run, prompts, generated)
                source = to_vector(generated, lm.layout)
                target = source if kind == "alg1" else goal
                pairs[task].append(Pair(source, vector, target))

            if kind in ("gen2ckpt", "ckpt2ckpt"):
                vector = checkpoint_vector(run, prompts, checkpoints[chosen])
                pairs[task].append(Pair(goal, vector, goal))
    return pairs, held


def fit_aligner(cfg, layout, pairs) -> Aligner:
    """An untrained aligner with the statistics of its training material."""
    material = chain(*pairs.values())
    _, vectors, goals = zip(*material, strict=True)
    mean, std = standardisation(layout, torch.stack(goals))
    vectors = torch.stack(vectors)
    task_std = vectors.std(0) + 1e-8

    seed = runtime.seed_for(cfg.seed, "align", *pairs)
    torch.manual_seed(seed)
    return Aligner(cfg.align, layout, mean, std, vectors.mean(0), task_std)


def standardisation(layout: Layout, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(D,) mean and standard deviation per parameter tensor, from (n, D) adapters in token order.

    Raw weights are so small that the KL would drown their squared error.
    """
    sizes = []
    for _, _, d_in, d_out in layout.modules:
        sizes.append(layout.rank * d_in)
        sizes.append(layout.rank * d_out)

    means = []
    stds = []
    for part in vectors.split(sizes, dim=1):
        width = part.shape[1]
        std = part.std() + 1e-10
        means.append(part.mean().expand(width))
        stds.append(std.expand(width))
    return torch.cat(means), torch.cat(stds)


def make_batch(run, aligner, pairs, rng):
    """(sources, task vectors, goals, noise) of some pairs, standardised, on the device."""
    sources, vectors, goals = zip(*pairs, strict=True)
    latent = run.cfg.align.latent
    batch = (
        aligner.standardise(torch.stack(sources)),
        aligner.standardise_task(torch.stack(vectors)),
        aligner.standardise(torch.stack(goals)),
        torch.randn(len(pairs), latent, generator=rng),
    )
    return [part.to(run.device) for part in batch]


def vae_loss(vae, batch, kl_weight):
    """(loss, reconstruction MSE, KL) of one batch, () float32 each."""
    sources, vectors, goals, noise = batch
    out, mean, log_var = vae(sources, vectors, noise)
    mse = F.mse_loss(out.float(), goals)
    kl = kl_to_standard_normal(mean.float(), log_var.float())
    return mse + kl_weight * kl, mse, kl


def fomaml_gradient(vae, support, query, inner_lr, kl_weight):
    """Leave the first-order meta-gradient of two batches on the VAE's parameters.

    Implements: TEMPO, Algorithm 1, one task. Returns: MSE and KL of the query batch.
    """
    # Inner step, on a copy: one step of plain SGD on the support pairs.
    stepped = copy.deepcopy(vae)
    loss, _, _ = vae_loss(stepped, support, kl_weight)
    loss.backward()
    with torch.no_grad():
        for parameter in stepped.parameters():
            parameter -= inner_lr * parameter.grad

    # Outer step: the gradient of the query pairs where the inner step led.
    stepped.zero_grad()
    loss, mse, kl = vae_loss(stepped, query, kl_weight)
    loss.backward()

    # First order: it serves as it stands, without the derivative of the inner step.
    for parameter, there in zip(vae.parameters(), stepped.parameters(), strict=True):
        parameter.grad = there.grad
    return mse.item(), kl.item()


def train_aligners(run: Run) -> dict:
    """One Fusion VAE per left-out set that the targets need, if any method begins from it."""
    cfg = run.cfg
    if not set(methods.ALIGNED) & set(cfg.evaluate.methods):
        return {}  # `run.sh` calls every stage
    wanted = data.left_out_sets(cfg)

    # A rank takes a whole VAE: a batch of two pairs has nothing to divide.
    for left_out in run.deal(wanted):
        if not run.finished(f"align/{left_out}", "align"):
            make_aligner(run, left_out)

    fits = []
    for left_out in wanted:
        record = runtime.read_json(run.path / f"align/{left_out}/DONE.json")
        fits.append(record["r2"])
    return {"align/r2": sum(fits) / len(fits)}


def make_aligner(run: Run, left_out: str) -> None:
    """Collect the pairs of one left-out set, train its VAE, store it, and say how well it fits."""
    began = time.monotonic()
    folder = f"align/{left_out}"
    pairs, held = collect_pairs(run, left_out)
    lm = scoring.load_lm(run)
    aligner = fit_aligner(run.cfg, lm.layout, pairs)
    label = f"align {data.left_out_label(left_out)}"
    kl = train_vae(run, left_out, label, aligner, pairs)
    state = {name: value.cpu() for name, value in aligner.state_dict().items()}
    runtime.save_tensors(run.path / folder / "vae.safetensors", state)

    fit = held_out_fit(run, aligner, left_out, held, pairs)
    size = sum(parameter.numel() for parameter in aligner.parameters())
    steps = run.cfg.align.meta_epochs
    run.finish(folder, "align", began, **fit, kl=kl, steps=steps, parameters=size)
    run.log(
        f"{label}: R2 on held-out checkpoints {fit['r2']:.3f}, from generated adapters "
        f"{fit['r2_generated']:.3f} (unaligned {fit['r2_before']:.3f}) "
        f"in {time.monotonic() - began:.0f} s",
        True,
    )


def train_vae(run, left_out, label, aligner, pairs):
    """FOMAML over the meta-training tasks (TEMPO, Algorithm 1). Returns: the last KL.

    Raises: UserError: a loss that is not finite.
    """
    cfg = run.cfg
    align = cfg.align
    vae = aligner.vae.to(run.device).train()
    optimizer = torch.optim.Adam(vae.parameters(), lr=align.meta_lr)
    for epoch in run.track(range(align.meta_epochs), label):
        # Randomness depends on the epoch alone.
        key = (data.seed_name(left_out), epoch)
        rng = runtime.rng_for(cfg.seed, "align", *key)
        noise_seed = runtime.seed_for(cfg.seed, "align noise", *key)
        noise_rng = torch.Generator().manual_seed(noise_seed)

        # One task an epoch; its pairs make a support half and a query half.
        task = str(rng.choice(list(pairs)))
        order = rng.permutation(len(pairs[task]))
        shuffled = [pairs[task][i] for i in order]
        half = max(1, min(align.batch_size, len(shuffled) // 2))
        support = make_batch(run, aligner, shuffled[:half], noise_rng)
        query = make_batch(run, aligner, shuffled[-half:], noise_rng)

        # The KL's weight rises linearly from 0: first learn to rebuild, then to be smooth.
        kl_weight = align.kl_weight * epoch / max(1, align.meta_epochs - 1)
        with generator.autocast(run):
            mse, kl = fomaml_gradient(vae, support, query, align.inner_lr, kl_weight)
        if not math.isfinite(mse + kl):
            where = f"{label}: the loss is not finite at meta-epoch {epoch + 1}"
            raise UserError(f"{where}; lower align.meta_lr")

        # Adam starts from the meta-parameters, not from where the inner step led.
        optimizer.step()
        if epoch % 10 == 9 or epoch + 1 == align.meta_epochs:
            run.metric(
                stage="align",
                unit=left_out,
                step=epoch + 1,
                loss=round(mse, 5),
                kl=round(kl, 4),
                lr=align.meta_lr,
            )
    return kl


@torch.no_grad()
def held_out_fit(run, aligner, left_out, held, pairs):
    """R² on each task's held-out checkpoint; 0 is the mean of the training goals.

    Returns: r2, from the checkpoint itself; r2_generated, from the first generated adapter;
        r2_before, that adapter unaligned.
    """
    goals = [pair.goal for pair in chain(*pairs.values())]
    mean = torch.stack(goals).mean(0)

    total = 0.0
    errors = {"r2": 0.0, "r2_generated": 0.0, "r2_before": 0.0}
    for task, checkpoint in held.items():
        goal = to_vector(checkpoint, aligner.layout)
        total += squared_error(mean, goal)
        generated, _ = generator.generate_adapter(run, task, 0, left_out=left_out)
        prompts = conditions.prompt_set(run.cfg, task, left_out)
        guesses = {
            "r2": align_adapter(run, aligner, prompts, checkpoint),
            "r2_generated": align_adapter(run, aligner, prompts, generated),
            "r2_before": generated,
        }
        for name, guess in guesses.items():
            errors[name] += squared_error(to_vector(guess, aligner.layout), goal)
    return {name: 1 - error / total for name, error in errors.items()}


def squared_error(guess, goal):
    squares = (guess - goal) ** 2
    return float(squares.sum())


def load_aligner(run: Run, left_out: str) -> Aligner:
    """The trained VAE of a left-out set, kept for the process. Raises: UserError: none is there."""
    key = f"align/{left_out}"
    if key not in run.cache:
        if not run.finished(key, "align", redo=False):
            raise UserError(f"{run.path / key}: not trained yet; run stage=align")
        state = runtime.load_tensors(run.path / key / "vae.safetensors")
        layout = scoring.load_lm(run).layout
        statistics = [state[name] for name in ("mean", "std", "task_mean", "task_std")]
        aligner = Aligner(run.cfg.align, layout, *statistics)
        aligner.load_state_dict(state)
        aligner.requires_grad_(False).eval()
        aligner.vae.to(run.device)
        run.cache[key] = aligner
    return run.cache[key]


@torch.no_grad()
def align_adapter(run: Run, aligner: Aligner, prompts: str, adapter: Adapter) -> Adapter:
    """Move an adapter of a task through the VAE: equal in, equal out.

    The latent is its mean, or with `align.sample` one seeded draw (TEMPO, F.5).
    """
    source = aligner.standardise(to_vector(adapter, aligner.layout))
    vector = aligner.standardise_task(task_vector(run, prompts, adapter))
    batch = source[None].to(run.device)
    vectors = vector[None].to(run.device)
    noise = None
    if run.cfg.align.sample:
        # drawn on the CPU, alike on every machine
        rng = torch.Generator().manual_seed(runtime.seed_for(run.cfg.seed, "latent", prompts))
        noise = torch.randn(1, run.cfg.align.latent, generator=rng).to(run.device)
    with generator.autocast(run):
        out, _, _ = aligner.vae(batch, vectors, noise)
    weights = out[0].float().cpu() * aligner.std + aligner.mean
    tokens = weights.view(-1, aligner.layout.rank, aligner.layout.width)
    return generator.from_tokens(tokens, aligner.layout)
