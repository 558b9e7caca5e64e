"""Paper D, stage 1: LoRA checkpoints of the training tasks, and the generator from a batch of prompts to an adapter.

    python degaml.py stage=collect config=configs/smollm2.yaml     -> adapters/<task>/step_0060.safetensors …
    python degaml.py stage=generator config=configs/smollm2.yaml   -> generator/<left out task>/generator.safetensors

Everything is leave-one-out: the generator of a training task is trained without it, the one named `none` on all.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import collect
import data
import lora
import runtime
import scoring
from config import UserError
from data import Example
from fastconv import SameConv2d
from lora import Adapter, Layout
from runtime import Run

# ------------------------------------------------------------------------------------------------------ prompt states


def encode_prompts(run: Run) -> None:
    """Cache the frozen encoder's token states of every task's prompts, once per prompt.

    Writes prompts/<task>/states.npy, (prompts, L, d) float16, and pooled.npy, (prompts, d) float32.
    """
    tasks = data.load_tasks(run)
    for name in run.deal(list(tasks)):
        if not run.finished(f"prompts/{name}", "prompts"):
            start, folder = time.monotonic(), run.path / f"prompts/{name}"
            states, pooled = encode_texts(run, task_texts(run, name), f"encode {name}")
            runtime.save_array(folder / "states.npy", states.numpy())
            runtime.save_array(folder / "pooled.npy", pooled.numpy())
            run.finish(f"prompts/{name}", "prompts", start)


def task_texts(run: Run, name: str) -> list[str]:
    """The task's unlabelled prompts exactly as the base model reads them.

    Question-only text instead made generated adapters no better than their mean (trial run).
    """
    lm = scoring.load_lm(run)
    if lm.form == "cloze":
        return list(data.load_tasks(run)[name].prompts)
    return [
        scoring.input_text(lm, Example("", p, ("",))) for p in data.load_tasks(run)[name].prompts
    ]


def check_encoder(cfg) -> None:
    """Raises: UserError: the encoder is not to be had, or generator.flow begins with another width than its states'."""
    from transformers import AutoConfig

    g = cfg.generator
    try:
        width = AutoConfig.from_pretrained(g.encoder).hidden_size
    except (OSError, ValueError) as e:
        raise _no_encoder(g.encoder, e) from None
    if g.flow[0][2] != width:
        raise UserError(
            f"generator.flow: its first entry ends in {g.flow[0][2]}, the width of {g.encoder} is {width}"
        )


def _no_encoder(name: str, why: Exception) -> UserError:
    return UserError(
        f"generator.encoder={name}: cannot be loaded ({str(why).splitlines()[0][:120]}); run `make "
        "assets` or name a folder or hub id"
    )


@torch.no_grad()
def encode_texts(run: Run, texts: list[str], label: str = "encode") -> tuple[Tensor, Tensor]:
    """(n, L, d) float16 states at all L positions, padding included, and (n, d) float32 mean-pooled, L2-normalised
    embeddings.

    Source: paper D, E.1 (all-MiniLM-L6-v2, last hidden state, no pooling).
    """
    if "encoder" not in run.cache:
        check_encoder(run.cfg)
        from transformers import AutoModel, AutoTokenizer

        try:
            run.cache["encoder"] = (
                AutoTokenizer.from_pretrained(run.cfg.generator.encoder),
                AutoModel.from_pretrained(run.cfg.generator.encoder).to(run.device).eval(),
            )
        except (OSError, ValueError) as e:
            raise _no_encoder(run.cfg.generator.encoder, e) from None
    tokenizer, encoder = run.cache["encoder"]
    states, pooled = [], []
    for at in run.track(range(0, len(texts), 32), label):
        x = tokenizer(
            texts[at : at + 32],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=run.cfg.generator.max_length,
        ).to(run.device)
        h = encoder(**x).last_hidden_state
        m = x["attention_mask"][..., None]
        states.append(h.half().cpu())
        pooled.append(F.normalize((h * m).sum(1) / m.sum(1), dim=-1).cpu())
    return torch.cat(states), torch.cat(pooled)


