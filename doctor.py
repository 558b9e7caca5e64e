"""What a configuration needs before it runs: shapes, memory, disk and time per stage, from the model's shapes alone.

    python degaml.py stage=doctor config=configs/qwen2.5-0.5b.yaml

Shapes and parameter counts are exact. Memory, disk and hours are predictions from counted operations and a short
matrix-product measurement on this machine; the table says so.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import assets
import config
import data
import generator
import lora
import methods
import runtime
import scoring
import strategies
from alignment import FusionVAE
from config import UserError
from generator import HyperConvDecoder
from lora import Layout
from runtime import Run

GIB = 2**30
EFFICIENCY = 0.4  # of the measured matrix-product rate that training and scoring reach
ROW_TOKENS = 110  # of a benchmark question with its options, on average
LAUNCHES = 0.009  # seconds a layer of an adapter's training step keeps the host busy; measured beside an H100


@dataclass(frozen=True)
class Need:
    """What a stage is predicted to take: GiB of device memory, GiB of disk, hours on this device; host: GiB of a node's
    memory beside a GPU's, for all its ranks."""

    memory: float
    disk: float
    hours: float
    host: float = 0.0


def show_config(run: Run) -> dict:
    """Print the resolved configuration and what data it finds, without running anything."""
    cfg = run.cfg
    print(yaml.safe_dump(cfg.model_dump(), sort_keys=False))
    for task in data.describe_tasks(data.load_tasks(run), cfg.data.prompts_from).values():
        print(
            f"{task['title']:13} train {task['n_train']:5} support {task['n_support']:3} "
            f"test {task['n_test']:5} prompts {task['n_prompts']:4} | {task['source']}"
        )
    return {}


def check(run: Run) -> dict:
    """Load every split, the model and the encoder's configuration, so that a mistake shows before the work starts."""
    generator.check_encoder(run.cfg)
    strategies.check_grid(run.cfg.strategies)
    tasks = data.load_tasks(run)
    layout = scoring.load_lm(run).layout
    print(
        f"{len(tasks)} tasks, {layout.num_tokens} weight tokens of ({layout.rank}, {layout.width}), "
        f"D = {layout.size:,}: ready"
    )
    return {}


def examine(run: Run) -> dict:
    """Print machine, shapes and the needs of each stage; refuse what cannot fit.

    Raises: UserError: a stage needs more memory or disk than there is (the key to change is named), or an extracted
        file is not what it was.
    """
    cfg = run.cfg
    if run.rank:
        return {}
    model = meta_model(cfg)
    layout = lora.find_layout(
        model, cfg.model.rank, cfg.model.alpha, cfg.model.token_width, cfg.model.modules
    )
    tokens = token_shape(cfg, layout)
    with torch.device("meta"):
        decoder = HyperConvDecoder([*cfg.generator.flow, list(tokens)], cfg.generator.kernel)
    decoder_size = sum(p.numel() for p in decoder.parameters())
    have_memory, have_disk, rate = machine(run)
    seen = runtime.environment(run)
    print(
        f"machine    {run.device}, {seen['cores']} cores, {torch.get_num_threads()} threads, "
        f"{have_memory:.0f} GiB of {run.device} memory, {have_disk:.0f} GiB of free disk, {rate / 1e9:,.0f} GFLOP/s "
        f"{str(run.dtype)[6:]} matrix products"
    )
    if cfg.data.source == "assets":
        data = (
            Path(cfg.data.dir) if Path(cfg.data.dir).is_absolute() else config.ROOT / cfg.data.dir
        )
        print(
            f"assets     {assets.check_assets(data)} files, each with the hash it was extracted with"
        )
    print(
        "versions   "
        + ", ".join(f"{k} {seen[k]}" for k in ("python", "torch", "transformers", "peft"))
    )
    print(
        f"model      {cfg.model.name}: {sum(p.numel() for p in model.parameters()):,} parameters, LoRA rank "
        f"{cfg.model.rank}, D = {layout.size:,}"
    )
    print(f"tokens     {tokens[0]:,} tokens of ({tokens[1]},{tokens[2]})")
    print(
        f"generator  {decoder_size:,} generator parameters, kernel {cfg.generator.kernel}, "
        f"{multiplications(cfg, tokens) / 1e12:.3g} T multiplications a forward pass"
    )
    needs = predict(run, model, layout, tokens, decoder_size, rate)
    if run.device == "cpu":  # one memory for both
        needs = {k: Need(n.memory + n.host, n.disk, n.hours) for k, n in needs.items()}
    print(
        f"\npredicted, not measured ({run.device}; memory of one of {run.world} rank(s), hours of one rank alone at "
        f"{EFFICIENCY:.0%} of the measured rate)\n{'stage':12} {'memory GiB':>11} {'disk GiB':>9} {'hours':>9}"
    )
    for name, n in needs.items():
        print(f"{name:12} {n.memory:11.1f} {n.disk:9.2f} {n.hours:9.2f}")
    total, host = sum(n.disk for n in needs.values()), max(n.host for n in needs.values())
    print(
        f"{'all':12} {max(n.memory for n in needs.values()):11.1f} {total:9.2f} "
        f"{sum(n.hours for n in needs.values()):9.2f}"
    )
    if host:
        print(f"main memory of a node: {host:.0f} GiB; here are {host_memory():.0f}")
    refuse(needs, have_memory, have_disk, run.device)
    return {}


