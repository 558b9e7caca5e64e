"""The hot paths beside what a user would pick instead: same cores, same work, medians of repeats.

    make bench                                          all paths
    python bench/bench.py paths=train_arc_e,slot repeats=5 out=runs/bench

Ours runs one process per core with one thread each, as `make reproduce` does. A peer runs one
process with all cores as threads, as its users start it. Both compute in the dtype whose matrix
products are fastest on this machine. Both are workers: processes that load what they need, warm up,
and then report the work they did and the seconds it took. Work of workers side by side is added up.
Ratios are of work per second. Results go to results/bench/<cpu>.json. One worker alone, in float32:
python bench/bench.py worker <path> ours
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules measured
import answers
import conditions
import config
import data
import limits
import lora
import policy
import proposals
import runtime
import scoring
import strategies
from config import UserError
from generator import HyperConvDecoder
from lora import AdapterTrainer
from runtime import Run
from scoring import LM, Row


class Stopwatch:
    """Times the `with` block of a worker, and profiles it where asked."""

    def __init__(self, profiling: bool = False):
        self.profiler = contextlib.nullcontext()
        if profiling:
            self.profiler = torch.profiler.profile()

    def __enter__(self) -> None:
        self.profiler.__enter__()
        self.began = time.perf_counter()

    def __exit__(self, *error) -> None:
        self.seconds = time.perf_counter() - self.began
        self.profiler.__exit__(*error)


def seconds_of(work, repeats: int = 1) -> float:
    """Seconds of one call, the best of `repeats` after one call that warms up."""
    work()
    watch = Stopwatch()
    best = math.inf
    for _ in range(repeats):
        with watch:
            work()
        best = min(best, watch.seconds)
    return best


def open_run(*words: str) -> Run:
    """A run of the embedded preset in the dtype of the bench, outside the repository."""
    folder = Path(tempfile.mkdtemp())
    preset = ["config=configs/smollm2.yaml", f"run={folder}"]
    cfg, _ = config.load_config([*preset, *words])
    return Run(folder, cfg, dtype=getattr(torch, dtype_name()), quiet=True)


def dtype_name() -> str:
    """In which all workers compute: `measure` finds it and tells them."""
    return os.environ.get("BENCH_DTYPE", "float32")


def open_bench(*words: str) -> tuple[Run, LM]:
    """A run, and its model."""
    run = open_run(*words)
    return run, scoring.load_lm(run)


def make_rows(lm: LM, examples):
    return [scoring.make_row(lm, example) for example in examples]


def tokens_in(rows: list[Row]) -> int:
    return sum(row.length for row in rows)


def products(lm: LM, rows: list[Row]) -> int:
    """Multiplications of one pass: the decoder's for every token, the head's for scored ones."""
    scored = 0
    for row in rows:
        for branch, start in zip(row.branches, row.starts, strict=True):
            scored += len(branch) - start
    head = lm.model.get_output_embeddings().weight.numel()
    return matrix_weights(lm) * tokens_in(rows) + head * scored


def matrix_weights(lm: LM) -> int:
    """Weights that every token is multiplied by: the decoder's matrices."""
    count = 0
    for name, weight in lm.model.get_decoder().named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            count += weight.numel()
    return count


# Fine-tuning: a step that warms up, then six that count.
BATCH = 16
STEPS = 6
RATE = 5e-4
SEED = 999  # of the first adapter


def training_rows(run: Run, lm: LM, task: str):
    """The rows that both sides train on: contexts with their right answers."""
    count = BATCH * (1 + STEPS)
    rows = make_rows(lm, data.load_tasks(run)[task].train[:count])
    return [scoring.gold_row(row) for row in rows]


def train_ours(watch: Stopwatch, task: str) -> dict:
    """Packed rows, the head at answer positions only, fp32 masters."""
    run, lm = open_bench()
    rows = training_rows(run, lm, task)
    first = lora.init_adapter(lm.layout, SEED)
    losses = []

    def step(at):
        loss = scoring.lm_loss(lm, rows[at : at + BATCH])
        losses.append(trainer.backward(loss))
        trainer.step(RATE)

    with AdapterTrainer(lm.model, lm.layout, first) as trainer:
        step(0)  # warms up
        with watch:
            for at in range(BATCH, len(rows), BATCH):
                step(at)

    # frozen weights: one product forward, and one backward for the gradient of their input
    flops = 4 * products(lm, rows[BATCH:])
    return {"work": tokens_in(rows[BATCH:]), "answers": losses, "flops": flops}


