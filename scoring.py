"""Log-likelihood and generation scoring with any adapter, and the losses that train on the same packed rows.

A question is one row: its context once, its options behind it as branches that see the context and themselves but not
each other. Rows of similar length share a forward pass; the vocabulary projection runs at scored positions only.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import lora
import runtime
from config import UserError
from data import Example
from lora import Adapter, Layout
from runtime import Run


@dataclass
class LM:
    """A frozen base model ready for adapters.

    Attributes: model, tokenizer: of transformers. layout: of the task adapters. form: data.format. max_tokens: of a
        row's context. budget: tokens per forward pass. forwards, backwards: passes counted in rows, for cost reports.
    """

    model: torch.nn.Module
    tokenizer: object
    layout: Layout
    form: str = "cloze"
    max_tokens: int = 512
    budget: int = 1024
    forwards: int = 0
    backwards: int = 0


@dataclass(frozen=True)
class Row:
    """One packed question.

    Attributes: context: token ids. branches: token ids per option. starts: first scored position in each branch.
        chars: length of each option's text, for length normalisation. gold: index of the right branch.
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
    """What a model says about one example: raw = summed log-probability per option, norm = raw per character."""

    raw: tuple[float, ...]
    norm: tuple[float, ...]

    def of(self, metric: str) -> tuple[float, ...]:
        return self.norm if metric == "norm" else self.raw

    def pick(self, metric: str) -> int:
        s = self.of(metric)
        return max(range(len(s)), key=s.__getitem__)


def load_lm(run: Run) -> LM:
    """The base model of this run, loaded once per process. Raises: UserError: not to be had."""
    if "lm" not in run.cache:
        cfg = run.cfg
        model, tokenizer = load_base(cfg.model.name, cfg.model.revision, run.dtype, run.device)
        layout = lora.find_layout(
            model, cfg.model.rank, cfg.model.alpha, cfg.model.token_width, cfg.model.modules
        )
        lora.attach_lora(model, layout)
        run.cache["lm"] = LM(
            model,
            tokenizer,
            layout,
            cfg.data.format,
            cfg.data.max_tokens,
            cfg.evaluate.token_budget,
        )
    return run.cache["lm"]


def load_base(name: str, revision: str, dtype: torch.dtype, device: str):
    """(model, tokenizer) by folder or hub id, frozen, in evaluation mode. Raises: UserError."""
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        AutoModelForCausalLM,
        AutoTokenizer,
    )
    from transformers.masking_utils import sdpa_mask
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype)
    except (OSError, ValueError) as e:
        raise UserError(
            f"model.name={name}: cannot be loaded ({str(e).splitlines()[0][:160]}); run `make assets` for "
            "the embedded model, or name a folder or hub id"
        ) from None
    torch.backends.cuda.enable_cudnn_sdp(
        False
    )  # it plans anew for every shape: half of a training step
    AttentionInterface.register("packed", _packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)
    model.set_attn_implementation("packed")
    return model.to(device).eval().requires_grad_(False), tokenizer


