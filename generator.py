"""From a batch of a task's prompts to an adapter (DeGAML, stage 1).

    python degaml.py stage=generator config=configs/smollm2.yaml
        -> generator/<left-out set>/generator.safetensors

The file follows the data. Prompts come as encoder states (`conditions`). Collected checkpoints
become weight tokens. A hyper-convolutional decoder learns to map the states to the tokens, and then
generates. All is leave-one-out: the generator of a training task is trained without that task, the
one named `all` on every task.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

import collect
import conditions
import data
import lora
import runtime
import scoring
from config import UserError
from fastconv import SameConv2d
from lora import Adapter, Layout
from runtime import Run


def to_tokens(adapter: Adapter, layout: Layout) -> Tensor:
    """(T, r, k) float32: per module the column blocks of A (r, d_in), then of B^T (r, d_out).

    Source: the Drag-and-Drop tokenizer both papers adopt.
    """
    blocks = []
    for a, _, b, _ in layout.keys():
        for matrix in (adapter[a], adapter[b].t()):
            columns = matrix.reshape(layout.rank, -1, layout.width)
            blocks.append(columns.transpose(0, 1))
    return torch.cat(blocks).float()


def from_tokens(tokens: Tensor, layout: Layout) -> Adapter:
    """The inverse of `to_tokens`, exactly. Raises: ValueError: another number of tokens."""
    wanted = (layout.num_tokens, layout.rank, layout.width)
    if tokens.shape != wanted:
        raise ValueError(f"tokens are {tuple(tokens.shape)}, this layout has {wanted}")
    # A module's blocks stand together, A's before B's.
    counts = []
    for _, _, d_in, d_out in layout.modules:
        counts += [d_in // layout.width, d_out // layout.width]
    blocks = iter(tokens.split(counts))
    adapter = {}
    for a, _, b, _ in layout.keys():
        adapter[a] = _join(next(blocks)).contiguous()
        adapter[b] = _join(next(blocks)).t().contiguous()
    return adapter


def _join(blocks):
    """(n, r, k) column blocks -> (r, n k)."""
    return blocks.transpose(0, 1).flatten(1)


def frame_tokens(content: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Write scale codes around normalised blocks: (…, T, r, k), (…, T), (…, T) -> (…, T, r+2, k+2).

    The 2x2 tile [[m, s], [m, s]] repeats along the last two rows and columns, as Drag-and-Drop
    stores it.
    """
    framed = F.pad(content, (0, 2, 0, 2))
    framed[..., -2:, 0::2] = m[..., None, None]
    framed[..., -2:, 1::2] = s[..., None, None]
    framed[..., :, -2] = m[..., None]
    framed[..., :, -1] = s[..., None]
    return framed


