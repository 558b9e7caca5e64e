"""Scoring: packed rows against one plain forward pass per option, lm-evaluation-harness' rule, steering,
generation."""

import dataclasses
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_lora import random_adapter

from config import UserError, load_config
from data import Example, make_example, read_records
from lora import LoraLinear, attach_lora, find_layout, swap_adapter
from scoring import (
    LM,
    Row,
    Scores,
    _mean_softmax,
    accuracy,
    branch_logprobs,
    chat_prompt,
    choice_loss,
    compare,
    encode,
    generate_answers,
    gold_logprob,
    gold_row,
    hidden_states,
    input_text,
    judge,
    lm_loss,
    load_base,
    make_row,
    match_answer,
    pack,
    parse_letter,
    parts_of,
    plan_batches,
    project,
    prompt_nll,
    prompt_row,
    score_examples,
    slot_deltas,
)

EXAMPLES = [
    Example(
        "1",
        "Question: which stone is here?\nAnswer:",
        ("river", "forest and a very long engine", "x"),
        1,
        "",
    ),
    Example("2", "Is it", ("a", "bb"), 0, ""),
    Example(
        "3",
        "Question: " + "the market and the bridge, " * 12 + "where?\nAnswer:",
        ("the mirror", "the ladder"),
        1,
        "",
    ),
    Example(
        "4", "The engine fell on the window as", ("the engine", "the window"), 0, "", " was heavy."
    ),
    Example("5", "Pick", ("silver", "silver and copper", "silver", "si", "garden"), 4, ""),
]


@pytest.fixture
def plain(tiny_model_dir):
    """The tiny model as transformers alone loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def pairs_of(e: Example) -> list[tuple[str, str]]:
    """(context, continuation) of every option as written, WinoGrande's with the option in the context."""
    return [(f"{e.prompt} {o}", e.suffix) if e.suffix else (e.prompt, " " + o) for o in e.options]


@torch.no_grad()
def loglikelihood(model, tokenizer, context: str, continuation: str) -> float:
    """lm-evaluation-harness, HFLM: encode the whole and the context, one full forward, sum over the
    continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    cut = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    logp = F.log_softmax(model(torch.tensor([whole[:-1]])).logits[0].float(), -1)
    target = torch.tensor(whole[cut:])
    return logp[-len(target) :].gather(1, target[:, None]).sum().item()


def assert_close(scores: list[Scores], expected: list[list[float]], atol: float) -> None:
    for s, e in zip(scores, expected, strict=True):
        assert s.raw == pytest.approx(e, abs=atol)


# ------------------------------------------------------------------------------------- packed = separate


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_packed_scores_equal_separate_forwards(kind, tiny_architecture):
    """Options of one row and rows of one batch, of any length, score as if each were alone in a plain model,
    in every architecture."""
    from transformers import AutoModelForCausalLM

    folder = tiny_architecture(kind)
    model, tokenizer = load_base(str(folder), "main", torch.float32, "cpu")
    layout = find_layout(model, 4, 8, 16, ["q_proj", "v_proj"])
    attach_lora(model, layout)
    ref = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    expected = [[loglikelihood(ref, tokenizer, *p) for p in pairs_of(e)] for e in EXAMPLES]
    assert_close(
        score_examples(LM(model, tokenizer, layout, budget=4096), None, EXAMPLES), expected, 1e-3
    )
    assert max(abs(a - b) for e in expected for a, b in zip(e, e[1:], strict=False)) > 1


@pytest.mark.parametrize("budget", [1, 128, 4096])
def test_batch_composition_does_not_matter(tiny_lm, plain, budget):
    """Whatever shares the batch, whatever the order, a row's scores stay."""
    expected = {
        e.id: [loglikelihood(plain, tiny_lm.tokenizer, *p) for p in pairs_of(e)] for e in EXAMPLES
    }
    tiny_lm.budget = budget
    for seed in range(2):
        order = random.Random(seed).sample(EXAMPLES * 2, len(EXAMPLES) * 2)
        assert_close(score_examples(tiny_lm, None, order), [expected[e.id] for e in order], 1e-4)
    assert_close(score_examples(tiny_lm, None, EXAMPLES[3:4]), [expected["4"]], 1e-4)


