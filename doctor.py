"""What a configuration needs before it runs: shapes, memory, disk and hours per stage.

    python degaml.py stage=doctor config=configs/qwen2.5-0.5b.yaml

Shapes and parameter counts are exact. Memory and disk are counted from them. Hours are the steps
of a stage times one step of its network, timed here on random weights.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from dataclasses import dataclass
from statistics import mean

import torch
import yaml
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import assets
import collect
import conditions
import config
import data
import generator
import limits
import lora
import methods
import policy
import proof
import proposals
import runtime
import scoring
from alignment import FusionVAE
from config import UserError
from generator import HyperConvDecoder
from lora import Layout
from runtime import Run

GIB = 2**30
PROMPT_TOKENS = 500  # of what the policy reads
# Tokens of "[A]" with what ends it, and rows of a batch that writes them.
ANSWER_TOKENS = 4
ANSWERED_TOGETHER = 32
# Examples of a full test set, about: ARC-c has 1,172 and HellaSwag 10,042.
FULL_TEST = 5000
# Mean tokens of a row of the embedded tasks: trained on, with its right answer alone, and scored,
# with all its options. tests/test_doctor.py counts them.
ROW_TOKENS = {"cloze": (60, 86), "letter": (134, 145)}


def show_config(run: Run) -> dict:
    """Print the resolved configuration and what data it finds, without running anything."""
    print(yaml.safe_dump(run.cfg.model_dump(), sort_keys=False))
    tasks = data.describe_tasks(data.load_tasks(run), run.cfg.data)
    for task in tasks.values():
        print(
            f"{task['title']:13} train {task['n_train']:5} support {task['n_support']:3} "
            f"test {task['n_test']:5} prompts {task['n_prompts']:4} | {task['source']}"
        )
    return {}


def check(run: Run) -> dict:
    """Load every split and the encoder's configuration, and prove the base model, before work."""
    conditions.check_encoder(run.cfg)
    policy.check_search(run.cfg)
    tasks = data.load_tasks(run)
    proof.ensure(run)
    if set(methods.PROPOSING) & set(run.cfg.evaluate.methods):
        policy.policy_layout(run)  # adapt would be the first to miss its modules
        proposals.check_tokenizer(scoring.load_lm(run), run.cfg)
    layout = scoring.load_lm(run).layout
    print(
        f"{len(tasks)} tasks, {layout.num_tokens} weight tokens of "
        f"({layout.rank}, {layout.width}), D = {layout.size:,}: ready"
    )
    return {}


def examine(run: Run) -> dict:
    """Print machine, shapes and the needs of each stage; refuse what cannot fit.

    Raises: UserError: a stage needs more memory or disk than there is (the key to change is named),
        or an extracted file is not what it was.
    """
    if run.rank:
        return {}
    cfg = run.cfg
    memory, disk = machine(run)
    if cfg.data.source == "assets":
        count = assets.check_assets(config.ROOT / cfg.data.dir)
        print(f"assets     {count} files, each with the hash it was extracted with")
    seen = runtime.environment(run)
    print(f"versions   torch {seen['torch']}, transformers {seen['transformers']}")
    print(
        f"machine    {run.device}, {limits.cores()} core(s), {memory / GIB:.0f} GiB, "
        f"{disk / GIB:.0f} GiB of free disk"
    )

    case = open_case(run)
    tokens, rows, columns = token_shape(cfg, case.layout)
    print(f"model      {cfg.model.name}: {size_of(case.model):,} parameters")
    print(f"adapter    rank {cfg.model.rank}, D = {case.layout.size:,}")
    print(f"tokens     {tokens:,} tokens of ({rows},{columns})")
    print(f"generator  {size_of(case.decoder):,} generator parameters")

    needs = predict(case)
    print(f"\npredicted, not measured: memory of one of {run.world} rank(s), hours of one alone")
    print(f"{'stage':12} {'memory GiB':>11} {'disk GiB':>9} {'hours':>9}")
    for name, need in needs.items():
        gib = f"{need.memory / GIB:11.1f} {need.disk / GIB:9.2f}"
        print(f"{name:12} {gib} {need.seconds / 3600:9.2f}")
    refuse(needs, memory, disk, run.device)
    return {}


