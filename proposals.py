"""What the policy LLM is asked, and how it answers: one JSON object under a grammar.

`proposal_prompt` writes the question, by our wording or by the user's template (`policy.prompt`).
`draw_proposals` samples the answers of one round.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

import config
import lora
import methods
import runtime
import scoring
import strategies
from config import UserError
from data import Task
from lora import Adapter, Layout
from scoring import LM, Scores
from strategies import Strategy

TRIES = 8  # rounds of sampling again what was proposed already (policy.distinct)
# what a template may say, and what it must
FIELDS = ("task", "context", "state", "families")
NEEDED = ("context", "families")
SYSTEM = (
    "You are a specialist in adapting language models. You choose how a model's adapter is refined "
    "for a task it has not seen, and you answer with one JSON object and nothing else."
)
# one entry per family that `strategies.schema` knows
DESCRIPTIONS = {
    "TTT": "Test-time training: gradient steps that lower the perplexity of the task's unlabelled "
    "questions.\n"
    '{"family": "TTT", "ttl_steps": <integer>, "learning_rate": <float>, "batch_size": <integer>, '
    '"shuffle_data": <boolean>}',
    "LORA": "LoRA subspace mixing: blends the two halves of the adapter's rank by a ratio from 0 "
    "to 1.\n"
    '{"family": "LORA", "lambda": <float>}',
    "TTS": "Test-time scaling: several adapters from different question batches, routed or "
    "ensembled.\n"
    '{"family": "TTS", "num_prompt_batches": <integer>, "method": "<avg_sim_score | '
    'avg_prompt_embed | max_confidence | majority_vote | sum_logprobs>"}',
    "Latent": "Latent steering: a vector added to the last hidden state, optimised on each "
    "question.\n"
    '{"family": "Latent", "slot_steps": <integer>, "slot_lr": <float>}',
    "SFT": "Supervised steps on the few labelled examples, starting from a share of the generated "
    "adapter, 0 to 1.\n"
    '{"family": "SFT", "sft_steps": <integer>, "learning_rate": <float>, "batch_size": <integer>, '
    '"loss": "<lm | choice>", "init_scale": <float>}',
}


def proposal_prompt(
    lm: LM,
    task: Task,
    families: list[str],
    support: list[Scores],
    metric: str,
    template: str = "",
) -> str:
    """What the policy reads: the task's context, the state, and the families it may choose from.

    The state is how the starting adapter does on the support set: `support` are its scores.
    Args: template: the file `policy.prompt`; "" is our wording.
    Source: TEMPO, G.6 (structure, fields); DeGAML, section 2.2 (state). The wording is ours.
    """
    # the state: with it the policy can tell a task that needs help from one that does not
    examples = list(task.support)
    right = sum(scoring.judge(support, examples, metric)["correct"])
    log_p = sum(scoring.gold_logprob(support, examples, metric)) / len(examples)
    state = (
        f"with the generated adapter the model answers {right} of {len(examples)} "
        f"labelled examples correctly; mean log-probability of the right answer {log_p:.2f}."
    )

    # the first family listed is proposed too often, so every task lists them in its own order
    order = runtime.rng_for("families", task.name).permutation(families)
    listed = []
    for number, family in enumerate(order, 1):
        listed.append(f"({number}) {DESCRIPTIONS[family]}")

    context = task.context or "No description is available."
    if template:
        values = {
            "task": task.title,
            "context": context,
            "state": state,
            "families": "\n".join(listed),
        }
        system, user = read_template(template)
        filled = re.sub(r"\{(\w+)\}", lambda field: values[field[1]], user)
        return scoring.chat_prompt(lm.tokenizer, system, filled)

    user = "\n".join(
        [
            f"Task: {task.title}. {context}",
            f"State: {state}",
            "Choose the one strategy family and the settings that should help most. "
            "Families and their JSON:",
            *listed,
            f"Give only the JSON object for {task.title}.",
        ]
    )
    return scoring.chat_prompt(lm.tokenizer, SYSTEM, user)


def read_template(file: str) -> tuple[str, str]:
    """(system message, user message) of a template, a line `---` between them.

    Without that line the system message is ours.
    Raises: UserError: no such file, a field that is not known, or one that is missing.
    """
    path = Path(file)
    # your own file is looked for where the command is given, ours in the repository
    path = path if path.exists() else config.ROOT / path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"policy.prompt={file}: cannot be read ({error})") from None
    above, line, below = text.partition("\n---\n")
    system, user = SYSTEM, text.strip()
    if line:
        system, user = above.strip(), below.strip()

    # JSON in the text has braces too, but never a bare word alone between them
    used = re.findall(r"\{(\w+)\}", user)
    faults = []
    unknown = sorted(set(used) - set(FIELDS))
    if unknown:
        faults.append("unknown fields " + ", ".join(f"{{{name}}}" for name in unknown))
    missing = [name for name in NEEDED if name not in used]
    if missing:
        faults.append("missing fields " + ", ".join(f"{{{name}}}" for name in missing))
    if faults:
        known = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise UserError(f"policy.prompt={file}: {'; '.join(faults)}; a template has {known}")
    return system, user


@torch.no_grad()
def sample_proposals(
    lm: LM,
    layout: Layout,
    policy_adapter: Adapter | None,
    prompt: str,
    schemas: list[dict],
    policy_config,
    seed: int,
) -> list[str]:
    """One constrained sample per schema, all in one batch behind one cached prompt."""
    import llguidance.numpy as llnp

    # every sample has a grammar of its own, and a row of bits for its legal next tokens
    model = lm.model
    vocabulary = _vocabulary(lm)
    matchers = [_compile_grammar(lm, schema) for schema in schemas]
    count = len(schemas)
    legal = llnp.allocate_token_bitmask(count, vocabulary)
    rng = torch.Generator().manual_seed(seed)
    written = [[] for _ in schemas]
    lora.swap_adapter(model, layout, policy_adapter)
    try:
        # the prompt is read once; every sample continues from a copy of its cache
        lm.forwards += 1
        ids = torch.tensor([scoring.encode(lm, prompt)], device=model.device)
        output = model(ids, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        cache.batch_repeat_interleave(count)
        logits = output.logits[:, -1].expand(count, -1)

        for _ in range(policy_config.max_new_tokens):
            live = [i for i, matcher in enumerate(matchers) if not matcher.is_stopped()]
            if not live:
                break
            # finished samples stay in the batch, so that its shape does not change
            for i in live:
                llnp.fill_next_token_bitmask(matchers[i], legal, i)
            chosen = _sample(logits.float(), legal, policy_config, rng)
            for i in live:
                if matchers[i].consume_token(chosen[i]):
                    written[i].append(chosen[i])
            lm.forwards += count
            ids = torch.tensor(chosen, device=model.device)[:, None]
            output = model(ids, past_key_values=cache, use_cache=True)
            logits = output.logits[:, -1]
    finally:
        lora.clear_adapters(model)
    return lm.tokenizer.batch_decode(written, skip_special_tokens=True)


def check_tokenizer(lm: LM, cfg) -> None:
    """Raises: UserError: no grammar can be followed with the tokenizer, or no text ends in it."""
    reason = ""
    if lm.tokenizer.eos_token_id is None:
        reason = "it has no eos_token"
    try:
        _compile_grammar(lm, strategies.proposal_schema(cfg.strategies, cfg.policy.families, None))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:160]
    if reason:
        raise UserError(
            f"model.name={cfg.model.name}: the policy cannot propose with its tokenizer "
            f"({reason}); leave {', '.join(methods.PROPOSING)} out of evaluate.methods"
        )


def _vocabulary(lm):
    """How many tokens the head tells apart."""
    return lm.model.get_output_embeddings().weight.shape[0]


def _compile_grammar(lm, schema):
    """What follows one sample through its grammar."""
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_lark(write_grammar(schema))
    matcher = LLMatcher(_grammar_tokenizer(lm.tokenizer, _vocabulary(lm)), grammar)
    if matcher.is_error():
        raise RuntimeError(f"the strategy grammar does not compile: {matcher.get_error()}")
    return matcher


def write_grammar(schema: dict) -> str:
    """The grammar of a proposal schema, in the dialect of the grammar library.

    It is compact JSON, for white space never ends. A number may also be written with an exponent,
    which the library's own JSON grammar does not allow: 1e-5.
    """
    rules = []
    names = []
    for option in schema["anyOf"]:
        parts = []
        for name, spec in option["properties"].items():
            opening = "," if parts else "{"
            value = f"%json {json.dumps(spec)}"
            exponents = _exponents(spec)
            if exponents:
                value += f" | /{'|'.join(exponents)}/"
            field = f"field_{len(rules)}"
            rules.append(f"{field}: {value}")
            key = json.dumps(f'{opening}"{name}":')
            parts.append(f"{key} {field}")
        names.append(" ".join(parts) + ' "}"')
    return "\n".join([f"start: {' | '.join(names)}", *rules])


def _exponents(spec):
    """1e-5 and its like, as far as they lie in the bounds of an open number."""
    if spec.get("type") != "number":
        return []
    written = [f"{digit}e-{power}" for power in range(1, 8) for digit in range(1, 10)]
    return [text for text in written if spec["minimum"] <= float(text) <= spec["maximum"]]


@functools.lru_cache(maxsize=4)
def _grammar_tokenizer(tokenizer, vocabulary):
    """The grammar library's own form of a tokenizer, which takes a second to make."""
    import llguidance.hf

    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary)


