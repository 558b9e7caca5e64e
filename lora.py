"""An adapter: its layout in a model, swapping it in, fine-tuning it on packed rows, its weight tokens, its PEFT folder.

The base model is loaded once and never changed or cast; `attach_lora` replaces its adapted linear layers by
`LoraLinear`, into which `swap_adapter` puts any adapter in a few milliseconds. An adapter is {PEFT key: float32 CPU
tensor}.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError
from runtime import load_tensors, save_tensors, seed_for, write_json

Adapter = dict[str, Tensor]
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Layout:
    """Where a model's adapters sit, in token order.

    Attributes:
        modules: (path, layer, d_in, d_out) per adapted linear, layers ascending, modules in configured order.
        rank, alpha: LoRA r and alpha. width: k, columns of a weight token.
    """

    modules: tuple[tuple[str, int, int, int], ...]
    rank: int
    alpha: int
    width: int

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def num_tokens(self) -> int:
        return sum((d_in + d_out) // self.width for _, _, d_in, d_out in self.modules)

    @property
    def size(self) -> int:
        """D, trainable scalars."""
        return sum(self.rank * (d_in + d_out) for _, _, d_in, d_out in self.modules)

    def keys(self):
        """(key of A, (r, d_in), key of B, (d_out, r)) per module."""
        for path, _, d_in, d_out in self.modules:
            yield (f"{PREFIX}{path}.lora_A.weight", (self.rank, d_in),
                   f"{PREFIX}{path}.lora_B.weight", (d_out, self.rank))


def find_layout(model: nn.Module, rank: int, alpha: int, width: int, modules: list[str]) -> Layout:
    """The adapted linears of any decoder, found by module name.

    Raises: UserError: a name that matches nothing, or a token width that divides not every dimension (legal widths
        are named).
    """
    found, names = [], set()
    for path, m in model.named_modules():
        name, layer = path.rsplit(".", 1)[-1], re.search(r"\.(\d+)\.", path)
        if isinstance(m, (nn.Linear, LoraLinear)):
            names.add(name)
            if name in modules and layer:
                found.append((path, int(layer[1]), m.in_features, m.out_features))
    if missing := [n for n in modules if n not in {p.rsplit(".", 1)[-1] for p, *_ in found}]:
        raise UserError(f"model.modules: {missing} not found in the model; its linear layers are {sorted(names)}")
    found.sort(key=lambda f: (f[1], modules.index(f[0].rsplit(".", 1)[-1])))
    check_width(width, [d for _, _, i, o in found for d in (i, o)])
    return Layout(tuple(found), rank, alpha, width)


def check_width(width: int, dims: list[int]) -> None:
    """Raises: UserError: `width` does not divide every dimension; the widths that do are named."""
    if any(d % width for d in dims):
        common = math.gcd(*dims)
        legal = [w for w in range(1, common + 1) if common % w == 0 and w >= 8] or [common]
        raise UserError(f"model.token_width: {width} does not divide every adapted dimension {sorted(set(dims))}; "
                        f"legal: {legal}")


class LoraLinear(nn.Module):
    """A frozen linear layer plus an optional update (alpha/r) B A; A and B are plain tensors swapped from outside.

    `dense` is a further update of any rank, (d_out, d_in): what a draw from a posterior over whole matrices adds.
    """

    def __init__(self, base: nn.Linear, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.in_features, self.out_features = base.in_features, base.out_features
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.dense: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.A is None:
            return y
        if self.dense is not None:
            y = y + F.linear(x, self.dense)
        low = F.linear(x, self.A).reshape(-1, self.A.shape[0])
        # one fused multiply-add; in place only where no gradient is recorded
        add = torch.Tensor.addmm if torch.is_grad_enabled() else torch.Tensor.addmm_
        return add(y.reshape(-1, y.shape[-1]), low, self.B.t(), alpha=self.scale).view(y.shape)


def attach_lora(model: nn.Module, layout: Layout) -> None:
    """Replace the adapted linears by LoraLinear, once; the model is frozen."""
    model.requires_grad_(False)
    for path, *_ in layout.modules:
        parent, name = path.rsplit(".", 1)
        if not isinstance(getattr(model.get_submodule(parent), name), LoraLinear):
            setattr(model.get_submodule(parent), name,
                    LoraLinear(getattr(model.get_submodule(parent), name), layout.scale))


def swap_adapter(model: nn.Module, layout: Layout, adapter: Adapter | None) -> None:
    """Put an adapter into the model, cast to the base's dtype; None leaves the bare base model.

    Besides A and B an adapter may hold `dense_key(path)`: (d_out, d_in), added to the matrix (`LoraLinear.dense`).
    """
    for (path, *_), (a, _, b, _) in zip(layout.modules, layout.keys(), strict=True):
        m = model.get_submodule(path)
        w = m.weight
        m.A = None if adapter is None else adapter[a].to(w.device, w.dtype)
        m.B = None if adapter is None else adapter[b].to(w.device, w.dtype)
        dense = None if adapter is None else adapter.get(dense_key(path))
        m.dense = None if dense is None else dense.to(w.device, w.dtype)
        m.scale = layout.scale


def dense_key(path: str) -> str:
    """Key of a module's full-rank update."""
    return f"{PREFIX}{path}.dense.weight"