KEYS = {
    "generator": "lower generator.micro_batch, or shrink generator.flow",
    "collect": "lower collect.batch_size or data.max_tokens",
    "align": "lower align.batch_size",
    "evaluate": "lower evaluate.token_budget",
    "adapt": "lower evaluate.token_budget",
    "baselines": "lower collect.batch_size, or baselines.abmll.space=factor",
}


def refuse(needs: dict[str, Need], memory: float, disk: float, device: str) -> None:
    """Raises: UserError: naming every stage that cannot fit, and the key to change."""
    faults = [
        f"stage={name} needs about {n.memory:.1f} GiB of {device} memory, {memory:.1f} are there: {KEYS[name]}"
        for name, n in needs.items()
        if n.memory > memory
    ]
    faults += [
        f"stage={name} needs about {n.host:.0f} GiB of a node's main memory, {host_memory():.0f} are there: "
        "lower collect.save_last or align.draws, or start fewer ranks"
        for name, n in needs.items()
        if n.host > host_memory()
    ]
    if (total := sum(n.disk for n in needs.values())) > disk:
        faults.append(
            f"the run folder needs about {total:.1f} GiB of disk, {disk:.1f} are free: lower "
            "collect.save_last, or name another disk by run=…"
        )
    if faults:
        raise UserError("this configuration does not fit here:\n  " + "\n  ".join(faults))


def meta_model(cfg):
    """The base model without weights: from its folder's config.json, or from configs/models.yaml. Raises: UserError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = config.parse_yaml(
        (config.ROOT / "configs/models.yaml").read_text(), "configs/models.yaml"
    )
    folder = (
        Path(cfg.model.name) if Path(cfg.model.name).is_absolute() else config.ROOT / cfg.model.name
    )
    if (folder / "config.json").is_file():
        shapes = AutoConfig.from_pretrained(folder)
    elif cfg.model.name in facts:
        shapes = AutoConfig.for_model(**facts[cfg.model.name])
    else:
        raise UserError(
            f"model.name={cfg.model.name}: its shapes are not known here; name a folder with a config.json,"
            f" or add it to configs/models.yaml (there: {', '.join(facts)})"
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shapes)


def token_shape(cfg, layout: Layout) -> tuple[int, int, int]:
    """(T, rows, columns) of the generator's output; two of the codes frame every token."""
    frame = 2 if cfg.generator.scale_code == "dnd" else 0
    return layout.num_tokens, layout.rank + frame, layout.width + frame


def _layers(cfg, tokens):
    flow = [*cfg.generator.flow, list(tokens)]
    return zip(flow, flow[1:], strict=False)


def multiplications(cfg, tokens: tuple[int, int, int]) -> int:
    """Multiply-adds of the decoder on one prompt batch."""
    return cfg.generator.kernel**2 * sum(
        c * c2 * n * m + m * m2 * n * c2 + m * m2 * n * c + c * c2 * n * m2 + n * n2 * m2 * c2
        for (n, m, c), (n2, m2, c2) in _layers(cfg, tokens)
    )