def peer_record(row: Row) -> dict:
    """A row as Trainer's data sets hold it."""
    ids = list(row.context + row.branches[0])
    asked = len(row.context) + row.starts[0]
    labels = [-100] * asked + ids[asked:]  # no loss before the answer
    return {"input_ids": ids, "labels": labels}


def peer_loss(outputs, labels: Tensor, num_items_in_batch) -> Tensor:
    """Our loss: the mean over examples of each one's mean over answer tokens."""
    labels = labels[:, 1:]  # a position predicts the next token
    logits = outputs.logits[:, :-1].float()
    nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    lengths = (labels != -100).sum(1)  # nll is 0 elsewhere
    return (nll.sum(1) / lengths).mean()


class StepClock(transformers.TrainerCallback):
    """When each step of a Trainer ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **options):
        self.ends.append(time.perf_counter())


def train_peer(watch: Stopwatch, task: str) -> dict:
    """transformers.Trainer + PEFT: dynamic padding, bf16 by autocast; our examples, start and loss.

    Its other defaults are ours too: no decay, gradients clipped at norm 1.
    """
    import peft

    run, lm = open_bench()
    rows = training_rows(run, lm, task)

    # masters in fp32, as ours; autocast makes the products bf16
    ours = run.cfg.model
    base = transformers.AutoModelForCausalLM.from_pretrained(ours.name, dtype=torch.float32)
    shape = peft.LoraConfig(
        r=ours.rank,
        lora_alpha=ours.alpha,
        target_modules=ours.modules,
    )
    model = peft.get_peft_model(base, shape)
    peft.set_peft_model_state_dict(model, lora.init_adapter(lm.layout, SEED))

    clock = StepClock()
    arguments = transformers.TrainingArguments(
        output_dir=str(run.path),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS + 1,
        train_sampling_strategy="sequential",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        bf16=run.dtype == torch.bfloat16,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[peer_record(row) for row in rows],
        data_collator=transformers.DataCollatorForSeq2Seq(lm.tokenizer),
        compute_loss_func=peer_loss,
        callbacks=[clock],
    )
    trainer.train()

    watch.seconds = clock.ends[-1] - clock.ends[0]  # the first step warms up
    *log, _ = trainer.state.log_history  # an entry a step, and a summary
    losses = [entry["loss"] for entry in log]
    return {"work": tokens_in(rows[BATCH:]), "answers": losses}


DOCUMENTS = {"arc_e": 48, "hellaswag": 16, "boolq": 16}  # to score
HARNESS_BATCHES = (4, 16)


def documents_of(run: Run, task: str):
    test = data.load_tasks(run)[task].test
    return list(test[: DOCUMENTS[task]])


def score_ours(watch: Stopwatch, task: str) -> dict:
    """A context once, its options as branches, the head at scored positions only."""
    run, lm = open_bench()
    documents = documents_of(run, task)
    scoring.score_examples(lm, None, documents[:4])  # warms up
    with watch:
        scores = scoring.score_examples(lm, None, documents)

    # a log-likelihood for every option
    answers = []
    for score in scores:
        answers += score.raw
    # frozen, without gradients: one product
    flops = 2 * products(lm, make_rows(lm, documents))
    return {"work": len(documents), "answers": answers, "flops": flops}


def score_peer(watch: Stopwatch, task: str) -> dict:
    """lm-evaluation-harness: HFLM.loglikelihood on the same requests, in its faster batch size."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    run, _ = open_bench()
    documents = documents_of(run, task)
    name = run.cfg.model.name
    model = HFLM(pretrained=name, device="cpu", dtype=dtype_name(), batch_size=16)

    def ask(examples):
        requests = []
        for example in examples:
            for option in example.options:
                pair = (example.prompt, f" {option}")
                requests.append(Instance("loglikelihood", {}, pair, 0))
        found = model.loglikelihood(requests, disable_tqdm=True)
        return [logprob for logprob, _ in found]

    # the batch size that is faster here, on a part of the documents
    tried = {}
    for size in HARNESS_BATCHES:
        model.batch_size_per_gpu = size
        tried[size] = seconds_of(partial(ask, documents[: len(documents) // 4]))
    model.batch_size_per_gpu = min(tried, key=tried.get)
    with watch:
        answers = ask(documents)
    return {"work": len(documents), "answers": answers, "batch": model.batch_size_per_gpu}


# Written answers: (task, words of the configuration, tokens at most).
LETTERS = ("arc_e", ["data.format=letter"], 16)
SOLUTIONS = ("gsm8k", ["data.format=letter", "data.math_form=generate"], 64)
ANSWERS = 32


def asked_questions(run: Run, task: str):
    return list(data.load_tasks(run)[task].test[:ANSWERS])


def write_ours(watch: Stopwatch, case: tuple) -> dict:
    """Prompts of similar length in a batch, which finished rows leave; a letter ends an answer."""
    task, words, tokens = case
    run, lm = open_bench(*words)
    questions = asked_questions(run, task)
    answers.generate_answers(lm, None, questions[:2], 2)  # warms up
    with watch:
        texts = answers.generate_answers(lm, None, questions, tokens)
    return {"work": len(texts), "texts": texts}


@torch.no_grad()
def write_peer(watch: Stopwatch, case: tuple) -> dict:
    """transformers.generate, greedily: prompts of one batch, padded on the left."""
    task, words, tokens = case
    run, lm = open_bench(*words)
    questions = asked_questions(run, task)
    prompts = [scoring.input_text(lm, question) for question in questions]
    tokenizer = lm.tokenizer
    tokenizer.padding_side = "left"
    name = run.cfg.model.name
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=run.dtype)

    def write(prompts, most):
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        made = model.generate(**batch, max_new_tokens=most, do_sample=False)
        new = made[:, batch["input_ids"].shape[1] :]
        return tokenizer.batch_decode(new, skip_special_tokens=True)

    write(prompts[:2], 2)  # warms up
    with watch:
        texts = write(prompts, tokens)
    return {"work": len(texts), "texts": texts}


# Latent steering (SLOT).
PROMPTS = 32
SLOT_STEPS = 5
SLOT_RATE = 0.01


@torch.no_grad()
def steered_prompts(run: Run, lm: LM):
    """Rows, their hidden states, and where each row starts in them."""
    task = data.load_tasks(run)["arc_e"]
    rows = make_rows(lm, task.test[:PROMPTS])
    return rows, *scoring.hidden_states(lm, rows)


@torch.no_grad()
def slot_ours(watch: Stopwatch) -> dict:
    """The closed-form gradient with cached base logits."""
    run, lm = open_bench()
    rows, hidden, starts = steered_prompts(run, lm)

    def steer():
        return scoring.slot_deltas(lm, rows, hidden, starts, SLOT_STEPS, SLOT_RATE)

    steer()  # warms up
    with watch:
        deltas = steer()

    # each step reads every cached logit, float32, once; no other work is as large
    words = len(lm.model.get_output_embeddings().weight)
    positions = sum(len(row.context) - 1 for row in rows)
    # compared by their norms: of entries with next to no gradient, Adam steps by the rounding
    answers = deltas.norm(dim=1).tolist()
    read = 4 * words * positions * SLOT_STEPS
    return {"work": PROMPTS, "answers": answers, "bytes": read}


def slot_peer(watch: Stopwatch) -> dict:
    """The reference loop: one prompt at a time, autograd through the head, torch's AdamW."""
    run, lm = open_bench()
    rows, hidden, starts = steered_prompts(run, lm)

    def steer(row, start):
        target = torch.tensor(row.context[1:])
        states = hidden[start : start + len(target)]
        delta = torch.zeros_like(states[0], dtype=torch.float32, requires_grad=True)
        adamw = torch.optim.AdamW([delta], lr=SLOT_RATE, weight_decay=1e-8, eps=1e-5)
        for _ in range(SLOT_STEPS):
            adamw.zero_grad()
            moved = states + delta.to(states.dtype)
            F.cross_entropy(scoring.project(lm, moved), target).backward()
            adamw.step()
        return float(delta.detach().norm())

    steer(rows[0], starts[0])  # warms up
    with watch:
        answers = list(map(steer, rows, starts))
    return {"work": PROMPTS, "answers": answers}


# (words, shape of the weight tokens, pairs to a step): the embedded preset, and the papers' flow,
# tokens and batch at a quarter
EMBEDDED = ([], [9540, 8, 32], 6)
WIDE_FLOW = "[[32,96,384],[32,50,75],[64,25,64],[128,13,50],[256,5,50]]"
WIDE_WORDS = [
    f"generator.flow={WIDE_FLOW}",
    "generator.num_prompts=32",
    "generator.max_length=96",
    "generator.kernel=9",
]
WIDE = (WIDE_WORDS, [1074, 10, 34], 2)


def generator_steps(watch: Stopwatch, case: tuple, plain: bool) -> dict:
    """Two training steps of the generator, after one that warms up."""
    words, tokens, pairs = case
    run = open_run(*words)
    lower = run.dtype == torch.bfloat16
    settings = run.cfg.generator
    torch.manual_seed(0)
    decoder = HyperConvDecoder([*settings.flow, tokens], settings.kernel)
    adamw = torch.optim.AdamW(decoder.parameters(), lr=1e-4)
    prompts = data.load_tasks(run)["arc_e"].prompts
    texts = list(prompts[: pairs * settings.num_prompts])
    cached, _ = conditions.encode_texts(run, texts)  # what our training reads from a file
    target = torch.randn(pairs, *tokens)

    def step():
        states = cached
        if plain:
            states, _ = conditions.encode_texts(run, texts)
        batch = states.float().unflatten(0, (pairs, -1))
        with torch.autocast("cpu", torch.bfloat16, enabled=lower and not plain):
            made = decoder(batch)
        adamw.zero_grad()
        F.mse_loss(made.float(), target).backward()
        adamw.step()

    # the step that warms up is the one whose operations are counted
    with FlopCounterMode(display=False) as counter:
        step()
    with watch:
        step()
        step()
    return {"work": 2 * pairs, "flops": 2 * counter.get_total_flops()}


def generator_ours(watch: Stopwatch, case: tuple) -> dict:
    """Cached prompt states, in the dtype of the bench."""
    return generator_steps(watch, case, plain=False)


def generator_peer(watch: Stopwatch, case: tuple) -> dict:
    """As a straightforward module has it: the encoder in the loop, fp32."""
    return generator_steps(watch, case, plain=True)


def proposals_asked(run: Run, lm: LM):
    """The proposal prompt of one task, and the schemas of 20 proposals."""
    families = ["TTT", "LORA", "TTS", "Latent", "SFT"]
    task = data.load_tasks(run)["arc_e"]
    support = scoring.score_examples(lm, None, list(task.support))
    prompt = proposals.proposal_prompt(lm, task, families, support, "norm")

    bounds = run.cfg.strategies
    schemas = []
    for allowed in proposals.plan_families(families, 20, 1):
        schemas.append(strategies.proposal_schema(bounds, allowed))
    return prompt, schemas


def policy_ours(watch: Stopwatch) -> dict:
    """Twenty constrained proposals at once, behind one cached prompt."""
    run, lm = open_bench()
    layout = policy.policy_layout(run)
    prompt, schemas = proposals_asked(run, lm)
    settings = run.cfg.policy

    def sample(asked, seed):
        return proposals.sample_proposals(lm, layout, None, prompt, asked, settings, seed)

    sample(schemas[:2], 0)  # warms up
    with watch:
        texts = sample(schemas, 1)
    lengths = [len(scoring.encode(lm, text)) for text in texts]
    # a step for all of the batch reads every weight once
    read = run.dtype.itemsize * matrix_weights(lm) * max(lengths)
    return {"work": sum(lengths), "bytes": read}


@torch.no_grad()
def policy_peer(watch: Stopwatch) -> dict:
    """Two of these proposals, one at a time; the whole sequence is read again for every token."""
    import llguidance.hf
    import llguidance.numpy
    from llguidance import LLMatcher

    run, lm = open_bench()
    prompt, schemas = proposals_asked(run, lm)
    settings = run.cfg.policy
    asked = scoring.encode(lm, prompt)
    words = len(lm.model.get_output_embeddings().weight)
    vocabulary = llguidance.hf.from_tokenizer(lm.tokenizer, n_vocab=words)
    bits = llguidance.numpy.allocate_token_bitmask(1, words)
    compact = {"whitespace_flexible": False}

    def sample(schema):
        """The number of tokens sampled."""
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=compact)
        matcher = LLMatcher(vocabulary, grammar)
        ids = list(asked)
        most = len(ids) + settings.max_new_tokens
        while not matcher.is_stopped() and len(ids) < most:
            out = lm.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)
            logits = out.logits[0, -1].float()
            # tokens that the grammar forbids become impossible
            llguidance.numpy.fill_next_token_bitmask(matcher, bits)
            llguidance.numpy.apply_token_bitmask_inplace(logits.numpy(), bits)
            odds = torch.softmax(logits / settings.temperature, -1)
            token = int(torch.multinomial(odds, 1))
            matcher.consume_token(token)
            ids.append(token)
        return len(ids) - len(asked)

    with watch:
        tokens = sample(schemas[0]) + sample(schemas[-1])  # they differ in length
    return {"work": tokens}


