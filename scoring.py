"""What a base model says with an adapter in it: log-likelihoods, losses, latent steering.

A question is one row: its context once, and its options behind it as branches. A branch sees the
context and itself, and no other branch. Rows of similar length share a forward pass. The
vocabulary projection, the widest matrix of all, runs at scored positions only.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor

import data
import lora
import packing
import runtime
from config import UserError
from data import Example
from lora import Adapter, Layout
from prefix import Prefix, read_once
from runtime import Run

WRITTEN = ("strict", "lenient")  # metrics that read a generated answer
DATE = "26 Jul 2024"  # in chats whose template writes one


@dataclass
class LM:
    """A frozen base model ready for adapters.

    Attributes:
        model, tokenizer: of transformers.
        layout: of the task adapters.
        form: data.format, cloze or letter.
        max_tokens: of a row's context.
        budget: tokens per forward pass.
        forwards, backwards: passes so far, counted in rows, for cost reports.
        written, read: tokens generated and read so far.
        shots: solved examples before every row (`icl.Shots`), or None.
        prefix: tokens before every row (`prefix.Prefix`), those of the examples or others; or None.
    """

    model: torch.nn.Module
    tokenizer: object
    layout: Layout
    form: str = "cloze"
    max_tokens: int = 512
    budget: int = 1024
    forwards: int = 0
    backwards: int = 0
    written: int = 0
    read: int = 0
    shots: object = None
    prefix: Prefix | None = None


@dataclass(frozen=True)
class Row:
    """One question as tokens.

    Attributes:
        context: token ids that all options share.
        branches: token ids per option.
        starts: first scored position in each branch.
        chars: length of each option's text, for length normalisation.
        gold: index of the right branch.
    """

    context: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    chars: tuple[int, ...]
    gold: int | None = None

    @property
    def length(self) -> int:
        return len(self.context) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Scores:
    """What a model says about one example.

    Attributes:
        raw: summed log-probability per option.
        norm: raw per character of the option.
        greedy: the option whose every token is the model's first choice, or None.
        text: the written answer, where one was asked for (`answers.answer_examples`).
        strict, lenient: the option that it names by each reading; None = no option.
    """

    raw: tuple[float, ...]
    norm: tuple[float, ...]
    greedy: int | None = None
    text: str | None = None
    strict: int | None = None
    lenient: int | None = None

    def of(self, metric: str) -> tuple[float, ...]:
        """One value per option; of a written answer its letters' log-probabilities."""
        if metric == "norm":
            return self.norm
        return self.raw

    def pick(self, metric: str) -> int | None:
        """The best option, the first of equals; of a written answer the one it names, if any."""
        if metric in WRITTEN:
            if self.text is None:
                raise ValueError(f"{metric}: no answer was generated")
            return getattr(self, metric)
        values = self.of(metric)
        return values.index(max(values))


def load_lm(run: Run) -> LM:
    """The base model of this run, loaded once per process. Raises: UserError: not to be had."""
    if "lm" not in run.cache:
        cfg = run.cfg
        wanted = cfg.model
        model, tokenizer = load_base(wanted.name, wanted.revision, run.dtype, run.device)
        layout = lora.find_layout(
            model,
            wanted.rank,
            wanted.alpha,
            wanted.token_width,
            wanted.modules,
        )
        lora.attach_lora(model, layout)
        run.cache["lm"] = LM(
            model,
            tokenizer,
            layout,
            form=cfg.data.format,
            max_tokens=cfg.data.max_tokens,
            budget=cfg.evaluate.token_budget,
        )
    return run.cache["lm"]


def load_base(name: str, revision: str, dtype: torch.dtype, device: str):
    """(model, tokenizer) by folder or hub id, frozen, in evaluation mode. Raises: UserError."""
    import transformers
    from transformers.masking_utils import sdpa_mask

    # a bar for every file read would bury the log
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, output_loading_info=True
        )
        runtime.refuse_missing(found)
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise UserError(
            f"model.name={name}: cannot be loaded ({reason}); run `make assets` for the embedded "
            "model, or name a folder or hub id"
        ) from None

    # cuDNN's attention plans anew for every shape: half of a training step
    torch.backends.cuda.enable_cudnn_sdp(False)

    # transformers' way to a mask and an attention of one's own
    transformers.AttentionInterface.register("packed", _packed_attention)
    transformers.AttentionMaskInterface.register("packed", sdpa_mask)
    model.set_attn_implementation("packed")
    return model.to(device).eval().requires_grad_(False), tokenizer


