"""The hot paths beside what a user would pick instead: same cores, same work, interleaved repeats, medians.

    make bench                                          all paths
    python bench/bench.py paths=train_arc_e,slot repeats=5    some of them; out=folder keeps bench.json elsewhere

Ours runs one process per core with one thread each, as `make reproduce` does; a peer runs one process with all cores
as threads, as its users start it. A worker loads its model, warms up, then reports the work done and the seconds it
took; side by side workers add their work. Ratios are of work per second.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules measured
import config
import data
import doctor
import generator
import lora
import runtime
import scoring
import strategies
from config import UserError
from generator import HyperConvDecoder
from runtime import Run

CORES = len(os.sched_getaffinity(0))
GOALS = {
    "train_arc_e": 5,
    "train_boolq": 3,
    "score_arc_e": 4,
    "score_hellaswag": 3,
    "score_boolq": 2.5,
    "slot": 4,
    "generator": 3,
    "generator_wide": 3,
    "policy": 6,
}
UNITS = {
    "train": "real tokens/s",
    "score": "documents/s",
    "slot": "prompts/s",
    "generator": "pairs/s",
    "generator_wide": "pairs/s",
    "policy": "tokens/s",
}
DOCUMENTS = {"arc_e": 48, "hellaswag": 16, "boolq": 16}


def open_bench(dtype: torch.dtype = torch.bfloat16) -> Run:
    """A run of the embedded preset that writes nothing into the repository."""
    cfg, _ = config.load_config(["config=configs/smollm2.yaml", f"run={tempfile.mkdtemp()}"])
    return Run(Path(cfg.run), cfg, dtype=dtype, quiet=True)


PROFILES: list | None = None  # a list where `profile` asked for them


@contextlib.contextmanager
def watched():
    """Around the part of a worker that is timed, for `profile` to look at."""
    if PROFILES is None:
        yield
        return
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True
    ) as seen:
        yield
    PROFILES.append(seen)


def timed(work, repeats: int = 1) -> float:
    """Seconds of one call, the best of `repeats` after one call that warms up."""
    work()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        with watched():
            work()
        best = min(best, time.perf_counter() - start)
    return best


# ------------------------------------------------------------------------------------------------------- fine-tuning

BATCH, STEPS = 16, 6


def _training_examples(run: Run, task: str) -> list:
    return list(data.load_tasks(run)[task].train[: BATCH * (STEPS + 1)])


def train_ours(task: str) -> dict:
    """Packed rows, head on answer positions only, bf16 base, fp32 masters."""
    run = open_bench()
    lm, losses, starts = scoring.load_lm(run), [], []
    rows = [scoring.make_row(lm, e) for e in _training_examples(run, task)]
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]

    def on_step(step, loss, _):
        losses.append(loss)
        starts.append(time.perf_counter())

    with watched():
        lora.train_adapter(
            lm.model,
            lm.layout,
            lora.init_adapter(lm.layout, 999),
            batches,
            lambda b: scoring.lm_loss(lm, b),
            lr=lambda s: 5e-4,
            clip=1.0,
            on_step=on_step,
        )
    real = sum(
        scoring.gold_row(r).length for b in batches[1:] for r in b
    )  # the first step warms up
    return {
        "work": real,
        "seconds": starts[-1] - starts[0],
        "losses": losses,
        "flops": 4 * real * _weights(lm),
    }


def train_peer(task: str) -> dict:
    """transformers.Trainer + PEFT, bf16 autocast, dynamic padding, the same examples, order, start and loss."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from torch.utils.data import SequentialSampler
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    run = open_bench()
    lm, cfg = scoring.load_lm(run), run.cfg
    rows = [scoring.gold_row(scoring.make_row(lm, e)) for e in _training_examples(run, task)]
    data = []
    for r in rows:
        ids, head = [*r.context, *r.branches[0]], len(r.context) + r.starts[0]
        data.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": [-100] * head + ids[head:],
            }
        )
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(cfg.model.name, dtype=torch.float32),
        LoraConfig(
            r=cfg.model.rank,
            lora_alpha=cfg.model.alpha,
            target_modules=cfg.model.modules,
            task_type="CAUSAL_LM",
        ),
    )
    set_peft_model_state_dict(model, lora.init_adapter(lm.layout, 999))
    times, losses = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            times.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kw):
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kw):
            return SequentialSampler(self.train_dataset)

        def compute_loss(
            self, model, inputs, return_outputs=False, **kw
        ):  # mean over examples, as ours
            labels = inputs.pop("labels")
            out = model(**inputs)
            nll = torch.nn.functional.cross_entropy(
                out.logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none"
            )
            kept = labels[:, 1:] != -100
            loss = ((nll * kept).sum(1) / kept.sum(1)).mean()
            return (loss, out) if return_outputs else loss

    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS + 1,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    InOrder(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(data),
        callbacks=[Clock()],
        data_collator=DataCollatorForSeq2Seq(lm.tokenizer),
    ).train()
    real = sum(r.length for r in rows[BATCH:])
    return {
        "work": real,
        "seconds": times[-1] - times[0],
        "losses": losses,
        "flops": 4 * real * _weights(lm),
    }


