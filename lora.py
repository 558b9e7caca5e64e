"""An adapter: its layout in a model, swapping it in, fine-tuning it, and its PEFT folder.

The base model is loaded once and never changed or cast. `attach_lora` replaces its adapted linear
layers by `LoraLinear`. `swap_adapter` then puts any adapter into these, in a few milliseconds.
An adapter is {PEFT key: float32 CPU tensor}.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config
import runtime
from config import UserError

Adapter = dict[str, Tensor]
PREFIX = "base_model.model."  # PEFT wraps the model twice, and its keys say so
CLIP = 1.0  # of the gradient's global norm, in every training but the VAE's (both papers)


@dataclass(frozen=True)
class Layout:
    """Where a model's adapters sit, in token order.

    Attributes:
        modules: (path, layer, d_in, d_out) per adapted linear. Layers ascend; inside a layer the
            modules stand in the configured order.
        rank, alpha: LoRA r and alpha.
        width: k, columns of a weight token.
    """

    modules: tuple[tuple[str, int, int, int], ...]
    rank: int
    alpha: float
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

    def keys(self) -> Iterator[tuple]:
        """(key of A, (r, d_in), key of B, (d_out, r)) per module."""
        for path, _, d_in, d_out in self.modules:
            a_key = f"{PREFIX}{path}.lora_A.weight"
            b_key = f"{PREFIX}{path}.lora_B.weight"
            yield a_key, (self.rank, d_in), b_key, (d_out, self.rank)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """{key: shape} of an adapter's tensors: module by module, A before B."""
        found = {}
        for a_key, a_shape, b_key, b_shape in self.keys():
            found[a_key] = a_shape
            found[b_key] = b_shape
        return found


def find_layout(
    model: nn.Module,
    rank: int,
    alpha: int,
    width: int,
    modules: list[str],
    key: str = "model.modules",
) -> Layout:
    """The adapted linears of any decoder, found by module name.

    Args: key: of the configuration, which names the modules.
    Raises: UserError: a name that matches nothing, or a token width that does not divide every
        dimension.
    """
    # a model of images has towers of its own beside its text decoder: they are never adapted
    decoder = {id(module) for module in model.get_decoder().modules()}
    found = []
    linears = set()
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, LoraLinear)) or id(module) not in decoder:
            continue
        name = _last_name(path)
        # a linear outside the numbered layers, as the head, is never adapted
        linears.add(name)
        layer = re.search(r"\.(\d+)\.", path)
        if layer and name in modules:
            found.append((path, int(layer[1]), module.in_features, module.out_features))

    # a name that matches nothing would leave the adapter smaller than the user believes
    matched = {_last_name(path) for path, *_ in found}
    missing = [name for name in modules if name not in matched]
    if missing:
        raise UserError(
            f"{key}: {missing} not found in the model; its linear layers are {sorted(linears)}"
        )

    # A is cut along d_in and B along d_out: no token may be ragged
    dims = []
    for _, _, d_in, d_out in found:
        dims += [d_in, d_out]
    check_width(width, dims)

    # token order: by layer, then as configured, whatever order the model registers its modules in
    found.sort(key=lambda entry: (entry[1], modules.index(_last_name(entry[0]))))
    return Layout(tuple(found), rank, alpha, width)