def chat_prompt(
    tokenizer, system: str, user: str, turns: list[tuple[str, str]] | tuple = ()
) -> str:
    """A system and a user message up to where the assistant answers, without thinking aloud.

    The system text opens the user's first message where the template has no system role.
    Args: turns: questions and answers before.
    """
    if tokenizer.chat_template is None:
        before = "".join(f"{question}\n{answer}\n\n" for question, answer in turns)
        return f"{system}\n\n{before}{user}\n"

    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": user})
    try:
        text = _render(tokenizer, [{"role": "system", "content": system}, *messages])
    except TemplateError:  # Gemma's says no
        text = ""
    # others drop it without a word
    if system.strip() not in text:
        messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
        text = _render(tokenizer, messages)
    return text


def _render(tokenizer, messages):
    # with the day's date in it, as Llama 3.2 has, tomorrow's prompt would be another one
    template = re.sub(r"strftime_now\s*\([^)]*\)", repr(DATE), tokenizer.get_chat_template())
    # a template that knows no thinking passes over the word
    return tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )


def input_text(lm: LM, example: Example) -> str:
    """The exact text the model reads before it answers, behind the solved examples if any."""
    if lm.form == "cloze":
        return example.text
    if lm.shots:
        return lm.shots.chat_behind(lm, example)
    return chat_prompt(lm.tokenizer, system_message(example), example.prompt)


def system_message(example: Example) -> str:
    """What a chat about an example opens with, in the letter format."""
    ours = data.LETTER_SYSTEM if example.options else data.GENERATE_SYSTEM
    return example.system or ours


def encode(lm: LM, text: str) -> list[int]:
    """Token ids, behind the opening tokens where the tokenizer puts some, and no closing token."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    head = opening(lm.tokenizer)
    # a chat template writes the opening itself, and solved examples begin with it
    if not lm.shots and tuple(ids[: len(head)]) != head:
        ids = [*head, *ids]
    return ids


@functools.cache
def opening(tokenizer) -> tuple[int, ...]:
    """What it puts before every text: one token in Gemma, two in GLM-4, none in SmolLM2."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for begin in range(len(whole)):
        if whole[begin : begin + len(bare)] == bare:
            return tuple(whole[:begin])
    return ()


def _cut(lm, ids):
    """The last `lm.max_tokens` of a text's tokens, the opening ones among them.

    The question stands at the end. Gemma scores at chance without its opening token.
    """
    missing = len(ids) - lm.max_tokens
    if missing <= 0:
        return ids
    head = opening(lm.tokenizer)
    if tuple(ids[: len(head)]) != head:  # behind solved examples, which have it
        head = ()
    return [*head, *ids[len(head) + missing :]]


def make_row(lm: LM, example: Example) -> Row:
    """Tokenise an example as lm-evaluation-harness does.

    Context and continuation are tokenised together, then cut where the context alone ends. The
    tokens that all options share become the row's context.
    """
    pairs = continuations(lm, example)
    contexts = {context for context, _ in pairs}  # mostly a single one
    lengths = {context: len(encode(lm, context)) for context in contexts}
    ends = [lengths[context] for context, _ in pairs]
    wholes = [encode(lm, context + answer) for context, answer in pairs]

    # a branch holds every scored token, and one token at least
    limit = min(ends)
    for whole in wholes:
        limit = min(limit, len(whole) - 1)
    shared = 0
    while shared < limit and len({whole[shared] for whole in wholes}) == 1:
        shared += 1

    return Row(
        context=tuple(_cut(lm, wholes[0][:shared])),
        branches=tuple(tuple(whole[shared:]) for whole in wholes),
        starts=tuple(end - shared for end in ends),
        chars=tuple(max(1, len(answer.strip())) for _, answer in pairs),
        gold=example.gold,
    )


def continuations(lm: LM, example: Example) -> list[tuple[str, str]]:
    """[(context, scored text)] of every option; a free answer is the only one."""
    answers = example.options or (example.answer,)
    if lm.form == "letter":
        text = input_text(lm, example)
        return [(text, answer) for answer in answers]
    # WinoGrande's rule: the option fills the blank, the text behind it is scored
    if example.suffix:
        return [(f"{example.prompt} {answer}", example.suffix) for answer in answers]
    return [(example.prompt, f" {answer}") for answer in answers]