def clear_adapters(model: nn.Module) -> None:
    """The bare base model, whatever layout was in."""
    for m in model.modules():
        if isinstance(m, LoraLinear):
            m.A = m.B = m.dense = None


def init_adapter(layout: Layout, seed: int) -> Adapter:
    """The A initialisation every checkpoint shares (Kaiming uniform, as PEFT) and B = 0.

    One seed for all tasks: with different A's, A is unpredictable noise to the generator (docs/choices.md, 4).
    """
    g = torch.Generator().manual_seed(seed_for(seed, "lora_A"))
    out = {}
    for a, a_shape, b, b_shape in layout.keys():
        bound = 1 / math.sqrt(a_shape[1])
        out[a] = torch.empty(a_shape).uniform_(-bound, bound, generator=g)
        out[b] = torch.zeros(b_shape)
    return out


def flatten_adapter(adapter: Adapter, layout: Layout) -> Tensor:
    """(D,) float32, module by module, A before B."""
    return torch.cat([adapter[k].reshape(-1).float() for a, _, b, _ in layout.keys() for k in (a, b)])


def unflatten_adapter(vector: Tensor, layout: Layout) -> Adapter:
    """The inverse: views into the vector, through which gradients flow back to it."""
    shapes = [(k, s) for a, sa, b, sb in layout.keys() for k, s in ((a, sa), (b, sb))]
    parts = vector.split([math.prod(s) for _, s in shapes])
    return {k: v.view(s) for v, (k, s) in zip(parts, shapes, strict=True)}


def average_adapters(adapters: list[Adapter]) -> Adapter:
    """Element-wise mean."""
    return {k: torch.stack([a[k] for a in adapters]).mean(0) for k in adapters[0]}


# ------------------------------------------------------------------------------------------------------- fine-tuning