def test_scores_with_an_adapter(tiny_lm, plain):
    """An adapter changes the scores as merging (alpha/r) B A into the weights does, and is gone
    afterwards."""
    adapter = random_adapter(tiny_lm.layout, b_scale=0.05)
    bare = score_examples(tiny_lm, None, EXAMPLES)
    got = score_examples(tiny_lm, adapter, EXAMPLES)
    for (path, *_), (a, _, b, _) in zip(tiny_lm.layout.modules, tiny_lm.layout.keys(), strict=True):
        plain.get_submodule(path).weight.data += 2.0 * adapter[b] @ adapter[a]
    assert_close(
        got,
        [[loglikelihood(plain, tiny_lm.tokenizer, *p) for p in pairs_of(e)] for e in EXAMPLES],
        1e-3,
    )
    assert got[0].raw != pytest.approx(bare[0].raw, abs=0.1)
    assert score_examples(tiny_lm, None, EXAMPLES) == bare


def test_training_path_scores_the_same(tiny_lm, plain):
    """With gradients on, attention is written out and rows share sequences; the log-probabilities are
    the same."""
    rows = [make_row(tiny_lm, e) for e in EXAMPLES]
    assert len(pack(rows, "cpu")[0]) > 1
    with torch.enable_grad():
        got = branch_logprobs(tiny_lm, rows, *hidden_states(tiny_lm, rows))
    with torch.no_grad():
        bare = branch_logprobs(tiny_lm, rows, *hidden_states(tiny_lm, rows))
    for e, a, b in zip(EXAMPLES, got, bare, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
        assert a.tolist() == pytest.approx(
            [loglikelihood(plain, tiny_lm.tokenizer, *p) for p in pairs_of(e)], abs=1e-4
        )


def test_the_model_is_causal_with_and_without_gradients(tiny_lm, plain):
    """A direct call of the packed model without a mask is the plain model, also where gradients are
    recorded."""
    ids = torch.randint(0, 400, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(ids).logits
        assert torch.allclose(tiny_lm.model(ids).logits, expected, atol=1e-4)
    with torch.enable_grad():
        assert torch.allclose(tiny_lm.model(ids).logits, expected, atol=1e-4)


def test_norm_is_raw_per_character(tiny_lm):
    """norm divides by the option's length in characters, WinoGrande's by that of the scored text."""
    for e, s in zip(EXAMPLES, score_examples(tiny_lm, None, EXAMPLES), strict=True):
        chars = [len(o) for o in e.options] if not e.suffix else [len(e.suffix.strip())] * 2
        assert s.norm == pytest.approx([r / c for r, c in zip(s.raw, chars, strict=True)])
        assert s.of("norm") == s.norm and s.of("raw") == s.raw


def test_blank_at_the_start(tiny_lm, plain):
    """A WinoGrande sentence that opens with the blank: the options' contexts share no token, none borrows
    another's."""
    e = make_example(
        "winogrande",
        {
            "id": "w",
            "question": "_ was heavy so the window broke.",
            "gold": 0,
            "choices": ["engine", "candle"],
        },
        "cloze",
    )
    assert_close(
        score_examples(tiny_lm, None, [e]),
        [[loglikelihood(plain, tiny_lm.tokenizer, *p) for p in pairs_of(e)]],
        1e-4,
    )


# ------------------------------------------------------------------------------------ the real model


def harness_requests(name: str, r: dict) -> list[tuple[str, str]]:
    """lm-evaluation-harness' (context, continuation) pairs, from its task templates."""
    if name == "winogrande":
        at = r["question"].index("_")
        return [
            (r["question"][:at] + o, " " + r["question"][at + 1 :].strip()) for o in r["choices"]
        ]
    context = {
        "arc_e": f"Question: {r['question']}\nAnswer:",
        "hellaswag": r["question"],
        "boolq": f"{r.get('context')}\nQuestion: {r['question'].rstrip('?')}?\nAnswer:",
    }[name]
    return [(context, f" {c}") for c in r["choices"]]


@pytest.mark.parametrize("name", ["arc_e", "hellaswag", "boolq", "winogrande"])
def test_real_model_agrees_with_lm_eval(real_lm, name):
    """On the embedded model, log-likelihoods equal lm-evaluation-harness' computation within 1e-3."""
    records = sorted(
        read_records(load_config([])[0], name)["test"][:40], key=lambda r: len(str(r))
    )[:3]
    model, tokenizer = real_lm.model, real_lm.tokenizer
    expected = [
        [loglikelihood(model, tokenizer, *p) for p in harness_requests(name, r)] for r in records
    ]
    got = score_examples(real_lm, None, [make_example(name, r, "cloze") for r in records])
    assert_close(got, expected, 1e-3)
    assert all(-300 < v < -0.1 for e in expected for v in e)


def test_real_model_prefers_the_truth(real_lm):
    """A sanity check of the embedded weights: plain facts are chosen."""
    facts = [
        ("Question: What is the capital of France?\nAnswer:", ("Paris", "Rome", "Oslo")),
        ("Question: How many legs does a dog have?\nAnswer:", ("four", "nine", "none")),
        ("Question: Which is a colour?\nAnswer:", ("blue", "seven", "walking")),
    ]
    examples = [Example("", p, o, 0, "") for p, o in facts]
    assert accuracy(score_examples(real_lm, None, examples), examples, "raw") == 1


# ----------------------------------------------------------------------------------------------- rows


def test_row_golden(tiny_lm):
    """Context once, options behind it, nothing scored but the options."""
    row = make_row(tiny_lm, EXAMPLES[0])
    context = encode(tiny_lm, EXAMPLES[0].prompt)
    assert list(row.context) == context and row.starts == (0, 0, 0) and row.gold == 1
    assert row.chars == (5, 29, 1)
    for b, o in zip(row.branches, EXAMPLES[0].options, strict=True):
        assert [*context, *b] == encode(tiny_lm, f"{EXAMPLES[0].prompt} {o}")
    assert row.length == len(context) + sum(map(len, row.branches))


def test_row_of_a_partial_sentence(tiny_lm):
    """WinoGrande: the options differ in the unscored part of their branch, the text behind the blank
    is scored."""
    row = make_row(tiny_lm, EXAMPLES[3])
    tail = encode(tiny_lm, " was heavy.")
    assert all(list(b[s:]) == tail for b, s in zip(row.branches, row.starts, strict=True))
    assert min(row.starts) > 0 and row.chars == (10, 10)


def test_long_contexts_are_cut_on_the_left(tiny_lm):
    """max_tokens bounds the context, the options and the end of the prompt stay."""
    whole = make_row(tiny_lm, EXAMPLES[2])
    tiny_lm.max_tokens = 20
    row = make_row(tiny_lm, EXAMPLES[2])
    assert row.context == whole.context[-20:] and row.branches == whole.branches
    assert row.starts == whole.starts
    assert prompt_row(tiny_lm, EXAMPLES[2].prompt).context == tuple(
        encode(tiny_lm, EXAMPLES[2].prompt)[-20:]
    )


def test_letter_rows(tiny_lm):
    """Letter format: the chat template with our system line, answers in brackets."""
    tiny_lm.form = "letter"
    e = make_example(
        "arc_e", {"id": "x", "question": "Why?", "choices": ["a", "b"], "gold": 1}, "letter"
    )
    text = input_text(tiny_lm, e)
    assert (
        text.startswith("<|im_start|>system\nYou answer multiple-choice")
        and "in square brackets" in text
    )
    assert text.endswith("<|im_start|>user\nWhy?\nA: a\nB: b<|im_end|>\n<|im_start|>assistant\n")
    row = make_row(tiny_lm, e)
    # the bracket both answers open with belongs to the answers: it is scored
    assert tiny_lm.tokenizer.decode(row.context) == text and row.starts == (0, 0)
    assert [tiny_lm.tokenizer.decode(b) for b in row.branches] == ["[A]", "[B]"]
    free = Example("g", "1+1?", (), None, "2")
    assert "####" in input_text(tiny_lm, free) and len(make_row(tiny_lm, free).branches) == 1
    tiny_lm.tokenizer.chat_template = None
    assert chat_prompt(tiny_lm.tokenizer, "S", "U") == "S\n\nU\n"


def test_opening_token(tiny_lm):
    """A tokenizer that opens texts with a token of its own gets it once; one that does not gets none; no
    closing token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    plain = encode(tiny_lm, "a stone")
    tok = tiny_lm.tokenizer.backend_tokenizer
    tok.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>",
        special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)],
    )
    tiny_lm.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    assert encode(tiny_lm, "a stone") == [0, *plain]
    assert encode(tiny_lm, "<|endoftext|>a stone") == [0, *plain]
    row = make_row(tiny_lm, EXAMPLES[0])
    assert row.context[0] == 0 and not any(0 in b or 2 in b for b in row.branches)


def test_batches_cover_every_row_within_the_budget():
    """Each row once, longest first, rows x longest within the budget unless a single row exceeds it."""
    rng = random.Random(0)
    rows = [Row(tuple(range(rng.randrange(1, 60))), ((1, 2),), (0,), (1,)) for _ in range(40)]
    for budget in (1, 100, 10_000):
        batches = plan_batches(rows, budget)
        assert sorted(i for b in batches for i in b) == list(range(40))
        for b in batches:
            longest = max(rows[i].length for i in b)
            assert len(b) == 1 or len(b) * longest <= budget
    assert len(batches) == 1 and plan_batches([], 5) == []


def test_pack_golden():
    """Positions restart at the context's end in each branch; a branch sees its row's context and
    itself only."""
    rows = [Row((10, 11), ((12, 13), (14,)), (0, 0), (1, 1)), Row((20,), ((21,),), (0,), (1,))]
    with torch.no_grad():
        ids, pos, mask, starts = pack(rows, "cpu")
    assert ids.tolist() == [[10, 11, 12, 13, 14], [20, 21, 0, 0, 0]] and starts == [0, 5]
    assert pos[0].tolist() == [0, 1, 2, 3, 2] and pos[1, :2].tolist() == [0, 1]
    assert mask.shape == (2, 1, 5, 5) and mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert mask[1, 0, 1].int().tolist() == [1, 1, 0, 0, 0] and mask.any(-1).all()


def test_rows_sharing_a_sequence_do_not_see_each_other():
    """First fit: three rows in one sequence, masked from each other."""
    rows = [
        Row((1, 2, 3, 4, 5, 6), (), (), ()),
        Row((7, 8), ((9,),), (0,), (1,)),
        Row((10, 11, 12), (), (), ()),
    ]
    with torch.no_grad():
        ids, _, mask, starts = pack(rows, "cpu")
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]] and starts == [0, 6, 9]
    assert not mask[1, 0, 3:, :3].any() and mask[1, 0, 2, :3].all()


def test_passes_are_counted_in_rows(tiny_lm):
    """Cost reports: one forward per question, and a backward where gradients are recorded."""
    score_examples(tiny_lm, None, EXAMPLES)
    assert (tiny_lm.forwards, tiny_lm.backwards) == (5, 0)
    rows = [make_row(tiny_lm, e) for e in EXAMPLES[:2]]
    with torch.enable_grad():
        hidden_states(tiny_lm, rows)
    assert (tiny_lm.forwards, tiny_lm.backwards) == (7, 2)


# ----------------------------------------------------------------------------------------------- losses


def test_losses_by_hand(tiny_lm, plain):
    """lm: mean over examples of the mean NLL of the gold tokens; choice adds the cross-entropy over
    the options."""
    examples = EXAMPLES[:3]
    rows = [make_row(tiny_lm, e) for e in examples]
    nll, ce = [], []
    for e, r in zip(examples, rows, strict=True):
        raw = [loglikelihood(plain, tiny_lm.tokenizer, *p) for p in pairs_of(e)]
        nll.append(-raw[e.gold] / len(r.branches[e.gold]))
        ce.append(math.log(sum(math.exp(x - raw[e.gold]) for x in raw)))
    assert lm_loss(tiny_lm, rows).item() == pytest.approx(sum(nll) / 3, abs=1e-4)
    assert choice_loss(tiny_lm, rows).item() == pytest.approx((sum(nll) + sum(ce)) / 3, abs=1e-4)
    assert gold_row(rows[0]).branches == (rows[0].branches[1],)


def test_prompt_nll_is_cross_entropy(tiny_lm, plain):
    """Mean NLL of tokens 2..n of each context, with branches ignored."""
    rows = [prompt_row(tiny_lm, e.prompt) for e in EXAMPLES] + [make_row(tiny_lm, EXAMPLES[0])]
    expected = []
    for r in rows:
        ids = torch.tensor([r.context])
        with torch.no_grad():
            expected.append(F.cross_entropy(plain(ids).logits[0, :-1], ids[0, 1:]).item())
    assert prompt_nll(tiny_lm, rows).tolist() == pytest.approx(expected, abs=1e-4)
    assert prompt_nll(tiny_lm, [Row((5,), (), (), ())]).tolist() == [0.0]


# ---------------------------------------------------------------------------------------------- steering


def states(lm, rows):
    with torch.no_grad():
        return hidden_states(lm, rows)


def autograd_delta(lm, row, hidden, start, steps, lr):
    """The same optimisation by autograd and torch's AdamW."""
    n = len(row.context)
    h, target = hidden[start : start + n - 1].clone(), torch.tensor(row.context[1:])
    delta = torch.zeros(h.shape[-1], requires_grad=True)
    opt = torch.optim.AdamW([delta], lr=lr, weight_decay=1e-8, eps=1e-5)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(lm.model.get_output_embeddings()(h + delta), target).backward()
        opt.step()
    return delta.detach()


@pytest.mark.parametrize("steps, lr", [(1, 0.1), (5, 0.1), (3, 1e-3)])
def test_steering_equals_autograd(tiny_lm, steps, lr):
    """The closed-form gradient with hand-written AdamW equals autograd with torch's, row by row."""
    rows = [make_row(tiny_lm, e) for e in EXAMPLES]
    hidden, starts = states(tiny_lm, rows)
    with torch.no_grad():
        got = slot_deltas(tiny_lm, rows, hidden, starts, steps, lr)
    assert got.shape == (5, 32) and got.dtype == torch.float32
    for i, r in enumerate(rows):
        expected = autograd_delta(tiny_lm, r, hidden, starts[i], steps, lr)
        assert (got[i] - expected).abs().max() < 1e-5 and expected.abs().max() > lr / 2


def test_steering_of_a_batch_equals_singles(tiny_lm):
    """Questions are steered independently; each starts from zero."""
    rows = [make_row(tiny_lm, e) for e in EXAMPLES[:2]]
    with torch.no_grad():
        both = slot_deltas(tiny_lm, rows, *states(tiny_lm, rows), 4, 0.1)
        singles = [slot_deltas(tiny_lm, [r], *states(tiny_lm, [r]), 4, 0.1)[0] for r in rows]
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(both, singles, strict=True))
    assert (both[0] - both[1]).abs().max() > 0.01


def test_no_steps_of_steering_change_nothing(tiny_lm):
    """Zero steps: zero deltas, the same scores; a context of one token cannot be steered."""
    rows = [make_row(tiny_lm, e) for e in EXAMPLES]
    with torch.no_grad():
        assert slot_deltas(tiny_lm, rows, *states(tiny_lm, rows), 0, 0.1).abs().max() == 0
        one = [Row((5,), ((6,),), (0,), (1,), 0)]
        assert slot_deltas(tiny_lm, one, *states(tiny_lm, one), 3, 0.1).abs().max() == 0
    assert score_examples(tiny_lm, None, EXAMPLES, slot=(0, 0.1)) == score_examples(
        tiny_lm, None, EXAMPLES
    )


def test_steered_scores(tiny_lm, plain):
    """Scores with steering: the delta of the question added to every hidden state, no gradient left on the
    backbone."""
    got = score_examples(tiny_lm, None, EXAMPLES, slot=(4, 0.2))
    for e, s in zip(EXAMPLES, got, strict=True):
        row = make_row(tiny_lm, e)
        delta = autograd_delta(
            tiny_lm, row, *(lambda h, st: (h, st[0]))(*states(tiny_lm, [row])), 4, 0.2
        )
        expected = []
        for context, continuation in pairs_of(e):
            ids, cut = encode(tiny_lm, context + continuation), len(encode(tiny_lm, context))
            with torch.no_grad():
                h = plain.model(torch.tensor([ids])).last_hidden_state[0] + delta
                logp = F.log_softmax(plain.lm_head(h), -1)
            expected.append(sum(logp[i - 1, ids[i]].item() for i in range(cut, len(ids))))
        assert s.raw == pytest.approx(expected, abs=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in tiny_lm.model.parameters())


# -------------------------------------------------------------------------------------------- generation


def test_greedy_answers_equal_generate(tiny_lm, plain):
    """Left-padded batches give what transformers' greedy search gives for each prompt alone, in the
    order asked."""
    examples = [dataclasses.replace(e, suffix="") for e in EXAMPLES]
    got = generate_answers(tiny_lm, None, examples, 12)
    for e, text in zip(examples, got, strict=True):
        ids = torch.tensor([encode(tiny_lm, e.prompt)])
        out = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=tiny_lm.tokenizer.pad_token_id,
        )
        assert text == tiny_lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(got)) > 1 and tiny_lm.forwards == 5