def gold_row(row: Row) -> Row:
    """The context with the right answer only, for the language-model loss."""
    gold = row.gold or 0  # a free-form example has one branch and no index
    one = slice(gold, gold + 1)
    return Row(row.context, row.branches[one], row.starts[one], row.chars[one], 0)


def prompt_row(lm: LM, text: str) -> Row:
    """Unlabelled text as a row without branches."""
    ids = _cut(lm, encode(lm, text))
    return Row(tuple(ids), (), (), ())


def _packed_attention(module, query, key, value, mask, **options):
    """Attention over packed rows, in transformers' form.

    Args:
        query: (B, H, T, D). key, value: (B, H', T, D). mask: boolean, or None.
    Returns: (B, T, H, D), and None for the weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # On a CPU the fused kernel's backward takes ten times the two plain matrix products, at the
    # lengths trained on here (300 at most). So they are written out there, and only there. The
    # fused kernel has no cap on its logits either.
    cap = options.pop("softcap", None)
    plain = torch.is_grad_enabled() and query.device.type == "cpu" and mask is not None
    if not cap and not plain:  # most calls
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    # heads that share a key are stacked as more queries of it: the key is never repeated
    batch, heads, length, dim = query.shape
    scaling = options.get("scaling") or dim**-0.5
    keys = key.flatten(0, 1)
    values = value.flatten(0, 1)
    queries = (query * scaling).reshape(len(keys), -1, dim)
    weights = torch.bmm(queries, keys.transpose(1, 2))

    weights = weights.view(batch, heads, length, -1)
    if cap:
        weights = cap * torch.tanh(weights / cap)
    if mask is None and length > 1:
        # transformers leaves out a mask that is merely causal; keys may be cached before
        seen = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device)
        mask = seen.tril(key.shape[2] - length)
    if mask is not None:
        lowest = torch.finfo(weights.dtype).min
        weights = weights.masked_fill(~mask, lowest)
    # in float32, whatever the model computes in
    weights = torch.softmax(weights, -1, dtype=torch.float32)

    weights = weights.to(values.dtype).view(len(keys), -1, values.shape[1])
    out = torch.bmm(weights, values).view(batch, heads, length, -1)
    return out.transpose(1, 2).contiguous(), None


def hidden_states(lm: LM, rows: list[Row]):
    """(S * T, d) final hidden states after the last norm, and where each row starts in them."""
    lm.forwards += len(rows)
    lm.read += sum(row.length for row in rows)
    if lm.shots:  # they are part of every question
        lm.read += len(rows) * lm.prefix.tokens
    if torch.is_grad_enabled():
        lm.backwards += len(rows)

    # on a CPU a matrix product gets no faster beyond a few hundred tokens
    enough = lm.budget
    if lm.model.device.type == "cpu":
        enough = 512

    # without the head, which `branch_logprobs` applies where it is needed
    decoder = lm.model.get_decoder()
    states = []
    starts = [0] * len(rows)
    offset = 0
    for group in packing.similar_lengths(rows, enough):
        members = [rows[i] for i in group]
        before = lm.prefix.tokens if lm.prefix else 0
        ids, positions, mask, begins = packing.pack(members, lm.model.device, before)
        cache = None
        if lm.prefix:
            mask, positions, cache = lm.prefix.before(mask, positions)
        out = decoder(
            ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        states.append(out.last_hidden_state.flatten(0, 1))
        for i, begin in zip(group, begins, strict=True):
            starts[i] = offset + begin
        offset += ids.numel()

    if len(states) == 1:  # mostly, and then nothing is copied
        return states[0], starts
    return torch.cat(states), starts


def project(lm: LM, hidden: Tensor) -> Tensor:
    """(…, d) hidden states -> (…, V) logits, float32 at least."""
    logits = lm.model.get_output_embeddings()(hidden)
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide)
    scale = logit_scale(lm)
    if scale != 1:
        logits = scale * logits
    cap = logit_cap(lm)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return logits


def logit_scale(lm: LM) -> float:
    """What a model multiplies its logits by behind the head: Cohere and Granite do."""
    shapes = _text_config(lm)
    return getattr(shapes, "logit_scale", None) or 1 / getattr(shapes, "logits_scaling", 1.0)


def logit_cap(lm: LM) -> float | None:
    """What a model's logits cannot exceed, by a tanh behind the head: Gemma 2 has one."""
    return getattr(_text_config(lm), "final_logit_softcapping", None)