def _weights(lm: scoring.LM) -> int:
    """Weights that every token is multiplied by: the decoder's matrices."""
    return sum(
        p.numel()
        for n, p in lm.model.get_decoder().named_parameters()
        if p.dim() == 2 and "embed" not in n
    )


# ----------------------------------------------------------------------------------------------------------- scoring


def score_ours(task: str) -> dict:
    """A context once, its options as branches, head on scored positions only."""
    run = open_bench()
    lm, docs = scoring.load_lm(run), list(data.load_tasks(run)[task].test[: DOCUMENTS[task]])
    scoring.score_examples(lm, None, docs[:4])
    start = time.perf_counter()
    with watched():
        found = scoring.score_examples(lm, None, docs)
    return {
        "work": len(docs),
        "seconds": time.perf_counter() - start,
        "answers": [x for s in found for x in s.raw],
        "flops": 2 * sum(scoring.make_row(lm, e).length for e in docs) * _weights(lm),
    }


def score_peer(task: str) -> dict:
    """lm-evaluation-harness: HFLM.loglikelihood on the same requests, batch 16, bf16."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    run = open_bench()
    docs = list(data.load_tasks(run)[task].test[: DOCUMENTS[task]])
    model = HFLM(pretrained=run.cfg.model.name, device="cpu", dtype="bfloat16", batch_size=16)

    def ask(examples):
        pairs = [
            (f"{e.prompt} {o}", e.suffix) if e.suffix else (e.prompt, " " + o)
            for e in examples
            for o in e.options
        ]
        return model.loglikelihood(
            [Instance(request_type="loglikelihood", doc={}, arguments=p, idx=0) for p in pairs],
            disable_tqdm=True,
        )

    ask(docs[:4])
    start = time.perf_counter()
    found = ask(docs)
    return {
        "work": len(docs),
        "seconds": time.perf_counter() - start,
        "answers": [x[0] for x in found],
    }


# -------------------------------------------------------------------------------------------------------------- SLOT

SLOT_STEPS, SLOT_LR = 5, 0.01


def _slot_material() -> tuple:
    run = open_bench()
    lm = scoring.load_lm(run)
    rows = [scoring.make_row(lm, e) for e in data.load_tasks(run)["arc_e"].test[:32]]
    with torch.no_grad():
        groups = [[rows[i] for i in batch] for batch in scoring.plan_batches(rows, lm.budget)]
        return lm, [(g, *scoring.hidden_states(lm, g)) for g in groups]


def slot_ours() -> dict:
    """The closed-form gradient with cached base logits."""
    lm, groups = _slot_material()

    def work():
        with torch.no_grad():
            return torch.cat(
                [
                    scoring.slot_deltas(lm, g, h, starts, SLOT_STEPS, SLOT_LR)
                    for g, h, starts in groups
                ]
            )

    answers = (
        work().norm(dim=1).tolist()
    )  # entries with next to no gradient take Adam steps by its rounding
    words = lm.model.get_output_embeddings().weight.shape[
        0
    ]  # each step reads every cached logit, float32, once
    return {
        "work": sum(len(g) for g, _, _ in groups),
        "seconds": timed(work),
        "answers": answers,
        "bytes": 4 * words * SLOT_STEPS * sum(len(r.context) - 1 for g, _, _ in groups for r in g),
    }


def slot_peer() -> dict:
    """The reference algorithm: one prompt at a time, autograd through the head, torch's AdamW (same dtype)."""
    lm, groups = _slot_material()

    def work():
        out = []
        for rows, hidden, starts in groups:
            for r, start in zip(rows, starts, strict=True):
                n = len(r.context)
                states, target = hidden[start : start + n - 1], torch.tensor(r.context[1:])
                delta = torch.zeros(hidden.shape[-1], requires_grad=True)
                opt = torch.optim.AdamW([delta], lr=SLOT_LR, weight_decay=1e-8, eps=1e-5)
                for _ in range(SLOT_STEPS):
                    opt.zero_grad()
                    logits = scoring.project(lm, states + delta.to(states.dtype))
                    torch.nn.functional.cross_entropy(logits, target).backward()
                    opt.step()
                out.append(delta.detach())
        return torch.stack(out)

    answers = (
        work().norm(dim=1).tolist()
    )  # entries with next to no gradient take Adam steps by its rounding
    return {"work": sum(len(g) for g, _, _ in groups), "seconds": timed(work), "answers": answers}


