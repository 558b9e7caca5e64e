"""Written answers: greedy generation against transformers, readings, ensembles, costs."""

import dataclasses

import pytest
import torch
from test_lora import is_bare, random_adapter
from test_scoring import EXAMPLES, plain_model

import answers
import runtime
import scoring
import strategies
from data import Example
from scoring import Scores
from strategies import Refined


@pytest.fixture
def plain(tiny_model_dir):
    return plain_model(tiny_model_dir)


def test_greedy_answers_equal_generate(tiny_lm, plain):
    """Left-padded batches give transformers' greedy search for each prompt alone, in order."""
    examples = [dataclasses.replace(e, suffix="") for e in EXAMPLES]
    got = answers.generate_answers(tiny_lm, None, examples, 12)
    pad = tiny_lm.tokenizer.pad_token_id
    for e, text in zip(examples, got, strict=True):
        ids = torch.tensor([scoring.encode(tiny_lm, e.prompt)])
        mask = torch.ones_like(ids)
        out = plain.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=pad
        )
        written = out[0, ids.shape[1] :]
        assert text == tiny_lm.tokenizer.decode(written, skip_special_tokens=True)
    assert len(set(got)) > 1
    assert tiny_lm.forwards == 5


def test_answers_with_an_adapter(tiny_lm):
    """The adapter takes part in generation and is gone afterwards."""

    def written(adapter):
        return answers.generate_answers(tiny_lm, adapter, EXAMPLES[:2], 8)

    bare = written(None)
    assert written(random_adapter(tiny_lm.layout)) != bare
    assert written(None) == bare
    assert is_bare(tiny_lm.model)


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
    """Strict: the bracketed letter opens the answer. Lenient: the first bracketed, else alone."""
    lettered = tuple(f"[{letter}]" for letter in "ABCDEFGHIJ"[:options])
    assert answers.parse_letter(text, lettered, True) == strict
    assert answers.parse_letter(text, lettered, False) == lenient


@pytest.mark.parametrize(
    "text, options, strict, lenient",
    [
        ("[True]", ("[True]", "[False]"), 0, 0),
        ("[False].", ("[True]", "[False]"), 1, 1),
        ("The statement is false.", ("[True]", "[False]"), None, 1),
        ("[TRUE]", ("[True]", "[False]"), None, 0),
        ("A man, untrue", ("[True]", "[False]"), None, None),
        ("[3]", ("[1]", "[2]", "[3]", "[4]"), 2, 2),
        ("It is 4.", ("[1]", "[2]", "[3]", "[4]"), None, 3),
        ("[A]", ("[1]", "[2]", "[3]", "[4]"), None, None),
    ],
)
def test_parse_options_of_a_released_file(text, options, strict, lenient):
    """True and False, and the numbers of some ARC rows, are read as letters are."""
    assert answers.parse_letter(text, options, True) == strict
    assert answers.parse_letter(text, options, False) == lenient


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
    """Strict: after ####. Lenient: also the last box or the last number. Commas do not count."""
    assert answers.match_answer(text, answer, True) is strict
    assert answers.match_answer(text, answer, False) is lenient


PROMPTS = ["pick the river", "which stone is here, and why", "the garden", "a copper engine or"]
ITEMS = [Example(f"q{i}", text, ("[A]", "[B]", "[C]"), i % 3) for i, text in enumerate(PROMPTS)]


def prompts_of(lm, items=ITEMS):
    return [scoring.prompt_row(lm, scoring.input_text(lm, item)) for item in items]


def test_memory_decides_what_is_a_batch(tiny_lm, monkeypatch):
    """As many rows as there is room for, no more, and never rows of very unlike length."""
    rows = prompts_of(tiny_lm, ITEMS * 30)
    assert max(map(len, answers._plan(tiny_lm, rows, 8, None))) > 16

    room = 3 * 2 * 32 * answers._token_bytes(tiny_lm)
    monkeypatch.setattr(runtime, "free_memory", lambda device: room)
    batches = answers._plan(tiny_lm, rows, 8, None)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        lengths = [rows[i].length + 8 for i in batch]
        assert max(lengths) * len(batch) <= 96 or len(batch) == 1
        assert min(lengths) >= answers.SHORTEST * max(lengths)