def _text_config(lm):
    return lm.model.config.get_text_config()


def _scored_positions(rows, starts):
    """(3, n) of every scored token: where it is predicted from, its id, its branch.

    Branches are numbered over all rows. A token is predicted from the token before it.
    """
    where = []
    targets = []
    branches = []
    number = 0
    for row, start in zip(rows, starts, strict=True):
        begin = start + len(row.context)
        end_of_context = begin - 1
        for branch, first in zip(row.branches, row.starts, strict=True):
            size = len(branch)
            before = [end_of_context, *range(begin, begin + size)]
            where += before[first:size]
            targets += branch[first:]
            branches += [number] * (size - first)
            begin += size
            number += 1
    return torch.tensor([where, targets, branches], dtype=torch.long)


def branch_logprobs(lm: LM, rows: list[Row], hidden: Tensor, starts: list[int]):
    """[(options,)] tensors, one per row: the summed log-probability of each branch."""
    logits, targets, branch = _answer_logits(lm, rows, hidden, starts)
    picked = -F.cross_entropy(logits, targets, reduction="none")
    return _sum_branches(rows, branch, picked)


def _answer_logits(lm, rows, hidden, starts):
    """(n, V) logits of every scored token, (n,) its id, (n,) its branch, numbered over all rows."""
    positions = _scored_positions(rows, starts)
    where, targets, branch = runtime.to_device(positions, hidden.device)
    # the head at answer positions only: over whole rows it would cost more than the model
    return project(lm, hidden[where]), targets, branch


def _sum_branches(rows, branch, values):
    """[(options,)] tensors, one per row: sums of the values of each branch's tokens."""
    options = [len(row.branches) for row in rows]
    sums = values.new_zeros(sum(options), *values.shape[1:])
    return list(sums.index_add(0, branch, values).split(options))


@torch.no_grad()
def score_examples(
    lm: LM,
    adapter: Adapter | None,
    examples: list[Example],
    *,
    slot: tuple[int, float] | None = None,
) -> list[Scores]:
    """Score every option of every example.

    Args:
        slot: (steps, lr) of latent steering, or None.
    """
    if not examples:
        return []
    rows = [make_row(lm, example) for example in examples]
    sums = [None] * len(rows)
    lora.swap_adapter(lm.model, lm.layout, adapter)
    try:
        with read_once(lm, rows, steered=slot is not None) as own:
            for batch in packing.plan_batches(own, lm.budget):
                found = _score_batch(lm, [own[i] for i in batch], slot)
                for i, values in zip(batch, found, strict=True):
                    sums[i] = values
    finally:
        lora.clear_adapters(lm.model)

    # one wait for the device, for all batches
    options = [len(row.branches) for row in rows]
    sums = torch.cat(sums).cpu().split(options)
    scores = []
    for row, values in zip(rows, sums, strict=True):
        raw, others = values.T.tolist()
        norm = [value / chars for value, chars in zip(raw, row.chars, strict=True)]
        greedy = others.index(0) if 0 in others else None
        scores.append(Scores(tuple(raw), tuple(norm), greedy))
    return scores


def _score_batch(lm, rows, slot):
    """Each row's (options, 2): log-probability, and how many tokens are not the first choice."""
    hidden, starts = hidden_states(lm, rows)
    if slot is not None:
        # each question's own vector on all its states, context and options
        deltas = slot_deltas(lm, rows, hidden, starts, *slot).to(hidden.dtype)
        for delta, start, row in zip(deltas, starts, rows, strict=True):
            hidden[start : start + row.length] += delta
    logits, targets, branch = _answer_logits(lm, rows, hidden, starts)
    picked = -F.cross_entropy(logits, targets, reduction="none")
    other = (logits.argmax(-1) != targets).to(picked.dtype)
    return _sum_branches(rows, branch, torch.stack([picked, other], 1))


def lm_loss(lm: LM, rows: list[Row]) -> Tensor:
    """Mean over examples of the mean NLL of the right answer's tokens. () float32."""
    answers = [gold_row(row) for row in rows]
    return _mean_nll(lm, answers).mean()