def swapping() -> dict:
    """What a swap of adapters costs beside the scoring pass it precedes."""
    run, lm = open_bench()
    task = data.load_tasks(run)["arc_e"]
    documents = list(task.test[:24])
    adapter = lora.init_adapter(lm.layout, SEED)
    swap = partial(lora.swap_adapter, lm.model, lm.layout, adapter)
    score = partial(scoring.score_examples, lm, adapter, documents)
    swapped = seconds_of(swap, 20)  # milliseconds each, so the best of many
    scored = seconds_of(score) / len(documents)
    return {"swap_ms": 1000 * swapped, "share_of_200_documents": swapped / (200 * scored)}


MIXED = ("arc_e", "winogrande", "arc_c", "socialiqa", "piqa", "gsm8k", "jama", "math")


def scaling() -> dict:
    """Log-log slopes of seconds against size: 1 is linear, less is amortised."""
    run, lm = open_bench()
    tasks = data.load_tasks(run)
    arc_e = tasks["arc_e"]
    documents = list(arc_e.test)
    rows = make_rows(lm, arc_e.train[:128])
    adapter = lora.init_adapter(lm.layout, SEED)
    text = []
    for row in make_rows(lm, tasks["boolq"].test[:40]):
        text += row.context

    # the first eight documents of 1, 2, 4 and 8 tasks, by their tokens: tasks differ in length
    several_tasks = {}
    passes = []
    tokens = 0
    for name in MIXED:
        passes.append(list(tasks[name].test[:8]))
        tokens += tokens_in(make_rows(lm, passes[-1]))
        if len(passes) in (1, 2, 4, 8):
            several_tasks[tokens] = list(passes)

    # what is measured
    score = partial(scoring.score_examples, lm, adapter)

    def score_each(passes):
        for examples in passes:
            score(examples)

    def train(rows):
        with AdapterTrainer(lm.model, lm.layout, adapter) as trainer:
            for at in range(0, len(rows), 8):
                loss = scoring.lm_loss(lm, rows[at : at + 8])
                trainer.backward(loss)
                trainer.step(RATE)

    @torch.no_grad()
    def read(ids):
        scoring.hidden_states(lm, [Row(tuple(ids), (), (), ())])

    return {
        "examples scored": slope(score, first_of(documents, 25, 50, 100, 200)),
        "examples trained on": slope(train, first_of(rows, 16, 32, 64, 128)),
        "adapters scored": slope(score_each, first_of([documents[:8]] * 16, 2, 4, 8, 16)),
        "tokens of 1, 2, 4, 8 tasks": slope(score_each, several_tasks),
        "tokens of one sequence": slope(read, first_of(text, 128, 256, 512, 1024)),
        "generator width": slope(decode, {width: width for width in (96, 192, 384, 768)}),
    }


