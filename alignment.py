"""Stage 2 of paper T: a Fusion VAE that moves generated adapters towards fine-tuned ones, given a task vector.

    python degaml.py stage=align config=…      -> align/<left_out>/vae.safetensors

An adapter enters as one standardised vector of D weights in token order. The encoder shortens it 1,024 times and pools
it to 32 positions, the latent is fused with what the adapter does to the model's hidden states, and the mirrored
decoder writes D weights again.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import collect
import data
import generator
import lora
import runtime
import scoring
from config import UserError
from lora import Adapter, Layout
from runtime import Run

CHANNELS = (1, 32, 64, 128, 256, 512)
POOLED = 32
STRIDE = 4
BLOCK = STRIDE ** (len(CHANNELS) - 1)  # weights that share one position after the encoder: 1,024


class FusionVAE(nn.Module):
    """(B, D) standardised adapters and (B, d) task vectors -> (B, D) aligned adapters.

    Implements: paper T, section on stage 2, as docs/choices.md, 16, completes it: the described decoder ends at 32,768
    values, so its 32 positions are interpolated to ceil(D / 1024) before the transposed convolutions, and a learned
    table tells neighbouring positions apart. With `residual` the last layer starts at zero and is added to the input,
    so that the untrained network is the identity.
    """

    def __init__(self, size: int, task_width: int, latent: int, pos_table: bool, residual: bool):
        super().__init__()
        self.size, self.blocks, self.residual = size, -(-size // BLOCK), residual
        pairs = list(zip(CHANNELS, CHANNELS[1:], strict=False))
        self.encoder = nn.ModuleList(nn.Conv1d(a, b, STRIDE, STRIDE) for a, b in pairs)
        features = CHANNELS[-1] * POOLED
        self.task = nn.Linear(task_width, CHANNELS[-1])
        self.mean = nn.Linear(features + CHANNELS[-1], latent)
        self.log_var = nn.Linear(features + CHANNELS[-1], latent)
        self.expand = nn.Linear(latent + CHANNELS[-1], features)
        self.position = nn.Parameter(torch.zeros(CHANNELS[-1], self.blocks)) if pos_table else None
        self.decoder = nn.ModuleList(
            nn.ConvTranspose1d(b, a, STRIDE, STRIDE) for a, b in reversed(pairs)
        )
        if residual:
            nn.init.zeros_(self.decoder[-1].weight)
            nn.init.zeros_(self.decoder[-1].bias)

    def forward(
        self, x: Tensor, task: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (aligned, mean, log variance); `noise` (B, latent) draws the latent, None takes its mean."""
        y = F.pad(x, (0, self.blocks * BLOCK - self.size))[..., None]
        for conv in self.encoder:
            y = F.leaky_relu(shorten(y, conv))
        pooled = F.adaptive_avg_pool1d(y.transpose(1, 2), POOLED).flatten(1)
        task = self.task(task)
        fused = torch.cat([pooled, task], 1)
        mean, log_var = self.mean(fused), self.log_var(fused)
        z = mean if noise is None else mean + torch.exp(0.5 * log_var) * noise
        y = self.expand(torch.cat([z, task], 1)).view(len(x), CHANNELS[-1], POOLED)
        y = F.interpolate(y, size=self.blocks, mode="linear", align_corners=False)
        if self.position is not None:
            y = y + self.position
        y = y.transpose(1, 2)
        for conv in self.decoder:
            y = lengthen(F.leaky_relu(y), conv)
        y = y[:, : self.size, 0]
        return (x + y if self.residual else y), mean, log_var


