"""Any file: read by one rule for every source, or refused in a sentence that says what to write."""

import csv
import json
import random

import pytest

import data
import records
from config import Columns, UserError, load_config

WORDS = ["river", "stone", "cloud", "forest", "engine", "window", "garden", "letter", "copper"]


def rows_of(count=60, options=3, seed=0):
    """Rows as ../docs/own-task.md describes them."""
    rng = random.Random(seed)
    for i in range(count):
        choices = rng.sample(WORDS, options)
        question = f"Case {i}: pick the word after {choices[0]}."
        gold = rng.randrange(options)
        yield {"id": f"q{i}", "question": question, "choices": choices, "gold": gold}


def as_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_csv(path, rows, delimiter=","):
    rows = list(rows)
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        out.writeheader()
        out.writerows(rows)
    return path


def as_columns(row, gold):
    """A row of a table, with one column per option."""
    options = {f"choice{i}": text for i, text in enumerate(row["choices"], 1)}
    return {"id": row["id"], "question": row["question"], **options, "gold": gold}


def table_of(path, labels=False, **settings):
    return records.read_files({"all": path}, labels, **settings)


def found(table):
    """What a task is made of, whatever the source."""
    keys = ("id", "question", "choices", "gold")
    return [tuple(row.get(key) for key in keys) for row in table.splits["all"]]


@pytest.fixture
def plain(tmp_path):
    """The rows as JSON lines: what every other form has to equal."""
    return found(table_of(as_lines(tmp_path / "my.jsonl", rows_of())))


# One rule for every source


@pytest.mark.parametrize(
    "name, delimiter", [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t"), ("a.csv", "\t")]
)
@pytest.mark.parametrize("label", ["index", "letter", "text", "whole float"])
def test_tables_of_every_kind(tmp_path, plain, name, delimiter, label):
    """C7, C8, C5, C4: commas, semicolons or tabs; an index, a letter, an option's text or 1.0."""
    rows = []
    for row in rows_of():
        gold = row["gold"]
        labels = {"index": gold, "letter": "ABC"[gold], "whole float": float(gold)}
        rows.append(as_columns(row, labels.get(label, row["choices"][gold])))
    assert found(table_of(as_csv(tmp_path / name, rows, delimiter))) == plain


def test_json_labels_of_every_kind(tmp_path, plain):
    """C4, C5: whole floats and texts in JSON; a null or an empty label is no label."""
    rows = list(rows_of())
    for i, row in enumerate(rows):
        row["gold"] = float(row["gold"]) if i % 2 else row["choices"][row["gold"]].upper()
    assert found(table_of(as_lines(tmp_path / "a.jsonl", rows))) == plain
    rows[0]["gold"] = None
    rows[1]["gold"] = ""
    rows[2]["gold"] = -1
    read = table_of(as_lines(tmp_path / "b.jsonl", rows)).splits["all"]
    assert [records.is_labelled(row) for row in read] == [False] * 3 + [True] * 57


def test_json_array_and_parquet(tmp_path, plain):
    """C8: a JSON array, and a parquet file."""
    from datasets import Dataset

    rows = list(rows_of())
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert found(table_of(tmp_path / "a.json")) == plain
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert found(table_of(tmp_path / "a.parquet")) == plain
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"bad\.parquet: cannot read it as parquet"):
        table_of(tmp_path / "bad.parquet")