def kept_values(cfg, tokens: tuple[int, int, int]) -> int:
    """Activations one prompt batch keeps for the backward pass: every convolution's input, and tanh's output; with
    `generator.recompute` every layer's input, and one layer's others at a time."""
    layers = [
        (n * m * c, n * m * c + n * m * c2 + n * m2 * c + 4 * n * m2 * c2 + n2 * m2 * c2)
        for (n, m, c), (n2, m2, c2) in _layers(cfg, tokens)
    ]
    inside = [others for _, others in layers]
    return sum(x for x, _ in layers) + sum(inside)


def predict(
    run: Run, model, layout: Layout, tokens, decoder_size: int, rate: float
) -> dict[str, Need]:
    """{stage: Need} of the stages this configuration runs."""
    cfg = run.cfg
    c, g, p, a = cfg.collect, cfg.generator, cfg.policy, cfg.align
    wide, shapes = run.dtype.itemsize, model.config
    size = sum(x.numel() for x in model.parameters())
    matrices = sum(i * o for _, _, i, o in layout.modules)
    targets = cfg.data.targets or cfg.data.train_tasks + cfg.data.test_tasks
    tasks, sets = len(cfg.data.train_tasks), len({data.left_out_for(cfg, t) for t in targets})
    row = min(cfg.data.max_tokens, ROW_TOKENS)
    base = size * wide
    per_token = (
        wide * shapes.num_hidden_layers * (12 * shapes.hidden_size + 4 * shapes.intermediate_size)
    )
    budget, gpu = cfg.evaluate.token_budget, run.device == "cuda"

    def training(
        rows: int,
    ) -> float:  # fp32 master, gradient and moments of the adapter, activations, logits
        held = min(rows * cfg.data.max_tokens, scoring.part_tokens(budget)) if gpu else rows * row
        return (base + 18 * layout.size + held * per_token + rows * 8 * shapes.vocab_size * 8) / GIB

    def hours(
        flops: float, passes: float = 0.0
    ) -> float:  # on a GPU a training step is bound by its launches
        return (
            max(flops / (EFFICIENCY * rate), gpu * passes * LAUNCHES * shapes.num_hidden_layers)
            / 3600
        )

    one = 2 * matrices * row  # FLOPs of one example forward; training an adapter takes twice that
    steps, saved = c.pretrain_steps + c.finetune_steps, 4 * layout.size
    needs = {
        "collect": Need(
            training(c.batch_size),
            tasks * c.save_last * saved / GIB,
            hours(2 * one * tasks * steps * c.batch_size, tasks * steps),
        )
    }
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks of a node
    states = (
        (tasks + len(set(targets) - set(cfg.data.train_tasks)))
        * cfg.data.num_prompts
        * g.max_length
        * 384
        * 2
    )
    shared = run.world if cfg.data_parallel else 1  # ranks that share the moments out
    weights = (
        8 + 8 / shared + (2 if wide == 2 else 0)
    )  # bytes: master, gradient, moments, autocast's copy
    biggest = g.kernel**2 * max(
        max(k * k2, m * m2, n * n2) for (n, m, k), (n2, m2, k2) in _layers(cfg, tokens)
    )
    needs["generator"] = Need(
        (
            base
            + weights * decoder_size
            + 6 * biggest
            + g.micro_batch * kept_values(cfg, tokens) * wide
        )
        / GIB,
        (states + (sets + 3) * 4 * decoder_size)
        / GIB,  # and one resumable state of weights and moments
        hours(6 * multiplications(cfg, tokens) * g.batch_size * g.steps * sets),
        (beside * tasks * c.save_last * 4 * math.prod(tokens) + 24 * decoder_size) / GIB,
    )  # targets; a saved state
    method_ids, idle = set(cfg.evaluate.methods), methods.idle_stages(cfg.evaluate.methods)
    drawing = (
        0.0 if "generator" in idle else 4 * decoder_size / GIB
    )  # the generator beside the model
    if method_ids & set(methods.ALIGNED):
        with torch.device("meta"):
            vae = FusionVAE(layout.size, shapes.hidden_size, a.latent, a.pos_table, a.residual)
        count = sum(x.numel() for x in vae.parameters())
        needs["align"] = Need(
            drawing + (20 * count + a.batch_size * 28 * layout.size * 4 + base) / GIB,
            sets * 4 * count / GIB,
            hours(2 * a.meta_epochs * a.batch_size * sets * 6 * 4300 * layout.size),
            beside * 4 * a.draws * tasks * saved / GIB,
        )
    tried = (
        p.proposals
        * p.iterations
        * len(targets)
        * len(method_ids & {"degaml", "degaml_plus", "tempo", "tempo_plus"})
    )
    # steering keeps float32 logits of every context token
    scored_at_once = (
        base + budget * per_token / shapes.num_hidden_layers + 4 * budget * shapes.vocab_size
    ) / GIB
    prompts = (
        scoring.part_tokens(budget, all_scored=True)
        if gpu
        else row * max(_offered(cfg, "TTT.batch_size", "max_batch_size"))
    )
    testing = (
        base + prompts * (per_token + 12 * shapes.vocab_size)
    ) / GIB  # test-time training: logits everywhere
    rows, updates = _trained(cfg)
    needs["adapt"] = Need(
        drawing + max(scored_at_once, testing, training(16)),
        len(targets) * len(method_ids) * saved / GIB,
        hours(one * tried * (cfg.data.num_support + 2 * rows), tried * updates),
    )
    baselines = method_ids & set(methods.META_TRAINED)
    if baselines:
        b = cfg.baselines
        passes = {
            "union": (steps * tasks * b.union.step_share, c),
            # second order: three passes for one
            "maml": (
                3 * b.maml.meta_steps * b.maml.tasks_per_step * (b.maml.inner_steps + 1),
                b.maml,
            ),
            "abmll": (
                b.abmll.meta_steps * b.abmll.tasks_per_step * (b.abmll.inner_steps + 1),
                b.abmll,
            ),
        }
        made = [(sets * n, of.batch_size) for m, (n, of) in passes.items() if m in baselines]
        whole = (
            "abmll" in baselines and b.abmll.space == "product"
        )  # 28 float32 per entry of dW, as measured
        needs["baselines"] = Need(
            max(training(c.batch_size), whole * (base + 112 * matrices) / GIB),
            sets * len(baselines) * saved / GIB,
            hours(2 * one * sum(n * size for n, size in made), sum(n for n, _ in made)),
        )
    scored = cfg.data.num_test * len(targets) * (len(method_ids) + cfg.evaluate.prompt_batches)
    needs["evaluate"] = Need(drawing + scored_at_once, 200 * scored / GIB, hours(one * scored))
    return {name: need for name, need in needs.items() if name not in idle}


