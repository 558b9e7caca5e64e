"""Paper D, stage 1: LoRA checkpoints of the training tasks, and the generator from a batch of prompts to an adapter.

    python degaml.py stage=collect config=configs/smollm2.yaml     -> adapters/<task>/step_0060.safetensors …
    python degaml.py stage=generator config=configs/smollm2.yaml   -> generator/<left out task>/generator.safetensors

Everything is leave-one-out: the generator of a training task is trained without it, the one named `none` on all.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import SAVING, Stopped, UserError
from data import load_tasks
from lora import (
    Adapter,
    TokenCode,
    average_adapters,
    from_tokens,
    init_adapter,
    load_adapter,
    rate,
    save_adapter,
    to_tokens,
    train_adapter,
)
from runtime import (
    Run,
    fingerprint,
    load_array,
    load_tensors,
    read_json,
    rng_for,
    save_array,
    save_tensors,
    seed_for,
    sha256,
    to_device,
    write_json,
)
from scoring import LM, choice_loss, input_text, lm_loss, load_lm, loss_in_parts, make_row

# ------------------------------------------------------------------------------------------------------- checkpoints

def collect_adapters(cfg, run: Run) -> dict:
    """LoRA trajectories of the training tasks, one checkpoint per step, all from one A initialisation.

    Source: paper D, E.4: `pretrain_steps` at `pretrain_lr`, then `finetune_steps` at `finetune_lr`; the optimiser
    state carries over. Writes adapters/<task>/ with the last `save_last` steps and a manifest.
    Raises: UserError: a loss that is not finite; the state before it is saved.
    """
    tasks = load_tasks(run)
    lm = load_lm(run)
    units = sorted(cfg.data.train_tasks, key=lambda t: -_mean_length(lm, tasks[t]))
    for name in run.deal(units):
        if not run.finished(f"adapters/{name}", "collect"):
            _collect_one(cfg, run, lm, tasks[name])
    manifests = [read_json(run.path / f"adapters/{t}/manifest.json") for t in cfg.data.train_tasks]
    if len({m["init_sha"] for m in manifests}) != 1:
        raise UserError(f"{run.path / 'adapters'}: the tasks do not share one A initialisation; delete the folder and "
                        "run stage=collect again")
    return {"collect/last_loss": sum(m["last_loss"] for m in manifests) / len(manifests)}


def _mean_length(lm: LM, task) -> float:
    return sum(len(e.text) for e in task.train[:50])


def _collect_one(cfg, run: Run, lm: LM, task) -> None:
    c, folder, start = cfg.collect, run.path / f"adapters/{task.name}", time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    steps = c.pretrain_steps + c.finetune_steps
    rng = rng_for(cfg.seed, "collect", task.name)
    order = np.concatenate([rng.permutation(len(task.train)) for _ in
                            range(1 + steps * c.batch_size // len(task.train))])
    rows = {}

    def batches():
        for s in run.track(range(steps), f"collect {task.name}"):
            index = order[s * c.batch_size:(s + 1) * c.batch_size]
            for i in index:
                rows.setdefault(i, make_row(lm, task.train[i]))
            yield [rows[i] for i in index]

    def lr(s):
        if s < c.pretrain_steps:
            return rate(s, c.pretrain_steps, c.pretrain_lr, c.warmup_steps, c.schedule)
        return rate(s - c.pretrain_steps, c.finetune_steps, c.finetune_lr, 0, c.schedule)

    def on_step(s, loss, snapshot):
        losses.append(loss)
        if s % 5 == 4 or s == steps - 1:
            run.metric(stage="collect", unit=task.name, step=s + 1, loss=round(loss, 5), lr=lr(s))
        if s >= steps - c.save_last:
            save_tensors(folder / f"step_{s + 1:04d}.safetensors", snapshot())

    losses: list[float] = []
    first = init_adapter(lm.layout, cfg.seed)
    loss_fn = {"lm": lm_loss, "choice": choice_loss}[c.loss]
    try:
        train_adapter(lm.model, lm.layout, first, batches(), lambda b: loss_in_parts(lm, b, loss_fn), lr=lr,
                      clip=c.clip, on_step=on_step)
    except FloatingPointError as e:
        step, last, adapter = e.args
        save_tensors(folder / "before_failure.safetensors", adapter)
        raise UserError(f"collect {task.name}: the loss is not finite at step {step + 1} (last finite {last:.4f}); the "
                        f"adapter before it is in {folder / 'before_failure.safetensors'}; lower collect.pretrain_lr") \
            from None
    write_json(folder / "manifest.json", {
        "task": task.name, "steps": steps, "last_loss": losses[-1], "losses": [round(x, 4) for x in losses],
        "init_sha": adapter_hash({k: v for k, v in first.items() if "lora_A" in k}),
        "sha256": {f.name: sha256(f) for f in sorted(folder.glob("step_*.safetensors"))}})
    run.finish(f"adapters/{task.name}", "collect", start, steps=steps)
    run.log(f"collect {task.name}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {time.monotonic() - start:.0f} s", True)


def adapter_hash(adapter: Adapter) -> str:
    """Identity of an adapter's numbers."""
    import hashlib
    h = hashlib.sha256()
    for k in sorted(adapter):
        h.update(k.encode() + adapter[k].contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def load_checkpoints(run: Run, lm: LM, task: str) -> list[Adapter]:
    """The collected checkpoints of a task, oldest first. Raises: UserError: missing, changed since, or made under
    another configuration."""
    folder = run.path / f"adapters/{task}"
    run.finished(f"adapters/{task}", "collect", redo=False)
    out = []
    for name, digest in read_json(folder / "manifest.json")["sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise UserError(f"{folder / name}: missing, truncated or changed since it was made (hash differs from "
                            f"manifest.json); delete {folder} and run stage=collect again")
        out.append(load_adapter(folder / name, lm.layout))
    return out


def last_checkpoint(run: Run, lm: LM, task: str) -> Adapter:
    """The adapter trained on the task's own train split (method `own`)."""
    name = sorted(read_json(run.path / f"adapters/{task}/manifest.json")["sha256"])[-1]
    return load_adapter(run.path / f"adapters/{task}/{name}", lm.layout)


def training_tasks(cfg, left_out: str) -> list[str]:
    """The tasks a model named after its left-out task may learn from."""
    return [t for t in cfg.data.train_tasks if t != left_out]


def left_out_for(cfg, target: str) -> str:
    """Leave-one-out name of a target: itself in-domain, `none` out of domain."""
    return target if target in cfg.data.train_tasks else "none"


def mean_adapter(run: Run, lm: LM, target: str) -> Adapter:
    """Control: element-wise mean of the training tasks' last checkpoints, without the target's."""
    return average_adapters([last_checkpoint(run, lm, t)
                             for t in training_tasks(run.cfg, left_out_for(run.cfg, target))])


# ------------------------------------------------------------------------------------------------------ prompt states

def encode_prompts(cfg, run: Run) -> None:
    """Cache the frozen encoder's token states of every task's prompts, once per prompt.

    Writes prompts/<task>/states.npy, (prompts, L, d) float16, and pooled.npy, (prompts, d) float32.
    """
    tasks = load_tasks(run)
    for name in run.deal(list(tasks)):
        if not run.finished(f"prompts/{name}", "prompts"):
            start, folder = time.monotonic(), run.path / f"prompts/{name}"
            states, pooled = encode_texts(run, task_texts(run, name), f"encode {name}")
            save_array(folder / "states.npy", states.numpy())
            save_array(folder / "pooled.npy", pooled.numpy())
            run.finish(f"prompts/{name}", "prompts", start)


def task_texts(run: Run, name: str) -> list[str]:
    """The task's unlabelled prompts exactly as the base model reads them.

    Question-only text instead made generated adapters no better than their mean (trial run).
    """
    lm = load_lm(run)
    if lm.form == "cloze":
        return list(load_tasks(run)[name].prompts)
    from data import Example
    return [input_text(lm, Example("", p, ("",))) for p in load_tasks(run)[name].prompts]


def check_encoder(cfg) -> None:
    """Raises: UserError: the encoder is not to be had, or generator.flow begins with another width than its states'."""
    from transformers import AutoConfig
    g = cfg.generator
    try:
        width = AutoConfig.from_pretrained(g.encoder).hidden_size
    except (OSError, ValueError) as e:
        raise _no_encoder(g.encoder, e) from None
    if g.flow[0][2] != width:
        raise UserError(f"generator.flow: its first entry ends in {g.flow[0][2]}, the width of {g.encoder} is {width}")


def _no_encoder(name: str, why: Exception) -> UserError:
    return UserError(f"generator.encoder={name}: cannot be loaded ({str(why).splitlines()[0][:120]}); run `make "
                     "assets` or name a folder or hub id")


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
            run.cache["encoder"] = (AutoTokenizer.from_pretrained(run.cfg.generator.encoder),
                                    AutoModel.from_pretrained(run.cfg.generator.encoder).to(run.device).eval())
        except (OSError, ValueError) as e:
            raise _no_encoder(run.cfg.generator.encoder, e) from None
    tokenizer, encoder = run.cache["encoder"]
    states, pooled = [], []
    for at in run.track(range(0, len(texts), 32), label):
        x = tokenizer(texts[at:at + 32], padding="max_length", truncation=True, return_tensors="pt",
                      max_length=run.cfg.generator.max_length).to(run.device)
        h = encoder(**x).last_hidden_state
        m = x["attention_mask"][..., None]
        states.append(h.half().cpu())
        pooled.append(F.normalize((h * m).sum(1) / m.sum(1), dim=-1).cpu())
    return torch.cat(states), torch.cat(pooled)


def load_states(run: Run, task: str) -> np.ndarray:
    """(prompts, L, d) float16, memory-mapped. Raises: UserError: not made yet, or damaged."""
    return load_array(run.path / f"prompts/{task}/states.npy", "r")


def load_pooled(run: Run, task: str) -> Tensor:
    """(prompts, d) float32, the prompts' pooled embeddings. Raises: UserError: not made yet, or damaged."""
    return torch.from_numpy(load_array(run.path / f"prompts/{task}/pooled.npy"))


def draw_prompts(cfg, task: str, count: int, *key) -> np.ndarray:
    """Indices of one prompt batch: `num_prompts` drawn without replacement and shuffled; repeated cyclically if the
    task has fewer."""
    n = cfg.generator.num_prompts
    order = rng_for(cfg.generator.seed, "prompts", task, *key).permutation(count)
    return np.resize(order, n)


# ----------------------------------------------------------------------------------------------------------- decoder

class SameConv2d(nn.Conv2d):
    """A convolution of stride 1 that keeps the size. On a GPU it goes through `_GPUConv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        y = _GPUConv2d.apply(x.to(dtype), self.weight.to(dtype))
        return y if self.bias is None else y + self.bias.to(dtype)[:, None, None]


class _GPUConv2d(torch.autograd.Function):
    """The same function by other kernels: 2.7 times as fast over the papers' generator on an H100 with cuDNN 9.

    Both passes are transposed convolutions, the forward one of the flipped kernel, on whole groups of channels that
    stay last: for those cuDNN has the better kernels at 9 x 9. Its gradient of a kernel of many channels (28 TFLOP/s)
    is replaced.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        return _conv_transpose(x, weight.transpose(0, 1).flip(2, 3))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        to_x = _conv_transpose(grad, weight) if ctx.needs_input_grad[0] else None
        if weight.shape[0] * weight.shape[1] >= 256 * 256:   # measured: below that cuDNN's is faster
            return to_x, kernel_gradient(x, grad, weight.shape[-1])
        return to_x, nn.grad.conv2d_weight(x, weight.shape, grad, padding=weight.shape[-1] // 2)


def _conv_transpose(x: Tensor, weight: Tensor) -> Tensor:
    """Size-keeping transposed convolution with zero channels to a multiple of 64 (of 16 where they are few)."""
    extra = [-n % (64 if n > 32 else 16) for n in weight.shape[:2]]
    x, weight = F.pad(x, (0, 0, 0, 0, 0, extra[0])), F.pad(weight, (0, 0, 0, 0, 0, extra[1], 0, extra[0]))
    x, weight = (v.contiguous(memory_format=torch.channels_last) for v in (x, weight))
    return F.conv_transpose2d(x, weight, padding=weight.shape[-1] // 2)[:, :weight.shape[1] - extra[1]]


def kernel_gradient(x: Tensor, grad: Tensor, kernel: int) -> Tensor:
    """(C', C, k, k) gradient of a size-keeping convolution's weight by matrix products: (B, C, H, W) inputs and (B, C',
    H, W) output gradients, both channels last.

    Of each row of the kernel, its k columns are one batched product: with every position a row of C numbers, the input
    one column further is the same memory one row further, so nothing is copied for it. Output gradients are zero where
    a shifted row would run into the next line.
    """
    (b, c, h, w), c2, half = x.shape, grad.shape[1], kernel // 2
    # products are three times as fast on rows of whole 16 bytes
    x = F.pad(x.permute(0, 2, 3, 1), (0, -c % 8, half, half, half, half))
    grad = F.pad(grad.permute(0, 2, 3, 1), (0, -c2 % 8, 0, 2 * half)).flatten(0, 2)
    n, wide = len(grad), x.shape[-1]
    lines = x.new_zeros(n + 2 * half, wide)
    columns = lines.as_strided((kernel, n, wide), (wide, wide, 1))
    left = grad.t().expand(kernel, -1, n)
    rows = []
    for i in range(kernel):
        lines[:n].view(b, h, w + 2 * half, wide).copy_(x[:, i:i + h])
        rows.append(torch.bmm(left, columns)[:, :c2, :c])
    return torch.stack(rows).permute(2, 3, 0, 1)


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
        w = self.w1(y.permute(0, 3, 2, 1))                       # (B, C', L, N)
        w = self.w2(w.permute(0, 2, 3, 1)).permute(0, 2, 1, 3)   # (B, L', N, C') -> (B, N, L', C')
        h = self.h1(y.permute(0, 2, 1, 3))                       # (B, L', N, C)
        h = torch.tanh(self.h2(h.permute(0, 3, 1, 2))).permute(0, 3, 2, 1)   # (B, C', L', N) -> (B, N, L', C')
        y = self.out((w + h + self.bias) / 3)
        return x + y if self.residual else y


class HyperConvDecoder(nn.Sequential):
    """The whole flow of (N, L, C) shapes; the last one is the weight tokens' (T, r[+2], k[+2]).

    With `recompute` a layer keeps its input alone and computes the rest again for its gradient.
    """

    def __init__(self, flow: list[list[int]], kernel: int, recompute: bool = False):
        super().__init__(*(HyperConvLayer(a, b, kernel) for a, b in zip(flow, flow[1:], strict=False)))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else layer(x)
        return x


# ---------------------------------------------------------------------------------------------------------- training

@dataclass
class Generator:
    """A trained generator: decoder, weight-token code, and the layout it writes."""

    decoder: HyperConvDecoder
    code: TokenCode
    left_out: str


def train_generators(cfg, run: Run) -> dict:
    """One generator per left-out task that the targets need. Writes generator/<left out>/generator.safetensors."""
    encode_prompts(cfg, run)
    targets = cfg.data.targets or cfg.data.train_tasks + cfg.data.test_tasks
    wanted = sorted({left_out_for(cfg, t) for t in targets}, key=lambda t: (t != "none", t))   # the same on every rank
    for left_out, part, parts in run.divide(wanted, "generator", "generator"):
        _train_one(cfg, run, left_out, part, parts)
    losses = [read_json(run.path / f"generator/{left_out}/DONE.json")["recon_mse"] for left_out in wanted]
    return {"generator/recon_mse": sum(losses) / len(losses)}


def _train_one(cfg, run: Run, left_out: str, part: int = 0, parts: int = 1) -> None:
    """MSE regression from prompt batches to checkpoints (paper D, eq. 10).

    Of `parts` ranks that train together this is number `part`: it takes every parts-th micro-batch, gradients are
    summed over ranks, and every rank makes the same update. The global batch does not depend on their number.
    """
    g, start, lm = cfg.generator, time.monotonic(), load_lm(run)
    tasks = training_tasks(cfg, left_out)
    states = {t: load_states(run, t) for t in tasks}
    tokens = {t: torch.stack([to_tokens(a, lm.layout) for a in load_checkpoints(run, lm, t)]) for t in tasks}
    code = TokenCode.fit(g.scale_code, lm.layout, None if g.scale_code == "dnd" else torch.cat(list(tokens.values())))
    targets = {t: code.encode(tokens.pop(t)) for t in tasks}   # at the papers' scale two copies do not fit
    weight = token_weights(targets).to(run.device) if g.criterion_weight == "std" else None
    folder = run.path / f"generator/{left_out}"
    torch.manual_seed(seed_for(g.seed, "generator"))
    decoder = HyperConvDecoder([*g.flow, list(code.shape)], g.kernel, g.recompute).to(run.device)
    opt = SharedAdamW(run, decoder, *((part, parts) if g.shard_optimizer else (0, 1)), lr=g.lr,
                      weight_decay=g.weight_decay, fused=run.device == "cuda")
    made_with = seed_for(fingerprint(cfg, "generator"))
    done, last, spent = _resume(folder / "state.safetensors", decoder, opt, made_with)
    start -= spent   # by the attempts before this one
    if parts > 1:
        run.barrier()   # all have read the same state before any writes a new one
    forward = _compiled(g, run, decoder) if g.compile else decoder
    label = "generator on all tasks" if left_out == "none" else f"generator without {left_out}"

    def save() -> None:   # every rank that trains has to call
        with SAVING:
            moments = opt.moments(keep=not part)
            if not part:
                _save_state(folder / "state.safetensors", decoder, moments, step=done, last=last, made_with=made_with,
                            spent=time.monotonic() - start)
            if parts > 1:
                run.barrier()   # none leaves, and has torchrun end the others, before rank 0 has written
    try:
        for step in run.track(range(done, g.steps), label, together=parts > 1):
            opt.param_groups[0]["lr"] = rate(step, g.steps, g.lr, g.warmup_steps, "cosine")
            pairs = draw_pairs(cfg, states, targets, step)
            loss = _accumulate(cfg, run, forward, pairs, states, targets, weight, step, part, parts)
            norm = nn.utils.clip_grad_norm_(decoder.parameters(), g.clip)
            value = float(loss)
            if not (math.isfinite(value) and torch.isfinite(norm)):   # on every rank
                save()
                raise UserError(f"{label}: the loss is not finite at step {step + 1} (last finite "
                                f"{last:.4f}); the state before it is saved in {folder}; lower generator.lr")
            opt.step()
            decoder.zero_grad(set_to_none=True)
            last, done = value, step + 1
            if not part and (step % 10 == 9 or done == g.steps):
                run.metric(stage="generator", unit=left_out, step=done, loss=round(value, 5),
                           lr=opt.param_groups[0]["lr"])
            if done % g.save_every == 0 and done < g.steps:
                save()
    except Stopped:
        save()
        raise
    if part:
        return
    save_tensors(folder / "generator.safetensors", {f"decoder.{k}": v.cpu() for k, v in decoder.state_dict().items()}
                 | {f"code.{k}": v for k, v in code.constants.items()})
    (folder / "state.safetensors").unlink(missing_ok=True)
    run.finish(f"generator/{left_out}", "generator", start, ranks=parts, tasks=tasks, recon_mse=last, steps=g.steps,
               parameters=sum(p.numel() for p in decoder.parameters()))
    run.log(f"{label}: mse {last:.4f} in {time.monotonic() - start:.0f} s", True)


class SharedAdamW(torch.optim.AdamW):
    """AdamW whose moments the ranks that train together share out (ZeRO-1; Rajbhandari et al. 2020).

    Each keeps and updates its part of every weight's elements and sends the others what came out. Whole tensors would
    not do: one of the papers' generator holds two thirds of its weights. Every element sees the same numbers as without
    sharing.
    """

    def __init__(self, run: Run, network: nn.Module, part: int, parts: int, **options):
        self.run, self.weights, self.part, self.parts = run, list(network.parameters()), part, parts
        super().__init__([nn.Parameter(self._share(p.data)) for p in self.weights], **options)   # views of the weights
        self.shares = self.param_groups[0]["params"]

    def _share(self, x: Tensor, part: int | None = None) -> Tensor:
        """This rank's run of a tensor's elements, or another's, as a view."""
        n, i = x.numel(), self.part if part is None else part
        return x.reshape(-1)[n * i // self.parts:n * (i + 1) // self.parts]

    def step(self) -> None:
        """Update every weight of the network, on every rank, from gradients that are the same on all."""
        for p, share in zip(self.weights, self.shares, strict=True):
            share.grad = self._share(p.grad)
        super().step()
        for share in self.shares:   # a view that would keep the gradients alive into the next step
            share.grad = None
        for rank in range(self.parts if self.parts > 1 else 0):
            self.run.spread([self._share(p.data, rank) for p in self.weights], rank)

    def moments(self, keep: bool) -> dict[str, Tensor]:
        """{m.<i>, v.<i>: whole moments on the CPU}, gathered from every rank for those that `keep` them; empty before
        the first step."""
        out = {}
        for i, (p, share) in enumerate(zip(self.weights, self.shares, strict=True)):
            for name, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                if key in self.state[share]:
                    whole = torch.zeros_like(p)
                    self._share(whole).copy_(self.state[share][key])
                    if self.parts > 1:
                        self.run.sum_over_ranks([whole])   # the others' shares are zero here
                    if keep:
                        out[f"{name}.{i}"] = whole.cpu()
        return out

    def load(self, moments: dict[str, Tensor], step: int) -> None:
        """Go on from gathered moments after this many steps; the number of ranks may have changed."""
        for i, share in enumerate(self.shares):
            if f"m.{i}" in moments:
                at = share.device if self.defaults["fused"] else "cpu"   # where AdamW keeps its count
                m, v = (self._share(moments[f"{k}.{i}"]).to(share.device, copy=True) for k in "mv")
                self.state[share] = {"step": torch.tensor(float(step), device=at), "exp_avg": m, "exp_avg_sq": v}


def _compiled(g, run: Run, decoder: nn.Module):
    """The decoder through torch.compile, tried forward and backward; where that fails, as it is, with a message."""
    try:
        fast = torch.compile(decoder)
        with _autocast(run):
            fast(torch.zeros(g.micro_batch, *g.flow[0], device=run.device)).sum().backward()
    except Exception as e:   # a missing C++ compiler, an unsupported device: it raises many types of its own
        run.log(f"generator.compile: not possible here ({type(e).__name__}: {str(e).splitlines()[0][:120]}); going on "
                "without it", True)
        fast = decoder
    decoder.zero_grad(set_to_none=True)
    return fast


def _accumulate(cfg, run: Run, decoder, pairs: list, states: dict, targets: dict, weight: Tensor | None, step: int,
                part: int, parts: int) -> Tensor:
    """Leave the gradient of one global batch on the decoder's parameters, and return its loss; both over all ranks."""
    g, total = cfg.generator, torch.zeros((), device=run.device)
    for at in range(part * g.micro_batch, len(pairs), parts * g.micro_batch):
        condition, target = _load_pairs(run, pairs[at:at + g.micro_batch], states, targets, step, at)
        with _autocast(run):
            out = decoder(condition)
        each = None if weight is None else weight.expand(out.shape)
        loss = F.mse_loss(out.float(), target, weight=each) * (len(condition) / len(pairs))
        loss.backward()
        total += loss.detach()
    if parts > 1:
        for p in decoder.parameters():   # a rank may have had no micro-batch
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        run.sum_over_ranks([*(p.grad for p in decoder.parameters()), total])
    return total


def _autocast(run: Run):
    """bf16 convolutions in training and generation alike, by `generator.dtype`."""
    wish = run.cfg.generator.dtype
    bf16 = wish == "bfloat16" or (wish == "auto" and run.dtype == torch.bfloat16)
    return torch.autocast(run.device, torch.bfloat16, enabled=bf16)


def draw_pairs(cfg, states: dict, targets: dict, step: int) -> list[tuple[str, np.ndarray, int]]:
    """(task, prompt indices, checkpoint) of one step: `batch_size` pairs dealt evenly over the training tasks, each
    drawn from the task's pool of `pairs_per_task` random pairs (paper D, E.4)."""
    g, out, tasks = cfg.generator, [], list(targets)
    rng = rng_for(g.seed, "step", step)
    for i in range(g.batch_size):
        task = tasks[(i + step * g.batch_size) % len(tasks)]
        pair = int(rng.integers(g.pairs_per_task))
        checkpoint = int(rng_for(g.seed, "pair", task, pair).integers(len(targets[task])))
        out.append((task, draw_prompts(cfg, task, len(states[task]), "pair", pair), checkpoint))
    return out


def _load_pairs(run: Run, pairs, states, targets, step: int, at: int) -> tuple[Tensor, Tensor]:
    """(B, N, L, d) conditions and (B, T, …) targets on the device, float32, with Drag-and-Drop's noise."""
    g = run.cfg.generator
    shape = (len(pairs[0][1]), *states[pairs[0][0]].shape[1:])
    condition = torch.empty(len(pairs), *shape, dtype=torch.float16, pin_memory=run.device == "cuda")
    for row, (t, index, _) in zip(condition.numpy(), pairs, strict=True):   # one copy: 0.3 GB at the papers' scale
        np.take(states[t], np.asarray(index), 0, out=row, mode="clip")
    condition = to_device(condition, run.device).float()   # float16 on the way, and noise drawn there
    target = to_device(torch.stack([targets[t][c] for t, _, c in pairs]), run.device)
    if g.noise:
        rng = torch.Generator(run.device).manual_seed(seed_for(g.seed, "noise", step, at))
        condition += g.noise * torch.randn(condition.shape, generator=rng, device=run.device)
        target = target + 0.1 * g.noise * torch.randn(target.shape, generator=rng, device=run.device)
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


def _save_state(path: Path, decoder: nn.Module, moments: dict[str, Tensor], **numbers: float) -> None:
    for torn in path.parent.glob(f".{path.name}.*.tmp"):   # of a process killed while it saved
        torn.unlink(missing_ok=True)
    save_tensors(path, {f"p.{k}": v.cpu() for k, v in decoder.state_dict().items()} | moments
                 | {k: torch.tensor(v) for k, v in numbers.items()})


def _resume(path: Path, decoder: nn.Module, opt: SharedAdamW, made_with: int) -> tuple[int, float, float]:
    """Load weights and moments if an interrupted training of this configuration left them.

    Returns: steps done, the last loss, seconds spent. Randomness depends on the step alone: nothing else is needed.
    """
    state = load_tensors(path) if path.is_file() else {}
    if int(state.get("made_with", -1)) != made_with:   # none, or another configuration's: start afresh
        return 0, float("nan"), 0.0
    decoder.load_state_dict({k[2:]: v for k, v in state.items() if k.startswith("p.")})   # shares are views of it
    opt.load(state, int(state["step"]))
    return int(state["step"]), float(state["last"]), float(state.get("spent", 0.0))


# --------------------------------------------------------------------------------------------------------- generation

def load_generator(run: Run, left_out: str) -> Generator:
    """The trained generator of a left-out set, kept until another is asked for. Raises: UserError."""
    key = f"generator/{left_out}"
    if key not in run.cache:
        lm, g = load_lm(run), run.cfg.generator
        for other in [k for k in run.cache if k.startswith("generator/")]:
            del run.cache[other]   # the papers' take 4 GiB each
        if not run.finished(key, "generator", redo=False):
            raise UserError(f"{run.path / key}: not trained yet; run stage=generator")
        state = load_tensors(run.path / key / "generator.safetensors")
        code = TokenCode(g.scale_code, lm.layout, {k[5:]: v for k, v in state.items() if k.startswith("code.")})
        with torch.device("meta"):   # nothing to initialise
            decoder = HyperConvDecoder([*g.flow, list(code.shape)], g.kernel)
        decoder.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("decoder.")}, assign=True)
        run.cache[key] = Generator(decoder.to(run.device).eval().requires_grad_(False), code, left_out)
    return run.cache[key]


@torch.no_grad()
def generate_adapter(run: Run, target: str, batch: int, prompts_of: str = "",
                     left_out: str | None = None) -> tuple[Adapter, np.ndarray]:
    """One draw from q_phi(adapter | task): the adapter of the `batch`-th independent prompt batch of a target.

    Args: prompts_of: condition on another task's prompts (the control `wrong_prompts`). left_out: which generator,
        if not the target's own leave-one-out one (meta-training of the policy).
    Returns: the adapter, without gradient, and the indices of the prompts it was conditioned on.
    """
    source = prompts_of or target
    gen = load_generator(run, left_out_for(run.cfg, target) if left_out is None else left_out)
    states = load_states(run, source)
    index = draw_prompts(run.cfg, source, len(states), "generate", batch)
    condition = torch.from_numpy(states[index]).float()[None].to(run.device)
    with _autocast(run):
        out = gen.decoder(condition)[0]
    adapter = from_tokens(gen.code.decode(out.float().cpu()), gen.code.layout)
    if any(v.requires_grad for v in adapter.values()):   # the policy's gradients must not reach the generator
        raise RuntimeError("a generated adapter carries a gradient")
    return adapter, index


def save_generated(folder: Path, adapter: Adapter, run: Run) -> None:
    """A generated adapter as a PEFT folder."""
    save_adapter(folder, adapter, load_lm(run).layout, run.cfg.model.name, run.cfg.model.revision)