def test_class_labels(tmp_path):
    """C3: the names of a ClassLabel are the options, in a parquet file and in a folder of them."""
    from datasets import ClassLabel, Dataset, Features, Value

    names = ["negative", "neutral", "positive"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = {"text": [f"review {i}" for i in range(30)], "label": [i % 3 for i in range(30)]}
    folder = tmp_path / "folder"
    folder.mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    cfg, _ = load_config([f"data.hub={{mine: {folder}}}"])
    for table in (table_of(folder / "train.parquet"), data.read_records(cfg, "mine")):
        assert [row["gold"] for row in table.splits["all"]] == [i % 3 for i in range(30)]
        assert table.splits["all"][0]["choices"] == names
        assert "columns: question = text, gold = label" in table.notes


ARC = {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}


@pytest.mark.parametrize(
    "row, options, gold",
    [
        ({"question": "q", "choices": ARC, "answerKey": "B"}, ["x", "y", "z"], 1),
        (
            {"question": "q", "choices": ARC | {"label": ["1", "2", "3"]}, "answerKey": "3"},
            ["x", "y", "z"],
            2,
        ),
        ({"question": "q", "options": {"A": "x", "B": "y"}, "answer_idx": "B"}, ["x", "y"], 1),
        (
            {
                "question_stem": "q",
                "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}],
                "answerKey": "A",
            },
            ["x", "y"],
            0,
        ),
        ({"Question": "q", "A": "x", "B": "y", "Answer": "B"}, ["x", "y"], 1),
        ({"question": "q", "opa": "x", "opb": "y", "label": 1}, ["x", "y"], 1),
        ({"context": "c", "question": "q", "answerA": "x", "answerB": "y", "label": "B"}, "xy", 1),
        (
            {"question": "q", "correct_answer": "b", "distractor1": "c", "distractor2": "a"},
            "abc",
            1,
        ),
        (
            {"premise": "c", "hypothesis": "q", "choices": ["no", "yes"], "label": 1},
            ["no", "yes"],
            1,
        ),
        ({"question": "q", "choices": ["no", "yes"], "answer": True}, ["no", "yes"], 1),
        ({"question": "q", "choices": [3, 4, 5], "answer": "4"}, ["3", "4", "5"], 1),
        ({"question": "q", "choices": "['x', 'y']", "label": "(B)"}, ["x", "y"], 1),
    ],
)
def test_shapes_that_others_publish(tmp_path, row, options, gold):
    """C6, C11: options in every usual shape, columns by their usual names."""
    (read,) = records.read_file(as_lines(tmp_path / "a.jsonl", [row]))
    assert (read["question"], read["choices"], read["gold"]) == ("q", list(options), gold)


@pytest.mark.parametrize("classes", [("negative", "positive"), ("no", "perhaps", "yes")])
@pytest.mark.parametrize(
    "columns", [("question", "answer"), ("text", "label"), ("prompt", "response")]
)
def test_distinct_answers_are_the_options(tmp_path, classes, columns):
    """C1: a few distinct texts as answers are classes; a line says so."""
    question, answer = columns
    count = len(classes)
    rows = [{question: f"review {i}", answer: classes[i % count]} for i in range(60)]
    table = table_of(as_lines(tmp_path / "a.jsonl", rows))
    assert table.classes == classes
    assert found(table)[1] == ("a-2", "review 1", list(classes), 1)
    (note,) = [note for note in table.notes if "distinct answers" in note]
    assert all(f"{name} ({60 // count})" in note for name in classes)


def test_answers_that_are_no_classes(tmp_path):
    """Sums are answers of their own: nearly each comes once."""
    rows = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(60)]
    table = table_of(as_lines(tmp_path / "a.jsonl", rows))
    assert not table.classes and table.splits["all"][3]["answer"] == "6"
    few = [{"question": f"{i}?", "answer": "ab"[i % 2]} for i in range(60)]
    assert not table_of(as_lines(tmp_path / "b.jsonl", few), free=True).classes


