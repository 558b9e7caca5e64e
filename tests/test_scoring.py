"""Scoring: packed rows against one plain forward pass per option, losses, steering."""

import copy
import dataclasses
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import load_lm, save_tiny
from test_lora import random_adapter

import data
import lora
import packing
import scoring
from config import UserError, load_config
from data import Example
from scoring import LM, Row, Scores

LONG = "Question: " + "the market and the bridge, " * 12 + "where?\nAnswer:"
STONE = "Question: which stone is here?\nAnswer:"
FELL = "The engine fell on the window as"
EXAMPLES = [
    Example("1", STONE, ("river", "forest and a very long engine", "x"), 1),
    Example("2", "Is it", ("a", "bb"), 0),
    Example("3", LONG, ("the mirror", "the ladder"), 1),
    Example("4", FELL, ("the engine", "the window"), 0, "", " was heavy."),
    Example("5", "Pick", ("silver", "silver and copper", "silver", "si", "garden"), 4),
]


def plain_model(folder):
    """The model as transformers alone loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture
def plain(tiny_model_dir):
    return plain_model(tiny_model_dir)


def pairs_of(e):
    """(context, continuation) of every option as written, WinoGrande's with the option in front."""
    if e.suffix:
        return [(f"{e.prompt} {option}", e.suffix) for option in e.options]
    return [(e.prompt, f" {option}") for option in e.options]


@torch.no_grad()
def loglikelihood(model, tokenizer, context, continuation):
    """lm-evaluation-harness, HFLM: the whole and the context encoded, one forward, a sum."""
    stripped = context.rstrip()
    whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    cut = len(tokenizer(stripped, add_special_tokens=False)["input_ids"])
    logp = F.log_softmax(model(torch.tensor([whole[:-1]])).logits[0].float(), -1)
    target = torch.tensor(whole[cut:])
    return logp[-len(target) :].gather(1, target[:, None]).sum().item()


def expected_scores(model, tokenizer, examples=EXAMPLES):
    """The log-likelihood of every option, each alone in a plain model."""
    found = []
    for e in examples:
        found.append([loglikelihood(model, tokenizer, *pair) for pair in pairs_of(e)])
    return found


def assert_close(scores, expected, atol):
    for found, values in zip(scores, expected, strict=True):
        assert found.raw == pytest.approx(values, abs=atol)


@pytest.fixture
def alone(plain, tiny_lm):
    """What the tiny model says of every option of EXAMPLES, each alone."""
    return expected_scores(plain, tiny_lm.tokenizer)


@pytest.fixture
def rows(tiny_lm):
    return [scoring.make_row(tiny_lm, e) for e in EXAMPLES]


def score(lm, adapter=None, examples=EXAMPLES, **more):
    return scoring.score_examples(lm, adapter, examples, **more)


KINDS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "cohere", "olmo2", "smollm3")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_scores_equal_separate_forwards(kind, tiny_architecture):
    """Options and rows of one batch score as if each were alone in a plain model, of any kind."""
    folder = tiny_architecture(kind)
    model, tokenizer = scoring.load_base(str(folder), "main", torch.float32, "cpu")
    layout = lora.find_layout(model, 4, 8, 16, ["q_proj", "v_proj"])
    lora.attach_lora(model, layout)
    expected = expected_scores(plain_model(folder), tokenizer)
    assert_close(score(LM(model, tokenizer, layout, budget=4096)), expected, 1e-3)
    gaps = [abs(a - b) for values in expected for a, b in zip(values, values[1:], strict=False)]
    assert max(gaps) > 1


def scaled_model(folder):
    """A tiny Granite, which divides its logits by 8, and the same in plain transformers."""
    folder = save_tiny(folder, "granite", logits_scaling=8.0)
    return load_lm(folder, 4, 8, 16, ["q_proj", "v_proj"]), plain_model(folder)


def test_a_scale_behind_the_head_counts(tmp_path):
    """Scores are those of the model's own logits."""
    lm, plain = scaled_model(tmp_path)
    assert_close(score(lm), expected_scores(plain, lm.tokenizer), 1e-3)