def train_adapter(model: nn.Module, layout: Layout, adapter: Adapter, batches: Iterable, loss_fn, *, lr, clip: float,
                  on_step=None, add_up=None) -> Adapter:
    """Gradient steps on an adapter: AdamW without decay, fp32 masters, gradients clipped by their global norm.

    The base stays in its own dtype; the model sees copies of the masters in that dtype, so bf16 rounding never
    accumulates in the adapter.

    Args:
        batches: one item per step, handed to `loss_fn(batch)`, which returns a scalar loss, or yields (sum, count) of
            parts of the batch, whose graphs are not held at once: the loss is the sums over the counts. Nothing: no
            step.
        lr: step (from 0) -> learning rate. on_step: called as on_step(step, loss, adapter()) after each update.
        add_up: where ranks train together on shares of a batch, what sums the gradient and the loss over them.
    Returns: the trained adapter; the model is left bare.
    Raises: FloatingPointError: a loss that is not finite; its args are (step, last finite loss, adapter before it).
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    master = flatten_adapter(adapter, layout).to(device)
    copy = torch.empty_like(master, dtype=dtype)
    leaves = [v.requires_grad_() for v in unflatten_adapter(copy, layout).values()]
    for (path, *_), a, b in zip(layout.modules, leaves[::2], leaves[1::2], strict=True):
        m = model.get_submodule(path)
        m.A, m.B, m.scale = a, b, layout.scale
    opt = torch.optim.AdamW([master], lr=1.0, weight_decay=0.0, fused=device.type == "cuda")

    def snapshot() -> Adapter:
        return unflatten_adapter(master.detach().cpu().clone(), layout)

    last = float("nan")
    try:
        for step, batch in enumerate(batches):
            with torch.no_grad():
                copy.copy_(master)
            found, grad, value, count = loss_fn(batch), 0, 0, 0
            for loss, n in [(found, 1)] if torch.is_tensor(found) else found:
                grad = grad + torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, leaves)]).float()
                value, count = value + loss.detach(), count + n
            if not count:
                continue
            master.grad, value = grad / count, value / count
            if add_up is not None:
                add_up([master.grad, value])
            value = float(value)
            if not math.isfinite(value):
                raise FloatingPointError(step, last, snapshot())
            norm = master.grad.norm()
            if not torch.isfinite(norm):
                raise FloatingPointError(step, last, snapshot())
            master.grad.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
            opt.param_groups[0]["lr"] = lr(step)
            opt.step()
            last = value
            if on_step is not None:
                on_step(step, value, snapshot)
        return snapshot()
    finally:
        clear_adapters(model)


def rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Learning rate of one phase: linear warm-up, then constant or cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ----------------------------------------------------------------------------------------------------- weight tokens

def to_tokens(adapter: Adapter, layout: Layout) -> Tensor:
    """(T, r, k) float32: per module the column blocks of A (r, d_in), then those of B^T (r, d_out).

    Source: the Drag-and-Drop tokenizer both papers adopt.
    """
    r, k = layout.rank, layout.width
    return torch.cat([m.reshape(r, -1, k).transpose(0, 1)
                      for a, _, b, _ in layout.keys() for m in (adapter[a], adapter[b].t())]).float()


def from_tokens(tokens: Tensor, layout: Layout) -> Adapter:
    """The inverse of `to_tokens`, exactly. Raises: ValueError: another number of tokens."""
    r, k = layout.rank, layout.width
    if tokens.shape != (layout.num_tokens, r, k):
        raise ValueError(f"tokens are {tuple(tokens.shape)}, this layout has {(layout.num_tokens, r, k)}")
    out, at = {}, 0
    for a, (_, d_in), b, (d_out, _) in layout.keys():
        na, nb = d_in // k, d_out // k
        out[a] = tokens[at:at + na].transpose(0, 1).reshape(r, d_in).contiguous()
        out[b] = tokens[at + na:at + na + nb].transpose(0, 1).reshape(r, d_out).t().contiguous()
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
    """How weight tokens become regression targets: `dnd | zlog | fixed | element` (docs/choices.md, 2).

    dnd, zlog: per-token mean and standard deviation travel in a frame and are predicted. fixed, element: they are
    constants over the training checkpoints (per parameter tensor, per element), stored with the generator.
    """

    def __init__(self, kind: str, layout: Layout, constants: dict[str, Tensor]):
        self.kind, self.layout, self.constants = kind, layout, constants

    @classmethod
    def fit(cls, kind: str, layout: Layout, tokens: Tensor) -> TokenCode:
        """Constants from training checkpoints: (C, T, r, k) tokens."""
        if kind == "dnd":
            return cls(kind, layout, {})
        if kind == "element":
            return cls(kind, layout, {"mean": tokens.mean(0), "std": tokens.std(0) + 1e-10})
        if kind == "fixed":
            owner = _owners(layout)
            flat = tokens.transpose(0, 1).reshape(tokens.shape[1], -1)
            mean = torch.stack([flat[owner == i].mean() for i in range(int(owner.max()) + 1)])[owner]
            std = torch.stack([flat[owner == i].std() for i in range(int(owner.max()) + 1)])[owner]
            return cls(kind, layout, {"mean": mean[:, None, None], "std": std[:, None, None] + 1e-10})
        mu, sd = tokens.mean((-1, -2)), tokens.std((-1, -2))
        log = torch.log(sd + 1e-8)
        return cls(kind, layout, {"mu_mean": mu.mean(0), "mu_std": mu.std(0) + 1e-12,
                                  "log_mean": log.mean(0), "log_std": log.std(0) + 1e-6})

    @property
    def shape(self) -> tuple[int, int, int]:
        extra = 2 if self.kind in ("dnd", "zlog") else 0
        return self.layout.num_tokens, self.layout.rank + extra, self.layout.width + extra

    def encode(self, tokens: Tensor) -> Tensor:
        """(…, T, r, k) -> (…, *shape), float32. A constant block has content zero, not 0/0."""
        c = self.constants
        if self.kind in ("fixed", "element"):
            return (tokens - c["mean"]) / c["std"]
        mu, sd = tokens.mean((-1, -2)), tokens.std((-1, -2))
        content = (tokens - mu[..., None, None]) / sd.clamp_min(1e-30)[..., None, None]
        content = torch.where((sd < 1e-12)[..., None, None], 0.0, content)
        if self.kind == "dnd":
            return frame_tokens(content, 8 * mu, torch.log(0.9 * sd + 0.1) + 1.6)
        return frame_tokens(content, (mu - c["mu_mean"]) / c["mu_std"],
                            (torch.log(sd + 1e-8) - c["log_mean"]) / c["log_std"])

    def decode(self, coded: Tensor) -> Tensor:
        """The inverse of `encode`; a predicted standard deviation below zero counts as zero, not as a flipped sign."""
        c, coded = self.constants, coded.float()
        if self.kind in ("fixed", "element"):
            return coded * c["std"] + c["mean"]
        content, m, s = unframe_tokens(coded)
        if self.kind == "dnd":
            mu, sd = m / 8, (torch.exp(s - 1.6) - 0.1) / 0.9
        else:
            mu = m * c["mu_std"] + c["mu_mean"]
            sd = torch.exp(s * c["log_std"] + c["log_mean"]) - 1e-8
        return content * sd.clamp_min(0)[..., None, None] + mu[..., None, None]


def _owners(layout: Layout) -> Tensor:
    """(T,) index of the parameter tensor each token belongs to."""
    counts = [n for _, _, d_in, d_out in layout.modules for n in (d_in // layout.width, d_out // layout.width)]
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def position_code(layout: Layout, width: int) -> Tensor:
    """(T, width) 2-D sine-cosine code: half the channels for the token's place in its layer, half for the layer.

    The papers mention it (E.2); off by default, since a constant added to targets cancels at decoding.
    Raises: ValueError: width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width {width} is no multiple of 4")
    layer = torch.repeat_interleave(torch.tensor([m[1] for m in layout.modules]),
                                    torch.tensor([(m[2] + m[3]) // layout.width for m in layout.modules]))
    place = torch.cat([torch.arange(int((layer == i).sum())) for i in layer.unique()])
    freq = torch.exp(-math.log(10000.0) * torch.arange(width // 4) / (width // 4))
    return torch.cat([f(p[:, None] * freq) for p in (place, layer) for f in (torch.sin, torch.cos)], 1)


# -------------------------------------------------------------------------------------------------------------- files

def save_adapter(folder: Path, adapter: Adapter, layout: Layout, base_name: str, revision: str = "main") -> None:
    """A PEFT folder: adapter_model.safetensors and adapter_config.json."""
    save_tensors(folder / "adapter_model.safetensors", adapter, {"format": "pt"})
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "revision": revision,
        "r": layout.rank, "lora_alpha": layout.alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "fan_in_fan_out": False, "use_rslora": False,
        "target_modules": sorted({p.rsplit(".", 1)[-1] for p, *_ in layout.modules})})


def load_adapter(path: Path, layout: Layout) -> Adapter:
    """Raises: UserError: missing, corrupt, or of another shape than the layout."""
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    adapter = load_tensors(file)
    want = {k: s for a, sa, b, sb in layout.keys() for k, s in ((a, sa), (b, sb))}
    got = {k: tuple(v.shape) for k, v in adapter.items()}
    if got != want:
        odd = next(k for k in sorted(want | got) if want.get(k) != got.get(k))
        raise UserError(f"{file}: {odd} is {got.get(odd, 'absent')}, expected {want.get(odd, 'no such key')}; "
                        "the adapter belongs to another model, rank or module set")
    return {k: v.float() for k, v in adapter.items()}


# ------------------------------------------------------------------------------------------------ Gaussians of adapters

def posterior_moments(posterior: Tensor, layout: Layout, space: str, log_floor: float) -> list[tuple[Tensor, Tensor]]:
    """(mean, log sd) of what a (2, D) posterior is a diagonal Gaussian over.

    factor: one pair of (D,), the entries of A and B; row 1 is their log sd. product: a pair of (d_out, d_in) per
    module, the entries of dW; row 1 holds a second pair of factors, sd = |(alpha/r) B A| + e^log_floor (ABMLL's
    structured spread; the absolute value keeps it positive).
    """
    if space == "factor":
        return [(posterior[0], posterior[1])]
    mean, spread = (unflatten_adapter(row, layout) for row in posterior)
    return [(layout.scale * mean[b] @ mean[a],
             ((layout.scale * spread[b] @ spread[a]).abs() + math.exp(log_floor)).log())
            for a, _, b, _ in layout.keys()]


def draw_adapter(posterior: Tensor, layout: Layout, space: str, log_floor: float, rng: torch.Generator) -> Adapter:
    """One reparameterised draw, through which gradients flow to the posterior. In product space it is of full rank."""
    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng, device=rng.device).to(like.device)
    moments = posterior_moments(posterior, layout, space, log_floor)
    if space == "factor":
        (mean, log_sd), = moments
        return unflatten_adapter(mean + log_sd.exp() * noise(mean), layout)
    return unflatten_adapter(posterior[0], layout) | {
        dense_key(path): log_sd.exp() * noise(log_sd)
        for (path, *_), (_, log_sd) in zip(layout.modules, moments, strict=True)}


def load_posterior(folder: Path, layout: Layout) -> Tensor:
    """(2, D) of a PEFT folder that holds the mean, with spread.safetensors beside it."""
    return torch.stack([flatten_adapter(a, layout) for a in
                        (load_adapter(folder, layout), load_tensors(folder / "spread.safetensors"))])