def forecast(run: Run) -> str:
    """How long it takes from nothing to the adapter of one target, from one step measured now."""
    case = open_case(run)
    needs = predict(case)
    # ranks share the training tasks out, and with data_parallel the pairs of a step
    sharing = {"collect": min(run.world, len(run.cfg.data.train_tasks))}
    if run.cfg.data_parallel:
        sharing["generator"] = min(run.world, run.cfg.generator.batch_size)
    minutes = {}
    for stage, need in needs.items():
        minutes[stage] = need.seconds / sharing.get(stage, 1) / 60
    parts = ", ".join(f"{stage} {value:.1f}" for stage, value in minutes.items())
    return (
        f"about {sum(minutes.values()):.0f} minutes to the adapter, if nothing is there yet "
        f"({parts}; predicted from one measured step)"
    )


@dataclass(frozen=True)
class Case:
    """A configuration on this machine.

    Attributes:
        model, decoder: base model and generator, shapes alone (on torch's meta device).
        least: seconds of a training step of one layer of the base model on one row.
        row: seconds of a step on a whole batch, per row.
        kept: bytes that a token of that layer keeps for the backward pass.
        multiply: seconds of a multiplication of the decoder, with its share of the backward pass.
        sets: left-out sets, each with networks of its own.
    """

    run: Run
    model: nn.Module
    layout: Layout
    decoder: nn.Module
    least: float
    row: float
    kept: float
    multiply: float
    targets: list[str]
    sets: int


@dataclass
class Need:
    """What a stage takes: bytes of memory where the model runs, bytes of disk, seconds of one rank.

    host: bytes of a node's main memory beside its GPUs', for all its ranks.
    """

    memory: float
    disk: float
    seconds: float
    host: float = 0.0


def predict(case: Case) -> dict[str, Need]:
    """What each stage of this configuration needs."""
    idle = methods.idle_stages(case.run.cfg.evaluate.methods)
    if case.run.cfg.policy.mode == "per_task":  # each policy is trained inside stage=adapt
        idle.add("policy")
    needs = {}
    for name, (need, _) in STAGES.items():
        if name not in idle:
            needs[name] = need(case)
    if case.run.device == "cpu":  # one memory for both
        for need in needs.values():
            need.memory += need.host
            need.host = 0.0
    return needs


def lm_need(case, steps=0, batch=0, scored=0, adapters=0, all_scored=False) -> Need:
    """Of training steps on a batch of rows each, rows scored (and answered), and adapters stored.

    all_scored: the loss needs the logits of every token, not of some eight answer tokens a row.
    """
    cfg = case.run.cfg
    shapes = case.model.config
    trained, whole = ROW_TOKENS[cfg.data.format]
    # frozen weights take no gradient: the forward pass is half of a training step
    forward = case.row * whole / trained / 2
    # a GPU takes as long for one row as for several: it waits for the launching of its kernels
    step = max(case.least, batch * case.row)
    seconds = (steps * step + scored * forward) * shapes.num_hidden_layers
    if cfg.evaluate.generate:
        # as if none were found while scoring: the prompt once more, then token by token, where a
        # batch takes as long as a row
        token = case.least / 2 / ANSWERED_TOGETHER
        answer = forward + min(ANSWER_TOKENS, cfg.evaluate.max_new_tokens) * token
        seconds += scored * answer * shapes.num_hidden_layers

    held = batch * trained
    if case.run.device == "cuda":  # there a batch is taken in parts
        part = scoring.part_tokens(cfg.evaluate.token_budget, all_scored)
        held = min(batch * cfg.data.max_tokens, part)
    # float32 weights, gradient and two moments, and the copy in the model's dtype
    adapter = (16 + case.run.dtype.itemsize) * case.layout.size
    # float32 logits, their softmax and their gradient
    logits = 12 * shapes.vocab_size * (held if all_scored else 8 * batch)
    memory = adapter + held * case.kept * shapes.num_hidden_layers + logits
    if scored:
        # one layer's states and float32 logits at any token
        states = cfg.evaluate.token_budget * (case.kept + 4 * shapes.vocab_size)
        memory = max(memory, states)
        # the generator stands beside the model
        if "generator" not in methods.idle_stages(cfg.evaluate.methods):
            memory += 4 * size_of(case.decoder)
    disk = adapters * 4 * case.layout.size
    return Need(base_memory(case) + memory, disk, seconds)


def base_memory(case):
    """Bytes of the frozen base model."""
    return size_of(case.model) * case.run.dtype.itemsize


def need_collect(case):
    cfg = case.run.cfg
    c = cfg.collect
    tasks = len(cfg.data.train_tasks)
    # both phases of every training task; its last checkpoints are kept
    steps = tasks * (c.pretrain_steps + c.finetune_steps)
    return lm_need(case, steps, c.batch_size, adapters=tasks * collect.num_kept(c))