def test_steering_with_a_scale_behind_the_head(tmp_path):
    """Its one step is AdamW's on the gradient that autograd finds."""
    lm, plain = scaled_model(tmp_path)
    row = scoring.make_row(lm, EXAMPLES[0])
    with torch.no_grad():
        hidden, starts = scoring.hidden_states(lm, [row])
        found = scoring.slot_deltas(lm, [row], hidden, starts, 1, 0.1)[0]
        ids = torch.tensor([row.context])
        states = plain.model(ids).last_hidden_state[0, :-1]
    delta = torch.zeros(states.shape[1], requires_grad=True)
    logits = plain.lm_head(states + delta) / 8
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, ids[0, 1:]), delta)
    want = -0.1 * grad / (grad.abs() + 1e-5)
    torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-4)


def test_steering_with_a_cap_behind_the_head(tmp_path):
    """As autograd with torch's AdamW finds it on the capped logits of a plain Gemma 2."""
    cap = 2.0
    folder = save_tiny(tmp_path, "gemma2", final_logit_softcapping=cap)
    lm, plain = load_lm(folder, 4, 8, 16, ["q_proj", "v_proj"]), plain_model(folder)
    row = scoring.make_row(lm, EXAMPLES[0])
    found, _, _ = steer(lm, [row, Row((5,), (), (), ())], 3, 0.1)

    ids = torch.tensor([row.context])
    with torch.no_grad():
        states = plain.model(ids).last_hidden_state[0, :-1]
    delta = torch.zeros(states.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=0.1, weight_decay=1e-8, eps=1e-5)
    for _ in range(3):
        optimizer.zero_grad()
        logits = cap * torch.tanh(plain.lm_head(states + delta) / cap)
        F.cross_entropy(logits, ids[0, 1:]).backward()
        optimizer.step()
    torch.testing.assert_close(found[0], delta.detach(), rtol=1e-3, atol=1e-3)
    assert found[1].abs().max() == 0