def prompt_nll(lm: LM, rows: list[Row]) -> Tensor:
    """(B,) mean token NLL of each row's context: ln of the input perplexity (TEMPO, eq. 6)."""
    texts = []
    for row in rows:
        # all that follows the first token is scored, as if it were an answer
        branch = row.context[1:]
        texts.append(Row(row.context[:1], (branch,), (0,), (1,)))
    return _mean_nll(lm, texts)


def _mean_nll(lm, rows):
    """(B,) mean NLL of the scored tokens of rows with one branch each."""
    hidden, starts = hidden_states(lm, rows)
    sums = torch.cat(branch_logprobs(lm, rows, hidden, starts))
    lengths = torch.tensor([max(1, _scored(row, 0)) for row in rows])
    return -sums / runtime.to_device(lengths, sums.device)


def choice_loss(lm: LM, rows: list[Row]) -> Tensor:
    """`lm_loss` plus the cross-entropy of the right option, a mean over examples.

    The softmax is over the options' raw log-probabilities.
    """
    hidden, starts = hidden_states(lm, rows)
    scores = branch_logprobs(lm, rows, hidden, starts)
    total = 0.0
    for row, sums in zip(rows, scores, strict=True):
        nll = -sums[row.gold] / _scored(row, row.gold)
        choice = F.log_softmax(sums, -1)[row.gold]
        total = total + nll - choice
    return total / len(rows)


def _scored(row, branch):
    """Scored tokens of a branch."""
    return len(row.branches[branch]) - row.starts[branch]


def part_tokens(budget: int, all_scored: bool = False) -> int:
    """Tokens a GPU trains on at once; fewer where the loss needs the logits of every one."""
    tokens = budget // 2
    if all_scored:
        tokens = budget // 4
    return max(1024, tokens)


def parts_of(lm: LM, rows: list[Row], all_scored: bool = False):
    """Rows in the parts that a training step takes one after the other, for a GPU's memory.

    On a CPU all at once.
    """
    if lm.model.device.type == "cpu":
        return [rows]
    tokens = part_tokens(lm.budget, all_scored)
    parts = []
    for batch in packing.plan_batches(rows, tokens):
        parts.append([rows[i] for i in batch])
    return parts


def loss_in_parts(lm: LM, rows: list[Row], loss_fn):
    """Yield (sum, count) of each part of a loss that is a mean over rows.

    `AdapterTrainer.backward` takes them.
    """
    parts = parts_of(lm, rows)
    if len(parts) == 1:
        yield loss_fn(lm, rows), 1
        return
    for part in parts:
        yield len(part) * loss_fn(lm, part), len(part)