def first_of(items: list, *counts: int) -> dict[int, list]:
    return {count: items[:count] for count in counts}


def decode(width: int) -> None:
    """Forward and backward through the embedded flow with its second layer so wide."""
    flow = [
        [16, 64, 384],
        [32, 32, width],
        [64, 16, width // 2],
        [128, 8, 32],
        [9540, 8, 32],
    ]
    states = torch.randn(6, *flow[0])
    decoder = HyperConvDecoder(flow, 3)
    with torch.autocast("cpu", torch.bfloat16):
        made = decoder(states)
    made.float().mean().backward()


def slope(work, cases: dict) -> dict:
    """Args: cases: by their sizes, what to work on."""
    seconds = [seconds_of(partial(work, case)) for case in cases.values()]
    x = [math.log(size) for size in cases]
    y = [math.log(second) for second in seconds]
    line = statistics.linear_regression(x, y)
    return {"sizes": list(cases), "seconds": seconds, "slope": line.slope}


def peak() -> dict:
    """Matrix products and copies, per second of one process with all its threads."""
    square = torch.randn(2048, 2048, dtype=getattr(torch, dtype_name()))
    source = torch.empty(2**27, dtype=torch.uint8)
    copy = torch.empty_like(source)
    multiplied = seconds_of(lambda: square @ square, 5)
    copied = seconds_of(lambda: copy.copy_(source), 5)
    return {
        "flops": 2 * 2048**3 / multiplied,
        "bytes": 2 * len(source) / copied,  # read and written
    }


@dataclass(frozen=True)
class Comparison:
    """One path: two workers that do the same work, its unit, and what the workers are given."""

    ours: Callable[..., dict]
    peer: Callable[..., dict]
    unit: str
    given: object = None


COMPARISONS = {
    "train_arc_e": Comparison(train_ours, train_peer, "real tokens/s", "arc_e"),
    "train_boolq": Comparison(train_ours, train_peer, "real tokens/s", "boolq"),
    "score_arc_e": Comparison(score_ours, score_peer, "documents/s", "arc_e"),
    "score_hellaswag": Comparison(score_ours, score_peer, "documents/s", "hellaswag"),
    "score_boolq": Comparison(score_ours, score_peer, "documents/s", "boolq"),
    "answers_letters": Comparison(write_ours, write_peer, "answers/s", LETTERS),
    "answers_solutions": Comparison(write_ours, write_peer, "answers/s", SOLUTIONS),
    "slot": Comparison(slot_ours, slot_peer, "prompts/s"),
    "generator": Comparison(generator_ours, generator_peer, "pairs/s", EMBEDDED),
    "generator_wide": Comparison(generator_ours, generator_peer, "pairs/s", WIDE),
    "policy": Comparison(policy_ours, policy_peer, "tokens/s"),
}
WORKER_MEMORY = 4 * limits.GIB
ALONE = {"adapters": swapping, "scaling": scaling, "peak": peak}  # without a peer
PATHS = [*COMPARISONS, "adapters", "scaling"]


def work_as(name: str, side: str) -> dict:
    """What one worker reports. Args: side: ours, peer, or profile (ours, watched)."""
    if name in ALONE:
        return ALONE[name]()
    path = COMPARISONS[name]
    watch = Stopwatch(profiling=side == "profile")
    worker = path.peer if side == "peer" else path.ours
    arguments = [path.given] if path.given else []
    facts = worker(watch, *arguments)
    if side == "profile":
        return where_time_goes(watch.profiler.key_averages())
    return facts | {"seconds": watch.seconds}


def where_time_goes(events) -> dict:
    """Shares of the time of the eight operations that take longest."""
    # self time: an operation's own, without those that it calls
    spent = {}
    for event in events:
        if event.key.startswith("aten::"):
            spent[event.key] = event.self_cpu_time_total
    whole = sum(spent.values())
    longest = sorted(spent, key=spent.get)[-8:]
    return {name: round(spent[name] / whole, 3) for name in reversed(longest)}


def launch(name: str, side: str, processes: int = 1) -> list[dict]:
    """Run a worker in so many pinned processes side by side. Returns: what each reported.

    Raises: UserError: one failed; its last line is shown.
    """
    command = [sys.executable, __file__, "worker", name, side]
    cores = sorted(os.sched_getaffinity(0))
    threads = len(cores) // processes
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    jobs = []
    for i in range(processes):
        # processes that migrate between cores are slower: each gets its own
        first = i * threads
        os.sched_setaffinity(0, cores[first : first + threads])  # inherited by the child
        job = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=config.ROOT,
        )
        jobs.append(job)
    os.sched_setaffinity(0, cores)

    # the last line is the report: libraries print before it
    reports = []
    for job in jobs:
        output, errors = job.communicate()
        if job.returncode:
            reason = errors.strip().splitlines()[-1:]
            hint = ""
            if "ModuleNotFoundError" in errors:
                hint = "; pip install -r bench/requirements.txt installs what it is compared with"
            raise UserError(f"bench: {name} ({side}) failed: {reason}{hint}")
        reports.append(json.loads(output.splitlines()[-1]))
    return reports