def test_gemma2_is_causal_without_a_mask(tiny_architecture):
    """A changed last token moves nothing before it, in one pass and behind a cache."""
    model, _ = scoring.load_base(str(tiny_architecture("gemma2")), "main", torch.float32, "cpu")
    ids = torch.arange(5, 17)[None]
    other = ids.clone()
    other[0, -1] = 40
    with torch.no_grad():
        whole = model(ids).logits
        torch.testing.assert_close(model(other).logits[:, :-1], whole[:, :-1])
        first = model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-4, atol=1e-4)


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}"
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<u>{{ m['content'] }}</u>{% endif %}"
    "{% endfor %}"
)
THINKS = (
    "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


@pytest.mark.parametrize(
    "template, want",
    [
        (NO_SYSTEM, "<u>Be brief.\n\nWhy?</u>"),
        (DROPS_SYSTEM, "<u>Be brief.\n\nWhy?</u>"),
        (THINKS, "<u>Be brief.</u><u>Why?</u><think></think>"),
    ],
)
def test_any_chat_template_carries_the_system_text(tiny_lm, template, want):
    """In the user's message where there is no system role; thinking is turned off."""
    tiny_lm.tokenizer.chat_template = template
    assert scoring.chat_prompt(tiny_lm.tokenizer, "Be brief.", "Why?") == want


@pytest.mark.parametrize("budget", [1, 128, 4096])
def test_batch_composition_does_not_matter(tiny_lm, alone, budget):
    """Whatever shares the batch, whatever the order, a row's scores stay."""
    tiny_lm.budget = budget
    for seed in range(2):
        order = random.Random(seed).sample([0, 1, 2, 3, 4] * 2, 10)
        found = score(tiny_lm, examples=[EXAMPLES[i] for i in order])
        assert_close(found, [alone[i] for i in order], 1e-4)
    assert_close(score(tiny_lm, examples=EXAMPLES[3:4]), alone[3:4], 1e-4)
    assert score(tiny_lm, examples=[]) == []


def test_scores_with_an_adapter(tiny_lm, plain):
    """An adapter scores as (alpha/r) B A merged into the weights, and is gone afterwards."""
    layout = tiny_lm.layout
    adapter = random_adapter(layout, b_scale=0.05)
    bare = score(tiny_lm)
    got = score(tiny_lm, adapter)
    for (path, *_), (a, _, b, _) in zip(layout.modules, layout.keys(), strict=True):
        plain.get_submodule(path).weight.data += 2.0 * adapter[b] @ adapter[a]
    assert_close(got, expected_scores(plain, tiny_lm.tokenizer), 1e-3)
    assert got[0].raw != pytest.approx(bare[0].raw, abs=0.1)
    assert score(tiny_lm) == bare


def logprobs(lm, rows):
    return scoring.branch_logprobs(lm, rows, *scoring.hidden_states(lm, rows))


def test_training_path_scores_the_same(tiny_lm, alone, rows):
    """With gradients attention is written out and rows share sequences: the same numbers."""
    assert len(packing.pack(rows, "cpu")[0]) < len(rows)
    trained = logprobs(tiny_lm, rows)
    with torch.no_grad():
        bare = logprobs(tiny_lm, rows)
    for a, b, values in zip(trained, bare, alone, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
        assert a.tolist() == pytest.approx(values, abs=1e-4)


def test_the_model_is_causal_with_and_without_gradients(tiny_lm, plain):
    """A direct call of the packed model without a mask is the plain model."""
    ids = torch.randint(0, 400, (2, 19), generator=torch.Generator().manual_seed(0))
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            assert torch.allclose(tiny_lm.model(ids).logits, plain(ids).logits, atol=1e-4)


def test_norm_is_raw_per_character(tiny_lm):
    """norm divides by the option's length in characters, WinoGrande's by the scored text's."""
    for e, found in zip(EXAMPLES, score(tiny_lm), strict=True):
        scored = [continuation.strip() for _, continuation in pairs_of(e)]
        expected = [raw / len(text) for raw, text in zip(found.raw, scored, strict=True)]
        assert found.norm == pytest.approx(expected)
        assert found.of("norm") == found.norm
        assert found.of("raw") == found.raw


def test_blank_at_the_start(tiny_lm, plain):
    """A WinoGrande sentence that opens with the blank: the options' contexts share no token."""
    question = "_ was heavy so the window broke."
    record = {"id": "w", "question": question, "gold": 0, "choices": ["engine", "candle"]}
    examples = [data.make_example("winogrande", record, "cloze")]
    expected = expected_scores(plain, tiny_lm.tokenizer, examples)
    assert_close(score(tiny_lm, examples=examples), expected, 1e-4)


def harness_requests(name, record):
    """lm-evaluation-harness' (context, continuation) pairs, from its task templates."""
    question = record["question"]
    if name == "winogrande":
        before, after = question.split("_", 1)
        return [(before + choice, f" {after.strip()}") for choice in record["choices"]]
    context = {
        "arc_e": f"Question: {question}\nAnswer:",
        "hellaswag": question,
        "boolq": f"{record.get('context')}\nQuestion: {question.rstrip('?')}?\nAnswer:",
    }[name]
    return [(context, f" {choice}") for choice in record["choices"]]


@pytest.mark.parametrize("name", ["arc_e", "hellaswag", "boolq", "winogrande"])
def test_real_model_agrees_with_lm_eval(real_lm, name):
    """On the embedded model, log-likelihoods equal lm-evaluation-harness' within 1e-3."""
    records = data.read_records(load_config([])[0], name).splits["test"][:40]
    records = sorted(records, key=lambda record: len(str(record)))[:3]
    expected = []
    for record in records:
        requests = harness_requests(name, record)
        expected.append([loglikelihood(real_lm.model, real_lm.tokenizer, *r) for r in requests])
    examples = [data.make_example(name, record, "cloze") for record in records]
    assert_close(score(real_lm, examples=examples), expected, 1e-3)
    assert all(-300 < value < -0.1 for values in expected for value in values)


def test_real_model_prefers_the_truth(real_lm):
    """A sanity check of the embedded weights: plain facts are chosen."""
    facts = {
        "What is the capital of France?": ("Paris", "Rome", "Oslo"),
        "How many legs does a dog have?": ("four", "nine", "none"),
        "Which is a colour?": ("blue", "seven", "walking"),
    }
    examples = [Example("", f"Question: {q}\nAnswer:", o, 0) for q, o in facts.items()]
    assert scoring.accuracy(score(real_lm, examples=examples), examples, "raw") == 1


def test_row_golden(tiny_lm, rows):
    """Context once, options behind it, nothing scored but the options."""
    row = rows[0]
    context = scoring.encode(tiny_lm, STONE)
    assert list(row.context) == context
    assert row.starts == (0, 0, 0)
    assert row.gold == 1
    assert row.chars == (5, 29, 1)
    for branch, option in zip(row.branches, EXAMPLES[0].options, strict=True):
        assert [*context, *branch] == scoring.encode(tiny_lm, f"{STONE} {option}")
    assert row.length == len(context) + sum(map(len, row.branches))


def test_row_of_a_partial_sentence(tiny_lm, rows):
    """WinoGrande: options stand in the unscored part of a branch, what follows is scored."""
    row = rows[3]
    tail = scoring.encode(tiny_lm, " was heavy.")
    for branch, first in zip(row.branches, row.starts, strict=True):
        assert list(branch[first:]) == tail
        assert first > 0
    assert row.chars == (10, 10)


def test_long_contexts_are_cut_on_the_left(tiny_lm, rows):
    """max_tokens bounds the context; the options and the end of the prompt stay."""
    tiny_lm.max_tokens = 20
    row = scoring.make_row(tiny_lm, EXAMPLES[2])
    assert row == dataclasses.replace(rows[2], context=rows[2].context[-20:])
    tail = scoring.encode(tiny_lm, LONG)[-20:]
    assert scoring.prompt_row(tiny_lm, LONG).context == tuple(tail)


def test_letter_rows(tiny_lm):
    """Letter format: the chat template with our system line, answers in brackets."""
    tiny_lm.form = "letter"
    record = {"id": "x", "question": "Why?", "choices": ["a", "b"], "gold": 1}
    e = data.make_example("arc_e", record, "letter")
    text = scoring.input_text(tiny_lm, e)
    assert text.startswith("<|im_start|>system\nYou answer multiple-choice")
    assert "in square brackets" in text
    assert text.endswith("<|im_start|>user\nWhy?\nA: a\nB: b<|im_end|>\n<|im_start|>assistant\n")

    # the bracket both answers open with belongs to the answers: it is scored
    row = scoring.make_row(tiny_lm, e)
    assert tiny_lm.tokenizer.decode(row.context) == text
    assert row.starts == (0, 0)
    assert [tiny_lm.tokenizer.decode(branch) for branch in row.branches] == ["[A]", "[B]"]

    free = Example("g", "1+1?", answer="2")
    assert "####" in scoring.input_text(tiny_lm, free)
    assert len(scoring.make_row(tiny_lm, free).branches) == 1
    tiny_lm.tokenizer.chat_template = None
    assert scoring.chat_prompt(tiny_lm.tokenizer, "S", "U") == "S\n\nU\n"


def tokenizer_with(lm, single: str, **names):
    """The model's tokenizer, which puts tokens around every text as `single` says."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    ids = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    used = [(token, number) for token, number in ids.items() if token in single]
    backend = lm.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=single, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", **names)


def test_opening_token(tiny_lm):
    """A tokenizer's own opening token comes once, where it has one; a closing token never."""
    plain = scoring.encode(tiny_lm, "a stone")
    single = "<|endoftext|> $A <|im_end|>"
    tiny_lm.tokenizer = tokenizer_with(tiny_lm, single, bos_token="<|endoftext|>")
    assert scoring.encode(tiny_lm, "a stone") == [0, *plain]
    assert scoring.encode(tiny_lm, "<|endoftext|>a stone") == [0, *plain]
    row = scoring.make_row(tiny_lm, EXAMPLES[0])
    assert row.context[0] == 0
    assert not any(0 in branch or 2 in branch for branch in row.branches)

    # a row that is cut keeps it: Gemma is at chance without
    whole = scoring.make_row(tiny_lm, EXAMPLES[2]).context
    text = scoring.encode(tiny_lm, LONG)
    tiny_lm.max_tokens = 20
    assert scoring.make_row(tiny_lm, EXAMPLES[2]).context == (0, *whole[-19:])
    assert scoring.prompt_row(tiny_lm, LONG).context == (0, *text[-19:])


def test_an_opening_of_other_tokens_than_bos(tiny_lm):
    """GLM-4 opens with two, and has no bos_token."""
    plain = scoring.encode(tiny_lm, "a stone")
    tiny_lm.tokenizer = tokenizer_with(tiny_lm, "<|endoftext|> <|im_start|> $A")
    assert scoring.encode(tiny_lm, "a stone") == [0, 1, *plain]
    assert scoring.encode(tiny_lm, "<|endoftext|><|im_start|>a stone") == [0, 1, *plain]


def test_a_chat_is_the_same_tomorrow(tiny_lm):
    """Llama 3.2 and SmolLM3 write the day's date."""
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}{% endif %}"
        "{% for m in messages %} {{ m['content'] }}{% endfor %}"
    )
    text = scoring.chat_prompt(tokenizer, "Be brief.", "Why?")
    assert text == f"Today: {scoring.DATE} Be brief. Why?"