def shorten(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """The convolution on (B, L, C), channels last. Kernel and stride are equal, so it is one matrix product."""
    weight = conv.weight.transpose(1, 2).flatten(1)  # (C', 4 C)
    return F.linear(x.reshape(len(x), -1, weight.shape[1]), weight, conv.bias)


def lengthen(x: Tensor, conv: nn.ConvTranspose1d) -> Tensor:
    """The transposed convolution on (B, L, C), channels last: (B, 4 L, C')."""
    weight = conv.weight.transpose(1, 2).flatten(1)  # (C, 4 C')
    return (x @ weight).view(len(x), -1, conv.out_channels) + conv.bias


def kl_to_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)): summed over the latent, averaged over the batch."""
    return 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1).mean()


@dataclass
class Aligner:
    """A trained alignment: the VAE and the statistics that standardise its inputs.

    Attributes: mean, std: (D,) of the weights, constant within a parameter tensor. task_mean, task_std: (d,).
    """

    vae: FusionVAE
    layout: Layout
    mean: Tensor
    std: Tensor
    task_mean: Tensor
    task_std: Tensor

    def encode(self, adapter: Adapter) -> Tensor:
        """(D,) standardised weights in token order."""
        return (generator.to_tokens(adapter, self.layout).reshape(-1) - self.mean) / self.std

    def decode(self, vector: Tensor) -> Adapter:
        tokens = (vector * self.std + self.mean).view(-1, self.layout.rank, self.layout.width)
        return generator.from_tokens(tokens, self.layout)


# ----------------------------------------------------------------------------------------------------- task vectors


@torch.no_grad()
def task_vector(run: Run, task: str, adapter: Adapter) -> Tensor:
    """(d,) what an adapter does to a task: mean over prompts of its change to the last prompt token's hidden state.

    One definition for training and inference; docs/choices.md, 16.
    """
    lm = scoring.load_lm(run)
    rows = [
        scoring.prompt_row(lm, t) for t in generator.task_texts(run, task)[: run.cfg.align.prompts]
    ]
    key = f"base states/{task}"
    if key not in run.cache:
        run.cache[key] = _last_states(lm, rows, None)
    return (_last_states(lm, rows, adapter) - run.cache[key]).mean(0)


def _last_states(lm: scoring.LM, rows: list, adapter: Adapter | None) -> Tensor:
    """(n, d) float32 states after the last norm at each row's last token."""
    out = [None] * len(rows)
    lora.swap_adapter(lm.model, lm.layout, adapter)
    try:
        for batch in scoring.plan_batches(rows, lm.budget):
            hidden, starts = scoring.hidden_states(lm, [rows[i] for i in batch])
            for i, start in zip(batch, starts, strict=True):
                out[i] = hidden[start + rows[i].length - 1].float().cpu()
    finally:
        lora.clear_adapters(lm.model)
    return torch.stack(out)


def _cached_vector(run: Run, task: str, adapter: Adapter) -> Tensor:
    """A checkpoint's task vector is the same for every left-out set: kept in align/vectors/."""
    prompts = runtime.seed_for(*generator.task_texts(run, task)[: run.cfg.align.prompts])
    path = run.path / f"align/vectors/{task}.{lora.adapter_hash(adapter)}.{prompts:x}.safetensors"
    if not path.exists():
        runtime.save_tensors(path, {"v": task_vector(run, task, adapter)})
    return runtime.load_tensors(path)["v"]


# --------------------------------------------------------------------------------------------------------- training


def train_aligners(run: Run) -> dict:
    """One Fusion VAE per left-out set that the targets need. Writes align/<left_out>/vae.safetensors."""
    cfg = run.cfg
    targets = cfg.data.targets or cfg.data.train_tasks + cfg.data.test_tasks
    wanted = sorted({data.left_out_for(cfg, t) for t in targets}, key=lambda t: (t != "all", t))
    for left_out in run.deal(wanted):
        if not run.finished(f"align/{left_out}", "align"):
            _train_one(run, left_out)
    gains = [
        runtime.read_json(run.path / f"align/{left_out}/DONE.json")["r2"] for left_out in wanted
    ]
    return {"align/r2": sum(gains) / len(gains)}


def collect_pairs(
    run: Run, left_out: str
) -> tuple[dict[str, list[tuple[Tensor, Tensor, Tensor]]], dict]:
    """Training material of every meta-training task, in raw weights.

    Returns: {task: [(input tokens, task vector, target tokens)]} by `align.pairs`, and {task: held-out checkpoint}.
        gen2ckpt maps an adapter generated from a random prompt batch to a random checkpoint, ckpt2ckpt a checkpoint to
        itself (both are mixed half and half for gen2ckpt), alg1 a generated adapter to itself: paper T, Algorithm 1.
    """
    cfg = run.cfg
    lm, a, pairs, held = scoring.load_lm(run), cfg.align, {}, {}
    for task in data.training_tasks(cfg, left_out):
        checkpoints = collect.load_checkpoints(run, lm, task)
        held[task] = checkpoints.pop(0) if len(checkpoints) > 1 else checkpoints[0]
        rng = runtime.rng_for(cfg.seed, "align pairs", data.seed_name(left_out), task)
        made = []
        for draw in range(a.draws):
            goal = checkpoints[int(rng.integers(len(checkpoints)))]
            if a.pairs in ("gen2ckpt", "alg1"):
                generated, _ = generator.generate_adapter(run, task, draw, left_out=left_out)
                vector = task_vector(run, task, generated)
                made.append((generated, vector, goal if a.pairs == "gen2ckpt" else generated))
            if a.pairs in ("gen2ckpt", "ckpt2ckpt"):
                made.append((goal, _cached_vector(run, task, goal), goal))
        flat = {
            id(x): generator.to_tokens(x, lm.layout).reshape(-1)
            for start, _, goal in made
            for x in (start, goal)
        }
        pairs[task] = [
            (flat[id(x)], v, flat[id(y)]) for x, v, y in made
        ]  # a checkpoint serves many pairs
    return pairs, held