def test_finished_rows_leave_the_batch(tiny_lm, monkeypatch):
    """A row that wrote an end token is computed no further; the others go on as if alone."""
    rows = prompts_of(tiny_lm)
    # the first token of row 1 becomes an end token: that row is empty, and leaves at once
    with torch.no_grad():
        hidden, starts = scoring.hidden_states(tiny_lm, [rows[1]])
        logits = scoring.project(tiny_lm, hidden[starts[0] + len(rows[1].context) - 1])
    first = int(logits.argmax())
    monkeypatch.setattr(answers, "_end_tokens", lambda lm: {first})
    expected = [answers.continue_rows(tiny_lm, [row], 12)[0] for row in rows]

    sizes = []
    decoder = tiny_lm.model.get_decoder()
    handle = decoder.register_forward_hook(lambda m, args, out: sizes.append(len(out[0])))
    got = answers.continue_rows(tiny_lm, rows, 12)
    handle.remove()
    assert got == expected
    assert got[1] == ""
    assert sizes[0] == 4
    assert max(sizes[1:]) < 4


def script(monkeypatch, lm, text):
    """Make the model write this text, token by token, whatever it is asked."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    said = iter(ids)
    size = lm.model.get_output_embeddings().weight.shape[0]

    def project(lm, hidden):
        logits = torch.zeros(len(hidden), size)
        logits[:, next(said)] = 1
        return logits

    monkeypatch.setattr(scoring, "project", project)


@pytest.mark.parametrize("text", ["[B] as the river", "the garden is [ c ] or [A] here", "river"])
def test_an_answer_ends_with_its_letter(tiny_lm, monkeypatch, text):
    """In letter format what follows a bracketed option is not written, and changes no reading."""
    tiny_lm.form = "letter"
    ids = tiny_lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tiny_lm.tokenizer.decode(ids)
    script(monkeypatch, tiny_lm, text)
    row = prompts_of(tiny_lm)[0]
    (short,) = answers.continue_rows(tiny_lm, [row], len(ids), options=[ITEMS[0].options])
    assert whole.startswith(short)
    assert (short == whole) == (answers.bracketed_option(whole, ITEMS[0].options) is None)
    for strict in (True, False):
        got = answers.parse_letter(short, ITEMS[0].options, strict)
        assert got == answers.parse_letter(whole, ITEMS[0].options, strict)


def slowly(lm, plain, row, steps, slot):
    """Greedy search that reads everything again for each token, in a plain model."""
    hidden, starts = scoring.hidden_states(lm, [row])
    delta = scoring.slot_deltas(lm, [row], hidden, starts, *slot)[0]
    ids = list(row.context)
    for _ in range(steps):
        with torch.no_grad():
            last = plain.model(torch.tensor([ids])).last_hidden_state[0, -1]
            ids.append(int(plain.lm_head(last + delta).argmax()))
    return lm.tokenizer.decode(ids[len(row.context) :], skip_special_tokens=True)


def test_steering_acts_on_every_generated_token(tiny_lm, plain, monkeypatch):
    """The vector found on the prompt is added before the head, at each token that is written."""
    monkeypatch.setattr(answers, "_end_tokens", lambda lm: set())
    rows = prompts_of(tiny_lm)
    with torch.no_grad():
        bare = answers.continue_rows(tiny_lm, rows, 6)
        got = answers.continue_rows(tiny_lm, rows, 6, slot=(5, 1.0))
        want = [slowly(tiny_lm, plain, row, 6, (5, 1.0)) for row in rows]
    assert got == want
    assert got != bare


@pytest.mark.parametrize("slot", [None, (5, 1.0)])
def test_a_greedy_option_need_not_be_generated(tiny_lm, slot):
    """The scoring pass and generation give the same answers, and the first is shorter."""
    tiny_lm.form = "letter"
    many = [dataclasses.replace(ITEMS[0], prompt=f"row {i} has a river") for i in range(24)]
    rows = prompts_of(tiny_lm, many)
    with torch.no_grad():
        said = answers.continue_rows(tiny_lm, rows, 2, slot=slot)
    # an option of every question is what the model writes there
    items = []
    for item, text in zip(many, said, strict=True):
        items.append(dataclasses.replace(item, options=("[A]", text, "[C]")))
    found = scoring.score_examples(tiny_lm, None, items, slot=slot)
    scored = [score.greedy for score in found]
    assert 1 in scored
    assert set(scored) <= {1, None}, "a text may have other tokens than its writer's"

    before = tiny_lm.written
    got = answers.answer_examples(tiny_lm, None, items, slot=slot, tokens=2)
    assert [score.text for score in got] == said
    assert tiny_lm.written - before == 2 * scored.count(None)


def wrote(letter: str, *p: float) -> Scores:
    """One adapter's scores of three options, and the letter that it wrote; "" = none."""
    raw = tuple(torch.tensor(p).log().tolist())
    example = Example("q", "?", ("[A]", "[B]", "[C]"), 0)
    return answers.read_answer(example, Scores(raw, raw), f"[{letter}]" if letter else "hm")