def need_generator(case):
    cfg = case.run.cfg
    g = cfg.generator
    count = size_of(case.decoder)
    states = torch.empty(1, *g.flow[0], device="meta")
    work = count_multiplications(case.decoder, states)
    kept = count_kept(case.decoder, states)

    # float32 weights and gradients, and two moments; ranks that train together share the moments
    # out by whole weights, so the rank with the largest weight holds the most
    largest = max(parameter.numel() for parameter in case.decoder.parameters())
    moments = count
    if cfg.data_parallel:
        moments = max(count / case.run.world, largest)
    network = 8 * count + 8 * moments
    if case.run.dtype == torch.bfloat16:
        # autocast's copy of the weights; the largest gradient is there in both dtypes at once
        network += 2 * count + 6 * largest
        kept /= 2
        if case.run.device == "cuda":
            # the last layer writes float32: its kernel, the largest, twice in float32, and cuDNN's
            # own room for it (measured: 33 GiB at 0.5B)
            network += 10 * largest
    memory = base_memory(case) + network + g.micro_batch * kept

    # float16 states of every prompt, a generator per set, weights and moments to resume one
    num_tasks = len({*cfg.data.train_tasks, *case.targets})
    prompts = num_tasks * cfg.data.num_prompts * 2 * states[0, 0].numel()
    disk = prompts + (case.sets + 3) * 4 * count
    # the targets of a left-out set are files that all ranks read; ranks that train alone are at
    # different sets. One rank holds the state while it saves it.
    checkpoints = len(cfg.data.train_tasks) * collect.num_kept(cfg.collect)
    targets = checkpoints * 4 * math.prod(token_shape(cfg, case.layout))
    at_once = 1 if cfg.data_parallel else min(case.sets, case.run.world)
    disk += at_once * targets
    host = 24 * count
    pairs = case.sets * g.steps * g.batch_size
    return Need(memory, disk, pairs * work * case.multiply, host)


def need_align(case):
    cfg = case.run.cfg
    align = cfg.align
    size = case.layout.size
    width = case.model.config.hidden_size
    with torch.device("meta"):
        vae = FusionVAE(size, width, align.latent, align.pos_table, align.residual)
        pair = (torch.empty(1, size), torch.empty(1, width))
        work = count_multiplications(vae, *pair)
        kept = count_kept(vae, *pair)
    # a task vector of every generated adapter
    draws = len(cfg.data.train_tasks) * align.draws
    need = lm_need(case, scored=case.sets * draws * align.prompts)
    # weights, gradients, two moments and the inner step's copy
    need.memory += 20 * size_of(vae) + align.batch_size * kept
    need.disk = case.sets * 4 * size_of(vae)
    # a support and a query batch each epoch
    passes = case.sets * align.meta_epochs * 2 * align.batch_size
    need.seconds += passes * work * case.multiply
    # sources and goals of every pair, and once more while their statistics are taken
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need.host = ranks_here * 4 * draws * 4 * size
    return need


def need_policy(case):
    """Meta-training of the policies: a search on every training task of every left-out set."""
    cfg = case.run.cfg
    tasks = case.sets * len(cfg.data.train_tasks)
    return search_need(case, tasks, cfg.policy.iterations)


def need_adapt(case):
    """A search per target; a policy that is trained already proposes once."""
    cfg = case.run.cfg
    iterations = cfg.policy.iterations
    if cfg.policy.mode == "meta":
        iterations = 1
    need = search_need(case, len(case.targets), iterations)
    need.disk = 4 * case.layout.size * len(case.targets) * len(cfg.evaluate.methods)
    return need


def search_need(case, tasks, iterations):
    """As if every proposal trained like TTT: SFT's folds make up for families that do not train.

    The policy's own training, and what a step of a chain after the first takes, come on top.
    """
    cfg = case.run.cfg
    bounds = cfg.strategies
    policy_config = cfg.policy
    proposing = set(cfg.evaluate.methods) & set(methods.PROPOSING)
    rounds = iterations * tasks * len(proposing) * policy_config.steps
    tried = policy_config.proposals * rounds
    steps = mean(bounds.proposal_grid.get("TTT.ttl_steps", [1, bounds.max_ttl_steps]))
    batch = mean(bounds.proposal_grid.get("TTT.batch_size", [1, bounds.max_batch_size]))
    scored = tried * cfg.data.num_support
    need = lm_need(case, tried * steps, batch, scored, all_scored=True)

    # at most policy.MAX_SAMPLES rewarded proposals of each round, behind one prompt per batch
    updates = policy_config.epochs * math.ceil(policy.MAX_SAMPLES / policy_config.batch_size)
    rows = PROMPT_TOKENS / ROW_TOKENS[cfg.data.format][0]
    need.seconds += lm_need(case, rounds * updates, rows).seconds
    return need