def _last_name(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def check_width(width: int, dims: list[int]) -> None:
    """Raises: UserError: `width` does not divide every dimension; the widths that do are named."""
    common = math.gcd(*dims)
    if common % width == 0:
        return
    # widths below 8 make more tokens than a decoder can hold
    divisors = [w for w in range(1, common + 1) if common % w == 0]
    useful = [w for w in divisors if w >= 8]
    raise UserError(
        f"model.token_width: {width} does not divide every adapted dimension {sorted(set(dims))}; "
        f"legal: {useful or [common]}"
    )


class LoraLinear(nn.Module):
    """A frozen linear layer plus an optional update (alpha/r) B A.

    A and B are plain tensors, swapped from outside. `dense` is a further update of any rank,
    (d_out, d_in): what a draw from a posterior over whole matrices adds.
    """

    def __init__(self, base: nn.Linear, scale: float):
        super().__init__()
        self.base = base
        self.scale = scale
        self.in_features = base.in_features
        self.out_features = base.out_features
        # no buffers: what is swapped in stays out of the model's state
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.dense: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.A is None:
            return self.base(x)
        # a product takes matrices: all positions of all sequences are rows of one
        rows = x.reshape(-1, x.shape[-1])
        base = self.base
        y = AdaptedProduct.apply(rows, base.weight, base.bias, self.A, self.B, self.scale)
        if self.dense is not None:
            y = y + F.linear(rows, self.dense)
        return y.view(*x.shape[:-1], -1)


class AdaptedProduct(torch.autograd.Function):
    """x W^T + bias + scale x A^T B^T, with a gradient for x, A and B.

    It is what autograd would compute, in fewer passes over the states, and with the narrow products
    laid out so that a CPU makes them three to four times as fast.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        """x: (n, d_in). weight: (d_out, d_in). a: (r, d_in). b: (d_out, r)."""
        low = x @ a.t()
        y = F.linear(x, weight, bias)
        y.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, grad):
        """grad: (n, d_out)."""
        x, weight, a, b, low = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted (MAML)
            low = x @ a.t()

        # B by columns: a product with few columns reads its second matrix row by row
        columns = b.t().contiguous()
        grad_low = ctx.scale * (grad @ columns.t())
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.addmm(grad @ weight, grad_low, a)
        if ctx.needs_input_grad[3]:
            grad_a = grad_low.t() @ x
        if ctx.needs_input_grad[4]:
            grad_b = ctx.scale * (low.t() @ grad).t()
        return grad_x, None, None, grad_a, grad_b, None


def attach_lora(model: nn.Module, layout: Layout) -> None:
    """Replace the adapted linears by LoraLinear, once; the model is frozen."""
    model.requires_grad_(False)
    for path, *_ in layout.modules:
        parent_path, name = path.rsplit(".", 1)
        parent = model.get_submodule(parent_path)
        linear = getattr(parent, name)
        # the policy's layout may adapt modules that a task layout has wrapped before
        if not isinstance(linear, LoraLinear):
            setattr(parent, name, LoraLinear(linear, layout.scale))


def swap_adapter(model: nn.Module, layout: Layout, adapter: Adapter | None) -> None:
    """Put an adapter into the model, cast to the base's dtype; None leaves the bare base model.

    Besides A and B an adapter may hold `dense_key(path)`, (d_out, d_in): see `LoraLinear.dense`.
    """
    for (path, *_), (a_key, _, b_key, _) in zip(layout.modules, layout.keys(), strict=True):
        module = model.get_submodule(path)
        module.scale = layout.scale  # layouts of several ranks take turns in one model

        # nothing of the adapter before stays
        module.A = None
        module.B = None
        module.dense = None
        if adapter is None:
            continue
        weight = module.weight
        module.A = adapter[a_key].to(weight.device, weight.dtype)
        module.B = adapter[b_key].to(weight.device, weight.dtype)
        dense = adapter.get(dense_key(path))
        if dense is not None:
            module.dense = dense.to(weight.device, weight.dtype)


def dense_key(path: str) -> str:
    """Key of a module's full-rank update."""
    return f"{PREFIX}{path}.dense.weight"


def clear_adapters(model: nn.Module) -> None:
    """The bare base model, whatever layout was in."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.A = None
            module.B = None
            module.dense = None


def init_adapter(layout: Layout, seed: int) -> Adapter:
    """The A initialisation every checkpoint shares (Kaiming uniform, as PEFT) and B = 0.

    One seed for all tasks: with different A's, A is unpredictable noise to the generator
    (docs/choices.md, 4).
    """
    rng = torch.Generator().manual_seed(runtime.seed_for(seed, "lora_A"))
    adapter = {}
    for a_key, a_shape, b_key, b_shape in layout.keys():
        # Kaiming uniform with a = sqrt(5): 1 / sqrt(fan in)
        bound = 1 / math.sqrt(a_shape[1])
        adapter[a_key] = torch.empty(a_shape).uniform_(-bound, bound, generator=rng)
        adapter[b_key] = torch.zeros(b_shape)
    return adapter


def flatten_adapter(adapter: Adapter, layout: Layout) -> Tensor:
    """(D,) float32, module by module, A before B."""
    return torch.cat([adapter[key].reshape(-1).float() for key in layout.shapes()])


def unflatten_adapter(vector: Tensor, layout: Layout) -> Adapter:
    """The inverse: views into the vector, through which gradients flow back to it."""
    shapes = layout.shapes()
    parts = vector.split([math.prod(shape) for shape in shapes.values()])
    adapter = {}
    for (key, shape), part in zip(shapes.items(), parts, strict=True):
        adapter[key] = part.view(shape)
    return adapter


def average_adapters(adapters: list[Adapter]) -> Adapter:
    """Element-wise mean."""
    mean = {}
    for key in adapters[0]:
        mean[key] = torch.stack([adapter[key] for adapter in adapters]).mean(0)
    return mean


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

        # what the model sees, in its own dtype
        self.copy = self.master.to(parameter.dtype, copy=True)

        # the model's A and B are views of the copy: one tensor to cast, one gradient to gather
        views = unflatten_adapter(self.copy, layout)
        for view in views.values():
            view.requires_grad_()
        swap_adapter(model, layout, views)
        self.leaves = list(views.values())

        self.optimizer = torch.optim.AdamW([self.master], lr=1.0, weight_decay=0.0, fused=True)

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
        # a plain loss is one part
        parts = loss
        if torch.is_tensor(loss):
            parts = [(loss, 1)]
        gradient = 0
        total = 0
        count = 0
        for part, size in parts:
            # gradients are summed in float32, whatever the model computes in
            pieces = torch.autograd.grad(part, self.leaves)
            gradient = gradient + torch.cat([piece.reshape(-1) for piece in pieces]).float()
            total = total + part.detach()
            count += size
        if not count:
            return None

        # a limit on the norm keeps one odd batch from throwing the adapter away
        self.master.grad = gradient / count
        norm = self.master.grad.norm()
        self.master.grad.mul_((CLIP / (norm + 1e-6)).clamp(max=1.0))
        # the norm is not finite if any entry of the gradient is not
        if not math.isfinite(norm):
            return math.nan
        return float(total / count)

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
        return peak * (step + 1) / (warmup + 1)  # no step is wasted on a rate of zero
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def save_adapter(folder: Path, adapter: Adapter, layout: Layout, model_config) -> None:
    """A PEFT folder: adapter_model.safetensors and adapter_config.json.

    Args: model_config: the section `model` of the configuration, which names the base model.
    """
    from peft import LoraConfig  # slow to import

    runtime.save_tensors(folder / "adapter_model.safetensors", adapter, {"format": "pt"})

    modules = sorted({_last_name(path) for path, *_ in layout.modules})
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name(model_config),
        revision=model_config.revision,
        r=layout.rank,
        lora_alpha=layout.alpha,
        target_modules=modules,
        inference_mode=True,
    )
    # PEFT's own writer is not whole-or-not-at-all, and it orders a set as the process hashes it
    fields = settings.to_dict() | {"target_modules": modules}
    runtime.write_json(folder / "adapter_config.json", fields)


def base_name(model_config) -> str:
    """The base model as other tools find it from any folder: an absolute path, or a hub id."""
    # relative paths of a configuration mean the repository's
    folder = config.ROOT / model_config.name
    return str(folder.absolute()) if folder.is_dir() else model_config.name


def load_adapter(path: Path, layout: Layout) -> Adapter:
    """The adapter of a PEFT folder, or of one safetensors file.

    Raises: UserError: missing, corrupt, or of another shape or scale than the layout.
    """
    file = path
    if path.is_dir():
        file = path / "adapter_model.safetensors"
    adapter = runtime.load_tensors(file)

    # shapes first: a wrong one would otherwise fail deep inside a matrix product
    found = {key: tuple(tensor.shape) for key, tensor in adapter.items()}
    expected = layout.shapes()
    for key in sorted(found | expected):
        if found.get(key) != expected.get(key):
            raise UserError(
                f"{file}: {key} is {found.get(key, 'absent')}, "
                f"expected {expected.get(key, 'no such key')}; "
                "the adapter belongs to another model, rank or module set"
            )

    # a checkpoint is a bare file; a folder also says at which scale its adapter was trained
    if path.is_dir():
        _check_scale(path / "adapter_config.json", layout)
    return {key: tensor.float() for key, tensor in adapter.items()}


def _check_scale(file: Path, layout: Layout) -> None:
    """Raises: UserError: PEFT would apply the adapter with another alpha than this layout."""
    from peft import LoraConfig

    settings = LoraConfig.from_peft_type(**runtime.read_json(file))
    scale = settings.lora_alpha / settings.r
    if settings.use_rslora:
        scale = settings.lora_alpha / settings.r**0.5
    if not math.isclose(scale, layout.scale):
        raise UserError(
            f"{file}: lora_alpha is {settings.lora_alpha}, r is {settings.r}, use_rslora is "
            f"{settings.use_rslora}: a scale of {scale:g}, expected {layout.scale:g}; the adapter "
            "was trained at another scale"
        )


def adapter_hash(adapter: Adapter) -> str:
    """Identity of an adapter's numbers."""
    digest = hashlib.sha256()
    for key in sorted(adapter):  # independent of the order of the keys
        digest.update(key.encode() + adapter[key].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