# --------------------------------------------------------------------------------------------------------- generator

WIDE = (
    [[32, 96, 384], [32, 50, 75], [64, 25, 64], [128, 13, 50], [256, 5, 50]],
    9,
)  # the papers' flow, a quarter


def _generator(wide: bool, plain: bool) -> dict:
    """One training step of 6 pairs; plain = encoder in the loop, fp32, as a straightforward module has it."""
    run = open_bench()
    g, lm = run.cfg.generator, scoring.load_lm(run)
    flow, kernel = WIDE if wide else (g.flow, g.kernel)
    n, length, _ = flow[0]
    g.max_length = length
    shape = [1074, 10, 34] if wide else [lm.layout.num_tokens, lm.layout.rank, lm.layout.width]
    pairs = 2 if wide else 6
    torch.manual_seed(0)
    decoder = HyperConvDecoder([*flow, shape], kernel)
    opt = torch.optim.AdamW(decoder.parameters(), lr=1e-4)
    texts = (list(data.load_tasks(run)["arc_e"].prompts) * 2)[: pairs * n]
    target, cached = torch.randn(pairs, *shape), generator.encode_texts(run, texts)[0]

    def step():
        states = (generator.encode_texts(run, texts)[0] if plain else cached).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=not plain):
            out = decoder(states.view(pairs, n, length, -1))
        loss = torch.nn.functional.mse_loss(out.float(), target)
        opt.zero_grad()
        loss.backward()
        opt.step()

    import resource

    seconds = timed(step, 2)
    g.flow, g.kernel = flow, kernel
    with torch.device("meta"):  # shapes alone
        twin = HyperConvDecoder([*flow, shape], kernel)
        work, _ = doctor.count_pass(twin, torch.empty(1, *flow[0]))
    return {
        "work": pairs,
        "seconds": seconds,
        "flops": 6 * work * pairs,
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


# ------------------------------------------------------------------------------------------------------------ policy


def _policy(batched: bool) -> dict:
    """20 constrained proposals behind one cached prompt, or 2 one at a time without a cache: tokens per second, since
    proposals differ in length."""
    import llguidance.hf

    import policy as P

    run = open_bench()
    lm, cfg = scoring.load_lm(run), run.cfg
    layout, task = P.policy_layout(run), data.load_tasks(run)["arc_e"]
    families = ["TTT", "LORA", "TTS", "Latent", "SFT"]
    support = scoring.score_examples(lm, None, list(task.support[:4]))
    task = task.__class__(**{**task.__dict__, "support": task.support[:4]})
    prompt = P.proposal_prompt(lm, task, families, support, "norm")
    plan = P.plan_families(families, 20, 1)
    schemas = [strategies.proposal_schema(cfg.strategies, f, None) for f in plan]
    P.sample_proposals(lm, layout, None, prompt, schemas[:2], cfg.policy, 0)
    grammar = llguidance.hf.from_tokenizer(
        lm.tokenizer, n_vocab=lm.model.get_output_embeddings().weight.shape[0]
    )
    start = time.perf_counter()
    if batched:
        with watched():
            texts = P.sample_proposals(lm, layout, None, prompt, schemas, cfg.policy, 1)
    else:
        texts = [
            _sample_plainly(lm, prompt, s, cfg.policy, grammar) for s in (schemas[0], schemas[-1])
        ]
    lengths = [
        len(scoring.encode(lm, t)) for t in texts
    ]  # a step for all of the batch reads every weight once
    return {
        "work": sum(lengths),
        "seconds": time.perf_counter() - start,
        "bytes": 2 * _weights(lm) * max(lengths),
        "prompt_tokens": len(scoring.encode(lm, prompt)),
    }


def _sample_plainly(lm: scoring.LM, prompt: str, schema: dict, policy, grammar) -> str:
    """One constrained sample, the whole sequence read again for every token."""
    import llguidance.numpy as llnp
    from llguidance import LLMatcher

    vocab = lm.model.get_output_embeddings().weight.shape[0]
    matcher = LLMatcher(
        grammar,
        LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_flexible": False}
        ),
    )
    bits, ids, out = llnp.allocate_token_bitmask(1, vocab), scoring.encode(lm, prompt), []
    while not matcher.is_stopped() and len(out) < policy.max_new_tokens:
        with torch.no_grad():
            logits = (
                lm.model(torch.tensor([[*ids, *out]]), use_cache=False, logits_to_keep=1)
                .logits[0, -1]
                .float()
            )
        llnp.fill_next_token_bitmask(matcher, bits)
        allowed = torch.from_numpy(bits.view("uint8").reshape(-1)).repeat_interleave(8)[:vocab]
        allowed = (allowed >> (torch.arange(vocab) % 8)) & 1
        p = torch.softmax(logits.masked_fill(allowed == 0, -math.inf) / policy.temperature, -1)
        out.append(int(torch.multinomial(p, 1)))
        matcher.consume_token(out[-1])
    return lm.tokenizer.decode(out)