def _offered(cfg, field: str, most: str) -> list[float]:
    """The values of a strategy's field that the policy is offered; of an open range its ends."""
    return cfg.strategies.proposal_grid.get(field) or [1, getattr(cfg.strategies, most)]


def _trained(cfg) -> tuple[float, float]:
    """(rows, steps) that a proposal trains on, on average over the families."""

    def mean(field, most):
        values = _offered(cfg, field, most)
        return sum(values) / len(values)

    families = methods.sampled_families(cfg.evaluate.methods, cfg.policy.families)
    steps = {
        "TTT": mean("TTT.ttl_steps", "max_ttl_steps"),
        "SFT": cfg.policy.folds * mean("SFT.sft_steps", "max_sft_steps"),
    }
    steps = {f: n for f, n in steps.items() if f in families}
    rows = sum(n * mean(f"{f}.batch_size", "max_batch_size") for f, n in steps.items())
    return rows / len(families), sum(steps.values()) / len(families)


def host_memory() -> float:
    """GiB of this machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def machine(run: Run) -> tuple[float, float, float]:
    """(GiB of memory where the model runs, GiB of free disk, FLOP/s of a matrix product in the run's dtype)."""
    memory = (
        torch.cuda.get_device_properties(0).total_memory / GIB
        if run.device == "cuda"
        else host_memory()
    )
    n = 8192 if run.device == "cuda" else 1024
    a = torch.randn(n, n, device=run.device).to(run.dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return memory, shutil.disk_usage(run.path).free / GIB, 2 * n**3 / best