def _packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs
):
    """Attention over packed rows. (B, H, T, D) query, (B, H', T, D) key and value, boolean mask -> (B, T, H, D).

    On a CPU the fused kernel's backward takes ten times the two plain matrix products at these lengths (<= ~300), so
    training there writes them out; everything else is `scaled_dot_product_attention`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    groups = query.shape[1] // key.shape[1]
    cap = kwargs.pop("softcap", None)
    if not cap and (
        query.device.type != "cpu" or not torch.is_grad_enabled() or attention_mask is None
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    b, h, t, d = query.shape
    q = (query * scaling).reshape(
        b * key.shape[1], groups * t, d
    )  # heads that share a key stacked as more queries
    k, v = key.reshape(-1, *key.shape[2:]), value.reshape(-1, *value.shape[2:])
    weights = torch.bmm(q, k.transpose(1, 2)).view(b, h, t, -1)
    if cap:
        weights = cap * torch.tanh(weights / cap)
    if attention_mask is not None:
        weights = (
            weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
            if attention_mask.dtype == torch.bool
            else weights + attention_mask
        )
    weights = torch.softmax(weights, -1, dtype=torch.float32).to(v.dtype)
    out = torch.bmm(weights.view(b * key.shape[1], groups * t, -1), v).view(b, h, t, v.shape[-1])
    return out.transpose(1, 2).contiguous(), None


# --------------------------------------------------------------------------------------------------------------- rows


def chat_prompt(tokenizer, system: str, user: str) -> str:
    """A system and a user message up to where the assistant answers."""
    if tokenizer.chat_template is None:
        return f"{system}\n\n{user}\n"
    return tokenizer.apply_chat_template(
        [{"role": "system", "content": system}, {"role": "user", "content": user}],
        tokenize=False,
        add_generation_prompt=True,
    )


def input_text(lm: LM, example: Example) -> str:
    """The exact text the model reads before it answers."""
    if lm.form == "cloze":
        return example.text
    return chat_prompt(
        lm.tokenizer,
        data.LETTER_SYSTEM if example.options else data.GENERATE_SYSTEM,
        example.prompt,
    )


def encode(lm: LM, text: str) -> list[int]:
    """Token ids with the tokenizer's own opening token, if it has one, and no closing token."""
    tok = lm.tokenizer
    ids = tok(text, add_special_tokens=False)["input_ids"]
    return [tok.bos_token_id, *ids] if _opens(tok) and not text.startswith(tok.bos_token) else ids


@functools.lru_cache(maxsize=8)
def _opens(tokenizer) -> bool:
    """Does it put an opening token first?"""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def make_row(lm: LM, example: Example) -> Row:
    """Tokenise an example as lm-evaluation-harness does: context and continuation together, then cut where the
    context alone ends; what the options' contexts share becomes the row's context."""
    answers = example.options or (example.answer,)
    if lm.form == "letter":
        text = input_text(lm, example)
        pairs = [(text, a) for a in answers]
    elif example.suffix:
        pairs = [(f"{example.prompt} {o}", example.suffix) for o in answers]
    else:
        pairs = [(example.prompt, " " + a) for a in answers]
    wholes = [encode(lm, c + a) for c, a in pairs]
    lengths = {
        c: len(encode(lm, c)) for c in {c for c, _ in pairs}
    }  # options mostly share one context
    cuts = [lengths[c] for c, _ in pairs]
    shared = _common_prefix(wholes, min(min(cuts), min(map(len, wholes)) - 1))
    drop = max(0, shared - lm.max_tokens)
    return Row(
        tuple(wholes[0][drop:shared]),
        tuple(tuple(w[shared:]) for w in wholes),
        tuple(c - shared for c in cuts),
        tuple(max(1, len(a.strip())) for _, a in pairs),
        example.gold,
    )


def _common_prefix(sequences: list[list[int]], limit: int) -> int:
    n = 0
    while n < limit and len({s[n] for s in sequences}) == 1:
        n += 1
    return n


def gold_row(row: Row) -> Row:
    """The context with the right answer only, for the language-model loss."""
    g = row.gold or 0
    return Row(row.context, (row.branches[g],), (row.starts[g],), (row.chars[g],), 0)


def prompt_row(lm: LM, text: str) -> Row:
    """Unlabelled text as a row without branches."""
    return Row(tuple(encode(lm, text)[-lm.max_tokens :]), (), (), ())