MOST = [wrote("A", 0.5, 0.3, 0.2), wrote("A", 0.4, 0.35, 0.25), wrote("B", 0.04, 0.95, 0.01)]
TIED = [wrote("A", 0.5, 0.4, 0.1), wrote("B", 0.2, 0.7, 0.1)]
UNREAD = [wrote("C", 0.3, 0.3, 0.4), wrote("", 0.9, 0.05, 0.05)]


@pytest.mark.parametrize(
    "each, method, want",
    [
        (MOST, "majority_vote", 0),
        (MOST, "max_confidence", 1),
        (MOST, "sum_logprobs", 1),
        (MOST, "mean_probability", 1),
        (TIED, "majority_vote", 1),
        # an option that no adapter wrote is no answer, however probable
        (UNREAD, "majority_vote", 2),
        (UNREAD, "mean_probability", 2),
        ([UNREAD[1]] * 2, "majority_vote", None),
    ],
)
def test_adapters_answer_together(each, method, want):
    """A vote counts what is written; the other ways weigh what is written by its probability."""
    raw = strategies.combine([s.raw for s in each], method)
    got = strategies.pool_answers(each, Scores(raw, raw), method)
    assert (got.strict, got.lenient) == (want, want)
    assert got.text == ("hm" if want is None else f"[{'ABC'[want]}]")


def test_solutions_are_voted_on():
    """Answers without options: the number that most adapters end with, the first of equals."""
    texts = ["so 41.", "thus 1,234", "#### 1234", "or 41"]
    each = [Scores((0.0,), (0.0,), text=text) for text in texts]
    alone = Scores((0.0,), (0.0,))
    assert strategies.pool_answers(each, alone, "majority_vote").text == "so 41."
    assert strategies.pool_answers(each[1:], alone, "majority_vote").text == "thus 1,234"
    # what names no number is no vote
    silent = [Scores((0.0,), (0.0,), text=text) for text in ("well", "so 7", "well")]
    assert strategies.pool_answers(silent, alone, "majority_vote").text == "so 7"


def test_a_free_answer_is_never_the_right_one_that_was_scored(tiny_lm):
    """In the letter format too: its single branch holds the answer that is to be found."""
    tiny_lm.form = "letter"
    free = Example("q", "a stone", (), None, "")
    (said,) = answers.answer_examples(tiny_lm, None, [free], tokens=3)
    assert said.greedy == 0, "an empty answer is always the first choice"
    assert said.text


def answers_of(lm, refined):
    found = strategies.score_refined(lm, refined, ITEMS, tokens=4)
    return [score.text for score in found]


@pytest.mark.parametrize("form", ["cloze", "letter"])
def test_every_family_acts_on_what_is_written(tiny_lm, form):
    """Steering and routes change what is written; ensembles are in the tests above."""
    tiny_lm.form = form
    adapters = [random_adapter(tiny_lm.layout, seed=seed, b_scale=0.3) for seed in range(3)]
    first = answers_of(tiny_lm, Refined(adapters[:1]))
    assert answers_of(tiny_lm, Refined(adapters[:1], slot=(5, 1.0))) != first

    # each question goes to its own adapter
    alone = [answers_of(tiny_lm, Refined([adapter])) for adapter in adapters]
    route = [2, 0, 1, 2]
    router = strategies.Router([torch.eye(4)[[i]] for i in range(3)], None)
    router.embed = lambda texts: torch.eye(4)[[2, 0, 1, 2]]
    routed = answers_of(tiny_lm, Refined(adapters, "avg_prompt_embed", router=router))
    assert routed == [alone[number][i] for i, number in enumerate(route)]
    assert routed != first