def _sample(logits, legal, policy_config, rng):
    """One token per sample, among the legal ones, by temperature, top-k and top-p (TEMPO, G.5).

    Args:
        logits: (samples, V) tensor.
        legal: (samples, V / 32) array of int32, a bit per token. A finished sample keeps its last
            bits: it gets some token, and nobody reads it.
    """
    # the grammar: an illegal token gets no probability at all
    vocabulary = logits.shape[1]
    bits = np.unpackbits(legal.view("uint8"), axis=1, count=vocabulary, bitorder="little")
    allowed = torch.as_tensor(bits, dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(~allowed, -math.inf) / policy_config.temperature

    # top-k first: what follows is small, and the draw is made on the CPU, alike on every device
    values, index = logits.topk(min(policy_config.top_k, vocabulary))
    p = torch.softmax(values.cpu(), -1)
    # top-p: the token that crosses the limit stays
    mass_before = p.cumsum(-1) - p
    p = torch.where(mass_before < policy_config.top_p, p, 0.0)
    drawn = torch.multinomial(p, 1, generator=rng)
    return index.cpu().gather(1, drawn).squeeze(1).tolist()


def plan_families(
    families: list[str],
    count: int,
    minimum: int,
) -> list[list[str]]:
    """Which families each of `count` samples may use.

    `minimum` samples are tied to each family, so that every family is explored; the rest are free.
    """
    plan = []
    for family in families:
        plan += [[family]] * minimum
    plan += [families] * count
    return plan[:count]  # with few samples the first families go first


def draw_proposals(
    lm: LM,
    layout: Layout,
    policy_adapter: Adapter | None,
    prompt: str,
    families: list[str],
    cfg,
    key: tuple,
) -> list[tuple[str, Strategy | None]]:
    """The proposals of one round, each as text and as a strategy; None where it is none.

    With `policy.distinct` whatever repeats an earlier proposal, or is no strategy, is sampled
    again, at most `TRIES` times. A sample stays tied to its family. A free one is tied to any
    family then, for the settings of the policy's favourite may be used up.
    Args: key: of the seeds.
    """
    explore = runtime.rng_for(*key, "explore")
    plan = plan_families(families, cfg.policy.proposals, cfg.policy.min_per_family)
    drawn = [("", None)] * len(plan)
    open_places = list(range(len(plan)))
    tries = TRIES if cfg.policy.distinct else 0
    for attempt in range(1 + tries):
        # the first round is seeded by the key alone, whatever comes after it
        again = ("again", attempt) if attempt else ()
        schemas = []
        for place in open_places:
            offered = plan[place]
            if attempt and offered == families:
                offered = [families[explore.integers(len(families))]]
            # left alone, a small policy proposes the same few settings every time: a sample that
            # is tied to a family, or sampled again, sees a random half of each grid
            free = offered == families and not attempt
            half = None if free else explore
            schemas.append(strategies.proposal_schema(cfg.strategies, offered, half))
        texts = sample_proposals(
            lm,
            layout,
            policy_adapter,
            prompt,
            schemas,
            cfg.policy,
            runtime.seed_for(*key, *again),
        )
        for place, text in zip(open_places, texts, strict=True):
            drawn[place] = (text, _parse(text, cfg.strategies, families))
        open_places = repeated_places([strategy for _, strategy in drawn])
        if not open_places:
            break
    return drawn


def repeated_places(proposed: list[Strategy | None]) -> list[int]:
    """The numbers of the proposals that repeat an earlier one, or are no strategy."""
    seen = set()
    places = []
    for place, strategy in enumerate(proposed):
        if strategy is None or strategy in seen:
            places.append(place)
        seen.add(strategy)
    return places


def _parse(text, bounds, families):
    """None: a grammar promises neither a value in bounds nor an end before max_new_tokens."""
    try:
        return strategies.parse_strategy(text, bounds, families)
    except ValueError:
        return None