def test_answers_with_an_adapter(tiny_lm):
    """The adapter takes part in generation and is gone afterwards."""
    bare = generate_answers(tiny_lm, None, EXAMPLES[:2], 8)
    assert generate_answers(tiny_lm, random_adapter(tiny_lm.layout), EXAMPLES[:2], 8) != bare
    assert generate_answers(tiny_lm, None, EXAMPLES[:2], 8) == bare
    assert all(m.A is None for m in tiny_lm.model.modules() if isinstance(m, LoraLinear))


@pytest.mark.parametrize(
    "text, options, strict, lenient",
    [
        ("[B]", 4, 1, 1),
        (" \n[C] because", 4, 2, 2),
        ("The answer is [B].", 4, None, 1),
        ("[ d ]", 4, None, 3),
        ("[2]", 4, None, 1),
        ("B", 4, None, 1),
        ("(C)", 4, None, 2),
        ("Answer: D.", 4, None, 3),
        ("B) two", 4, None, 1),
        ("The answer is 3", 4, None, 2),
        ("A or [C]", 4, None, 2),
        ("[E]", 4, None, None),
        ("[A]", 2, 0, 0),
        ("[C]", 2, None, None),
        ("Because", 4, None, None),
        ("D's", 4, None, None),
        ("none", 4, None, None),
        ("", 4, None, None),
        ("12", 4, None, None),
        ("5", 4, None, None),
        ("[5]", 5, None, 4),
        ("E", 5, None, 4),
        ("[J]", 10, 9, 9),
        ("[7]", 10, None, 6),
        ("[0]", 10, None, None),
    ],
)
def test_parse_letter(text, options, strict, lenient):
    """Strict: the bracketed letter opens the answer. Lenient: first bracketed option, else first
    standalone one."""
    assert (
        parse_letter(text, options, True) == strict
        and parse_letter(text, options, False) == lenient
    )