def compare(name: str, repeats: int, machine: dict) -> dict:
    """Interleaved repeats of ours and the peer: medians of work per second, and do they agree?"""
    # interleaved, so that a busy minute of the machine meets both
    rates = {"ours": [], "peer": []}
    for _ in range(repeats):
        ours = launch(name, "ours", machine["cores"])
        peer = launch(name, "peer")
        rates["ours"].append(sum(report["work"] / report["seconds"] for report in ours))
        rates["peer"].append(peer[0]["work"] / peer[0]["seconds"])
    row = {side: statistics.median(found) for side, found in rates.items()}
    row["ratio"] = row["ours"] / row["peer"]
    row["unit"] = COMPARISONS[name].unit
    row["runs"] = rates

    # what a unit of work needs at least, against what the machine gives
    report = ours[0]
    for bound in ("flops", "bytes"):
        if bound in report:
            needed = row["ours"] * report[bound] / report["work"]
            row["bound"] = bound
            row["share_of_machine"] = needed / machine[bound]

    # same losses, log-likelihoods or vectors: the same work was done
    if "answers" in report:
        gaps = torch.tensor(report["answers"]) - torch.tensor(peer[0]["answers"])
        row["largest_gap"] = float(gaps.abs().max())
    # ours may end an answer earlier
    if "texts" in report:
        pairs = zip(report["texts"], peer[0]["texts"], strict=True)
        same = [whole.strip().startswith(text.strip()) for text, whole in pairs]
        row["same_texts"] = statistics.mean(same)
    # with all cores in one process: where would more speed come from?
    row["profile"] = launch(name, "profile")[0]
    return row


