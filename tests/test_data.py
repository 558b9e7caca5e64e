"""Tasks: honest splits of the real assets, the records of every source, and errors that name file
and line."""

import gzip
import json
import re
from types import SimpleNamespace

import pytest
from conftest import make_run

import benchmarks
import data
import degaml
import records
from config import DEFAULT, UserError, load_config
from data import Example
from runtime import Run, read_json, sha256

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
    "common_knowledge.all": 1037,
    "strings.all": 1219,
    "arithmetic.all": 1047,
    "patterns.all": 534,
    "humanities.all": 1152,
    "economics.all": 628,
    "psychology.all": 1157,
    "politics.all": 538,
    "business.all": 619,
    "science.all": 900,
    "dental.all": 1318,
    "anatomy.all": 576,
}
SMALL = ("data.num_test=4", "data.num_support=4", "policy.folds=2")
LETTERED = {"text": ["stones", "light"], "label": ["A", "B"]}


def config_of(*words):
    return load_config(list(words))[0]


@pytest.fixture(scope="module")
def real(assets):
    """The twelve tasks under the default configuration."""
    return {name: data.load_task(config_of(), name) for name in benchmarks.TABLE}


def rows_of(count, **more):
    return [
        {"question": f"q{i}?", "choices": ["a", "b"], "gold": i % 2, **more} for i in range(count)
    ]