def test_chat_and_alpaca_rows(tmp_path):
    """C9: one question and one answer; more turns are refused by what they are."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Good?"}]
    answer = {"role": "assistant", "content": "yes"}
    (read,) = records.read_file(as_lines(tmp_path / "a.jsonl", [{"messages": [*turns, answer]}]))
    assert (read["question"], read["answer"], read["system"]) == ("Good?", "yes", "Be brief.")
    assert read["read_as"] == "chat (messages)"
    alpaca = {"instruction": "Judge it.", "input": "so good", "output": "positive"}
    (read,) = records.read_file(as_lines(tmp_path / "b.jsonl", [alpaca]))
    assert (read["question"], read["answer"]) == ("Judge it.\nso good", "positive")
    long = {"messages": [*turns, answer, turns[1], answer]}
    with pytest.raises(UserError, match=r"c\.jsonl:1: a chat of .*expected one question"):
        records.read_file(as_lines(tmp_path / "c.jsonl", [long]))


def test_columns_of_a_file_may_be_named(tmp_path):
    """C2: a number without a meaning is refused with the words that give it one, which work."""
    rows = [{"text": f"review {i} was bad", "label": i % 2} for i in range(60)]
    file = as_lines(tmp_path / "reviews.jsonl", rows)
    words = ["stage=adapt", f"run={tmp_path}", f"task={file}"]
    (tmp_path / "config.yaml").write_text("seed: 999\n")
    cfg, _ = load_config(words)
    with pytest.raises(UserError, match=r"`label` is 0, and nothing says .*\(`text`\)") as e:
        data.load_task(cfg, "reviews")
    (advice,) = [part for part in str(e.value).split("; ") if "data.columns=" in part]
    word = advice[advice.index("data.columns=") :].replace("'", "")
    cfg, _ = load_config([*words, word])
    assert data.load_task(cfg, "reviews").support[0].options == ("negative", "positive")

    cfg, _ = load_config([*words, "data.columns={reviews: {question: texte, gold: label}}"])
    with pytest.raises(UserError, match=r"data\.columns\.reviews: no 'texte'; .*'text', 'label'"):
        data.load_task(cfg, "reviews")


def test_columns_of_new_rows_need_no_label(tmp_path):
    """Rows to be answered may have the task's columns without the label's."""
    columns = Columns(question="frage", gold="antwort", choices=["no", "yes"])
    file = as_lines(tmp_path / "new.jsonl", [{"frage": "good?"}])
    (read,) = records.read_file(file, labels=None, columns=columns)
    assert (read["question"], read["choices"]) == ("good?", ["no", "yes"])
    with pytest.raises(UserError, match="no 'antwort'"):
        records.read_file(file, columns=columns)


def test_no_column_is_a_question(tmp_path):
    """The columns found, and what to write."""
    file = as_lines(tmp_path / "a.jsonl", [{"titre": "x", "label": "y"}])
    with pytest.raises(UserError, match=r"no column of \['titre', 'label'\].*data\.columns="):
        table_of(file)


# What is wrong in a file is said


@pytest.mark.parametrize(
    "row, fault",
    [
        ({"text": " ", "options": ["x", "y"]}, "`text` is missing or empty"),
        ({"text": "q", "options": ["x", 2, None]}, "`options` must be a list of at least two"),
        ({"text": "q", "options": ["x", " "]}, "option 1 is empty, in `options`"),
        ({"text": "q", "answerA": "", "answerB": "y"}, "option 0 is empty, in `answerA`"),
        ({"text": "q", "answerA": "x"}, "`answerA, answerB` must hold at least two texts"),
        ({"text": "q", "passage": 5, "options": ["x", "y"]}, "`passage` must be a text"),
        ({"text": "q", "options": ["x", "y"], "label": 7}, "`label` is 7, expected 0..1, A..B or"),
    ],
)
def test_faults_name_file_line_and_column(tmp_path, row, fault):
    """By the names that the file has, with a good row."""
    good = {"text": "good", "options": ["x", "y"], "label": 0}
    if "answerA" in row:
        good = {"text": "good", "answerA": "x", "answerB": "y", "label": 0}
    with pytest.raises(UserError) as e:
        table_of(as_lines(tmp_path / "a.jsonl", [good, row]))
    assert str(e.value).startswith(f"{tmp_path}/a.jsonl:2: {fault}")
    assert "a good row: " in str(e.value)


def test_labels_that_count_from_one(tmp_path):
    """A3: no label is 0. Where the last option shows it they are read so, else a line warns."""
    rows = []
    for row in rows_of(options=4):
        row["choices"][3] = "none of these"
        rows.append(as_columns(row, row["gold"] % 3 + 1))
    table = table_of(as_csv(tmp_path / "a.csv", rows))
    assert "of 60 labels none is 0: they are counted from 0 all the same" in table.notes[-1]

    rows = [as_columns(row, row["gold"] + 1) for row in rows_of()]
    table = table_of(as_csv(tmp_path / "b.csv", rows))
    assert found(table) == found(table_of(as_lines(tmp_path / "my.jsonl", rows_of())))
    assert "labels are counted from 1" in table.notes[-1]


def test_repeated_and_contradicting_rows(tmp_path):
    """A5: each question once, with the label of its first row; both are counted."""
    rows = list(rows_of())
    again = [dict(row, id=f"again-{row['id']}") for row in rows[:12]]
    for row in again:
        row["gold"] = (row["gold"] + 1) % 3
    thrice = [dict(row) for row in rows[20:30]] * 2
    table = table_of(as_lines(tmp_path / "a.jsonl", [*rows, *again, *thrice]))
    assert found(table) == found(table_of(as_lines(tmp_path / "b.jsonl", rows)))
    assert table.notes == [
        "20 rows repeat an earlier one and are dropped (73, 74, 75, …)",
        "12 rows repeat an earlier one with another label and are dropped: the first stays "
        "(61, 62, 63, …)",
    ]


def test_rows_that_no_one_can_answer(tmp_path):
    """Two equal right answers, or no label where labels are needed: dropped and counted."""
    rows = [dict(row) for row in rows_of(6)]
    rows[0]["choices"] = ["same", "same ", "other"]
    rows[0]["gold"] = 0
    del rows[1]["gold"]
    table = table_of(as_lines(tmp_path / "a.jsonl", rows), labels=True)
    assert [row["id"] for row in table.splits["all"]] == ["q2", "q3", "q4", "q5"]
    assert table.notes == [
        "1 rows have no label and are dropped (2)",
        "1 rows have the right answer twice and are dropped (1)",
    ]
    with pytest.raises(UserError, match=r"no row has a label \(columns: \['id', 'question'"):
        table_of(as_lines(tmp_path / "b.jsonl", [rows[1]]), labels=True)


def test_numbers_that_are_options(tmp_path):
    """Labels that are all numbers and all options are the options' texts; a line says so."""
    rows = []
    for i in range(20):
        choices = ["1", "2", "0"] if i % 2 else ["2", "0", "1"]
        rows.append({"question": f"{i}?", "choices": choices, "gold": str(i % 3)})
    table = table_of(as_lines(tmp_path / "a.jsonl", rows))
    read = table.splits["all"]
    assert [row["choices"][row["gold"]] for row in read] == [str(i % 3) for i in range(20)]
    assert "are numbers and texts of options" in table.notes[-1]