def test_batches_cover_every_row_within_the_budget():
    """Each row once, rows x longest within the budget unless a single row exceeds it."""
    rng = random.Random(0)
    rows = [Row(tuple(range(rng.randrange(1, 60))), ((1, 2),), (0,), (1,)) for _ in range(40)]
    for budget in (1, 100, 10_000):
        batches = packing.plan_batches(rows, budget)
        assert sorted(sum(batches, [])) == list(range(40))
        for batch in batches:
            longest = max(rows[i].length for i in batch)
            assert len(batch) == 1 or len(batch) * longest <= budget
    assert len(packing.plan_batches(rows, 10_000)) == 1
    assert packing.plan_batches([], 5) == []


@torch.no_grad()
def test_pack_golden():
    """Positions restart in each branch. A branch sees its row's context and itself only."""
    rows = [Row((10, 11), ((12, 13), (14,)), (0, 0), (1, 1)), Row((20,), ((21,),), (0,), (1,))]
    ids, positions, mask, starts = packing.pack(rows, "cpu")
    assert ids.tolist() == [[10, 11, 12, 13, 14, 20, 21]]
    assert starts == [0, 5]
    assert positions.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert mask.shape == (1, 1, 7, 7)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def row_of(length, first=1):
    return Row(tuple(range(first, first + length)), (), (), ())