def need_baselines(case):
    """Meta-training of the baselines; that on the support sets is short beside it."""
    cfg = case.run.cfg
    total = lm_need(case, batch=cfg.collect.batch_size)
    for method in {"union", "maml", "abmll"} & set(cfg.evaluate.methods):
        if method == "union":
            batch = cfg.collect.batch_size
            collecting = cfg.collect.pretrain_steps + cfg.collect.finetune_steps
            steps = collecting * len(cfg.data.train_tasks) * cfg.baselines.union.step_share
        else:
            settings = getattr(cfg.baselines, method)
            batch = settings.batch_size
            steps = settings.meta_steps * settings.tasks_per_step * (settings.inner_steps + 1)
        if method == "maml":  # second order takes three passes for one
            steps *= 3
        need = lm_need(case, case.sets * steps, batch, adapters=case.sets)
        total.memory = max(total.memory, need.memory)
        total.disk += need.disk
        total.seconds += need.seconds

    if "abmll" in cfg.evaluate.methods and cfg.baselines.abmll.space == "product":
        # a posterior over whole matrices: 28 float32 per entry of dW, as measured
        entries = sum(d_in * d_out for _, _, d_in, d_out in case.layout.modules)
        total.memory = max(total.memory, base_memory(case) + 28 * 4 * entries)
    return total


def need_evaluate(case):
    cfg = case.run.cfg
    # one per method, and the generator's prompt batches
    passes = len(cfg.evaluate.methods) + cfg.evaluate.prompt_batches
    if "icl" in cfg.evaluate.methods:
        passes += 2  # with 20 examples in the prompt an answer took 3.4 times as long
    size = min(data.test_limit(cfg.data), FULL_TEST)
    return lm_need(case, scored=size * len(case.targets) * passes)


# what each stage needs, and what to change where it does not fit
STAGES = {
    "collect": (need_collect, "lower collect.batch_size or data.max_tokens"),
    "generator": (need_generator, "lower generator.micro_batch, or shrink generator.flow"),
    "align": (need_align, "lower align.batch_size"),
    "policy": (need_policy, "lower policy.proposals or evaluate.token_budget"),
    "adapt": (need_adapt, "lower evaluate.token_budget"),
    "baselines": (need_baselines, "lower collect.batch_size, or baselines.abmll.space=factor"),
    "evaluate": (need_evaluate, "lower evaluate.token_budget"),
}


def open_case(run: Run) -> Case:
    cfg = run.cfg
    model = meta_model(cfg)
    layout = find_layout(cfg, model)
    flow = [*cfg.generator.flow, list(token_shape(cfg, layout))]
    with torch.device("meta"):
        decoder = HyperConvDecoder(flow, cfg.generator.kernel)
    least, row, kept = time_layer(run, model)
    multiply = time_decoder(run, flow)
    targets = cfg.data.targets or cfg.data.train_tasks + cfg.data.test_tasks
    sets = data.left_out_sets(cfg)
    return Case(run, model, layout, decoder, least, row, kept, multiply, targets, len(sets))


def time_layer(run, model) -> tuple:
    """Train an adapter of one layer of the base model, on random weights.

    Returns: seconds of a step on one row, seconds per row of a whole batch, bytes a token keeps.
    """
    from transformers import AutoModel

    cfg = run.cfg
    shapes = copy.deepcopy(model.config)
    shapes.num_hidden_layers = 1
    shapes.vocab_size = 1000
    shapes.pad_token_id = None
    # on a CPU attention is written out in training, as in `scoring`
    attention = "eager" if run.device == "cpu" else "sdpa"
    layer = AutoModel.from_config(shapes, dtype=run.dtype, attn_implementation=attention)
    layer.to(run.device)
    layout = find_layout(cfg, layer)
    lora.attach_lora(layer, layout)
    size = (cfg.collect.batch_size, ROW_TOKENS[cfg.data.format][0])
    batch = torch.ones(size, dtype=torch.long, device=run.device)

    with lora.AdapterTrainer(layer, layout, lora.init_adapter(layout, 0)) as trainer:

        def step(ids):
            states = layer(ids, use_cache=False).last_hidden_state
            trainer.backward(states.float().square().mean())
            trainer.step(1e-4)

        least = timed(run, lambda: step(batch[:1]))
        whole = timed(run, lambda: step(batch))
        kept = count_kept(layer, batch)
    return least, whole / len(batch), kept / batch.numel()