def print_row(name: str, row: dict) -> None:
    share = "-"
    if "bound" in row:
        share = f"{row['share_of_machine']:.0%} {row['bound']}"
    gap = row.get("largest_gap", math.nan)
    print(
        f"{name:17} {row['ours']:9.2f} {row['peer']:9.2f} {row['ratio']:6.1f}x "
        f"{share:>12} {gap:12.3g}   {row['unit']}",
        flush=True,
    )


def measure(paths: list[str], repeats: int, folder: Path) -> None:
    """Every path, each written as soon as it is known. Earlier results of other paths are kept."""
    # the dtype in which this machine's products are fastest, for both sides
    run = open_run()
    choice = runtime.choose_dtype(run.cfg, "cpu")
    os.environ["BENCH_DTYPE"] = choice["dtype"]
    machine = {
        "cpu": runtime.environment(run)["cpu"],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "cores": limits.cores(),
        "dtype": choice["dtype"],
        "gflops": choice["gflops"],
        "repeats": repeats,
    }
    machine |= launch("peak", "ours")[0]

    # a file per kind of processor
    name = f"{machine['cpu']} {machine['instructions']}".lower()
    file = folder / f"{re.sub('[^a-z0-9]+', '-', name)}.json"
    found = runtime.read_json(file) if file.exists() else {}
    found["machine"] = machine
    print(machine)
    print("path                   ours      peer   ratio   of machine  largest gap   unit")
    for name in paths:
        if limits.free_memory() < machine["cores"] * WORKER_MEMORY:
            print(f"{name}: skipped: each of {machine['cores']} workers needs 4 GiB of free memory")
            continue
        if name in ALONE:
            found[name] = launch(name, "ours")[0]
            print(f"{name}: {json.dumps(found[name])}", flush=True)
        else:
            found[name] = compare(name, repeats, machine)
            print_row(name, found[name])
        runtime.write_json(file, found)
    print(f"written: {file}")


def read_words(argv: list[str]) -> tuple[list[str], int, Path]:
    """(paths, repeats, folder). Raises: UserError."""
    words = {"paths": ",".join(PATHS), "repeats": "3", "out": "results/bench"}
    for word in argv:
        key, _, value = word.partition("=")
        if key not in words:
            raise UserError(f"bench: {word}: expected paths=..., repeats=... or out=...")
        words[key] = value
    paths = words["paths"].split(",")
    if set(paths) - set(PATHS):
        raise UserError(f"bench: paths={words['paths']}: legal are {', '.join(PATHS)}")
    repeats = words["repeats"]
    if not repeats.isdecimal() or int(repeats) == 0:
        raise UserError(f"bench: repeats={repeats}: expected a number from 1 on")
    return paths, int(repeats), config.ROOT / words["out"]


def main(argv: list[str]) -> int:
    """Measure and write results/bench/<cpu>.json, or be one worker.

    Returns: the exit status: 0, or 2 for a user's mistake.
    """
    if argv[:1] == ["worker"]:
        report = work_as(*argv[1:])
        print(json.dumps(report))
        return 0
    try:
        measure(*read_words(argv))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