def plan_batches(rows: list[Row], budget: int) -> list[list[int]]:
    """Indices grouped by length so that rows x longest stays within `budget` tokens; longest first."""
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].length, i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * rows[batches[-1][0]].length <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pack(rows: list[Row], device: str) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Lay rows into as few equal sequences as they need (first fit, longest first) and mask them from each other.

    Returns: ids (S, T), positions (S, T), mask (S, 1, T, T) bool, and for each row where its tokens start in the
        flattened (S * T) order. Branches restart at the position where their context ended.
    """
    width = max(r.length for r in rows)
    if (
        torch.is_grad_enabled() and len(rows) > 1
    ):  # training batches mix lengths: a longer sequence wastes less
        width = max(96, width)
    if torch.device(device).type == "cuda":  # the attention kernels read masks 16 bytes at a time
        width += -width % 8
    used: list[int] = []
    starts = [0] * len(rows)
    for i in sorted(range(len(rows)), key=lambda i: -rows[i].length):
        bin_ = next((b for b, u in enumerate(used) if u + rows[i].length <= width), None)
        if bin_ is None:
            bin_ = len(used)
            used.append(0)
        starts[i] = bin_ * width + used[bin_]
        used[bin_] += rows[i].length
    # seg: branch number in the row (0 = context); own: row number, padding sees only itself
    laid = torch.zeros(4, len(used) * width, dtype=torch.long)
    ids, pos, seg, own = laid
    own[:] = torch.arange(len(used) * width) + len(rows)
    for i, r in enumerate(rows):
        n = len(r.context)
        span = slice(starts[i], starts[i] + r.length)
        ids[span] = torch.tensor([*r.context, *(t for b in r.branches for t in b)])
        pos[span] = torch.tensor([*range(n), *(n + j for b in r.branches for j in range(len(b)))])
        seg[span] = torch.tensor([0] * n + [k + 1 for k, b in enumerate(r.branches) for _ in b])
        own[span] = i
    ids, pos, seg, own = runtime.to_device(laid, device).view(
        4, len(used), width
    )  # the mask is made where it is used
    mask = (own[:, :, None] == own[:, None, :]) & (
        (seg[:, :, None] == seg[:, None, :]) | (seg[:, None, :] == 0)
    )
    mask &= torch.ones(width, width, dtype=torch.bool, device=mask.device).tril()
    return ids, pos, mask[:, None], starts


def hidden_states(lm: LM, rows: list[Row]) -> tuple[Tensor, list[int]]:
    """(S * T, d) final hidden states after the last norm, and where each row starts in them."""
    lm.forwards += len(rows)
    lm.backwards += len(rows) * torch.is_grad_enabled()
    flat, starts, at = [], [0] * len(rows), 0
    enough = 512 if lm.model.device.type == "cpu" else lm.budget
    for group in _similar_lengths(rows, enough):
        ids, pos, mask, begins = pack([rows[i] for i in group], lm.model.device)
        out = lm.model.get_decoder()(
            ids, attention_mask=mask, position_ids=pos, use_cache=False
        ).last_hidden_state
        flat.append(out.view(-1, out.shape[-1]))
        for i, begin in zip(group, begins, strict=True):
            starts[i] = at + begin
        at += ids.numel()
    return (torch.cat(flat) if len(flat) > 1 else flat[0]), starts


def _similar_lengths(rows: list[Row], enough: int) -> list[list[int]]:
    """Row numbers in groups of at least `enough` tokens, longest first: attention costs the square of a group's longest
    row, and on a CPU a matrix product gets no faster beyond a few hundred tokens."""
    groups: list[list[int]] = []
    size = enough
    for i in sorted(range(len(rows)), key=lambda i: -rows[i].length):
        if size >= enough:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += rows[i].length
    return groups


def project(lm: LM, hidden: Tensor) -> Tensor:
    """(…, d) hidden states -> (…, V) logits, float32 at least."""
    logits = lm.model.get_output_embeddings()(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cap = getattr(lm.model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def scored_positions(rows: list[Row], starts: list[int]) -> tuple[list[int], list[int], list[int]]:
    """(flat position whose logits predict, target id, branch number over all rows) of every scored token."""
    where, target, branch, n = [], [], [], 0
    for r, start in zip(rows, starts, strict=True):
        last, at = start + len(r.context) - 1, start + len(r.context)
        for b, first in zip(r.branches, r.starts, strict=True):
            for j in range(first, len(b)):
                where.append(at + j - 1 if j else last)
                target.append(b[j])
                branch.append(n)
            at, n = at + len(b), n + 1
    return where, target, branch


def branch_logprobs(lm: LM, rows: list[Row], hidden: Tensor, starts: list[int]) -> list[Tensor]:
    """Summed log-probability of each branch, one (options,) tensor per row."""
    where, target, branch = scored_positions(rows, starts)
    where, target, branch = runtime.to_device(torch.tensor([where, target, branch]), hidden.device)
    picked = -F.cross_entropy(project(lm, hidden[where]), target, reduction="none")
    sums = picked.new_zeros(sum(len(r.branches) for r in rows))
    return list(sums.index_add(0, branch, picked).split([len(r.branches) for r in rows]))


def score_examples(
    lm: LM,
    adapter: Adapter | None,
    examples: list[Example],
    *,
    layout: Layout | None = None,
    slot: tuple[int, float] | None = None,
) -> list[Scores]:
    """Score every option of every example.

    Args: slot: (steps, lr) of latent steering, or None.
    """
    rows = [make_row(lm, e) for e in examples]
    batches, sums = plan_batches(rows, lm.budget), []
    lora.swap_adapter(lm.model, layout or lm.layout, adapter)
    try:
        with torch.no_grad():
            for batch in batches:
                group = [rows[i] for i in batch]
                hidden, starts = hidden_states(lm, group)
                if slot is not None:
                    deltas = slot_deltas(lm, group, hidden, starts, *slot).to(hidden.dtype)
                    for delta, start, row in zip(deltas, starts, group, strict=True):
                        hidden[start : start + row.length] += delta
                sums += branch_logprobs(lm, group, hidden, starts)
    finally:
        lora.clear_adapters(lm.model)
    out: list[Scores | None] = [None] * len(rows)
    values = iter(
        torch.cat(sums).tolist() if sums else []
    )  # one wait for the device, for all batches
    for i in (i for batch in batches for i in batch):
        raw = tuple(islice(values, len(rows[i].branches)))
        out[i] = Scores(raw, tuple(s / c for s, c in zip(raw, rows[i].chars, strict=True)))
    return out


def slot_deltas(
    lm: LM, rows: list[Row], hidden: Tensor, starts: list[int], steps: int, lr: float
) -> Tensor:
    """(B, d) float32 latent-steering vectors, one per row, optimised on the row's context alone.

    Implements: SLOT (paper T, Algorithm 3). The loss is the mean NLL of the context's tokens 2..n; its gradient is
    W^T mean(p - y), and logits(delta) = z0 + W delta with z0 cached, so no autograd runs through the head.
    Differs: mean instead of sum (docs/choices.md, 8); AdamW betas (0.9, 0.999), eps 1e-5, decay 1e-8 as in the
    reference code.
    """
    w = lm.model.get_output_embeddings().weight
    deltas = torch.zeros(len(rows), hidden.shape[-1], device=hidden.device)
    live = [i for i, r in enumerate(rows) if len(r.context) > 1]
    if not live or not steps:
        return deltas
    base, y = [], torch.stack([w[list(rows[i].context[1:])].float().mean(0) for i in live])
    for i in (
        live
    ):  # exp(z0), scaled to 1 at each position's largest logit: the only pass of exp over (n, V)
        z0 = project(lm, hidden[starts[i] : starts[i] + len(rows[i].context) - 1])
        base.append(z0.sub_(z0.amax(1, keepdim=True)).exp_())
    delta = deltas[live]
    m, v = torch.zeros_like(delta), torch.zeros_like(delta)
    for t in range(1, steps + 1):
        shift = F.linear(delta.to(w.dtype), w).float()
        shift = shift.sub_(shift.amax(1, keepdim=True)).exp_()
        g = F.linear(_mean_softmax(base, shift).to(w.dtype), w.t()).float() - y
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        delta.mul_(1 - lr * 1e-8)
        delta.addcdiv_(m / (1 - 0.9**t), (v / (1 - 0.999**t)).sqrt() + 1e-5, value=-lr)
    deltas[live] = delta
    return deltas


def _mean_softmax(bases: list[Tensor], shifts: Tensor) -> Tensor:
    """(B, V) means over positions of softmax(log base + log shift), from B of (n, V) and (B, V): two matrix-vector
    products each."""
    out, least = [], []
    for base, shift in zip(bases, shifts, strict=True):
        total = base @ shift
        least.append(total.min())
        out.append((total.reciprocal() @ base) * shift / len(base))
    for i, low in enumerate(torch.stack(least).tolist()):  # one wait for the device
        if (
            low < 1e-30
        ):  # a steering far from the base model's answers: too small for float32, use logs
            logits = bases[i].clamp_min(1e-38).log() + shifts[i].clamp_min(1e-38).log()
            out[i] = torch.softmax(logits, -1).mean(0)
    return torch.stack(out)


# ------------------------------------------------------------------------------------------------------------- losses


def lm_loss(lm: LM, rows: list[Row]) -> Tensor:
    """Mean over examples of the mean NLL of the right answer's tokens. () float32."""
    rows = [gold_row(r) for r in rows]
    sums = torch.cat(branch_logprobs(lm, rows, *hidden_states(lm, rows)))
    lengths = runtime.to_device(
        torch.tensor([len(r.branches[0]) - r.starts[0] for r in rows]), sums.device
    )
    return -(sums / lengths).mean()