def time_decoder(run, flow) -> float:
    """Seconds of a multiplication of the decoder, with its share of the backward pass."""
    g = run.cfg.generator

    def step():
        with generator.autocast(run):
            out = decoder(states)
        out.float().square().mean().backward()

    # A decoder too large to try here is timed at a half, a quarter, … of its sizes.
    for part in (16, 8, 4, 2, 1):
        sizes = [[math.ceil(size / part) for size in shape] for shape in flow]
        decoder = HyperConvDecoder(sizes, g.kernel).to(run.device)
        states = torch.randn(g.micro_batch, *sizes[0], device=run.device)
        seconds = timed(run, step)
        if seconds > 0.3:
            break
    # a GPU's kernels pad channels: the multiplications are those of the shapes
    work = count_multiplications(decoder.to("meta"), states.to("meta"))
    return seconds / work


def timed(run, step) -> float:
    """Least seconds of three steps: a kernel's first use is slow, and others may be at work."""
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        step()
        if run.device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken)


def count_multiplications(network: nn.Module, *inputs) -> int:
    """Multiplications of a forward pass, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with counter:
        network(*inputs)
    return counter.get_total_flops() // 2


def count_kept(network: nn.Module, *inputs) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        out = network(*inputs)
    del out  # held until here: a freed storage would be counted as the next one
    return sum(kept.values())


def size_of(network: nn.Module) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def find_layout(cfg, model) -> Layout:
    m = cfg.model
    return lora.find_layout(model, m.rank, m.alpha, m.token_width, m.modules)


def token_shape(cfg, layout: Layout) -> tuple:
    """(T, rows, columns) of the generator's output; two of the codes frame every token."""
    frame = 2 if cfg.generator.scale_code == "dnd" else 0
    return layout.num_tokens, layout.rank + frame, layout.width + frame


def meta_model(cfg) -> nn.Module:
    """The base model without weights: by its folder's config.json, or by configs/models.yaml.

    Raises: UserError: it is in neither.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    known = config.ROOT / "configs/models.yaml"
    facts = config.parse_yaml(known.read_text(), "configs/models.yaml")
    name = cfg.model.name
    folder = config.ROOT / name
    if (folder / "config.json").is_file():
        shapes = AutoConfig.from_pretrained(folder)
    elif name in facts:
        shapes = AutoConfig.for_model(**facts[name])
    else:
        try:  # a hub model that was loaded on this machine before
            shapes = AutoConfig.from_pretrained(
                name, revision=cfg.model.revision, local_files_only=True
            )
        except (OSError, ValueError):
            raise UserError(
                f"model.name={name}: its shapes are not known here; name a folder with a "
                "config.json, or add it to configs/models.yaml (there: "
                f"{', '.join(facts)})"
            ) from None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shapes)


def machine(run: Run) -> tuple:
    """(bytes of memory where the model runs, bytes of free disk)."""
    memory = limits.total_memory()
    if run.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    return memory, shutil.disk_usage(run.path).free


def refuse(needs: dict, memory: float, disk: float, device: str) -> None:
    """Raises: UserError: naming every stage that cannot fit, and the key to change."""
    faults = []
    for name, need in needs.items():
        _, change = STAGES[name]
        if need.memory > memory:
            faults.append(
                f"stage={name} needs about {need.memory / GIB:.1f} GiB of {device} memory, "
                f"{memory / GIB:.1f} are there: {change}"
            )
        if need.host > limits.total_memory():
            faults.append(
                f"stage={name} needs about {need.host / GIB:.0f} GiB of a node's main memory, "
                f"{limits.total_memory() / GIB:.0f} are there: lower align.draws, "
                "or start fewer ranks"
            )
    total = sum(need.disk for need in needs.values())
    if total > disk:
        faults.append(
            f"the run folder needs about {total / GIB:.1f} GiB of disk, {disk / GIB:.1f} are "
            "free: lower collect.save_last, or name another disk by run=…"
        )
    if faults:
        raise UserError("this configuration does not fit here:\n  " + "\n  ".join(faults))