def slot_deltas(
    lm: LM, rows: list[Row], hidden: Tensor, starts: list[int], steps: int, lr: float
) -> Tensor:
    """(B, d) float32 latent-steering vectors, one per row, optimised on the row's context alone.

    The loss is the mean NLL of the context's tokens 2..n, with a vector added to their states.

    Implements: SLOT (TEMPO, Algorithm 3). Differs: mean instead of sum (docs/choices.md, 8).
        AdamW's betas (0.9, 0.999), eps 1e-5 and decay 1e-8 are the reference code's.
    """
    deltas = torch.zeros(len(rows), hidden.shape[-1], device=hidden.device)
    live = [i for i, row in enumerate(rows) if len(row.context) > 1]
    if not live or not steps:
        return deltas

    # each context's states but the last, and the tokens that follow them
    states = []
    following = []
    for i in live:
        tokens = rows[i].context[1:]
        states.append(hidden[starts[i] : starts[i] + len(tokens)])
        following.append(torch.tensor(tokens, device=hidden.device))
    find_gradient = _linear_gradient
    if logit_cap(lm):
        find_gradient = _capped_gradient
    gradient_at = find_gradient(lm, states, following)

    # AdamW on all rows' vectors at once
    delta = deltas[live]
    mean = torch.zeros_like(delta)
    square = torch.zeros_like(delta)
    for step in range(1, steps + 1):
        gradient = gradient_at(delta)
        mean.mul_(0.9).add_(gradient, alpha=0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        corrected = mean / (1 - 0.9**step)
        root = (square / (1 - 0.999**step)).sqrt()
        delta.mul_(1 - lr * 1e-8)
        delta.addcdiv_(corrected, root + 1e-5, value=-lr)
    deltas[live] = delta
    return deltas


def _linear_gradient(lm, states, following):
    """The steering loss's gradient as a function of the (B, d) vectors, without autograd.

    The head is linear: logits(delta) = z0 + c W delta, and the gradient is c W^T mean(p - y). So z0
    and W^T mean(y) are computed once.
    """
    weight = lm.model.get_output_embeddings().weight
    scale = logit_scale(lm)
    targets = []
    bases = []
    for of_row, tokens in zip(states, following, strict=True):
        targets.append(weight[tokens].float().mean(0))
        logits = project(lm, of_row)
        # exp over (n, V) once, not at every step: exp(z0 + W delta) = exp(z0) exp(W delta);
        # the largest logit of each position is taken off, so that nothing overflows
        logits -= logits.amax(1, keepdim=True)
        bases.append(logits.exp_())
    target = torch.stack(targets)

    def gradient_at(delta):
        shift = scale * F.linear(delta.to(weight.dtype), weight).float()
        shift -= shift.amax(1, keepdim=True)
        expected = _mean_softmax(bases, shift.exp_())
        gradient = F.linear(expected.to(weight.dtype), weight.t()).float()
        return scale * (gradient - target)

    return gradient_at


def _capped_gradient(lm, states, following):
    """The same where a cap behind the head (Gemma 2) makes the logits bend: by autograd."""

    def gradient_at(delta):
        with torch.enable_grad():
            delta = delta.detach().requires_grad_()
            loss = 0.0
            for own, of_row, tokens in zip(delta, states, following, strict=True):
                logits = project(lm, of_row + own.to(of_row.dtype))
                loss = loss + F.cross_entropy(logits, tokens)
            return torch.autograd.grad(loss, delta)[0]

    return gradient_at


def _mean_softmax(bases, shifts):
    """(B, V) means over positions of softmax(log base + log shift).

    Args:
        bases: B of (n, V). shifts: (B, V).
    """
    means = []
    lowest = []
    for base, shift in zip(bases, shifts, strict=True):
        # two matrix-vector products, and no (n, V) tensor is written
        totals = base @ shift
        shares = totals.reciprocal() @ base
        means.append(shares * shift / len(base))
        lowest.append(totals.min())

    # far from the base model's answers the totals are too small for float32: take logarithms
    lowest = torch.stack(lowest).tolist()  # one wait for the device
    for i, low in enumerate(lowest):
        if low < 1e-30:
            logits = bases[i].clamp_min(1e-38).log()
            logits += shifts[i].clamp_min(1e-38).log()
            means[i] = torch.softmax(logits, -1).mean(0)
    return torch.stack(means)


def accuracy(scores: list[Scores], examples: list[Example], metric: str) -> float:
    correct = judge(scores, examples, metric)["correct"]
    return sum(correct) / len(correct)


def gold_logprob(scores: list[Scores], examples: list[Example], metric: str):
    """Log-probability of each example's right option under a softmax over its options."""
    found = []
    for score, example in zip(scores, examples, strict=True):
        values = score.of(metric)
        top = max(values)  # off every value: no exponential overflows, one of them is 1
        total = sum(math.exp(value - top) for value in values)
        shifted = values[example.gold] - top
        found.append(shifted - math.log(total))
    return found


def judge(scores: list[Scores], examples: list[Example], metric: str):
    """What labels say about scores, one entry per example: `correct` (0 or 1) and `gold_logp`."""
    correct = []
    for score, example in zip(scores, examples, strict=True):
        right = score.pick(metric) == example.gold
        correct.append(int(right))
    logprobs = gold_logprob(scores, examples, metric)
    rounded = [round(value, 6) for value in logprobs]
    return {"correct": correct, "gold_logp": rounded}


def compare(new: dict, old: dict) -> dict:
    """Of two judgements of the same examples: wins, losses, gain in mean gold log-probability."""
    changes = []
    for after, before in zip(new["correct"], old["correct"], strict=True):
        changes.append(after - before)
    gain = sum(new["gold_logp"]) - sum(old["gold_logp"])
    return {
        "wins": changes.count(1),
        "losses": changes.count(-1),
        "gold_logp_gain": gain / len(changes),
    }