@torch.no_grad()
def test_padding_sees_itself_only():
    """No softmax is empty: a token of padding is a row of its own."""
    ids, _, mask, starts = packing.pack([row_of(600), row_of(500), row_of(580)], "cpu")
    assert ids.shape == (3, 600)
    begin = starts[1] % 600
    assert begin == 0
    padding = mask[starts[1] // 600, 0, 500:]
    assert padding.sum(-1).tolist() == [1] * 100
    assert mask.any(-1).all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ([6, 3, 3], (2, 6)),  # no padding: the narrower the better
        ([7, 3, 3], (1, 13)),  # short rows share one sequence
        ([80, 60, 50, 40], (2, 120)),  # two of 120 beat three of 80
        ([900, 900], (2, 900)),  # long rows apart: attention grows with the square
        ([400, 30, 30], (1, 460)),
    ],
)
def test_rows_are_laid_out_by_cost(lengths, shape):
    """As few tokens of padding as pays, against the cost of attention in wide sequences."""
    rows = [row_of(length) for length in lengths]
    ids, _, _, starts = packing.pack(rows, "cpu")
    assert ids.shape == shape
    flat = ids.flatten().tolist()
    for row, start in zip(rows, starts, strict=True):
        assert tuple(flat[start : start + row.length]) == row.context