@pytest.mark.parametrize(
    "text, answer, strict, lenient",
    [
        ("so\n#### 42", "42", True, True),
        ("#### 1,234", "1234", True, True),
        ("#### $42.", "42", True, True),
        ("#### 42 \n", "42", True, True),
        ("the answer is 42", "42", False, True),
        ("42 apples, no 43.", "42", False, False),
        ("1,234 in all", "1234", False, True),
        ("#### 41 or 42", "42", False, False),
        ("it is -7.", "-7", False, True),
        (r"thus $\boxed{\frac{1}{2}}$", r"\frac{1}{2}", False, True),
        (r"\boxed{3} of 5", "3", False, True),
        (r"#### \left( 1, 2 \right)", "(1,2)", True, True),
        ("", "0", False, False),
        ("none", "0", False, False),
        ("3.5 m", "3.5", False, True),
        ("#### 420", "42", False, False),
    ],
)
def test_match_answer(text, answer, strict, lenient):
    """Strict: after ####. Lenient: also the last box or the last number. Commas, spaces and $ do
    not count."""
    assert (
        match_answer(text, answer, True) is strict and match_answer(text, answer, False) is lenient
    )


# ------------------------------------------------------------------------------------------------ figures


def test_figures_by_hand():
    """accuracy, mean gold log-probability, and paired wins, losses and gain."""
    ln = math.log
    examples = [Example(str(i), "p", ("a", "b"), g, "") for i, g in enumerate((0, 1, 0))]
    old = [
        Scores((ln(0.6), ln(0.4)), (-1.0, -2.0)),
        Scores((ln(0.6), ln(0.4)), (-1.0, -2.0)),
        Scores((ln(0.6), ln(0.4)), (-1.0, -2.0)),
    ]
    new = [
        Scores((ln(0.8), ln(0.2)), (-2.0, -1.0)),
        Scores((ln(0.2), ln(0.8)), (-2.0, -1.0)),
        Scores((ln(0.3), ln(0.7)), (-2.0, -1.0)),
    ]
    assert [s.pick("raw") for s in new] == [0, 1, 1] and [s.pick("norm") for s in old] == [0, 0, 0]
    assert accuracy(old, examples, "raw") == 2 / 3 and accuracy(new, examples, "norm") == 1 / 3
    assert gold_logprob(old, examples, "raw") == pytest.approx([ln(0.6), ln(0.4), ln(0.6)])
    raw = {name: judge(x, examples, "raw") for name, x in (("new", new), ("old", old))}
    assert raw["new"]["correct"] == [1, 1, 0] and raw["old"]["correct"] == [1, 0, 1]
    found = compare(raw["new"], raw["old"])
    assert (found["wins"], found["losses"]) == (1, 1)
    assert found["gold_logp_gain"] == pytest.approx(
        (ln(0.8) + ln(0.8) + ln(0.3) - 2 * ln(0.6) - ln(0.4)) / 3, abs=1e-6
    )
    found = compare(judge(new, examples, "norm"), judge(old, examples, "norm"))
    assert (found["wins"], found["losses"]) == (1, 2)
    assert compare(raw["old"], raw["old"]) == {"wins": 0, "losses": 0, "gold_logp_gain": 0.0}