# ----------------------------------------------------------------------------------------------- adapters and scaling


def adapters() -> dict:
    """What a swap costs beside the scoring pass it precedes, and 20 adapters on one task beside one."""
    run = open_bench()
    lm, docs = scoring.load_lm(run), list(data.load_tasks(run)["arc_e"].test[:24])
    drawn = [lora.init_adapter(lm.layout, i) for i in range(20)]
    swap = timed(lambda: lora.swap_adapter(lm.model, lm.layout, drawn[0]), 20)
    one = timed(lambda: scoring.score_examples(lm, drawn[0], docs))
    start = time.perf_counter()
    for a in drawn:
        scoring.score_examples(lm, a, docs)
    return {
        "swap_ms": 1000 * swap,
        "share_of_200_documents": swap / (one * 200 / len(docs)),
        "twenty_over_one": (time.perf_counter() - start) / one,
    }


def scaling() -> dict:
    """Log-log slopes of seconds against size: 1 is linear, less is amortised."""
    run = open_bench()
    lm, task = scoring.load_lm(run), data.load_tasks(run)["arc_e"]
    rows = [scoring.make_row(lm, e) for e in task.train[:128]]

    def train(n):
        lora.train_adapter(
            lm.model,
            lm.layout,
            lora.init_adapter(lm.layout, 1),
            [rows[i : i + 8] for i in range(0, n, 8)],
            lambda b: scoring.lm_loss(lm, b),
            lr=lambda s: 1e-4,
            clip=1.0,
        )

    def read(tokens):
        long = [scoring.make_row(lm, e) for e in data.load_tasks(run)["boolq"].test[:40]]
        filler = [t for r in long for t in r.context]
        row = rows[0].__class__(tuple(filler[:tokens]), ((1,),), (0,), (1,), 0)
        with torch.no_grad():
            scoring.hidden_states(lm, [row])

    drawn = [lora.init_adapter(lm.layout, i) for i in range(16)]

    def many(count):
        for a in drawn[:count]:
            scoring.score_examples(lm, a, list(task.test[:8]))

    several = [
        list(data.load_tasks(run)[n].test[:8])
        for n in ("arc_e", "winogrande", "arc_c", "socialiqa", "piqa", "gsm8k", "jama", "math")
    ]
    tokens_of = {
        sum(scoring.make_row(lm, e).length for t in several[:n] for e in t): n for n in (1, 2, 4, 8)
    }

    def tasks(tokens):  # eight documents of each; by tokens, since tasks differ in length
        for documents in several[: tokens_of[tokens]]:
            scoring.score_examples(lm, drawn[0], documents)

    def decode(width):
        flow = [
            [16, 64, 384],
            [32, 32, width],
            [64, 16, width // 2],
            [128, 8, 32],
            [lm.layout.num_tokens, 8, 32],
        ]
        decoder = HyperConvDecoder(flow, 3)
        with torch.autocast("cpu", torch.bfloat16):
            decoder(torch.randn(6, 16, 64, 384)).float().mean().backward()

    sizes = {
        "examples scored": (
            lambda n: scoring.score_examples(lm, None, list(task.test[:n])),
            (25, 50, 100, 200),
        ),
        "examples trained on": (train, (16, 32, 64, 128)),
        "adapters scored": (many, (2, 4, 8, 16)),
        "tokens of 1, 2, 4, 8 tasks": (tasks, tuple(tokens_of)),
        "tokens of one sequence": (read, (128, 256, 512, 1024)),
        "generator width": (decode, (96, 192, 384, 768)),
    }
    return {name: _slope(work, at) for name, (work, at) in sizes.items()}


def _slope(work, sizes) -> dict:
    seconds = [timed(lambda n=n: work(n)) for n in sizes]
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    mx, my = statistics.fmean(x), statistics.fmean(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
        (a - mx) ** 2 for a in x
    )
    return {
        "sizes": list(sizes),
        "seconds": [round(s, 4) for s in seconds],
        "slope": round(slope, 3),
    }


# -------------------------------------------------------------------------------------------------------------- peaks


def peak() -> dict:
    """bf16 matrix-product rate and copy bandwidth of one process with this many threads."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**27, dtype=torch.uint8)
    y = torch.empty_like(x)
    return {
        "gflops": 2 * 2048**3 / timed(lambda: a @ b, 5) / 1e9,
        "gb_per_s": 2 * x.numel() / timed(lambda: y.copy_(x), 5) / 1e9,
    }


# ------------------------------------------------------------------------------------------------------------- driver

WORKERS = {
    **{
        f"train_{t}": (lambda t=t: train_ours(t), lambda t=t: train_peer(t))
        for t in ("arc_e", "boolq")
    },
    **{f"score_{t}": (lambda t=t: score_ours(t), lambda t=t: score_peer(t)) for t in DOCUMENTS},
    "slot": (slot_ours, slot_peer),
    "generator": (lambda: _generator(False, False), lambda: _generator(False, True)),
    "generator_wide": (lambda: _generator(True, False), lambda: _generator(True, True)),
    "policy": (lambda: _policy(True), lambda: _policy(False)),
}
ALONE = {"peak": peak, "adapters": adapters, "scaling": scaling}


def launch(name: str, side: str, processes: int) -> list[dict]:
    """Run a worker in `processes` pinned processes side by side; returns what each reported. Raises: UserError."""
    jobs = []
    for i in range(processes):
        threads = CORES // processes
        cores = sorted(os.sched_getaffinity(0))[i * threads : (i + 1) * threads]
        env = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "BENCH_CORES": ",".join(map(str, cores)),
        }
        jobs.append(
            subprocess.Popen(
                [sys.executable, __file__, "worker", name, side],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
                cwd=config.ROOT,
            )
        )
    out = []
    for job in jobs:
        text, errors = job.communicate()
        if job.returncode:
            raise UserError(
                f"bench: {name} ({side}) failed: {errors.strip().splitlines()[-1:]}; make bench installs "
                "the peers (requirements-bench.txt)"
            )
        out.append(json.loads(text.strip().splitlines()[-1]))
    return out


KINDS = {
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::convolution",
        "aten::mkldnn_convolution",
    ),
    "attention kernel": ("scaled_dot_product",),
    "softmax": ("softmax", "cross_entropy", "nll_loss"),
}


def profile(name: str) -> dict:
    """Where one process of ours spends its time: shares by kind of operation, and the rate of its matrix products."""
    global PROFILES
    PROFILES = []
    WORKERS[name][0]()
    events = [e for e in PROFILES[-1].key_averages() if e.key.startswith("aten::")]
    took = dict.fromkeys([*KINDS, "the rest"], 0.0)  # microseconds
    for e in events:
        kind = next((k for k, parts in KINDS.items() if any(p in e.key for p in parts)), "the rest")
        took[kind] += e.self_cpu_time_total
    plain = [
        e for e in events if e.key in ("aten::mm", "aten::addmm", "aten::bmm")
    ]  # convolutions are not counted
    rate = (
        sum(e.flops or 0 for e in plain) / max(1.0, sum(e.self_cpu_time_total for e in plain)) / 1e3
    )
    return {
        **{k: round(t / sum(took.values()), 3) for k, t in took.items()},
        **({"product_gflops": round(rate, 1)} if rate else {}),
    }


def compare(name: str, repeats: int, machine: dict) -> dict:
    """Interleaved repeats of ours and the peer; medians of work per second, and whether the answers agree."""
    rates, last = {"ours": [], "peer": []}, {}
    for _ in range(repeats):
        for side in rates:
            found = launch(name, side, CORES if side == "ours" else 1)
            rates[side].append(sum(f["work"] / f["seconds"] for f in found))
            last[side] = found[0]
    ours, peer = (statistics.median(rates[s]) for s in ("ours", "peer"))
    row = {
        "ours": ours,
        "peer": peer,
        "ratio": ours / peer,
        "goal": GOALS[name],
        "unit": UNITS.get(name, UNITS.get(name.split("_")[0])),
        "runs": rates,
    }
    if row["ratio"] < row["goal"]:  # what binds
        row["profile"] = launch(name, "profile", 1)[0]
    for what, limit, name_ in (
        ("flops", machine["gflops"], "share_of_peak"),
        ("bytes", machine["gb_per_s"], "share_of_bandwidth"),
    ):
        if (
            what in last["ours"]
        ):  # what each unit of work needs at least, against what the machine gives
            row[name_] = last["ours"][what] / last["ours"]["work"] * ours / 1e9 / limit
    for key in ("losses", "answers"):
        if key in last["ours"]:
            gaps = [abs(a - b) for a, b in zip(last["ours"][key], last["peer"][key], strict=True)]
            row[f"largest_gap_{key}"] = max(gaps)
    for key in ("losses", "parameters", "peak_gib", "prompt_tokens"):
        row |= {f"{key}_{side}": found[key] for side, found in last.items() if key in found}
    return row


def main(argv: list[str]) -> int:
    """Parse, measure, print, write bench.json. Returns the exit status: 0, or 2 for a user's mistake."""
    if argv[:1] == ["worker"]:
        os.sched_setaffinity(0, {int(c) for c in os.environ["BENCH_CORES"].split(",")})
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        name, side = argv[1:]
        print(
            json.dumps(
                ALONE[name]()
                if name in ALONE
                else profile(name)
                if side == "profile"
                else WORKERS[name][side == "peer"]()
            )
        )
        return 0
    try:
        words = dict(a.split("=", 1) for a in argv if "=" in a)
        legal = [*WORKERS, *(n for n in ALONE if n != "peak")]
        paths = words.get("paths", ",".join(legal)).split(",")
        if (
            set(paths) - set(legal)
            or set(words) - {"paths", "repeats", "out"}
            or len(words) < len(argv)
        ):
            raise UserError(
                f"bench: expected paths=… (of {', '.join(legal)}), repeats=… or out=…, got "
                f"{' '.join(argv)}"
            )
        if not words.get("repeats", "3").isdecimal() or not int(words.get("repeats", 3)):
            raise UserError(f"bench: repeats={words['repeats']}: expected a number from 1 on")
        measure(
            paths,
            int(words.get("repeats", 3)),
            Path(words.get("out", config.ROOT / "results/bench")),
        )
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def measure(paths: list[str], repeats: int, out: Path) -> None:
    """Every path, each written as soon as it is known; earlier results of other paths are kept."""
    file = out / "bench.json"
    found = runtime.read_json(file) if file.exists() else {}
    found["machine"] = {
        "cpu": _cpu(),
        "cores": CORES,
        "torch": torch.__version__,
        "repeats": repeats,
        **launch("peak", "ours", 1)[0],
    }
    print(
        f"{found['machine']}\n{'path':16} {'ours':>10} {'peer':>10} {'ratio':>7} {'goal':>6}  of peak  largest gap"
    )
    for name in paths:
        if name in ALONE:
            found[name] = launch(name, "ours", 1)[0]
            print(f"{name}: {json.dumps(found[name])}", flush=True)
        else:
            row = found[name] = compare(name, repeats, found["machine"])
            share = (
                f"{100 * row['share_of_peak']:.0f} %"
                if "share_of_peak" in row
                else f"{100 * row['share_of_bandwidth']:.0f} % bw"
            )
            gap = next((f"{v:.3g}" for k, v in row.items() if k.startswith("largest_gap")), "-")
            print(
                f"{name:16} {row['ours']:10.2f} {row['peer']:10.2f} {row['ratio']:6.1f}x {row['goal']:5}x  "
                f"{share:7}  {gap}   ({row['unit']})",
                flush=True,
            )
            if "profile" in row:
                print(
                    f"  goal missed; one process with {CORES} threads: {json.dumps(row['profile'])}",
                    flush=True,
                )
        runtime.write_json(file, found)
    results = config.ROOT / "results/smollm2/results.json"
    if results.exists():
        found["end_to_end_seconds"] = runtime.read_json(results)["seconds"]
        print(f"make reproduce-all, core-seconds per stage: {found['end_to_end_seconds']}")
        runtime.write_json(file, found)
    print(f"written: {file}")


def _cpu() -> str:
    try:
        return next(
            line.split(":", 1)[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
