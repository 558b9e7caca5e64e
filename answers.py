"""What a base model writes with an adapter in it: greedy answers, and how they are read.

An answer is read twice. Strictly it must have the form that the prompt asks for; leniently the
option, or the number, that it names counts wherever it stands.
"""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import benchmarks
import lora
import runtime
import scoring
from data import Example
from lora import Adapter
from prefix import read_once
from scoring import LM, Row, Scores

SOLUTION_TOKENS = 256  # of a task without options, at least: a solution is longer than a letter
# a prompt and its answer are as unlike in length as this within a batch: padding is computed too
SHORTEST = 0.7


def answer_tokens(settings, examples: list[Example]) -> int:
    """How many tokens a greedy answer may have; 0 where the run asks for no answers.

    Args: settings: the section `evaluate`.
    """
    if not examples[0].options:
        return max(SOLUTION_TOKENS, settings.max_new_tokens)
    return settings.max_new_tokens if settings.generate else 0


def answer_examples(
    lm: LM,
    adapter: Adapter | None,
    examples: list[Example],
    *,
    slot: tuple[int, float] | None = None,
    tokens: int = 0,
) -> list[Scores]:
    """Score every option of every example, and with `tokens` let the model answer greedily.

    In letter format most answers need no generation: where each token of an option is the model's
    first choice, that option is the greedy answer. The scoring pass has seen it.
    Args:
        slot: (steps, lr) of latent steering, or None; it steers scores and answers.
        tokens: of an answer, at most; 0 = no answers.
    """
    scores = scoring.score_examples(lm, adapter, examples, slot=slot)
    if not tokens:
        return scores

    # what the scoring pass has seen
    texts = {}
    for i, (example, score) in enumerate(zip(examples, scores, strict=True)):
        # a free answer is never taken from the scoring pass, which has read the right one
        if lm.form == "letter" and example.options and score.greedy is not None:
            texts[i] = example.options[score.greedy]

    # what has to be generated
    missing = [i for i in range(len(examples)) if i not in texts]
    asked = [examples[i] for i in missing]
    written = generate_answers(lm, adapter, asked, tokens, slot=slot)
    texts.update(zip(missing, written, strict=True))

    answered = []
    for i, score in enumerate(scores):
        answered.append(read_answer(examples[i], score, texts[i]))
    return answered


def read_answer(example: Example, score: Scores, text: str) -> Scores:
    """The scores with a written answer, and the option that it names by each reading."""
    named = {}
    if example.options:
        named["strict"] = parse_letter(text, example.options, strict=True)
        named["lenient"] = parse_letter(text, example.options, strict=False)
    return dataclasses.replace(score, text=text, **named)


def is_right(score: Scores, example: Example, reading: str) -> bool:
    """Is the written answer right, by `strict` or `lenient` reading?"""
    if example.options:
        return score.pick(reading) == example.gold
    return match_answer(score.text, example.answer, reading == "strict")


@torch.no_grad()
def generate_answers(
    lm: LM,
    adapter: Adapter | None,
    examples: list[Example],
    max_new_tokens: int,
    *,
    slot: tuple[int, float] | None = None,
) -> list[str]:
    """Greedy answers, one per example. Latent steering acts on every generated token."""
    texts = [scoring.input_text(lm, example) for example in examples]
    rows = [scoring.prompt_row(lm, text) for text in texts]
    options = [example.options for example in examples]
    answers = [""] * len(rows)
    lora.swap_adapter(lm.model, lm.layout, adapter)
    try:
        with read_once(lm, rows, steered=slot is not None) as own:
            for batch in _plan(lm, own, max_new_tokens, slot):
                group = [own[i] for i in batch]
                named = [options[i] for i in batch]
                written = continue_rows(lm, group, max_new_tokens, options=named, slot=slot)
                for i, answer in zip(batch, written, strict=True):
                    answers[i] = answer
    finally:
        lora.clear_adapters(lm.model)
    return answers


def _plan(lm, rows, max_new_tokens, slot):
    """Row numbers in batches of similar length, each as large as memory allows."""
    room = runtime.free_memory(lm.model.device) // 2
    tokens = room // _token_bytes(lm)
    before = max_new_tokens
    if lm.prefix:
        before += lm.prefix.tokens  # each row of a batch has them
    # steering keeps the logits of every prompt token, as the scoring pass does
    if slot is not None:
        tokens = min(tokens, lm.budget)

    batches = []
    for i in sorted(range(len(rows)), key=lambda i: -rows[i].length):
        width = rows[i].length + before
        # the first row of a batch is its longest
        full = True
        if batches:
            longest = rows[batches[-1][0]].length + before
            full = longest * (len(batches[-1]) + 1) > tokens or width < SHORTEST * longest
        if full:
            batches.append([])
        batches[-1].append(i)
    return batches


def _token_bytes(lm):
    """Memory that a token takes while its row is generated: its cache and one layer's work."""
    shape = lm.model.config.get_text_config()
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    cache = 2 * shape.num_hidden_layers * heads * width
    inner = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size  # OPT names it anew
    if isinstance(inner, (list, tuple)):  # Gemma 3n has one per layer
        inner = max(inner)
    # twice: the cache is copied when rows leave it
    work = 8 * shape.hidden_size + 4 * inner
    return lm.model.dtype.itemsize * (2 * cache + work)