def test_gold_logprob_survives_large_scores():
    """Log-probabilities far below zero do not overflow; a shift of all options changes nothing."""
    e = [Example("x", "p", ("a", "b"), 1, "")]
    far = gold_logprob([Scores((-5000.0, -5001.0), (0, 0))], e, "raw")
    assert far == pytest.approx(gold_logprob([Scores((0.0, -1.0), (0, 0))], e, "raw"))
    assert far == pytest.approx([-1.3132617])


def test_equal_scores_pick_the_first():
    """Ties are broken by option order."""
    assert Scores((-1.0, -1.0, -2.0), (0, 0, 0)).pick("raw") == 0


# ------------------------------------------------------------------------------------------------ loading


def test_model_that_cannot_be_loaded(tmp_path):
    """A folder without a model gives one line that names the key and the ways out."""
    with pytest.raises(UserError, match=r"model\.name=.*cannot be loaded .*run `make assets`"):
        load_base(str(tmp_path), "main", torch.float32, "cpu")


def test_base_is_frozen_and_in_the_asked_type(tiny_model_dir):
    """No parameter takes gradients, the model is in evaluation mode, in the dtype asked for."""
    model, _ = load_base(str(tiny_model_dir), "main", torch.bfloat16, "cpu")
    assert not model.training
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(False, torch.bfloat16)}