def unframe_tokens(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse. A code is read as the mean of the bottom rows' and the right columns' means."""
    bottom = tokens[..., -2:, :]
    m_below = bottom[..., 0::2].mean((-1, -2))
    s_below = bottom[..., 1::2].mean((-1, -2))
    m_beside = tokens[..., :, -2].mean(-1)
    s_beside = tokens[..., :, -1].mean(-1)
    content = tokens[..., :-2, :-2]
    return content, (m_below + m_beside) / 2, (s_below + s_beside) / 2


@dataclass
class TokenCode:
    """How weight tokens become regression targets: `dnd | element` (docs/choices.md, 2).

    dnd: a token's mean and standard deviation travel in a frame around it and are predicted.
    element: they are constants of each element over the training checkpoints, and are stored with
    the generator.
    """

    kind: str
    layout: Layout
    constants: dict[str, Tensor]

    @classmethod
    def fit(cls, kind: str, layout: Layout, tokens: Tensor) -> TokenCode:
        """Constants from training checkpoints: (C, T, r, k) tokens."""
        constants = {}
        if kind == "element":
            constants["mean"] = tokens.mean(0)
            constants["std"] = tokens.std(0) + 1e-10
        return cls(kind, layout, constants)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one adapter's targets."""
        frame = 2 if self.kind == "dnd" else 0
        rows = self.layout.rank + frame
        columns = self.layout.width + frame
        return self.layout.num_tokens, rows, columns

    def encode(self, tokens: Tensor) -> Tensor:
        """(…, T, r, k) -> (…, *shape), float32."""
        if self.kind == "element":
            return (tokens - self.constants["mean"]) / self.constants["std"]
        mean = tokens.mean((-1, -2), keepdim=True)
        std = tokens.std((-1, -2), keepdim=True)
        content = (tokens - mean) / std.clamp_min(1e-30)
        # A constant block, such as a B that is still zero, has content zero and not 0/0.
        content = torch.where(std < 1e-12, 0.0, content)
        # Drag-and-Drop's numbers. The logarithm is finite where the deviation is zero.
        m = 8 * mean
        s = torch.log(0.9 * std + 0.1) + 1.6
        return frame_tokens(content, m[..., 0, 0], s[..., 0, 0])

    def decode(self, coded: Tensor) -> Tensor:
        """The inverse of `encode`."""
        coded = coded.float()
        if self.kind == "element":
            return coded * self.constants["std"] + self.constants["mean"]
        content, m, s = unframe_tokens(coded)
        mean = m / 8
        std = (torch.exp(s - 1.6) - 0.1) / 0.9
        # Predicted below zero it counts as zero, not as a flipped sign.
        std = std.clamp_min(0)
        return content * std[..., None, None] + mean[..., None, None]


class HyperConvLayer(nn.Module):
    """(B, N, L, C) -> (B, N', L', C'): two crossed pairs of convolutions, then one over prompts.

    Implements: DeGAML, eq. 9, with Drag-and-Drop's axes. W: conv C->C' over (L, N), then L->L' over
    (N, C'). H: conv L->L' over (N, C), then C->C' over (L', N), then tanh. Out: conv N->N' of
    (W + H + b)/3.
    """

    def __init__(self, shape: list[int], out: list[int], kernel: int, last: bool = False):
        super().__init__()
        n, length, c = shape
        n2, length2, c2 = out
        half = kernel // 2

        def conv(inputs, outputs, bias=False):
            return SameConv2d(inputs, outputs, kernel, padding=half, bias=bias)

        self.norm = nn.LayerNorm([length, c])
        self.w1 = conv(c, c2)
        self.w2 = conv(length, length2)
        self.h1 = conv(length, length2)
        self.h2 = conv(c, c2)
        bias = torch.empty(length2, c2).uniform_(-1, 1)
        self.bias = nn.Parameter(bias / (length2 * c2))
        self.out = conv(n, n2, bias=True)
        # The scales of weight tokens lie within a few bfloat16 steps: what is written is float32.
        self.out.wide = last
        self.residual = list(shape) == list(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        # Channels stand second: a permutation brings the axis there that the convolution changes.
        w = self.w1(y.permute(0, 3, 2, 1))  # (B, C', L, N)
        w = self.w2(w.permute(0, 2, 3, 1))  # (B, L', N, C')
        w = w.permute(0, 2, 1, 3)  # (B, N, L', C')

        h = self.h1(y.permute(0, 2, 1, 3))  # (B, L', N, C)
        h = self.h2(h.permute(0, 3, 1, 2))  # (B, C', L', N)
        h = torch.tanh(h).permute(0, 3, 2, 1)  # (B, N, L', C')

        y = self.out((w + h + self.bias) / 3)
        return x + y if self.residual else y


class HyperConvDecoder(nn.Sequential):
    """The whole flow of (N, L, C) shapes; the last is the weight tokens' (T, r[+2], k[+2])."""

    def __init__(self, flow: list[list[int]], kernel: int):
        layers = []
        for shape, out in itertools.pairwise(flow):
            last = len(layers) == len(flow) - 2
            layers.append(HyperConvLayer(shape, out, kernel, last))
        super().__init__(*layers)


def train_generators(run: Run) -> dict:
    """One generator per left-out set that the targets need.

    Ranks take whole generators; with `data_parallel` all ranks train each one together.
    Writes generator/<left-out set>/generator.safetensors.
    """
    cfg = run.cfg
    conditions.encode_prompts(run)
    wanted = data.left_out_sets(cfg)
    if cfg.data_parallel and run.world > 1:
        for left_out in wanted:
            _train_together(run, left_out)
    else:
        for left_out in run.deal(wanted):
            if not run.finished(f"generator/{left_out}", "generator"):
                train_one(run, left_out, ranks=1)

    losses = []
    for left_out in wanted:
        done = runtime.read_json(run.path / f"generator/{left_out}/DONE.json")
        losses.append(done["recon_mse"])
    return {"generator/recon_mse": sum(losses) / len(losses)}


def _train_together(run, left_out):
    """One generator by all ranks, unless it is finished."""
    # Rank 0 looks first: with `overwrite=true` to look may be to clear the folder.
    if run.rank > 0:
        run.barrier()
    finished = run.finished(f"generator/{left_out}", "generator")
    if run.rank == 0:
        run.barrier()

    if not finished:
        train_one(run, left_out, ranks=run.world)
    run.barrier()  # nobody looks for the results before rank 0 has written them


@dataclass
class Lessons:
    """What a generator learns from, by training task.

    Attributes: states: (prompts, L, d) float16. targets: (checkpoints, *TokenCode.shape) float32,
        memory-mapped.
        weight: (1, T, 1, 1), of the squared errors, or None.
    """

    states: dict[str, np.ndarray]
    targets: dict[str, Tensor]
    weight: Tensor | None


@dataclass
class Training:
    """A decoder in training, by `ranks` ranks together, and how far it has come.

    Attributes: made_with: a number for the configuration. network: what is called, the decoder or
        what spreads it over ranks. step: steps done. last: the last loss. spent: seconds, those of
        interrupted attempts included.
    """

    folder: Path
    ranks: int
    made_with: int
    decoder: HyperConvDecoder
    network: nn.Module
    optimizer: Optimizer
    step: int = 0
    last: float = math.nan
    spent: float = 0.0


def train_one(run: Run, left_out: str, ranks: int = 1) -> None:
    """Regress checkpoints on prompt batches (DeGAML, eq. 10), by this rank or by all together."""
    g = run.cfg.generator
    began = time.monotonic()
    label = f"generator {data.left_out_label(left_out)}"
    tasks = data.training_tasks(run.cfg, left_out)
    folder = run.path / f"generator/{left_out}"
    code, lessons = _prepare_lessons(run, left_out, tasks, folder / "targets", ranks)

    # A new decoder, or the one that an interrupted training of this configuration left.
    training = _build(run, folder, code, ranks)
    _resume(run, training)
    began -= training.spent
    decoder = training.decoder
    optimizer = training.optimizer

    leads = ranks == 1 or run.rank == 0
    steps = range(training.step, g.steps)
    if leads:
        steps = run.track(steps, label)
    for step in steps:
        rate = lora.rate(step, g.steps, g.lr, g.warmup_steps, "cosine")
        optimizer.param_groups[0]["lr"] = rate
        # The global batch is drawn by its step alone, whoever computes which part of it.
        pairs = draw_pairs(run.cfg, lessons.states, lessons.targets, step)
        loss = _accumulate(run, training, lessons, pairs)
        norm = nn.utils.clip_grad_norm_(decoder.parameters(), lora.CLIP)

        # Looked at before the step, which would spoil the weights. All ranks see the same numbers.
        training.spent = time.monotonic() - began
        if not (math.isfinite(loss) and math.isfinite(norm)):
            _save_state(run, training)
            raise UserError(
                f"{label}: the loss is not finite at step {step + 1} (last finite "
                f"{training.last:.4f}); the state before it is saved in {training.folder}; "
                "lower generator.lr"
            )
        optimizer.step()
        decoder.zero_grad(set_to_none=True)
        training.step += 1
        training.last = loss

        over = training.step == g.steps
        if leads and (over or training.step % 10 == 0):
            shown = round(loss, 5)
            run.metric(stage="generator", unit=left_out, step=training.step, loss=shown, lr=rate)
        if not over and training.step % g.save_every == 0:
            _save_state(run, training)

    if leads:
        _save_generator(training, code)
        facts = {"tasks": tasks, "recon_mse": training.last}
        facts["parameters"] = sum(weight.numel() for weight in decoder.parameters())
        run.finish(f"generator/{left_out}", "generator", began, ranks=ranks, **facts)
        # only now: a run killed before its record would train again from the first step
        (training.folder / "state.safetensors").unlink(missing_ok=True)
        shutil.rmtree(folder / "targets")
        run.log(f"{label}: mse {training.last:.4f} in {training.spent:.0f} s", every_rank=True)


def _prepare_lessons(run, left_out, tasks, folder, ranks):
    """What the decoder reads and what it has to write."""
    g = run.cfg.generator
    leads = ranks == 1 or run.rank == 0
    lm = scoring.load_lm(run)
    layout = lm.layout
    states = {}
    for task in tasks:
        states[task] = conditions.load_states(run, conditions.prompt_set(run.cfg, task, left_out))

    # The constants of an element code are those of all checkpoints; dnd has none.
    code = TokenCode(g.scale_code, layout, {})
    if g.scale_code == "element":
        every = []
        for task in tasks:
            for adapter in collect.load_checkpoints(run, lm, task):
                every.append(to_tokens(adapter, layout))
        code = TokenCode.fit("element", layout, torch.stack(every))

    # One rank writes the targets; all ranks of a node read the same pages of the files. At the
    # papers' scale they are tens of GiB.
    if leads:
        for task in tasks:
            _write_targets(run, folder, task, code)
    if ranks > 1:
        run.barrier()
    targets = {}
    for task in tasks:
        targets[task] = torch.from_numpy(runtime.load_array(folder / f"{task}.npy", "c"))

    weight = None
    if g.criterion_weight == "std":
        weight = token_weights(targets).to(run.device)
    return code, Lessons(states, targets, weight)


def _write_targets(run, folder, task, code):
    """Write a task's regression targets, (checkpoints, *TokenCode.shape), one at a time."""
    lm = scoring.load_lm(run)
    names = collect.checkpoint_names(run, task)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (len(names), *code.shape)
    file = np.lib.format.open_memmap(folder / f"{task}.npy", "w+", np.float32, shape)
    for number, adapter in enumerate(collect.load_checkpoints(run, lm, task)):
        file[number] = code.encode(to_tokens(adapter, lm.layout)).numpy()
    file.flush()


def token_weights(targets: dict[str, Tensor]) -> Tensor:
    """(1, T, 1, 1) loss weights with mean 1: each token's spread over a task's checkpoints.

    Averaged over tasks. Source: Drag-and-Drop's criterion weight.
    """
    per_task = []
    for target in targets.values():
        spread = target.std(0).mean((-1, -2))
        per_task.append(spread / spread.mean().clamp_min(1e-30))
    weight = torch.stack(per_task).mean(0)
    return weight.view(1, -1, 1, 1)


def _build(run, folder, code, ranks):
    """A new decoder and its AdamW, spread over the ranks that train it together."""
    g = run.cfg.generator
    made_with = runtime.seed_for(runtime.fingerprint(run.cfg, "generator"))
    torch.manual_seed(runtime.seed_for(g.seed, "generator"))
    decoder = HyperConvDecoder([*g.flow, code.shape], g.kernel)
    decoder.to(run.device)
    network = decoder
    weights = decoder.parameters()
    options = {"lr": g.lr, "weight_decay": g.weight_decay, "fused": run.device == "cuda"}
    if ranks == 1:
        optimizer = AdamW(weights, **options)
    else:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        # Gradients live in the buffers that the ranks exchange: no second copy of them.
        network = DistributedDataParallel(decoder, gradient_as_bucket_view=True)
        # Moments take twice the room of the weights: each rank keeps those of some weights only.
        optimizer = ZeroRedundancyOptimizer(weights, AdamW, **options)
    return Training(folder, ranks, made_with, decoder, network, optimizer)


def _accumulate(run, training, lessons, pairs):
    """Leave the gradient of one global batch on the decoder's parameters, and return its loss.

    Ranks that train together take the micro-batches in turn, and all get the sum over all.
    """
    size = run.cfg.generator.micro_batch
    if training.ranks > 1:  # smaller ones, where a rank would have none
        size = min(size, math.ceil(len(pairs) / training.ranks))
    starts = range(0, len(pairs), size)
    idle = False
    if training.ranks > 1:
        # A rank without a micro-batch must exchange gradients all the same: of weight zero.
        idle = run.rank >= len(starts)
        starts = starts[run.rank :: run.world] or [0]

    total = torch.zeros((), device=run.device)
    for at in starts:
        part = pairs[at : at + size]
        share = 0.0 if idle else len(part) / len(pairs)
        exchange = contextlib.nullcontext()
        if training.ranks > 1 and at != starts[-1]:
            exchange = training.network.no_sync()  # to do so with the last micro-batch is enough
        with exchange:
            loss = share * _loss(run, training, lessons, part, at)
            # The exchange takes the mean over ranks, and the sum is wanted.
            (loss * training.ranks).backward()
        total += loss.detach()
    if training.ranks > 1:
        dist.all_reduce(total)
    return float(total)


def _loss(run, training, lessons, pairs, at):
    """Mean squared error of a micro-batch, which begins with pair number `at` of its step."""
    noise = run.cfg.generator.noise
    condition, target = _load_pairs(run, lessons, pairs)
    if noise:
        # Drag-and-Drop's. Seeded by place: resumed, or on other ranks, it is the same.
        seed = runtime.seed_for(run.cfg.generator.seed, "noise", training.step, at)
        rng = torch.Generator(run.device).manual_seed(seed)
        for tensor, scale in ((condition, noise), (target, 0.1 * noise)):
            tensor += scale * torch.randn(tensor.shape, generator=rng, device=run.device)
    with autocast(run):
        out = training.network(condition)
    weight = None
    if lessons.weight is not None:
        weight = lessons.weight.expand(out.shape)
    return F.mse_loss(out, target, weight=weight)


def autocast(run: Run) -> torch.autocast:
    """Products in the base model's dtype, in training and use alike: of generator and VAE."""
    half = run.dtype == torch.bfloat16
    return torch.autocast(run.device, torch.bfloat16, enabled=half)


def draw_pairs(cfg, states: dict, targets: dict, step: int) -> list[tuple]:
    """(task, prompt indices, checkpoint) of one step: `batch_size` pairs, the tasks in turn.

    Each is drawn from the task's pool of `pairs_per_task` random pairs (DeGAML, App. C).
    """
    g = cfg.generator
    tasks = list(targets)
    rng = runtime.rng_for(g.seed, "step", step)
    pairs = []
    for i in range(g.batch_size):
        task = tasks[(i + step * g.batch_size) % len(tasks)]
        # The pool is never written out: a pair's number seeds its prompts and its checkpoint.
        number = int(rng.integers(g.pairs_per_task))
        prompts = conditions.draw_prompts(cfg, task, len(states[task]), "pair", number)
        of_pair = runtime.rng_for(g.seed, "pair", task, number)
        checkpoint = int(of_pair.integers(len(targets[task])))
        pairs.append((task, prompts, checkpoint))
    return pairs


def _load_pairs(run, lessons, pairs):
    """(B, N, L, d) conditions and (B, T, …) targets on the device, float32."""
    task, prompts, _ = pairs[0]
    shape = (len(pairs), len(prompts), *lessons.states[task].shape[1:])
    # One copy from the file into pinned memory, and float16 on the way to the device: a micro-batch
    # is 0.3 GB at the papers' scale.
    on_gpu = run.device == "cuda"
    condition = torch.empty(shape, dtype=torch.float16, pin_memory=on_gpu)
    rows = condition.numpy()
    target = []
    for i, (task, prompts, checkpoint) in enumerate(pairs):
        # "clip" for speed: "raise" copies through a buffer, and no index is out of bounds.
        np.take(lessons.states[task], prompts, axis=0, out=rows[i], mode="clip")
        target.append(lessons.targets[task][checkpoint])
    condition = runtime.to_device(condition, run.device)
    target = runtime.to_device(torch.stack(target), run.device)
    return condition.float(), target


def _save_state(run, training):
    """Write weights, moments and progress, whole or not at all; every rank that trains calls it."""
    path = training.folder / "state.safetensors"
    if training.ranks > 1:
        training.optimizer.consolidate_state_dict(to=0)  # all moments to rank 0
    if training.ranks == 1 or run.rank == 0:
        for torn in path.parent.glob(f".{path.name}.*.tmp"):  # of a process killed while it saved
            torn.unlink(missing_ok=True)
        state = training.decoder.state_dict(prefix="p.")
        moments = training.optimizer.state_dict()["state"]
        for i, of_weight in moments.items():
            state[f"m.{i}"] = of_weight["exp_avg"]
            state[f"v.{i}"] = of_weight["exp_avg_sq"]
        state["made_with"] = torch.tensor(training.made_with)
        state["step"] = torch.tensor(training.step)
        state["last"] = torch.tensor(training.last)
        state["spent"] = torch.tensor(training.spent)
        runtime.save_tensors(path, state)
    if training.ranks > 1:
        run.barrier()  # a rank that fails has the others ended: not before rank 0 has written


def _resume(run, training):
    """Take up what an interrupted training of this configuration left, by however many ranks.

    Randomness depends on the step alone, so weights, moments and progress are all there is.
    """
    path = training.folder / "state.safetensors"
    if not path.is_file():
        return
    state = runtime.load_tensors(path)
    if int(state["made_with"]) != training.made_with:
        return  # another configuration's: it is not continued
    training.decoder.load_state_dict(_part(state, "p."))
    training.step = int(state["step"])
    training.last = float(state["last"])
    training.spent = float(state["spent"])

    # Each of several ranks has an AdamW of its own inside, for its share of the weights.
    optimizer = training.optimizer if training.ranks == 1 else training.optimizer.optim
    mine = {id(weight) for weight in optimizer.param_groups[0]["params"]}
    for i, weight in enumerate(training.decoder.parameters()):
        if id(weight) in mine and f"m.{i}" in state:
            optimizer.state[weight] = {
                "step": torch.tensor(float(training.step)).to(run.device),
                "exp_avg": state[f"m.{i}"].to(run.device),
                "exp_avg_sq": state[f"v.{i}"].to(run.device),
            }


def _save_generator(training, code):
    """Decoder and constants of the code in one file."""
    tensors = training.decoder.state_dict(prefix="decoder.")
    for name, constant in code.constants.items():
        tensors[f"code.{name}"] = constant
    runtime.save_tensors(training.folder / "generator.safetensors", tensors)


def _part(tensors, prefix):
    """Those of a file's tensors whose names begin so, under the rest of the name."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors[name] for name in names}


@dataclass
class Generator:
    """A trained decoder, the code of the tokens it writes, and what it was trained without."""

    decoder: HyperConvDecoder
    code: TokenCode
    left_out: str


def load_generator(run: Run, left_out: str) -> Generator:
    """The trained generator of a left-out set. Raises: UserError: not trained, or damaged."""
    unit = f"generator/{left_out}"
    if unit in run.cache:
        return run.cache[unit]
    # One at a time: the papers' take 4 GiB each.
    for other in list(run.cache):
        if other.startswith("generator/"):
            del run.cache[other]

    g = run.cfg.generator
    folder = run.path / unit
    if not run.finished(unit, "generator", redo=False):
        raise UserError(f"{folder}: not trained yet; run stage=generator")
    state = runtime.load_tensors(folder / "generator.safetensors")
    layout = scoring.load_lm(run).layout
    code = TokenCode(g.scale_code, layout, _part(state, "code."))
    with torch.device("meta"):  # the stored weights take the places of new ones
        decoder = HyperConvDecoder([*g.flow, code.shape], g.kernel)
    decoder.load_state_dict(_part(state, "decoder."), assign=True)
    decoder.to(run.device).eval().requires_grad_(False)
    run.cache[unit] = Generator(decoder, code, left_out)
    return run.cache[unit]


@torch.no_grad()  # the policy's gradients must not reach the generator
def generate_adapter(
    run: Run, target: str, batch: int, prompts_of: str = "", left_out: str | None = None
) -> tuple[Adapter, np.ndarray]:
    """One draw from q_phi(adapter | task): by the `batch`-th independent prompt batch of a target.

    Args: prompts_of: condition on another task's prompts (the control `wrong_prompts`). left_out:
        which generator, if not the target's own leave-one-out one (meta-training of the policy).
    Returns: the adapter, without gradient, and the indices of the prompts it was conditioned on.
    """
    if left_out is None:
        left_out = data.left_out_for(run.cfg, target)
    generator = load_generator(run, left_out)
    source = prompts_of or target
    states = conditions.load_states(run, conditions.prompt_set(run.cfg, source, left_out))
    index = conditions.draw_prompts(run.cfg, source, len(states), "generate", batch)
    condition = torch.from_numpy(states[index])[None]
    with autocast(run):
        out = generator.decoder(condition.float().to(run.device))
    tokens = generator.code.decode(out[0].cpu())
    return from_tokens(tokens, generator.code.layout), index


def wrong_task(run: Run, name: str) -> str:
    """The task whose prompts are the control `wrong_prompts` of a task."""
    # two places on in the list of tasks, never a twin such as ARC-c and ARC-e
    names = run.cfg.data.train_tasks + run.cfg.data.test_tasks
    step = 2 if len(names) > 2 else 1
    return names[(names.index(name) + step) % len(names)]