def test_long_fields_of_a_csv(tmp_path):
    """A field may be a whole document."""
    rows = [{"question": "long " * 40_000, "A": "x", "B": "y", "gold": "B"}]
    (read,) = records.read_file(as_csv(tmp_path / "a.csv", rows))
    assert len(read["question"]) == 200_000 and read["gold"] == 1


def test_to_be_answered_every_row_stays(tmp_path):
    """Rows to be answered are not dropped, whatever they repeat; classes are the adapter's."""
    rows = [{"question": "good?"}, {"question": "good?"}, {"question": "bad?"}]
    table = table_of(as_lines(tmp_path / "a.jsonl", rows), labels=None, options=("no", "yes"))
    assert [row["choices"] for row in table.splits["all"]] == [["no", "yes"]] * 3


def test_one_ambiguous_row_changes_no_other(tmp_path):
    """Its right answer stands twice: it is dropped, and the others are read as before."""
    rows = [{"question": f"q{i}?", "choices": ["2", "3", "1"], "gold": "1"} for i in range(20)]
    rows.append({"question": "twice?", "choices": ["1", "1", "2"], "gold": "1"})
    table = table_of(as_lines(tmp_path / "a.jsonl", rows), labels=True)
    assert {record["gold"] for record in table.splits["all"]} == {2}
    assert len(table.splits["all"]) == 20
    assert any("right answer twice" in note for note in table.notes)


def test_a_column_beside_the_label_is_none(tmp_path):
    """`class` stands beside `gold`: a row without gold has no label."""
    rows = [
        {"question": f"q{i}?", "choices": ["a", "b"], "gold": i % 2, "class": 1} for i in range(20)
    ]
    rows += [{**rows[0], "question": f"open {i}?", "gold": None} for i in range(2)]
    table = table_of(as_lines(tmp_path / "a.jsonl", rows), labels=False)
    assert [record.get("gold") for record in table.splits["all"][-2:]] == [None, None]


@pytest.mark.parametrize(
    "row, options",
    [
        ({"choices": [1234567, 1234568], "gold": 1}, ["1234567", "1234568"]),
        ({"choices": [3.14159265, 3.0], "gold": 1}, ["3.14159265", "3"]),
        ({"correct_answer": 4, "distractor1": 5, "distractor2": 6}, ["4", "5", "6"]),
        ({"correct_answer": "x", "distractor1": "y"}, ["x", "y"]),
        ({"choices": {"text": ["x", "y"], "label": None}, "gold": 1}, ["x", "y"]),
        ({"choices": {"text": ["x", "y"], "label": ["A", "B", "C"]}, "gold": "B"}, ["x", "y"]),
    ],
)
def test_options_of_every_kind_stay_whole(tmp_path, row, options):
    """Numbers, wrong options beside the right one, and names that do not fit."""
    rows = [{"question": f"q{i}?", **row} for i in range(3)]
    rows[0].setdefault("distractor2", None)
    records_of = table_of(as_lines(tmp_path / "a.jsonl", rows), labels=True).splits["all"]
    assert records_of[1]["choices"] == options


def test_class_names_of_a_named_column(tmp_path):
    """data.columns says which column; the file says what its numbers are called."""
    columns = Columns(question="body", gold="stars")
    rows = {
        "all": [records.Row(f"{i}", f"{i}", {"body": f"b{i}", "stars": i % 2}) for i in range(9)]
    }
    names = {"stars": ["bad", "good"]}
    table = records.read_rows(rows, "here", True, names, columns, task="mine")
    assert table.splits["all"][1]["choices"] == ["bad", "good"]
    assert "the options of every row: bad, good" in table.notes