def load_states(run: Run, task: str) -> np.ndarray:
    """(prompts, L, d) float16, memory-mapped. Raises: UserError: not made yet, or damaged."""
    return runtime.load_array(run.path / f"prompts/{task}/states.npy", "r")


def load_pooled(run: Run, task: str) -> Tensor:
    """(prompts, d) float32, the prompts' pooled embeddings. Raises: UserError: not made yet, or damaged."""
    return torch.from_numpy(runtime.load_array(run.path / f"prompts/{task}/pooled.npy"))


def draw_prompts(cfg, task: str, count: int, *key) -> np.ndarray:
    """Indices of one prompt batch: `num_prompts` drawn without replacement and shuffled; repeated cyclically if the
    task has fewer."""
    n = cfg.generator.num_prompts
    order = runtime.rng_for(cfg.generator.seed, "prompts", task, *key).permutation(count)
    return np.resize(order, n)


class HyperConvLayer(nn.Module):
    """(B, N, L, C) -> (B, N', L', C'): two crossed pairs of 2-D convolutions, then one over the prompt axis.

    Implements: paper D, eq. 9 with Drag-and-Drop's axes: W = conv C->C' over (L, N), then L->L' over (N, C');
    H = conv L->L' over (N, C), then C->C' over (L', N), then tanh; out = conv N->N' of (W + H + b)/3.
    """

    def __init__(self, shape: list[int], out: list[int], kernel: int):
        super().__init__()
        (n, length, c), (n2, length2, c2) = shape, out

        def conv(a, b, bias=False):
            return SameConv2d(a, b, kernel, padding=kernel // 2, bias=bias)

        self.norm = nn.LayerNorm([length, c])
        self.w1, self.w2 = conv(c, c2), conv(length, length2)
        self.h1, self.h2 = conv(length, length2), conv(c, c2)
        self.bias = nn.Parameter(torch.empty(length2, c2).uniform_(-1, 1) / (length2 * c2))
        self.out = conv(n, n2, bias=True)
        self.residual = list(shape) == list(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        w = self.w1(y.permute(0, 3, 2, 1))  # (B, C', L, N)
        w = self.w2(w.permute(0, 2, 3, 1)).permute(0, 2, 1, 3)  # (B, L', N, C') -> (B, N, L', C')
        h = self.h1(y.permute(0, 2, 1, 3))  # (B, L', N, C)
        h = torch.tanh(self.h2(h.permute(0, 3, 1, 2))).permute(
            0, 3, 2, 1
        )  # (B, C', L', N) -> (B, N, L', C')
        y = self.out((w + h + self.bias) / 3)
        return x + y if self.residual else y


class HyperConvDecoder(nn.Sequential):
    """The whole flow of (N, L, C) shapes; the last one is the weight tokens' (T, r[+2], k[+2])."""

    def __init__(self, flow: list[list[int]], kernel: int):
        super().__init__(
            *(HyperConvLayer(a, b, kernel) for a, b in zip(flow, flow[1:], strict=False))
        )


# ---------------------------------------------------------------------------------------------------------- training


@dataclass
class Generator:
    """A trained generator: decoder, weight-token code, and the layout it writes."""

    decoder: HyperConvDecoder
    code: TokenCode
    left_out: str


def train_generators(run: Run) -> dict:
    """One generator per left-out task that the targets need. Writes generator/<left out>/generator.safetensors."""
    cfg = run.cfg
    encode_prompts(run)
    targets = cfg.data.targets or cfg.data.train_tasks + cfg.data.test_tasks
    wanted = sorted(
        {data.left_out_for(cfg, t) for t in targets}, key=lambda t: (t != "all", t)
    )  # the same on every rank
    for left_out in run.deal(wanted):
        if not run.finished(f"generator/{left_out}", "generator"):
            _train_one(run, left_out)
    losses = [
        runtime.read_json(run.path / f"generator/{left_out}/DONE.json")["recon_mse"]
        for left_out in wanted
    ]
    return {"generator/recon_mse": sum(losses) / len(losses)}


def _train_one(run: Run, left_out: str) -> None:
    """MSE regression from prompt batches to checkpoints (paper D, eq. 10)."""
    cfg = run.cfg
    g, start, lm = cfg.generator, time.monotonic(), scoring.load_lm(run)
    tasks = data.training_tasks(cfg, left_out)
    states = {t: load_states(run, t) for t in tasks}
    tokens = {
        t: torch.stack([to_tokens(a, lm.layout) for a in collect.load_checkpoints(run, lm, t)])
        for t in tasks
    }
    code = TokenCode.fit(
        g.scale_code, lm.layout, None if g.scale_code == "dnd" else torch.cat(list(tokens.values()))
    )
    targets = {
        t: code.encode(tokens.pop(t)) for t in tasks
    }  # at the papers' scale two copies do not fit
    weight = token_weights(targets).to(run.device) if g.criterion_weight == "std" else None
    folder = run.path / f"generator/{left_out}"
    torch.manual_seed(runtime.seed_for(g.seed, "generator"))
    decoder = HyperConvDecoder([*g.flow, list(code.shape)], g.kernel).to(run.device)
    opt = torch.optim.AdamW(
        decoder.parameters(), lr=g.lr, weight_decay=g.weight_decay, fused=run.device == "cuda"
    )
    made_with = runtime.seed_for(runtime.fingerprint(cfg, "generator"))
    done, last, spent = _resume(folder / "state.safetensors", decoder, opt, made_with)
    start -= spent  # by the attempts before this one
    label = "generator on all tasks" if left_out == "all" else f"generator without {left_out}"

    def save() -> None:
        _save_state(
            folder / "state.safetensors",
            decoder,
            opt,
            step=done,
            last=last,
            made_with=made_with,
            spent=time.monotonic() - start,
        )

    for step in run.track(range(done, g.steps), label):
        opt.param_groups[0]["lr"] = lora.rate(step, g.steps, g.lr, g.warmup_steps, "cosine")
        pairs = draw_pairs(cfg, states, targets, step)
        loss = _accumulate(run, decoder, pairs, states, targets, weight, step)
        norm = nn.utils.clip_grad_norm_(decoder.parameters(), lora.CLIP)
        value = float(loss)
        if not (math.isfinite(value) and torch.isfinite(norm)):
            save()
            raise UserError(
                f"{label}: the loss is not finite at step {step + 1} (last finite "
                f"{last:.4f}); the state before it is saved in {folder}; lower generator.lr"
            )
        opt.step()
        decoder.zero_grad(set_to_none=True)
        last, done = value, step + 1
        if step % 10 == 9 or done == g.steps:
            run.metric(
                stage="generator",
                unit=left_out,
                step=done,
                loss=round(value, 5),
                lr=opt.param_groups[0]["lr"],
            )
        if done % g.save_every == 0 and done < g.steps:
            save()
    runtime.save_tensors(
        folder / "generator.safetensors",
        {f"decoder.{k}": v.cpu() for k, v in decoder.state_dict().items()}
        | {f"code.{k}": v for k, v in code.constants.items()},
    )
    (folder / "state.safetensors").unlink(missing_ok=True)
    run.finish(
        f"generator/{left_out}",
        "generator",
        start,
        tasks=tasks,
        recon_mse=last,
        steps=g.steps,
        parameters=sum(p.numel() for p in decoder.parameters()),
    )
    run.log(f"{label}: mse {last:.4f} in {time.monotonic() - start:.0f} s", True)


def _accumulate(
    run: Run, decoder, pairs: list, states: dict, targets: dict, weight: Tensor | None, step: int
) -> Tensor:
    """Leave the gradient of one global batch on the decoder's parameters, and return its loss."""
    cfg = run.cfg
    g, total = cfg.generator, torch.zeros((), device=run.device)
    for at in range(0, len(pairs), g.micro_batch):
        condition, target = _load_pairs(
            run, pairs[at : at + g.micro_batch], states, targets, step, at
        )
        with _autocast(run):
            out = decoder(condition)
        each = None if weight is None else weight.expand(out.shape)
        loss = F.mse_loss(out.float(), target, weight=each) * (len(condition) / len(pairs))
        loss.backward()
        total += loss.detach()
    return total


def _autocast(run: Run):
    """Convolutions in the base model's dtype, in training and generation alike."""
    return torch.autocast(run.device, torch.bfloat16, enabled=run.dtype == torch.bfloat16)


def draw_pairs(cfg, states: dict, targets: dict, step: int) -> list[tuple[str, np.ndarray, int]]:
    """(task, prompt indices, checkpoint) of one step: `batch_size` pairs dealt evenly over the training tasks, each
    drawn from the task's pool of `pairs_per_task` random pairs (paper D, E.4)."""
    g, out, tasks = cfg.generator, [], list(targets)
    rng = runtime.rng_for(g.seed, "step", step)
    for i in range(g.batch_size):
        task = tasks[(i + step * g.batch_size) % len(tasks)]
        pair = int(rng.integers(g.pairs_per_task))
        checkpoint = int(runtime.rng_for(g.seed, "pair", task, pair).integers(len(targets[task])))
        out.append((task, draw_prompts(cfg, task, len(states[task]), "pair", pair), checkpoint))
    return out


def _load_pairs(run: Run, pairs, states, targets, step: int, at: int) -> tuple[Tensor, Tensor]:
    """(B, N, L, d) conditions and (B, T, …) targets on the device, float32, with Drag-and-Drop's noise."""
    g = run.cfg.generator
    shape = (len(pairs[0][1]), *states[pairs[0][0]].shape[1:])
    condition = torch.empty(
        len(pairs), *shape, dtype=torch.float16, pin_memory=run.device == "cuda"
    )
    for row, (t, index, _) in zip(
        condition.numpy(), pairs, strict=True
    ):  # one copy: 0.3 GB at the papers' scale
        np.take(states[t], np.asarray(index), 0, out=row, mode="clip")
    condition = runtime.to_device(
        condition, run.device
    ).float()  # float16 on the way, and noise drawn there
    target = runtime.to_device(torch.stack([targets[t][c] for t, _, c in pairs]), run.device)
    if g.noise:
        rng = torch.Generator(run.device).manual_seed(runtime.seed_for(g.seed, "noise", step, at))
        condition += g.noise * torch.randn(condition.shape, generator=rng, device=run.device)
        target = target + 0.1 * g.noise * torch.randn(
            target.shape, generator=rng, device=run.device
        )
    return condition, target


def token_weights(targets: dict[str, Tensor]) -> Tensor:
    """(1, T, 1, 1) loss weights with mean 1: each token's spread over a task's checkpoints, averaged over tasks.

    Source: Drag-and-Drop's criterion weight.
    """
    per_task = []
    for t in targets.values():
        spread = t.std(0).mean((-1, -2))
        per_task.append(spread / spread.mean().clamp_min(1e-30))
    return torch.stack(per_task).mean(0).view(1, -1, 1, 1)


def _save_state(path: Path, decoder: nn.Module, opt: torch.optim.AdamW, **numbers: float) -> None:
    for torn in path.parent.glob(f".{path.name}.*.tmp"):  # of a process killed while it saved
        torn.unlink(missing_ok=True)
    state = {f"p.{k}": v.cpu() for k, v in decoder.state_dict().items()}
    for i, p in enumerate(decoder.parameters()):
        if p in opt.state:
            state |= {
                f"m.{i}": opt.state[p]["exp_avg"].cpu(),
                f"v.{i}": opt.state[p]["exp_avg_sq"].cpu(),
            }
    runtime.save_tensors(path, state | {k: torch.tensor(v) for k, v in numbers.items()})


def _resume(
    path: Path, decoder: nn.Module, opt: torch.optim.AdamW, made_with: int
) -> tuple[int, float, float]:
    """Load weights and moments if an interrupted training of this configuration left them.

    Returns: steps done, the last loss, seconds spent. Randomness depends on the step alone: nothing else is needed.
    """
    state = runtime.load_tensors(path) if path.is_file() else {}
    if (
        int(state.get("made_with", -1)) != made_with
    ):  # none, or another configuration's: start afresh
        return 0, float("nan"), 0.0
    decoder.load_state_dict({k[2:]: v for k, v in state.items() if k.startswith("p.")})
    for i, p in enumerate(decoder.parameters()):
        if f"m.{i}" in state:
            at = p.device if opt.defaults["fused"] else "cpu"  # where AdamW keeps its count
            opt.state[p] = {
                "step": torch.tensor(float(state["step"]), device=at),
                "exp_avg": state[f"m.{i}"].to(p.device),
                "exp_avg_sq": state[f"v.{i}"].to(p.device),
            }
    return int(state["step"]), float(state["last"]), float(state.get("spent", 0.0))


# --------------------------------------------------------------------------------------------------------- generation


def load_generator(run: Run, left_out: str) -> Generator:
    """The trained generator of a left-out set, kept until another is asked for. Raises: UserError."""
    key = f"generator/{left_out}"
    if key not in run.cache:
        lm, g = scoring.load_lm(run), run.cfg.generator
        for other in [k for k in run.cache if k.startswith("generator/")]:
            del run.cache[other]  # the papers' take 4 GiB each
        if not run.finished(key, "generator", redo=False):
            raise UserError(f"{run.path / key}: not trained yet; run stage=generator")
        state = runtime.load_tensors(run.path / key / "generator.safetensors")
        code = TokenCode(
            g.scale_code, lm.layout, {k[5:]: v for k, v in state.items() if k.startswith("code.")}
        )
        with torch.device("meta"):  # nothing to initialise
            decoder = HyperConvDecoder([*g.flow, list(code.shape)], g.kernel)
        decoder.load_state_dict(
            {k[8:]: v for k, v in state.items() if k.startswith("decoder.")}, assign=True
        )
        run.cache[key] = Generator(
            decoder.to(run.device).eval().requires_grad_(False), code, left_out
        )
    return run.cache[key]


@torch.no_grad()
def generate_adapter(
    run: Run, target: str, batch: int, prompts_of: str = "", left_out: str | None = None
) -> tuple[Adapter, np.ndarray]:
    """One draw from q_phi(adapter | task): the adapter of the `batch`-th independent prompt batch of a target.

    Args: prompts_of: condition on another task's prompts (the control `wrong_prompts`). left_out: which generator,
        if not the target's own leave-one-out one (meta-training of the policy).
    Returns: the adapter, without gradient, and the indices of the prompts it was conditioned on.
    """
    source = prompts_of or target
    gen = load_generator(run, data.left_out_for(run.cfg, target) if left_out is None else left_out)
    states = load_states(run, source)
    index = draw_prompts(run.cfg, source, len(states), "generate", batch)
    condition = torch.from_numpy(states[index]).float()[None].to(run.device)
    with _autocast(run):
        out = gen.decoder(condition)[0]
    adapter = from_tokens(gen.code.decode(out.float().cpu()), gen.code.layout)
    if any(
        v.requires_grad for v in adapter.values()
    ):  # the policy's gradients must not reach the generator
        raise RuntimeError("a generated adapter carries a gradient")
    return adapter, index


def save_generated(folder: Path, adapter: Adapter, run: Run) -> None:
    """A generated adapter as a PEFT folder."""
    lora.save_adapter(
        folder, adapter, scoring.load_lm(run).layout, run.cfg.model.name, run.cfg.model.revision
    )


# ----------------------------------------------------------------------------------------------------- weight tokens


def to_tokens(adapter: Adapter, layout: Layout) -> Tensor:
    """(T, r, k) float32: per module the column blocks of A (r, d_in), then those of B^T (r, d_out).

    Source: the Drag-and-Drop tokenizer both papers adopt.
    """
    r, k = layout.rank, layout.width
    return torch.cat(
        [
            m.reshape(r, -1, k).transpose(0, 1)
            for a, _, b, _ in layout.keys()
            for m in (adapter[a], adapter[b].t())
        ]
    ).float()


def from_tokens(tokens: Tensor, layout: Layout) -> Adapter:
    """The inverse of `to_tokens`, exactly. Raises: ValueError: another number of tokens."""
    r, k = layout.rank, layout.width
    if tokens.shape != (layout.num_tokens, r, k):
        raise ValueError(
            f"tokens are {tuple(tokens.shape)}, this layout has {(layout.num_tokens, r, k)}"
        )
    out, at = {}, 0
    for a, (_, d_in), b, (d_out, _) in layout.keys():
        na, nb = d_in // k, d_out // k
        out[a] = tokens[at : at + na].transpose(0, 1).reshape(r, d_in).contiguous()
        out[b] = tokens[at + na : at + na + nb].transpose(0, 1).reshape(r, d_out).t().contiguous()
        at += na + nb
    return out


def frame_tokens(content: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Write scale codes around normalised blocks: (…, T, r, k) and (…, T) twice -> (…, T, r+2, k+2).

    The 2x2 tile [[m, s], [m, s]] repeats along the last two rows and columns, as Drag-and-Drop stores it.
    """
    out = F.pad(content, (0, 2, 0, 2))
    out[..., -2:, 0::2], out[..., -2:, 1::2] = m[..., None, None], s[..., None, None]
    out[..., :, -2], out[..., :, -1] = m[..., None], s[..., None]
    return out


def unframe_tokens(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Read content and codes back; the codes are the mean over the bottom tiles and over the right tiles, averaged."""
    bottom, right = tokens[..., -2:, :], tokens[..., :, -2:]
    m = (bottom[..., 0::2].mean((-1, -2)) + right[..., 0].mean(-1)) / 2
    s = (bottom[..., 1::2].mean((-1, -2)) + right[..., 1].mean(-1)) / 2
    return tokens[..., :-2, :-2], m, s


class TokenCode:
    """How weight tokens become regression targets: `dnd | element` (docs/choices.md, 2).

    dnd: per-token mean and standard deviation travel in a frame and are predicted. element: they are constants over
    the training checkpoints, per element, stored with the generator.
    """

    def __init__(self, kind: str, layout: Layout, constants: dict[str, Tensor]):
        self.kind, self.layout, self.constants = kind, layout, constants

    @classmethod
    def fit(cls, kind: str, layout: Layout, tokens: Tensor) -> TokenCode:
        """Constants from training checkpoints: (C, T, r, k) tokens."""
        if kind == "dnd":
            return cls(kind, layout, {})
        return cls(kind, layout, {"mean": tokens.mean(0), "std": tokens.std(0) + 1e-10})

    @property
    def shape(self) -> tuple[int, int, int]:
        extra = 2 if self.kind == "dnd" else 0
        return self.layout.num_tokens, self.layout.rank + extra, self.layout.width + extra

    def encode(self, tokens: Tensor) -> Tensor:
        """(…, T, r, k) -> (…, *shape), float32. A constant block has content zero, not 0/0."""
        c = self.constants
        if self.kind == "element":
            return (tokens - c["mean"]) / c["std"]
        mu, sd = tokens.mean((-1, -2)), tokens.std((-1, -2))
        content = (tokens - mu[..., None, None]) / sd.clamp_min(1e-30)[..., None, None]
        content = torch.where((sd < 1e-12)[..., None, None], 0.0, content)
        return frame_tokens(content, 8 * mu, torch.log(0.9 * sd + 0.1) + 1.6)

    def decode(self, coded: Tensor) -> Tensor:
        """The inverse of `encode`; a predicted standard deviation below zero counts as zero, not as a flipped sign."""
        c, coded = self.constants, coded.float()
        if self.kind == "element":
            return coded * c["std"] + c["mean"]
        content, m, s = unframe_tokens(coded)
        mu, sd = m / 8, (torch.exp(s - 1.6) - 0.1) / 0.9
        return content * sd.clamp_min(0)[..., None, None] + mu[..., None, None]