def test_bfloat16_base_scores_in_float32(tiny_model_dir, tiny_lm):
    """With a bfloat16 base, scores stay near float32 and adapters are cast when put in, not changed."""
    model, tokenizer = load_base(str(tiny_model_dir), "main", torch.bfloat16, "cpu")
    layout = find_layout(model, 4, 8, 16, ["q_proj", "v_proj"])
    attach_lora(model, layout)
    adapter = random_adapter(layout, b_scale=0.01)
    lm = LM(model, tokenizer, layout)
    swap_adapter(model, layout, adapter)
    assert model.model.layers[0].self_attn.q_proj.A.dtype == torch.bfloat16
    assert all(v.dtype == torch.float32 for v in adapter.values())
    for a, b in zip(
        score_examples(lm, None, EXAMPLES), score_examples(tiny_lm, None, EXAMPLES), strict=True
    ):
        assert a.raw == pytest.approx(b.raw, rel=0.05, abs=0.3)
    rows = [make_row(lm, e) for e in EXAMPLES[:1]]
    hidden, starts = states(lm, rows)
    assert hidden.dtype == torch.bfloat16 and project(lm, hidden).dtype == torch.float32
    assert slot_deltas(lm, rows, hidden, starts, 1, 0.1).dtype == torch.float32


def test_batches_are_divided_for_a_gpu_alone(tiny_lm):
    """Every row once, half of the token budget a part, a quarter where every token's logits are kept; on a CPU one
    part."""
    rows = [make_row(tiny_lm, e) for e in EXAMPLES * 20]
    assert parts_of(tiny_lm, rows) == [rows]
    gpu = SimpleNamespace(model=SimpleNamespace(device=torch.device("cuda")), budget=4096)
    for parts, most in ((parts_of(gpu, rows), 2048), (parts_of(gpu, rows, all_scored=True), 1024)):
        assert (
            sorted(map(id, (r for p in parts for r in p))) == sorted(map(id, rows))
            and len(parts) > 1
        )
        assert most / 2 < max(len(p) * max(r.length for r in p) for p in parts) <= most


def test_mean_softmax_survives_underflow():
    """Two matrix-vector products give the mean softmax; where they underflow, logarithms do."""
    g = torch.Generator().manual_seed(0)
    z, shift = 5 * torch.randn(4, 50, generator=g), 5 * torch.randn(50, generator=g)
    want = torch.softmax(z + shift, -1).mean(0)
    base, add = torch.exp(z - z.amax(1, keepdim=True)), torch.exp(shift - shift.max())
    torch.testing.assert_close(_mean_softmax([base], add[None])[0], want, rtol=1e-4, atol=1e-7)
    far = torch.zeros(50)
    far[7] = 85.0  # the shift's peak lies where the base model gives e^-80
    z[:, 7] = z.amax(1) - 80
    want = torch.softmax(z + far, -1).mean(0)
    base, add = torch.exp(z - z.amax(1, keepdim=True)), torch.exp(far - far.max())
    torch.testing.assert_close(_mean_softmax([base], add[None])[0], want, rtol=1e-3, atol=1e-4)