def examples_of(count, prefix, word):
    return [Example(f"{prefix}{i}", f"{word} {i}", ("a", "b"), 0, "a") for i in range(count)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user_task(tmp_path, rows, *words):
    """The task `mine`, of a file with these rows."""
    file = write_rows(tmp_path / "mine.jsonl", rows)
    return data.load_task(config_of(f"data.jsonl={{mine: {file}}}", *SMALL, *words), "mine")


def ids(*splits):
    return [example.id for split in splits for example in split]


def keys(texts, name):
    return {data._key(text, name) for text in texts}


# The real twelve


def test_documents_per_file(assets):
    """Every embedded file holds the number of documents its benchmark has: no second copies, none
    missing."""
    found = {}
    for path in sorted((assets / "data").glob("*.jsonl.gz")):
        with gzip.open(path) as lines:
            found[path.name.removesuffix(".jsonl.gz")] = sum(1 for _ in lines)
    assert found == COUNTS


def test_long_options_make_a_task_long():
    """PIQA asks in a few words and answers in sentences: its options count too."""
    short = Example("a", "Question: Where does a bird build its nest?\nAnswer:", ("tree", "sea"), 0)
    wordy = Example(
        "b", "Goal: mend a cup", ("glue its parts together", "throw it away, buy one"), 0
    )
    blank = Example("c", "The cat saw", ("the dog", "a bird"), 0, suffix="and ran away from it.")
    free = Example("d", "What is 2 + 2?", answer="It is 4.")
    assert len(wordy.prompt) < len(short.prompt)
    assert data.text_size([wordy]) > data.text_size([short])
    assert data.text_size([blank]) == len("The cat saw _and ran away from it.") + len(
        "the doga bird"
    )
    assert data.text_size([free, free]) == 2 * len("What is 2 + 2?It is 4.")


@pytest.mark.parametrize("name", benchmarks.TABLE)
def test_splits_share_nothing(real, name):
    """No test question occurs in train, support or the unlabelled prompts, and no support question
    in train or prompts. An id names one example only, so that stored ids prove it."""
    task = real[name]
    assert (len(task.support), len(task.test), len(task.prompts)) == (20, 200, 320)
    assert len(task.train) > 500
    splits = (task.train, task.support, task.test)
    train, support, test = (keys((e.text for e in split), name) for split in splits)
    prompts = keys(task.prompts, name)
    assert not test & (train | support | prompts)
    assert not support & (train | prompts)
    assert len(set(ids(*splits))) == len(ids(*splits))


@pytest.mark.parametrize("name", benchmarks.TABLE)
def test_every_real_example_is_whole(real, name):
    """Prompts and options are not empty, gold is an option, and the answer is its text."""
    for e in (*real[name].train, *real[name].support, *real[name].test):
        assert e.prompt.strip() and all(option.strip() for option in e.options)
        assert len(e.options) >= 2 and 0 <= e.gold < len(e.options)
        assert e.answer == e.options[e.gold]


def test_real_tasks_are_described(real):
    """tasks.json: sizes, chance, majority, ids, and which data stands in for which benchmark."""
    described = data.describe_tasks(real, config_of().data)
    in_domain = [name for name, about in described.items() if about["domain"] == "id"]
    assert in_domain == ["arc_c", "arc_e", "hellaswag", "boolq", "piqa", "winogrande"]
    stand_ins = {name for name, about in described.items() if about["stand_in_for"]}
    assert stand_ins == {"gsm8k", "math", "divlogic", "codemmlu", "jama"}
    chance = {"boolq": 0.5, "socialiqa": 0.3333, "hellaswag": 0.25, "gsm8k": 0.25, "jama": 0.2}
    assert {name: described[name]["chance"] for name in chance} == chance
    for name, task in real.items():
        about = described[name]
        assert about["n_test"] == 200 and about["test_ids"] == ids(task.test)
        assert about["support_ids"] == ids(task.support)
        assert about["chance"] <= about["majority"] + 0.05 < 1
        assert task.context  # every embedded task has a paragraph for the policy


def test_real_tasks_say_which_data_they_are(real):
    """tasks.json: source, form and number of rows; built options are told from published ones."""
    described = data.describe_tasks(real, config_of().data)
    assert described["arc_c"]["source"] == "ARC-Challenge"
    forms = {name: about["form"] for name, about in described.items()}
    assert forms.pop("boolq") == "yes or no, with passage"
    for name in benchmarks.FREE_ANSWER:
        assert forms.pop(name) == "gold answers among distractors built here"
    assert set(forms.values()) == {"question and options"}
    rows = {name: about["rows"] for name, about in described.items()}
    assert rows["boolq"] == 9427 + 3270 and rows["math"] == 5000


def test_splits_depend_on_the_seed_alone(real):
    """The same seed gives the same examples; another seed gives others."""
    first = real["arc_c"]
    assert data.load_task(config_of(), "arc_c") == first
    other = data.load_task(config_of("seed=1"), "arc_c")
    for part in ("test", "support", "prompts"):
        assert getattr(other, part) != getattr(first, part)


def test_smaller_limits_keep_the_examples(real):
    """num_train and num_prompts cut lists from the end; num_test does not move the support set of a
    benchmark with a test split of its own."""
    whole = real["arc_c"]
    limits = ("data.num_train=50", "data.num_prompts=30", "data.num_test=70")
    small = data.load_task(config_of(*limits), "arc_c")
    assert small.train == whole.train[:50] and small.prompts == whole.prompts[:30]
    assert small.support == whole.support and small.test == whole.test[:70]


def test_transductive_prompts_are_the_test_inputs(assets):
    """prompts_from=test conditions on test inputs; labels stay out."""
    task = data.load_task(config_of("data.prompts_from=test"), "boolq")
    assert list(task.prompts) == [e.text for e in task.test]
    assert not any(prompt.rstrip().endswith(("yes", "no")) for prompt in task.prompts)


def test_boolq_gold_is_yes(assets):
    """Option 0 is yes, right in 62 % of the questions as in BoolQ; the passage comes first."""
    records = data.read_records(config_of(), "boolq").splits
    for split, share in (("train", 0.623), ("test", 0.622)):
        yes = sum(row["gold"] == 0 for row in records[split])
        assert yes / len(records[split]) == pytest.approx(share, abs=5e-4)
    first = records["test"][0]
    e = data.make_example("boolq", first, "cloze")
    assert e.options == ("yes", "no") and e.prompt.startswith(first["context"][:40])
    assert e.prompt.endswith("?\nAnswer:") and "\nQuestion: " in e.prompt


# From records to examples


def test_boolq_golden():
    """Passage, question with one question mark, answer."""
    record = {"id": "b", "question": "is it blue", "context": "Sky -- It is."}
    e = data.make_example("boolq", record | {"choices": ["yes", "no"], "gold": 0}, "cloze")
    prompt = "Sky -- It is.\nQuestion: is it blue?\nAnswer:"
    assert e == Example("b", prompt, ("yes", "no"), 0, "yes")


def test_winogrande_partial_evaluation():
    """The options fill the blank and the text after it is what is scored; the unlabelled text keeps
    the blank."""
    text = "The cup fell off _ because it was wet."
    record = {"id": "w", "question": text, "choices": ["the desk", "the rag"], "gold": 1}
    e = data.make_example("winogrande", record, "cloze")
    options = ("the desk", "the rag")
    assert e == Example("w", "The cup fell off", options, 1, "the rag", " because it was wet.")
    assert e.text == text


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
    record = {"id": "x", "choices": [" a", "b "], "gold": 1, **record}
    e = data.make_example(name, record, "cloze")
    assert e == Example("x", prompt, ("a", "b"), 1, "b") and e.text == prompt


@pytest.mark.parametrize("name", ["arc_e", "winogrande", "boolq"])
def test_letter_format_golden(name):
    """Lettered options in the prompt, and bracketed letters as answers, for every task alike."""
    record = {"id": "x", "question": "A _ b?", "context": "Passage."}
    record |= {"choices": ["one", "two", "three"], "gold": 2}
    prompt = "Passage.\nA _ b?\nA: one\nB: two\nC: three"
    e = data.make_example(name, record, "letter")
    assert e == Example("x", prompt, ("[A]", "[B]", "[C]"), 2, "[C]")


def test_free_form_answers():
    """A record without options becomes a prompt and an answer."""
    record = {"id": "g", "question": "1+1?", "answer": "2"}
    e = data.make_example("gsm8k", record, "cloze")
    assert e == Example("g", "Question: 1+1?\nAnswer:", (), None, "2")
    assert data.make_example("gsm8k", record, "letter").prompt == "1+1?"


def test_generative_form_keeps_answers(assets):
    """math_form=generate: no options, gold answers, and no stand-in note."""
    task = data.load_task(config_of("data.math_form=generate"), "gsm8k")
    assert all(e.options == () and e.gold is None and e.answer for e in task.test)
    assert task.stand_in_for == ""


# The user's files


def row_text(**changes):
    return json.dumps({"question": "q", "choices": ["a", "b"], **changes})


@pytest.mark.parametrize(
    "line, text",
    [
        (row_text(gold=2), "`gold` is 2, expected 0..1, A..B or the text of an option"),
        (row_text(gold="C"), "`gold` is 'C', expected 0..1, A..B or the text of an option"),
        (row_text(gold="yes"), "`gold` is 'yes', expected 0..1, A..B or the text of an option"),
        (row_text(gold=True), "`gold` is True, expected 0..1, A..B or the text of an option"),
        (row_text(gold=0, choices=["a", " "]), "option 1 is empty"),
        (row_text(gold=0, choices=["a"]), "`choices` must be a list of at least two texts"),
        (row_text(gold=0, choices="ab"), "`choices` must be a list of at least two texts"),
        (row_text(gold=0, question=" "), "`question` is missing or empty"),
        ('{"choices": ["a", "b"], "gold": 0}', "`question` is missing or empty"),
        ("{'question': 'q'}", "not JSON ("),
        ('["q"]', "expected an object, got list"),
    ],
)
def test_bad_row_names_file_and_line(tmp_path, line, text):
    """Each mistake: file, line number, what is wrong, and a good row."""
    path = tmp_path / "mine.jsonl"
    path.write_text(row_text(gold=0, id="one") + "\n\n" + line + "\n")
    with pytest.raises(UserError) as e:
        records.read_file(path)
    assert str(e.value).startswith(f"{path}:3: {text}")
    assert 'a good row: {"id": "q1"' in str(e.value)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"question": "half \\ud83d", "answer": "x"}', "surrogate"),
        ('{"question": "q", "answer": "3", "solution": 42}', "`solution` must be a text"),
    ],
)
def test_rows_whose_label_would_be_lost(tmp_path, text, complaint):
    """A label in a column that is not read is a fault, even where labels are optional."""
    (tmp_path / "a.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match=f"a.jsonl:1: .*{complaint}"):
        records.read_file(tmp_path / "a.jsonl", labels=False)


def test_csv_header_may_be_written_as_spreadsheets_do(tmp_path):
    """Spaces around names, and capitals."""
    (tmp_path / "a.csv").write_text("Question, A, B, Gold\nwhy,x,y,B\n")
    (row,) = records.read_file(tmp_path / "a.csv")
    assert (row["question"], row["choices"], row["gold"]) == ("why", ["x", "y"], 1)


def test_more_options_than_letters(tmp_path):
    """Twelve options work in the cloze format; a bad gold and the letter format give a message, not
    a crash."""
    options = [f"o{i}" for i in range(12)]
    rows = [{"question": f"q{i}?", "choices": options, "gold": 11} for i in range(12)]
    assert user_task(tmp_path, rows).test[0].answer == "o11"
    with pytest.raises(UserError, match="option|letter"):
        user_task(tmp_path, rows, "data.format=letter")
    with pytest.raises(UserError, match=r"mine\.jsonl:1: `gold` is 12"):
        user_task(tmp_path, [rows[0] | {"gold": 12}])


@pytest.mark.parametrize(
    "content, text",
    [
        (b"", "no rows"),
        (b"\n \n", "no rows"),
        (None, "cannot read"),
        (b"\xff\xfe{}", "cannot read"),
    ],
)
def test_unreadable_files(tmp_path, content, text):
    """Empty, missing and non-UTF-8 files are named with an example of a row."""
    path = tmp_path / "f.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=text) as e:
        records.read_file(path)
    assert str(path) in str(e.value) and '"gold": 0}' in str(e.value)


def test_gold_may_be_an_index_or_a_letter(tmp_path):
    """0, "A" and "a" are the same option; ids are made up from file and line where missing;
    `prompt` is `question`."""
    golds = (0, "A", "a", 2, "C")
    rows = [
        {"prompt": f"q{i}", "choices": ["x", "y", "z"], "gold": gold}
        for i, gold in enumerate(golds)
    ]
    got = records.read_file(write_rows(tmp_path / "my.jsonl", rows))
    assert [row["gold"] for row in got] == [0, 0, 0, 2, 2]
    assert [row["id"] for row in got] == [f"my-{i}" for i in range(1, 6)]
    assert got[0]["question"] == "q0"


def test_odd_line_separators_inside_a_text(tmp_path):
    """Only a newline ends a JSON line; other separators may stand inside a text."""
    path = tmp_path / "my.jsonl"
    line = '{"question": "a\u2028b\x85c", "choices": ["x", "y"], "gold": 1}\n'
    path.write_text(line, encoding="utf-8")
    assert records.read_file(path)[0]["question"] == "a\u2028b\x85c"


@pytest.mark.parametrize("answer", [42, 0, 3.5, "42"])
def test_numeric_answers(tmp_path, answer):
    """A free-form answer may be a number, zero included, and then counts as its text."""
    rows = [{"question": f"What is {i}+{i}?", "answer": answer} for i in range(12)]
    task = user_task(tmp_path, rows, "data.math_form=generate")
    assert {e.answer for e in task.test} == {str(answer)}
    if isinstance(answer, int):
        task = user_task(tmp_path, rows)
        assert {e.options[e.gold] for e in task.test} == {str(answer)}


def test_rows_with_and_without_options(tmp_path):
    """A file that mixes both kinds is refused, whichever comes first."""
    mixed = [{"question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(8)] + rows_of(8)
    for rows in (mixed, mixed[::-1]):
        with pytest.raises(UserError, match=r"mine\.jsonl:[19]: rows with and without `choices`"):
            user_task(tmp_path, rows)


@pytest.mark.parametrize("context", [5, ["a"], {"b": 1}])
def test_context_that_is_no_text(tmp_path, context):
    """A context that is no text is refused at its line."""
    with pytest.raises(UserError, match=r"mine\.jsonl:1: .*context"):
        user_task(tmp_path, rows_of(12, context=context))


def test_an_operator_makes_another_question(tmp_path):
    """Questions of a user's task that differ in a symbol alone are not duplicates."""
    rows = []
    for i in range(10):
        for operator in "+-*/":
            question = f"{i} {operator} 2 = ?"
            rows.append({"question": question, "choices": ["yes", "no"], "gold": 0})
    task = user_task(tmp_path, rows)
    assert len(task.train) + len(task.support) + len(task.test) == 40


def test_one_file_is_cut(tmp_path):
    """One file is cut into test, support and train."""
    task = user_task(tmp_path, rows_of(20))
    assert (len(task.test), len(task.support), len(task.train)) == (4, 4, 12)
    assert task.domain == "ood"


def test_two_files_keep_their_sides(tmp_path):
    """The test is of the test file, and its texts do not cross, also those beyond num_test."""
    write_rows(tmp_path / "t_train.jsonl", rows_of(12))
    test = rows_of(6)
    for i, row in enumerate(test):
        row |= {"id": f"t{i}", "question": f"Q{i} ?"}
    write_rows(tmp_path / "t_test.jsonl", test)
    cfg = config_of(f"data.jsonl={{mine: '{tmp_path}/t_{{split}}.jsonl'}}", *SMALL)
    task = data.load_task(cfg, "mine")
    assert len(task.test) == 4 and set(ids(task.test)) < {row["id"] for row in test}
    # q0..q5 of train equal a test question up to case and punctuation
    assert len(task.support) == 4 and len(task.train) == 2
    left = {f"question q{i} answer" for i in range(6, 12)}
    assert keys((e.text for e in (*task.train, *task.support)), "mine") == left


def release_rows(count, prompt="Case {}: which?\nA: river\nB: stone\nC: cloud"):
    """Rows as the papers' releases ship them."""
    rows = []
    for i in range(count):
        response = f"[{'ABC'[i % 3]}]"
        rows.append({"prompt": prompt.format(i), "response": response, "system": "Pick one."})
    return rows


@pytest.mark.parametrize("form", ["cloze", "letter"])
def test_released_file_is_a_task_of_a_run(tmp_path, tiny_args, form, capsys):
    """A JSON array takes the place of a task's file: the run passes its check, and tasks.json says
    which file it was, in which form."""
    file = tmp_path / "ARC-c_test.json"
    file.write_text(json.dumps(release_rows(60), indent=4))
    words = [*tiny_args, f"data.format={form}"]
    tasks = json.loads(words[-2].split("=", 1)[1]) | {"delta": str(file)}
    words.append(f"data.jsonl={json.dumps(tasks)}")
    assert degaml.main([*words, "stage=check"]) == 0
    assert "ready" in capsys.readouterr().out

    run = make_run(words)
    data.keep_example_ids(run)
    described = read_json(run.path / "tasks.json")
    about = described["delta"]
    assert about["form"] == "release (prompt, response, system)"
    assert about["rows"] == 60 and about["sha256"] == {str(file): sha256(file)}
    assert about["source"] == f"ARC-c_test.json (sha256 {sha256(file)[:12]})"
    assert described["alpha"]["form"] == "question and options"
    task = data.load_tasks(run)["delta"]
    assert {e.system for e in task.test} == ({"Pick one."} if form == "letter" else {""})


def test_released_files_of_both_splits(tmp_path):
    """my_{split}.json, in the place of embedded data: no stand-in, and True or False is said."""
    for split, count in (("train", 30), ("test", 12)):
        rows = release_rows(count, f"is {split} {{}} true?")
        for row in rows:
            row["response"] = "[True]" if row["response"] == "[A]" else "[False]"
        (tmp_path / f"BoolQ_{split}.json").write_text(json.dumps(rows))
    words = [f"data.jsonl={{boolq: '{tmp_path}/BoolQ_{{split}}.json'}}", *SMALL]
    task = data.load_task(config_of(*words, "data.format=letter"), "boolq")
    assert {e.options for e in task.test} == {("[True]", "[False]")}
    assert set(ids(task.test)) < {f"BoolQ_test-{i}" for i in range(1, 13)}
    assert task.data["form"].endswith("True or False without passage")
    assert task.data["rows"] == 42 and len(task.data["sha256"]) == 2


def test_published_options_are_no_stand_in(tmp_path):
    """GSM8K-MC has options of its own; only what is built here stands in, whatever the source."""
    row = {"Question": "", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "B"}
    file = write_rows(tmp_path / "mc.jsonl", [row | {"Question": f"{i}?"} for i in range(12)])
    task = data.load_task(config_of(f"data.jsonl={{gsm8k: {file}}}", *SMALL), "gsm8k")
    assert task.stand_in_for == "" and task.data["form"] == "question and options"
    assert {e.answer for e in task.test} == {"2"}

    solved = [{"prompt": f"{i}+{i}?", "response": f"#### {2 * i}"} for i in range(12)]
    (tmp_path / "solved.json").write_text(json.dumps(solved))
    words = [f"data.jsonl={{gsm8k: {tmp_path / 'solved.json'}}}", *SMALL]
    task = data.load_task(config_of(*words), "gsm8k")
    assert "options built here" in task.stand_in_for and "distractors built" in task.data["form"]


def test_id_used_in_both_files(tmp_path):
    """Train and test file share one name space of ids: the second row's place is added to it."""
    for split in ("train", "test"):
        write_rows(tmp_path / f"t_{split}.jsonl", rows_of(1, id="same"))
    cfg = config_of(f"data.jsonl={{mine: '{tmp_path}/t_{{split}}.jsonl'}}")
    table = data.read_records(cfg, "mine")
    assert table.splits["train"][0]["id"] == "same"
    assert table.splits["test"][0]["id"] == f"same, {tmp_path}/t_test.jsonl:1"
    assert table.notes == ["1 rows have an id that came before: their place is added (1)"]


def test_too_few_rows_for_the_support_set(tmp_path):
    """The message says how many remain, how many are needed and which keys to change."""
    message = (
        r"^task mine: 3 examples remain for the support set, data\.num_support=4 are needed "
        r"\(after 4 for the test\)"
    )
    with pytest.raises(UserError, match=message):
        user_task(tmp_path, rows_of(7))
    with pytest.raises(UserError, match="no unlabelled prompts remain"):
        user_task(tmp_path, rows_of(8))


@pytest.mark.parametrize(
    "source, role, sizes",
    [
        ("train", "data.test_tasks=[mine]", (4, 4, 5)),
        ("test", "data.test_tasks=[mine]", (9, 4, 0)),
        ("test", "data.train_tasks=[mine, arc_e, arc_c]", (4, 4, 5)),
    ],
)
def test_a_pool_smaller_than_num_test(tmp_path, source, role, sizes):
    """The papers' presets ask for 5,000 test examples, and some benchmarks have a thousand in all.
    As the user's own task it has the same support set."""
    file = write_rows(tmp_path / "mine.jsonl", rows_of(13))
    words = [f"data.jsonl={{mine: {file}}}", *SMALL, "data.num_test=5000"]
    cfg = config_of(*words, f"data.prompts_from={source}", role)
    task = data.load_task(cfg, "mine")
    assert (len(task.test), len(task.support), len(task.train)) == sizes and task.prompts
    assert len(set(ids(task.test, task.support, task.train))) == 13
    cfg.task = "mine"
    cfg.data.train_tasks = ["arc_e", "arc_c"]
    assert data.load_task(cfg, "mine").support == task.support


# Splits


def test_duplicates_are_dropped_once():
    """Equal question and options count once, options in any order; equal questions with other
    options are kept apart."""
    examples = [
        Example("1", "p one", ("a", "b"), 0, "a"),
        Example("2", "P one!", ("b", "a"), 1, "a"),
        *examples_of(4, "r", "p"),
    ]
    cfg = config_of("data.num_test=1", "data.num_support=2", "policy.folds=2")
    splits = data.make_splits(cfg, "mine", {"all": examples})
    assert sorted(ids(*splits)) == ["1", "r0", "r1", "r2", "r3"]
    assert [len(split) for split in splits] == [2, 2, 1]


def test_skip_test_scores_a_fresh_part_of_the_test_split():
    """The parts are disjoint and nothing else moves; what trained on its only pool has no second
    part."""
    pool = examples_of(30, "r", "train")
    pools = {"train": pool, "test": examples_of(25, "t", "test")}

    def split(*words):
        return data.make_splits(config_of("data.num_test=10", *words), "mine", pools)

    parts = [split(f"data.skip_test={n}") for n in (0, 10, 20)]
    assert parts[0][:2] == parts[1][:2] == parts[2][:2]
    tests = [test for _, _, test in parts]
    assert [len(test) for test in tests] == [10, 10, 5] and len(set(ids(*tests))) == 25
    with pytest.raises(UserError, match="data.skip_test=25: task mine has 25 test examples"):
        split("data.skip_test=25")

    words = ["data.skip_test=1", "data.num_test=5", "data.num_support=4"]
    with pytest.raises(UserError, match="task boolq has no test split of its own"):
        data.make_splits(config_of(*words), "boolq", {"all": pool})
    untargeted = config_of(*words, "data.targets=[arc_c]")
    assert len(data.make_splits(untargeted, "mine", {"all": pool})[2]) == 5


def test_skip_test_of_one_pool_spares_support_and_prompts():
    """An unseen task's further parts are disjoint from its first test set, its support set and its
    prompts, which do not move; punctuation does not make a prompt's question a new one."""
    rows = examples_of(40, "r", "word")
    words = ["data.num_test=10", "data.num_support=4", "data.num_prompts=6"]
    words += ["policy.folds=2", "data.targets=[jama]"]

    def split(skip=0):
        cfg = config_of(*words, f"data.skip_test={skip}")
        return data.make_splits(cfg, "jama", {"all": rows})

    def prompts_of(train):
        return [e.text for e in train][:6]

    for i, text in enumerate(prompts_of(split()[0])):
        rows.append(Example(f"again{i}", text + "?", ("c", "d"), 0, "c"))
    first_train, support, first_test = split()  # another order: the pool has other rows now
    prompts = prompts_of(first_train)
    seen = set(ids(first_test, support))
    for skip in (10, 20, 30):
        train, again, test = split(skip)
        assert again == support and prompts_of(train) == prompts
        assert test and not seen & set(ids(test)) and not set(test) & set(train)
        texts = {e.text.strip("?") for e in test}
        assert not texts & {text.strip("?") for text in prompts}
        seen |= set(ids(test))
    with pytest.raises(UserError, match=r"=60: task jama has \d+ test examples; skip less"):
        split(60)


def test_settings_may_be_chosen_on_training_examples():
    """test_from=train scores examples of train, which are not trained on then; no test example."""
    pool = examples_of(30, "r", "train")
    twin = Example("twin", pool[0].prompt, ("other", "options"), 0, "other")
    pools = {"train": [*pool, twin], "test": examples_of(10, "t", "test")}
    words = ["data.num_test=10", "data.num_support=4", "policy.folds=2"]
    usual = data.make_splits(config_of(*words), "mine", pools)
    train, support, test = data.make_splits(
        config_of(*words, "data.test_from=train"), "mine", pools
    )
    assert support == usual[1] and len(test) == 10
    assert set(test) <= set(usual[0]) and set(train) < set(usual[0])
    assert not {e.prompt for e in test} & {e.prompt for e in train}

    # a train split that is too short for both is halved
    few = {"train": examples_of(12, "r", "train"), "test": pools["test"]}
    train, _, test = data.make_splits(config_of(*words, "data.test_from=train"), "mine", few)
    assert len(train) == len(test) == 4
    # what is scored is then no part of a test set
    with pytest.raises(UserError, match="data.test_from=train scores no test example"):
        config_of("data.test_from=train", "data.skip_test=10")


# Loading


def test_tasks_are_loaded_once(tmp_path, tiny_args):
    """A process reads each task's files once and keeps configuration order."""
    run = Run(tmp_path, config_of(*tiny_args))
    first = data.load_tasks(run)
    assert list(first) == ["alpha", "beta", "gamma", "delta", "epsilon"]
    assert data.load_tasks(run, ["delta"])["delta"] is first["delta"]
    assert [task.domain for task in first.values()] == ["id"] * 3 + ["ood"] * 2


def test_task_without_a_file(tmp_path):
    """Unknown names and missing or damaged embedded files say what to do."""
    with pytest.raises(UserError, match="no file for task arc_e"):
        data.read_records(config_of("data.source=jsonl"), "arc_e")
    cfg = config_of(f"data.dir={tmp_path}")
    with pytest.raises(UserError, match="run `make assets`"):
        data.read_records(cfg, "arc_e")
    with pytest.raises(UserError, match="task mine is not one of the embedded tasks"):
        data.read_records(cfg, "mine")
    with gzip.open(tmp_path / "jama.all.jsonl.gz", "wt") as f:
        f.write('{"id": ')
    (tmp_path / "math.all.jsonl.gz").write_bytes((tmp_path / "jama.all.jsonl.gz").read_bytes()[:-9])
    for name in ("jama", "math"):
        with pytest.raises(UserError, match=rf"{name}\.all\.jsonl\.gz: damaged"):
            data.read_records(cfg, name)


def test_contexts_file(tmp_path):
    """The shipped file covers the twelve tasks; another replaces it; a wrong one is refused by
    name."""
    assert set(data.read_contexts(config_of())) == set(benchmarks.TABLE)
    path = tmp_path / "c.yaml"
    path.write_text("mine: >\n  two\n  lines\n")
    assert data.read_contexts(config_of(f"policy.contexts={path}")) == {"mine": "two lines"}
    path.write_text("- a\n")
    for wrong in (path, tmp_path / "none.yaml"):
        with pytest.raises(UserError, match=rf"policy\.contexts={wrong}"):
            data.read_contexts(config_of(f"policy.contexts={wrong}"))


# The hub


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
        cfg = config_of("data.source=hub", f"data.hub={{{name}: {folder}}}", *words)
        return data.read_records(cfg, name).splits

    return read


def in_both(rows, test="validation"):
    return {"train": rows, test: rows}


def values(rows, *columns):
    return [tuple(row.get(column) for column in columns) for row in rows]


def test_hub_arc(hub):
    """Choices with letter or digit labels; three or five options; the result equals the embedded
    form."""

    def row(labels, key):
        choices = {"text": [f"t{label}" for label in labels], "label": list(labels)}
        return {"id": "x", "question": "Why?", "choices": choices, "answerKey": key}

    train = [row("ABCD", "C"), row("1234", "4"), row("ABC", "A"), row("ABCDE", "E")]
    got = hub("arc_e", {"train": train, "test": [row("1234", "1")]}, parquet=True)
    assert values(got["train"], "gold") == [(2,), (3,), (0,), (4,)]
    assert got["test"][0]["gold"] == 0
    assert got["train"][1]["choices"] == ["t1", "t2", "t3", "t4"]
    e = data.make_example("arc_e", got["train"][0], "cloze")
    assert e.prompt == "Question: Why?\nAnswer:"


def test_hub_hellaswag(hub):
    """Activity, context and capitalised second part; markup removed; string labels, unlabelled rows
    dropped."""
    row = {
        "activity_label": "Roof work",
        "ctx_a": "A man sits on a roof.",
        "ctx_b": "he",
        "ctx": "unused",
        "endings": ["is [title] up [step] there.", "lifts it.", "c.", "d."],
        "label": "1",
    }
    splits = {"train": [row, row | {"label": ""}], "validation": [row | {"label": "3"}]}
    got = hub("hellaswag", splits)
    assert values(got["train"], "gold") == [(1,)] and values(got["test"], "gold") == [(3,)]
    assert got["train"][0]["question"] == "Roof work: A man sits on a roof. He"
    assert got["train"][0]["choices"][0] == "is. up there."


def test_hub_boolq(hub):
    """true is yes, option 0, as in the embedded data."""
    rows = [{"question": "is it", "answer": answer, "passage": "P."} for answer in (True, False)]
    got = hub("boolq", in_both(rows))["test"]
    options = ["yes", "no"]
    assert values(got, "gold", "choices", "context") == [(0, options, "P."), (1, options, "P.")]


def test_hub_piqa(hub):
    """Two solutions, integer labels from 0; the hidden label -1 is dropped, not read as the last
    option. Train and test rows of one data set do not share an id."""
    rows = [{"goal": "Go", "sol1": "walk", "sol2": "fly", "label": i} for i in (0, 1, -1)]
    got = hub("piqa", in_both(rows))
    options = ["walk", "fly"]
    assert values(got["train"], "question", "choices", "gold") == [
        ("Go", options, 0),
        ("Go", options, 1),
    ]
    assert not {row["id"] for row in got["train"]} & {row["id"] for row in got["test"]}


def test_hub_winogrande_and_socialiqa(hub):
    """Both count their string labels from 1; an empty label is dropped."""
    row = {"sentence": "A _ b.", "option1": "x", "option2": "y"}
    got = hub("winogrande", in_both([row | {"answer": label} for label in ("1", "2", "")]))
    assert values(got["test"], "gold", "choices") == [(0, ["x", "y"]), (1, ["x", "y"])]
    row = {"context": "c", "question": "q", "answerA": "x", "answerB": "y", "answerC": "z"}
    got = hub("socialiqa", in_both([row | {"label": label} for label in "123"]))
    options = ["x", "y", "z"]
    assert values(got["train"], "gold", "choices", "context") == [
        (i, options, "c") for i in range(3)
    ]


def test_hub_gsm8k_and_math(hub):
    """The number after #### without commas; the last box of the solution, with its subject."""
    rows = [{"question": "q", "answer": "1,000 + 1\n#### 1,001"}]
    assert hub("gsm8k", in_both(rows, "test"))["test"][0]["answer"] == "1001"
    solution = r"$\boxed{1}$ so $\boxed{\frac{1}{2}}$"
    rows = [{"problem": "p", "level": "Level 1", "type": "Algebra", "solution": solution}]
    got = hub("math", in_both(rows, "test"))["train"]
    assert values(got, "question", "answer", "kind") == [("p", r"\frac{1}{2}", "Algebra")]


def test_hub_codemmlu(hub):
    """One pool; the description, where there is one, is the context."""
    row = {"question": "q", "choices": ["x", "y"], "answer": "B"}
    got = hub("codemmlu", {"test": [row | {"problem_description": "p"}]})
    assert values(got["all"], "question", "context", "gold") == [("q", "p", 1)]


def test_hub_columns_as_documented(hub):
    """data.columns with the roles that configs/default.yaml names maps a data set of other
    columns."""
    role = re.search(r"columns: \{\}.*choices: col or \[cols\], (\w+): col\}", DEFAULT.read_text())
    rows = [{"q": "Why?", "opts": ["x", "y", "z"], "key": "B", "label": 0}]
    columns = f"{{question: q, choices: opts, {role[1]}: key}}"
    got = hub("mine", in_both(rows, "test"), f"data.columns={{mine: {columns}}}")
    assert values(got["test"], "question", "choices", "gold") == [("Why?", ["x", "y", "z"], 1)]


@pytest.mark.parametrize(
    "row, choices",
    [
        ({"one": "stones", "two": "light", "key": "B"}, "[one, two]"),
        ({"options": ["stones", "light"], "key": 1}, "options"),
        ({"options": LETTERED, "key": "B"}, "options"),
    ],
)
def test_hub_columns_of_every_kind(hub, row, choices):
    """A list of options, a column for each, or labelled ones; a passage beside the question."""
    columns = f"{{question: q, context: text, choices: {choices}, gold: key}}"
    rows = [{"q": "What?", "text": "A plant.", **row}]
    got = hub("mine", {"train": rows}, f"data.columns={{mine: {columns}}}")["all"]
    options = ["stones", "light"]
    assert values(got, "question", "context", "choices", "gold") == [
        ("What?", "A plant.", options, 1)
    ]


GIVEN = "data.columns={mine: {question: question, choices: choices, gold: answer}}"


@pytest.mark.parametrize(
    "name, row, words",
    [
        ("mine", {"question": "q", "choices": ["a", "b"], "label": "A"}, (GIVEN,)),
        ("boolq", {"question": "q", "passage": "p"}, ()),
        ("hellaswag", {"ctx": "c", "endings": ["a", "b"], "label": "0"}, ()),
        ("gsm8k", {"question": "q", "final": "3"}, ()),
        ("gsm8k", {"question": "q", "answer": "B", "choices": ["a", "b"]}, ()),
        ("math", {"problem": "q", "answer": "3"}, ()),
    ],
)
def test_hub_columns_that_nobody_named(hub, name, row, words):
    """Columns are not guessed: those there are stand in the message, with what to write."""
    splits = dict.fromkeys(("train", "test", "validation"), [row])
    with pytest.raises(UserError, match=rf"^data\.columns\.{name}: ") as e:
        hub(name, splits, *words)
    assert all(column in str(e.value) for column in row)
    assert f"set data.columns={{{name}: {{question: " in str(e.value)


def test_hub_set_of_unknown_columns(hub):
    """Columns that no rule knows are asked for, with what to write."""
    with pytest.raises(UserError, match="no column of .*'premises'.*data.columns='{mine: {"):
        hub("mine", {"train": [{"premises": "q", "answer": "A"}]})


@pytest.mark.parametrize(
    "label, gold", [("2", 1), (2, 2), ("four", 3), ("B", 1), ("", None), (-1, None)]
)
def test_hub_labels_of_every_kind(hub, label, gold):
    """An option's text comes before a number or a letter; hidden labels are dropped."""
    choices = ["1", "2", "3", "four"] if label != "B" else ["w", "x", "y", "z"]
    rows = [{"question": q, "choices": choices, "answer": label} for q in "qr"]
    rows[1]["answer"] = choices[0] if isinstance(label, str) else 0
    got = hub("mine", {"train": rows}, GIVEN)["all"]
    assert values(got, "gold") == [(place,) for place in (gold, 0) if place is not None]


@pytest.mark.parametrize("label", ["5", 4, "BC", "none of these", -2])
def test_hub_label_that_names_no_option(hub, label):
    """A label outside the options is a fault of the mapping, not an unlabelled row."""
    row = {"question": "q", "choices": ["w", "x", "y", "z"], "answer": label}
    with pytest.raises(
        UserError, match="`answer` is .*, expected 0..3, A..D or the text of an option"
    ):
        hub("mine", {"train": [row]}, GIVEN)


@pytest.mark.parametrize("choices", ["wxyz", ["w"], ["w", " "], None])
def test_hub_options_that_are_none(hub, choices):
    """A text is no list of options, and one is no choice."""
    row = {"question": "q", "choices": choices, "answer": 0}
    with pytest.raises(UserError, match=r"data\.hub\.mine=.*, row mine-all-0: .*(choices|option)"):
        hub("mine", {"train": [row]}, GIVEN)


def test_hub_revision_is_recorded():
    """The commit by which the library files a hub set; a local folder has none."""
    commit = "210d026faf9955653af8916fad021475a3f00453"
    cached = f"/cache/allenai___ai2_arc/ARC-Easy/0.0.0/{commit}/ai2_arc-test.arrow"
    rows = SimpleNamespace(cache_files=[{"filename": cached}])
    assert records.hub_revision(rows) == commit
    local = "/cache/folder/default/0.0.0/866d6d8e6daca806/folder-train.arrow"
    assert records.hub_revision(SimpleNamespace(cache_files=[{"filename": local}])) == ""


def test_hub_task_without_a_data_set(tmp_path):
    """JAMA has no hub set; an id that cannot be loaded names the ways out."""
    with pytest.raises(UserError, match="bring your own file"):
        data.read_records(config_of("data.source=hub"), "jama")
    (tmp_path / "empty").mkdir()
    cfg = config_of("data.source=hub", f"data.hub={{arc_e: {tmp_path / 'empty'}}}")
    with pytest.raises(UserError, match="cannot load .* set data.hub="):
        data.read_records(cfg, "arc_e")


def own_config(*words):
    """The configuration of `mine` as a user's own task, in a run of the twelve."""
    cfg = config_of(*SMALL, *words)
    cfg.task = "mine"
    cfg._own = True
    return cfg


def test_a_repeated_question_costs_an_own_task_no_refinement():
    """The support set is served first; the test is what asks something else."""
    pool = examples_of(12, "r", "q")
    pool += [Example(f"s{i}", "Which is true?", (f"a{i}", "b"), 0, f"a{i}") for i in range(8)]
    for seed in range(5):
        train, support, test = data.make_splits(own_config(f"seed={seed}"), "mine", {"all": pool})
        assert len(support) == 4
        assert not {e.text for e in support} & {e.text for e in test}
        assert not train


def test_a_question_with_other_options_is_held_out_in_letters_too():
    """Its prompt shows the options, so the question is known by itself."""
    rows = []
    for i in range(10):
        for other in "xy":
            row = {"id": f"{i}{other}", "question": f"q{i}?", "choices": ["a", other], "gold": 0}
            rows.append(data.make_example("mine", row, "letter"))
    train, support, test = data.make_splits(config_of(*SMALL), "mine", {"all": rows})
    asked = [{e.question for e in split} for split in (train, support, test)]
    assert not asked[0] & asked[2] and not asked[1] & asked[2] and not asked[0] & asked[1]
    assert all(asked)


def test_an_own_tasks_held_out_rows_are_never_its_prompts(tmp_path):
    """Even where a run conditions on test inputs: the verdict is about unseen rows."""
    file = write_rows(tmp_path / "mine.jsonl", rows_of(40))
    cfg = own_config("data.prompts_from=test", f"data.jsonl={{mine: {file}}}")
    task = data.load_task(cfg, "mine")
    assert task.test
    assert not {example.text for example in task.test} & set(task.prompts)


def test_a_test_split_without_labels():
    """Hidden labels: refused of a task of the run; an own task is cut from its train split."""
    pools = {"train": examples_of(20, "r", "q"), "test": []}
    with pytest.raises(UserError, match="no row of its test split has a label"):
        data.make_splits(config_of(*SMALL), "mine", pools)
    _, support, test = data.make_splits(own_config(), "mine", pools)
    assert support and test