@torch.no_grad()
def test_a_long_prefix_is_shared_by_more_rows():
    """Each sequence takes a copy of it."""
    rows = [row_of(50) for _ in range(12)]
    alone = packing.pack(rows, "cpu")[0]
    behind = packing.pack(rows, "cpu", before=1500)[0]
    assert len(alone) == 12
    assert len(behind) < 6


@torch.no_grad()
def test_rows_sharing_a_sequence_do_not_see_each_other():
    """Three rows in one sequence, masked from each other."""
    rows = [row_of(40), row_of(30, 100), row_of(3, 200)]
    ids, _, mask, starts = packing.pack(rows, "cpu")
    assert ids.shape == (1, 73)
    first, second, third = starts
    assert not mask[0, 0, second : second + 30, first : first + 40].any()
    assert not mask[0, 0, third : third + 3, : second + 30].any()
    assert mask[0, 0, third + 2, third : third + 3].all()


def test_passes_are_counted_in_rows(tiny_lm, rows):
    """Cost reports: one forward per question, and a backward where gradients are recorded."""
    score(tiny_lm)
    assert (tiny_lm.forwards, tiny_lm.backwards) == (5, 0)
    scoring.hidden_states(tiny_lm, rows[:2])
    assert (tiny_lm.forwards, tiny_lm.backwards) == (7, 2)


def test_losses_by_hand(tiny_lm, alone, rows):
    """lm: the mean of the gold tokens' mean NLL; choice adds the cross-entropy of the options."""
    nll = []
    entropy = []
    for e, row, raw in zip(EXAMPLES[:3], rows[:3], alone[:3], strict=True):
        nll.append(-raw[e.gold] / len(row.branches[e.gold]))
        entropy.append(math.log(sum(math.exp(value - raw[e.gold]) for value in raw)))
    lm_loss = scoring.lm_loss(tiny_lm, rows[:3]).item()
    choice_loss = scoring.choice_loss(tiny_lm, rows[:3]).item()
    assert lm_loss == pytest.approx(sum(nll) / 3, abs=1e-4)
    assert choice_loss == pytest.approx((sum(nll) + sum(entropy)) / 3, abs=1e-4)
    assert scoring.gold_row(rows[0]).branches == (rows[0].branches[1],)


def test_prompt_nll_is_cross_entropy(tiny_lm, plain, rows):
    """Mean NLL of tokens 2..n of each context, with branches ignored."""
    rows = [*(scoring.prompt_row(tiny_lm, e.prompt) for e in EXAMPLES), rows[0]]
    expected = []
    for row in rows:
        ids = torch.tensor([row.context])
        with torch.no_grad():
            logits = plain(ids).logits
        expected.append(F.cross_entropy(logits[0, :-1], ids[0, 1:]).item())
    assert scoring.prompt_nll(tiny_lm, rows).tolist() == pytest.approx(expected, abs=1e-4)
    assert scoring.prompt_nll(tiny_lm, [Row((5,), (), (), ())]).tolist() == [0.0]


@torch.no_grad()
def steer(lm, rows, steps, lr):
    """slot_deltas of rows, and the hidden states they were made for."""
    hidden, starts = scoring.hidden_states(lm, rows)
    return scoring.slot_deltas(lm, rows, hidden, starts, steps, lr), hidden, starts


