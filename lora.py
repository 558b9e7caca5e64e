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

import runtime
from config import UserError

Adapter = dict[str, Tensor]
PREFIX = "base_model.model."
CLIP = 1.0  # of the gradient's global norm, in every training (both papers)


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
            yield (
                f"{PREFIX}{path}.lora_A.weight",
                (self.rank, d_in),
                f"{PREFIX}{path}.lora_B.weight",
                (d_out, self.rank),
            )


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
        raise UserError(
            f"model.modules: {missing} not found in the model; its linear layers are {sorted(names)}"
        )
    found.sort(key=lambda f: (f[1], modules.index(f[0].rsplit(".", 1)[-1])))
    check_width(width, [d for _, _, i, o in found for d in (i, o)])
    return Layout(tuple(found), rank, alpha, width)


def check_width(width: int, dims: list[int]) -> None:
    """Raises: UserError: `width` does not divide every dimension; the widths that do are named."""
    if any(d % width for d in dims):
        common = math.gcd(*dims)
        legal = [w for w in range(1, common + 1) if common % w == 0 and w >= 8] or [common]
        raise UserError(
            f"model.token_width: {width} does not divide every adapted dimension {sorted(set(dims))}; "
            f"legal: {legal}"
        )


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
            setattr(
                model.get_submodule(parent),
                name,
                LoraLinear(getattr(model.get_submodule(parent), name), layout.scale),
            )


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
    g = torch.Generator().manual_seed(runtime.seed_for(seed, "lora_A"))
    out = {}
    for a, a_shape, b, b_shape in layout.keys():
        bound = 1 / math.sqrt(a_shape[1])
        out[a] = torch.empty(a_shape).uniform_(-bound, bound, generator=g)
        out[b] = torch.zeros(b_shape)
    return out


def flatten_adapter(adapter: Adapter, layout: Layout) -> Tensor:
    """(D,) float32, module by module, A before B."""
    return torch.cat(
        [adapter[k].reshape(-1).float() for a, _, b, _ in layout.keys() for k in (a, b)]
    )


def unflatten_adapter(vector: Tensor, layout: Layout) -> Adapter:
    """The inverse: views into the vector, through which gradients flow back to it."""
    shapes = [(k, s) for a, sa, b, sb in layout.keys() for k, s in ((a, sa), (b, sb))]
    parts = vector.split([math.prod(s) for _, s in shapes])
    return {k: v.view(s) for v, (k, s) in zip(parts, shapes, strict=True)}


def average_adapters(adapters: list[Adapter]) -> Adapter:
    """Element-wise mean."""
    return {k: torch.stack([a[k] for a in adapters]).mean(0) for k in adapters[0]}


# ------------------------------------------------------------------------------------------------------- fine-tuning


class AdapterTrainer:
    """AdamW without decay on one adapter inside the model, gradients clipped by their global norm.

    The base model stays in its own dtype. The model sees copies of float32 masters in that dtype,
    so that bf16 rounding never accumulates in the adapter. Leaving the `with` block leaves the
    model bare.

        with AdapterTrainer(model, layout, adapter) as trainer:
            for rows in batches:
                loss = trainer.backward(lm_loss(lm, rows))
                trainer.step(lr)
        trained = trainer.adapter()
    """

    def __init__(self, model: nn.Module, layout: Layout, adapter: Adapter):
        parameter = next(model.parameters())
        self.model = model
        self.layout = layout
        self.master = flatten_adapter(adapter, layout).to(parameter.device)
        self.copy = self.master.to(parameter.dtype, copy=True)

        # the model's A and B are views of the copy: one tensor to cast, one gradient to gather
        views = unflatten_adapter(self.copy, layout)
        self.leaves = [view.requires_grad_() for view in views.values()]
        for (path, *_), a, b in zip(
            layout.modules, self.leaves[::2], self.leaves[1::2], strict=True
        ):
            module = model.get_submodule(path)
            module.A = a
            module.B = b
            module.scale = layout.scale

        fused = parameter.device.type == "cuda"
        self.optimizer = torch.optim.AdamW([self.master], lr=1.0, weight_decay=0.0, fused=fused)

    def __enter__(self) -> AdapterTrainer:
        return self

    def __exit__(self, *error) -> None:
        clear_adapters(self.model)

    def backward(self, loss: Tensor | Iterable[tuple[Tensor, int]]) -> float | None:
        """Leave the clipped gradient of a loss on the masters.

        Args:
            loss: () tensor, or (sum, count) of one part of a batch after another. Then the loss is
                the sums over the counts, and the graphs of two parts are never held at once.
        Returns: the loss; nan if it or its gradient is not finite; None if nothing was counted.
        """
        parts = [(loss, 1)] if torch.is_tensor(loss) else loss
        gradient = 0
        total = 0
        count = 0
        for part, size in parts:
            pieces = torch.autograd.grad(part, self.leaves)
            gradient = gradient + torch.cat([piece.reshape(-1) for piece in pieces]).float()
            total = total + part.detach()
            count += size
        if not count:
            return None

        self.master.grad = gradient / count
        norm = self.master.grad.norm()
        self.master.grad.mul_((CLIP / (norm + 1e-6)).clamp(max=1.0))
        value = float(total / count)
        return value if math.isfinite(norm) else math.nan

    def step(self, lr: float) -> None:
        """One update of the masters, and fresh copies for the model."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            self.copy.copy_(self.master)

    def adapter(self) -> Adapter:
        """The adapter as it is now."""
        return unflatten_adapter(self.master.detach().cpu().clone(), self.layout)


def rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Learning rate of one phase: linear warm-up, then constant or cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# -------------------------------------------------------------------------------------------------------------- files


def save_adapter(
    folder: Path, adapter: Adapter, layout: Layout, base_name: str, revision: str = "main"
) -> None:
    """A PEFT folder: adapter_model.safetensors and adapter_config.json."""
    runtime.save_tensors(folder / "adapter_model.safetensors", adapter, {"format": "pt"})
    runtime.write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "revision": revision,
            "r": layout.rank,
            "lora_alpha": layout.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "fan_in_fan_out": False,
            "use_rslora": False,
            "target_modules": sorted({p.rsplit(".", 1)[-1] for p, *_ in layout.modules}),
        },
    )


def load_adapter(path: Path, layout: Layout) -> Adapter:
    """Raises: UserError: missing, corrupt, or of another shape than the layout."""
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    adapter = runtime.load_tensors(file)
    want = {k: s for a, sa, b, sb in layout.keys() for k, s in ((a, sa), (b, sb))}
    got = {k: tuple(v.shape) for k, v in adapter.items()}
    if got != want:
        odd = next(k for k in sorted(want | got) if want.get(k) != got.get(k))
        raise UserError(
            f"{file}: {odd} is {got.get(odd, 'absent')}, expected {want.get(odd, 'no such key')}; "
            "the adapter belongs to another model, rank or module set"
        )
    return {k: v.float() for k, v in adapter.items()}


def adapter_hash(adapter: Adapter) -> str:
    """Identity of an adapter's numbers."""
    import hashlib

    h = hashlib.sha256()
    for k in sorted(adapter):
        h.update(k.encode() + adapter[k].contiguous().numpy().tobytes())
    return h.hexdigest()[:16]