def choice_loss(lm: LM, rows: list[Row]) -> Tensor:
    """`lm_loss` plus the cross-entropy of the right option under a softmax over the options' raw log-probabilities."""
    total, golds = 0.0, runtime.to_device(torch.tensor([[r.gold] for r in rows]), lm.model.device)
    for sums, gold, r in zip(
        branch_logprobs(lm, rows, *hidden_states(lm, rows)), golds, rows, strict=True
    ):
        nll = -sums[r.gold] / (len(r.branches[r.gold]) - r.starts[r.gold])
        total = total + nll + F.cross_entropy(sums[None], gold)
    return total / len(rows)


def part_tokens(budget: int, all_scored: bool = False) -> int:
    """Tokens of a batch that a GPU trains on at once; fewer where the loss needs the logits of every one."""
    return max(1024, budget // (4 if all_scored else 2))


def parts_of(lm: LM, rows: list[Row], all_scored: bool = False) -> list[list[Row]]:
    """Rows in the parts that a training step takes one after the other, for a GPU's memory; on a CPU all at once."""
    if lm.model.device.type == "cpu":
        return [rows]
    return [
        [rows[i] for i in part] for part in plan_batches(rows, part_tokens(lm.budget, all_scored))
    ]


def loss_in_parts(lm: LM, rows: list[Row], loss_fn):
    """A loss that is a mean over rows as `train_adapter` takes it: whole, or (sum, count) of one part after another."""
    parts = parts_of(lm, rows)
    return (
        loss_fn(lm, rows) if len(parts) == 1 else ((len(p) * loss_fn(lm, p), len(p)) for p in parts)
    )


def prompt_nll(lm: LM, rows: list[Row]) -> Tensor:
    """(B,) mean token NLL of each row's context: ln of the input perplexity (paper T, eq. 6)."""
    hidden, starts = hidden_states(lm, rows)
    which = torch.tensor(
        [i for i, r in enumerate(rows) for _ in r.context[1:]],
        dtype=torch.long,
        device=hidden.device,
    )
    where = [
        start + j for r, start in zip(rows, starts, strict=True) for j in range(len(r.context) - 1)
    ]
    target = torch.tensor(
        [t for r in rows for t in r.context[1:]], dtype=torch.long, device=hidden.device
    )
    nll = F.cross_entropy(project(lm, hidden[where]), target, reduction="none")
    sums = torch.zeros(len(rows), device=hidden.device).index_add(0, which, nll)
    return sums / torch.tensor([max(1, len(r.context) - 1) for r in rows], device=hidden.device)


# --------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate_answers(
    lm: LM,
    adapter: Adapter | None,
    examples: list[Example],
    max_new_tokens: int,
    batch_size: int = 0,
) -> list[str]:
    """Greedy answers, longest inputs first, left-padded, `batch_size` at most (0 = 16 on a CPU, else 128) and four
    times `lm.budget` tokens."""
    batch_size = batch_size or (16 if lm.model.device.type == "cpu" else 128)
    texts = [input_text(lm, e) for e in examples]
    ids = [encode(lm, t)[-lm.max_tokens :] for t in texts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    pad = (
        lm.tokenizer.pad_token_id
        if lm.tokenizer.pad_token_id is not None
        else lm.tokenizer.eos_token_id
    )
    out = [""] * len(ids)
    lora.swap_adapter(lm.model, lm.layout, adapter)
    try:
        at = 0
        while at < len(order):
            width = len(ids[order[at]])
            batch = order[at : at + max(1, min(batch_size, 4 * lm.budget // max(1, width)))]
            at += len(batch)
            x = torch.tensor(
                [[pad] * (width - len(ids[i])) + ids[i] for i in batch], device=lm.model.device
            )
            mask = torch.tensor(
                [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch], device=x.device
            )
            lm.forwards += len(batch)
            y = lm.model.generate(
                x,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=pad,
            )  # a checkpoint may ship another
            for i, text in zip(
                batch,
                lm.tokenizer.batch_decode(y[:, width:], skip_special_tokens=True),
                strict=True,
            ):
                out[i] = text
    finally:
        lora.clear_adapters(lm.model)
    return out


def parse_letter(text: str, num_options: int, strict: bool) -> int | None:
    """The option a generated answer names, or None.

    Strict: the answer opens with the bracketed letter, as the prompt asks. Lenient: the first bracketed option
    anywhere, else the first standalone letter or, for options 1..4, digit.
    """
    letters, digits = "ABCDEFGHIJ"[:num_options], f"1-{min(num_options, 9)}"
    pattern = (
        rf"\s*\[([{letters}])\]" if strict else rf"\[\s*([{letters}{letters.lower()}{digits}])\s*\]"
    )
    found = re.match(pattern, text) if strict else re.search(pattern, text)
    if found is None and not strict:
        found = re.search(rf"(?<![A-Za-z0-9])([{letters}{digits}])(?![A-Za-z0-9'])", text)
    if found is None:
        return None
    c = found[1].upper()
    return int(c) - 1 if c.isdigit() else letters.index(c)


def match_answer(text: str, answer: str, strict: bool) -> bool:
    """Exact match of a generated number or expression. Strict: after `####`; lenient: the last number or box too."""

    def clean(s):
        return re.sub(r"[\s$,]|\\left|\\right|\\!|\.$", "", s).strip()

    marked = re.search(r"####\s*(.+)", text)
    if marked:
        return clean(marked[1]) == clean(answer)
    if strict:
        return False
    guess = data.last_boxed(text) or next(iter(re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)[::-1]), "")
    return bool(guess) and clean(guess) == clean(answer)


# ------------------------------------------------------------------------------------------------------------ figures


def accuracy(scores: list[Scores], examples: list[Example], metric: str) -> float:
    return sum(s.pick(metric) == e.gold for s, e in zip(scores, examples, strict=True)) / len(
        examples
    )


def gold_logprob(scores: list[Scores], examples: list[Example], metric: str) -> list[float]:
    """Log-probability of each example's right option under a softmax over its options."""
    out = []
    for s, e in zip(scores, examples, strict=True):
        v = s.of(metric)
        top = max(v)
        out.append(v[e.gold] - top - math.log(sum(math.exp(x - top) for x in v)))
    return out


def judge(scores: list[Scores], examples: list[Example], metric: str) -> dict[str, list]:
    """What labels say about scores, one entry per example: `correct` (0 or 1) and `gold_logp`."""
    return {
        "correct": [int(s.pick(metric) == e.gold) for s, e in zip(scores, examples, strict=True)],
        "gold_logp": [round(x, 6) for x in gold_logprob(scores, examples, metric)],
    }


def compare(new: dict[str, list], old: dict[str, list]) -> dict:
    """Wins, losses and the gain in mean gold log-probability of one judgement over another of the same examples."""
    pairs = list(zip(new["correct"], old["correct"], strict=True))
    return {
        "wins": sum(n > o for n, o in pairs),
        "losses": sum(n < o for n, o in pairs),
        "gold_logp_gain": (sum(new["gold_logp"]) - sum(old["gold_logp"])) / len(pairs),
    }