def autograd_delta(lm, row, hidden, start, steps, lr):
    """The same optimisation by autograd and torch's AdamW."""
    states = hidden[start : start + len(row.context) - 1].clone()
    target = torch.tensor(row.context[1:])
    delta = torch.zeros(states.shape[-1], requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=lr, weight_decay=1e-8, eps=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = lm.model.get_output_embeddings()(states + delta)
        F.cross_entropy(logits, target).backward()
        optimizer.step()
    return delta.detach()


@pytest.mark.parametrize("steps, lr", [(1, 0.1), (5, 0.1), (3, 1e-3)])
def test_steering_equals_autograd(tiny_lm, rows, steps, lr):
    """The closed-form gradient and AdamW written out equal autograd with torch's, row by row."""
    got, hidden, starts = steer(tiny_lm, rows, steps, lr)
    assert got.shape == (5, 32)
    assert got.dtype == torch.float32
    for delta, row, start in zip(got, rows, starts, strict=True):
        expected = autograd_delta(tiny_lm, row, hidden, start, steps, lr)
        assert (delta - expected).abs().max() < 1e-5
        assert expected.abs().max() > lr / 2


def test_steering_of_a_batch_equals_singles(tiny_lm, rows):
    """Questions are steered independently; each starts from zero."""
    both = steer(tiny_lm, rows[:2], 4, 0.1)[0]
    for i in range(2):
        alone = steer(tiny_lm, [rows[i]], 4, 0.1)[0][0]
        assert (both[i] - alone).abs().max() < 1e-5
    assert (both[0] - both[1]).abs().max() > 0.01


def test_no_steps_of_steering_change_nothing(tiny_lm, rows):
    """Zero steps: zero deltas, the same scores; a context of one token cannot be steered."""
    assert steer(tiny_lm, rows, 0, 0.1)[0].abs().max() == 0
    one = [Row((5,), ((6,),), (0,), (1,), 0)]
    assert steer(tiny_lm, one, 3, 0.1)[0].abs().max() == 0
    assert score(tiny_lm, slot=(0, 0.1)) == score(tiny_lm)


def test_steered_scores(tiny_lm, plain, rows):
    """The question's delta is added to every hidden state; no gradient is left on the model."""
    for e, row, found in zip(EXAMPLES, rows, score(tiny_lm, slot=(4, 0.2)), strict=True):
        _, hidden, (start,) = steer(tiny_lm, [row], 0, 0.2)
        delta = autograd_delta(tiny_lm, row, hidden, start, 4, 0.2)
        expected = []
        for context, continuation in pairs_of(e):
            ids = scoring.encode(tiny_lm, context + continuation)
            cut = len(scoring.encode(tiny_lm, context))
            with torch.no_grad():
                steered = plain.model(torch.tensor([ids])).last_hidden_state[0] + delta
                logp = F.log_softmax(plain.lm_head(steered), -1)
            expected.append(sum(logp[i - 1, ids[i]].item() for i in range(cut, len(ids))))
        assert found.raw == pytest.approx(expected, abs=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in tiny_lm.model.parameters())


def two_options(p, norm):
    """Scores of two options, the first of probability p."""
    return Scores((math.log(p), math.log(1 - p)), norm)


def test_figures_by_hand():
    """accuracy, mean gold log-probability, and paired wins, losses and gain."""
    examples = [Example(str(i), "p", ("a", "b"), gold) for i, gold in enumerate((0, 1, 0))]
    old = [two_options(0.6, (-1.0, -2.0))] * 3
    new = [two_options(p, (-2.0, -1.0)) for p in (0.8, 0.2, 0.3)]
    assert [found.pick("raw") for found in new] == [0, 1, 1]
    assert [found.pick("norm") for found in old] == [0, 0, 0]
    assert scoring.accuracy(old, examples, "raw") == 2 / 3
    assert scoring.accuracy(new, examples, "norm") == 1 / 3
    logprobs = scoring.gold_logprob(old, examples, "raw")
    assert logprobs == pytest.approx([math.log(p) for p in (0.6, 0.4, 0.6)])

    after = scoring.judge(new, examples, "raw")
    before = scoring.judge(old, examples, "raw")
    assert after["correct"] == [1, 1, 0]
    assert before["correct"] == [1, 0, 1]
    found = scoring.compare(after, before)
    assert (found["wins"], found["losses"]) == (1, 1)
    gain = math.log(0.8 * 0.8 * 0.3) - math.log(0.6 * 0.4 * 0.6)
    assert found["gold_logp_gain"] == pytest.approx(gain / 3, abs=1e-6)
    assert scoring.compare(before, before) == {"wins": 0, "losses": 0, "gold_logp_gain": 0.0}
    after = scoring.judge(new, examples, "norm")
    found = scoring.compare(after, scoring.judge(old, examples, "norm"))
    assert (found["wins"], found["losses"]) == (1, 2)


def test_gold_logprob_survives_large_scores():
    """Log-probabilities far below zero do not overflow; a shift of all options changes nothing."""
    examples = [Example("x", "p", ("a", "b"), 1)]
    for top in (0.0, -5000.0):
        scores = [Scores((top, top - 1), (0, 0))]
        found = scoring.gold_logprob(scores, examples, "raw")
        assert found == pytest.approx([-1.3132617])


def test_equal_scores_pick_the_first():
    """Ties are broken by option order."""
    assert Scores((-1.0, -1.0, -2.0), (0, 0, 0)).pick("raw") == 0


def test_model_that_cannot_be_loaded(tmp_path):
    """A folder without a model gives one line that names the key and the ways out."""
    with pytest.raises(UserError, match=r"model\.name=.*cannot be loaded .*run `make assets`"):
        scoring.load_base(str(tmp_path), "main", torch.float32, "cpu")


@pytest.fixture
def bfloat16_lm(tiny_model_dir):
    model, tokenizer = scoring.load_base(str(tiny_model_dir), "main", torch.bfloat16, "cpu")
    layout = lora.find_layout(model, 4, 8, 16, ["q_proj", "v_proj"])
    lora.attach_lora(model, layout)
    return LM(model, tokenizer, layout)


def test_base_is_frozen_and_in_the_asked_type(bfloat16_lm):
    """No parameter takes gradients, the model is in evaluation mode, in the dtype asked for."""
    model = bfloat16_lm.model
    assert not model.training
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(False, torch.bfloat16)}