def pad_left(prompts: list[tuple[int, ...]], device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and positions of prompts, each (B, T): every answer begins in one column."""
    tensors = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(tensors, True, 0, padding_side="left").to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = torch.arange(ids.shape[1], device=device) >= (ids.shape[1] - lengths)[:, None]
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)


def continue_rows(
    lm: LM,
    rows: list[Row],
    max_new_tokens: int,
    *,
    options: list[tuple[str, ...]] = (),
    slot: tuple[int, float] | None = None,
) -> list[str]:
    """The greedy continuations of prompts, in one batch that finished rows leave.

    Args:
        options: of each row. Where one is asked for in brackets (letter format), the first that
            stands in brackets ends the answer: nothing behind it changes how it is read.
        slot: (steps, lr) of latent steering, or None.
    """
    lm.forwards += len(rows)
    device = lm.model.device
    decoder = lm.model.get_decoder()
    ends = _end_tokens(lm)

    ids, mask, positions = pad_left([row.context for row in rows], device)
    width = ids.shape[1]
    lm.read += sum(len(row.context) for row in rows)
    cache = None
    if lm.shots:  # they are part of every prompt
        lm.read += len(rows) * lm.prefix.tokens
    if lm.prefix:
        mask, positions, cache = lm.prefix.before(mask, positions)

    # the prompts, read once
    out = decoder(
        ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    hidden = out.last_hidden_state
    cache = out.past_key_values
    steering = torch.zeros(len(rows), 1, device=device)
    if slot is not None:
        starts = [(i + 1) * width - len(row.context) for i, row in enumerate(rows)]
        steering = scoring.slot_deltas(lm, rows, hidden.flatten(0, 1), starts, *slot)
    last = hidden[:, -1]
    positions = positions[:, -1:]

    written = [[] for _ in rows]
    live = list(range(len(rows)))
    for _ in range(max_new_tokens):
        # the most likely token of every row that is not finished
        logits = scoring.project(lm, last + steering.to(last.dtype))
        chosen = logits.argmax(-1)
        going = []
        for place, token in enumerate(chosen.tolist()):
            row = live[place]
            if token in ends:
                continue
            written[row].append(token)
            lm.written += 1
            letter_wanted = lm.form == "letter" and options and options[row]
            if letter_wanted and _is_complete(lm, written[row], options[row]):
                continue
            going.append(place)
        if not going:
            break

        # finished rows leave the batch
        if len(going) < len(live):
            keep = torch.tensor(going, device=device)
            live = [live[place] for place in going]
            cache.batch_select_indices(keep)
            mask = mask[keep]
            positions = positions[keep]
            steering = steering[keep]
            chosen = chosen[keep]

        # one token further
        positions = positions + 1
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)
        out = decoder(
            chosen[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        last = out.last_hidden_state[:, -1]
    return lm.tokenizer.batch_decode(written, skip_special_tokens=True)


def _end_tokens(lm):
    """The tokens that end an answer; a chat model has several."""
    ends = lm.model.generation_config.eos_token_id
    if ends is None:
        ends = lm.tokenizer.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def _is_complete(lm, tokens, options):
    text = lm.tokenizer.decode(tokens, skip_special_tokens=True)
    return bracketed_option(text, options) is not None


def parse_letter(text: str, options: tuple[str, ...], strict: bool) -> int | None:
    """The option a generated answer names, or None.

    Strict: the answer opens with the bracketed option, as the prompt asks. Lenient: the first
    bracketed option anywhere, else the first that stands alone; a letter's number counts too.

    Args: options: in brackets, as the letter format has them: [A], [B] or [True], [False].
    """
    if strict:
        found = re.match(r"\s*(\[.+?\])", text)
        if found and found[1] in options:
            return options.index(found[1])
        return None

    places = _named_places(options)
    names = "|".join(map(re.escape, places))
    alone = rf"(?<![A-Za-z0-9])({names})(?![A-Za-z0-9'])"
    found = bracketed_option(text, options) or re.search(alone, text)
    if not found:
        return None
    said = found[1]
    return places.get(said, places.get(said.upper(), places.get(said.lower())))


def bracketed_option(text: str, options: tuple[str, ...]) -> re.Match | None:
    """The first option that stands in brackets, in capitals or not, or its number."""
    names = "|".join(map(re.escape, _named_places(options)))
    return re.search(rf"\[\s*((?i:{names}))\s*\]", text)


def _named_places(options):
    """{name: place} of what may name an option without its brackets."""
    places = {}
    for i, option in enumerate(options):
        places.setdefault(option[1:-1], i)
    # a small letter may be an article, a small word is none
    for i, option in enumerate(options):
        other = str(i + 1) if len(option) == 3 else option[1:-1].lower()
        places.setdefault(other, i)
    return places


def match_answer(text: str, answer: str, strict: bool) -> bool:
    """Exact match of a generated number or expression, by `final_answer`."""
    found = final_answer(text, strict)
    return found != "" and found == _bare(answer)


def final_answer(text: str, strict: bool) -> str:
    """The number or expression that a solution ends with, without what makes no difference; or "".

    Strict: what stands after `####`. Lenient: the last box or the last number counts too.
    """
    marked = re.search(r"####\s*(.+)", text)
    if marked:
        return _bare(marked[1])
    if strict:
        return ""
    guess = benchmarks.last_boxed(text)
    if not guess:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        guess = "".join(numbers[-1:])
    return _bare(guess)


def _bare(text: str) -> str:
    """Without what makes no difference: spaces, commas, $, LaTeX's sizes, a full stop."""
    return re.sub(r"[\s$,]|\\left|\\right|\\!|\.$", "", text).strip()