def standardisation(layout: Layout, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(D,) mean and standard deviation per parameter tensor, from (n, D) adapters in token order."""
    mean, std = torch.empty(vectors.shape[1]), torch.empty(vectors.shape[1])
    at = 0
    for _, _, d_in, d_out in layout.modules:
        for width in (d_in, d_out):
            part = vectors[:, at : at + layout.rank * width]
            mean[at : at + part.shape[1]], std[at : at + part.shape[1]] = (
                part.mean(),
                part.std() + 1e-10,
            )
            at += part.shape[1]
    return mean, std


def vae_loss(
    vae: FusionVAE, params: dict, batch, noise: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, reconstruction MSE, KL) of the VAE with the given parameters."""
    x, task, target = batch
    out, mean, log_var = (part.float() for part in functional_call(vae, params, (x, task, noise)))
    mse, kl = F.mse_loss(out, target), kl_to_standard_normal(mean, log_var)
    return mse + weight * kl, mse, kl


def fomaml_gradient(vae: FusionVAE, support, query, noises, lr: float, steps: int, weight: float):
    """First-order meta-gradient: inner SGD on the support pairs, then the query gradient at its end.

    Returns: gradients by parameter name, query MSE, query KL.
    """

    def gradient(params: dict, batch, noise) -> tuple[dict, Tensor, Tensor]:
        params = {k: v.requires_grad_() for k, v in params.items()}
        loss, mse, kl = vae_loss(vae, params, batch, noise, weight)
        grads = torch.autograd.grad(loss, list(params.values()))
        return dict(zip(params, grads, strict=True)), mse.detach(), kl.detach()

    params = {k: v.detach() for k, v in vae.named_parameters()}
    for _ in range(steps):
        grads, _, _ = gradient(params, support, noises[0])
        params = {k: (v - lr * grads[k]).detach() for k, v in params.items()}
    grads, mse, kl = gradient(params, query, noises[1])
    return grads, float(mse), float(kl)


def _train_one(run: Run, left_out: str) -> None:
    """FOMAML over the meta-training tasks (paper T, Algorithm 1), the KL weight rising linearly."""
    cfg = run.cfg
    a, started, lm = cfg.align, time.monotonic(), scoring.load_lm(run)
    pairs, held = collect_pairs(run, left_out)
    aligner = _new_aligner(cfg, lm.layout, pairs)
    vae = aligner.vae.to(run.device).train()
    opt = torch.optim.Adam(vae.parameters(), lr=a.meta_lr)
    label = "align on all tasks" if left_out == "all" else f"align without {left_out}"
    for epoch in run.track(range(a.meta_epochs), label):
        rng = runtime.rng_for(cfg.seed, "align", data.seed_name(left_out), epoch)
        noise = torch.Generator().manual_seed(
            runtime.seed_for(cfg.seed, "align noise", data.seed_name(left_out), epoch)
        )
        weight = a.kl_weight * epoch / max(1, a.meta_epochs - 1)
        task = str(rng.choice(list(pairs)))
        order = rng.permutation(len(pairs[task]))
        half = max(1, min(a.batch_size, len(order) // 2))
        support, query = (
            _batch(run, aligner, pairs[task], index) for index in (order[:half], order[-half:])
        )
        noises = [torch.randn(half, a.latent, generator=noise).to(run.device) for _ in range(2)]
        with torch.autocast(run.device, torch.bfloat16, enabled=run.dtype == torch.bfloat16):
            grads, mse, kl = fomaml_gradient(
                vae, support, query, noises, a.inner_lr, a.inner_steps, weight
            )
        if not (math.isfinite(mse) and math.isfinite(kl)):
            raise UserError(
                f"{label}: the loss is not finite at meta-epoch {epoch + 1}; lower align.meta_lr"
            )
        for name, p in vae.named_parameters():
            p.grad = grads[name]
        opt.step()
        if epoch % 10 == 9 or epoch + 1 == a.meta_epochs:
            run.metric(
                stage="align",
                unit=left_out,
                step=epoch + 1,
                loss=round(mse, 5),
                kl=round(kl, 4),
                lr=a.meta_lr,
            )
    folder = run.path / f"align/{left_out}"
    runtime.save_tensors(
        folder / "vae.safetensors",
        {f"vae.{k}": v.detach().cpu() for k, v in vae.state_dict().items()}
        | {k: getattr(aligner, k) for k in ("mean", "std", "task_mean", "task_std")},
    )
    facts = held_out_fit(run, aligner, left_out, held, pairs)
    run.finish(
        f"align/{left_out}",
        "align",
        started,
        **facts,
        kl=kl,
        steps=a.meta_epochs,
        parameters=sum(p.numel() for p in vae.parameters()),
    )
    run.log(
        f"{label}: R2 on held-out checkpoints {facts['r2']:.3f}, from generated adapters "
        f"{facts['r2_generated']:.3f} (unaligned {facts['r2_before']:.3f}) in "
        f"{time.monotonic() - started:.0f} s",
        True,
    )


def _batch(run: Run, aligner: Aligner, pairs: list, index: np.ndarray) -> tuple[Tensor, ...]:
    """(inputs, task vectors, targets) of some pairs, standardised; empty where there are none."""
    if not len(index):
        return ()
    scales = (
        (aligner.mean, aligner.std),
        (aligner.task_mean, aligner.task_std),
        (aligner.mean, aligner.std),
    )
    return tuple(
        ((torch.stack([pairs[i][k] for i in index]) - mean) / std).to(run.device)
        for k, (mean, std) in enumerate(scales)
    )


def _new_aligner(cfg, layout: Layout, pairs: dict) -> Aligner:
    """An untrained VAE with the statistics of its training material."""
    a, everything = cfg.align, [p for task in pairs.values() for p in task]
    mean, std = standardisation(layout, torch.stack([y for _, _, y in everything]))
    vectors = torch.stack([v for _, v, _ in everything])
    torch.manual_seed(runtime.seed_for(cfg.seed, "align", *pairs))
    vae = FusionVAE(layout.size, vectors.shape[1], a.latent, a.pos_table, a.residual)
    return Aligner(vae, layout, mean, std, vectors.mean(0), vectors.std(0) + 1e-8)


@torch.no_grad()
def held_out_fit(
    run: Run, aligner: Aligner, left_out: str, held: dict[str, Adapter], pairs: dict
) -> dict[str, float]:
    """R² on each task's held-out checkpoint against the mean predictor (0 = the mean of the training targets).

    r2: from the checkpoint itself. r2_generated: from the first generated adapter. r2_before: that adapter unaligned.
    """
    mean = torch.stack([y for task in pairs.values() for _, _, y in task]).mean(0)
    errors = {"r2": 0.0, "r2_generated": 0.0, "r2_before": 0.0}
    total = 0.0
    for task, adapter in held.items():
        goal = generator.to_tokens(adapter, aligner.layout).reshape(-1)
        total += float(((goal - mean) ** 2).sum())
        generated, _ = generator.generate_adapter(run, task, 0, left_out=left_out)
        before = generator.to_tokens(generated, aligner.layout).reshape(-1)
        for key, source in (("r2", adapter), ("r2_generated", generated)):
            out = generator.to_tokens(
                align_adapter(run, aligner, task, source), aligner.layout
            ).reshape(-1)
            errors[key] += float(((out - goal) ** 2).sum())
        errors["r2_before"] += float(((before - goal) ** 2).sum())
    return {k: 1 - v / total for k, v in errors.items()}


# --------------------------------------------------------------------------------------------------------- alignment


def load_aligner(run: Run, left_out: str) -> Aligner:
    """The trained VAE of a left-out set, kept for the process. Raises: UserError."""
    key = f"align/{left_out}"
    if key not in run.cache:
        lm, a = scoring.load_lm(run), run.cfg.align
        if not run.finished(key, "align", redo=False):
            raise UserError(f"{run.path / key}: not trained yet; run stage=align")
        state = runtime.load_tensors(run.path / key / "vae.safetensors")
        vae = FusionVAE(lm.layout.size, len(state["task_mean"]), a.latent, a.pos_table, a.residual)
        vae.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("vae.")})
        run.cache[key] = Aligner(
            vae.to(run.device).eval().requires_grad_(False),
            lm.layout,
            *(state[k] for k in ("mean", "std", "task_mean", "task_std")),
        )
    return run.cache[key]


@torch.no_grad()
def align_adapter(run: Run, aligner: Aligner, task: str, adapter: Adapter) -> Adapter:
    """Move an adapter of a task through the VAE; the latent is its mean, so the result is a function of the input."""
    vector = (task_vector(run, task, adapter) - aligner.task_mean) / aligner.task_std
    with torch.autocast(run.device, torch.bfloat16, enabled=run.dtype == torch.bfloat16):
        out, _, _ = aligner.vae(
            aligner.encode(adapter)[None].to(run.device), vector[None].to(run.device)
        )
    return aligner.decode(out[0].float().cpu())