def test_bfloat16_base_scores_in_float32(bfloat16_lm, tiny_lm):
    """Scores stay near float32; adapters are cast when put in, not changed."""
    model = bfloat16_lm.model
    adapter = random_adapter(bfloat16_lm.layout, b_scale=0.01)
    lora.swap_adapter(model, bfloat16_lm.layout, adapter)
    assert model.model.layers[0].self_attn.q_proj.A.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())

    for near, exact in zip(score(bfloat16_lm), score(tiny_lm), strict=True):
        assert near.raw == pytest.approx(exact.raw, rel=0.05, abs=0.3)
    deltas, hidden, _ = steer(bfloat16_lm, [scoring.make_row(bfloat16_lm, EXAMPLES[0])], 1, 0.1)
    assert hidden.dtype == torch.bfloat16
    assert scoring.project(bfloat16_lm, hidden).dtype == torch.float32
    assert deltas.dtype == torch.float32


@pytest.mark.parametrize("all_scored, most", [(False, 2048), (True, 1024)])
def test_batches_are_divided_for_a_gpu_alone(tiny_lm, rows, all_scored, most):
    """Every row once, half of the budget a part, or a quarter; on a CPU one part."""
    rows = rows * 20
    assert scoring.parts_of(tiny_lm, rows) == [rows]
    gpu = SimpleNamespace(model=SimpleNamespace(device=torch.device("cuda")), budget=4096)
    parts = scoring.parts_of(gpu, rows, all_scored)
    assert sorted(map(id, sum(parts, []))) == sorted(map(id, rows))
    assert len(parts) > 1
    largest = max(len(part) * max(row.length for row in part) for part in parts)
    assert most / 2 < largest <= most


def mean_softmax(logits, shift):
    base = torch.exp(logits - logits.amax(1, keepdim=True))
    add = torch.exp(shift - shift.max())
    return scoring._mean_softmax([base], add[None])[0]


def test_mean_softmax_survives_underflow():
    """Two matrix-vector products give the mean softmax; where they underflow, logarithms do."""
    rng = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(4, 50, generator=rng)
    shift = 5 * torch.randn(50, generator=rng)
    expected = torch.softmax(logits + shift, -1).mean(0)
    torch.testing.assert_close(mean_softmax(logits, shift), expected, rtol=1e-4, atol=1e-7)

    far = torch.zeros(50)
    far[7] = 85.0  # the shift's peak lies where the base model gives e^-80
    logits[:, 7] = logits.amax(1) - 80
    expected = torch.softmax(logits + far, -1).mean(0)
    torch.testing.assert_close(mean_softmax(logits, far), expected, rtol=1e-3, atol=1e-4)
