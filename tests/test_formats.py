"""Published files as they are: the releases' prompt, response and system; MC-Evaluation's columns.

The rows have the shapes that occur in those files; their texts are our own.
"""

import json

import pytest

import data
import formats
import records
import scoring
from config import UserError, load_config

SYSTEM = "You pick one answer. Reply with a single [ans] (ans is A,B,C,D or True/False)"
REMINDER = "\nPlease answer the question choosing from [A]/[B]/[C]/[D]."
CODE = "def f(x):\n1: y = x\n2: return y"
LONG = "".join(f"\n{chr(code)}: text {code}" for code in range(ord("A"), ord("b") + 1))


def release(prompt, response="[A]", **more):
    return {"prompt": prompt, "response": response, "system": SYSTEM, **more}


def examples_of(path, name="mine"):
    """The examples of a user's file in both formats."""
    rows = records.read_file(path)
    return [[data.make_example(name, row, form) for row in rows] for form in ("letter", "cloze")]


def array(path, rows):
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "prompt, response, question, choices, gold, letters",
    [
        # ARC: letters or numbers, three to five options
        ("Why?\nA: x\nB: y\nC: z", "[C]", "Why?", ["x", "y", "z"], 2, "ABC"),
        ("Why?\n1: x\n2: y\n3: z\n4: w", "[3]", "Why?", ["x", "y", "z", "w"], 2, "1234"),
        # HellaSwag: the first option in the line of the sentence, which may begin with a comma
        (
            "Sentence:She satChoices:A: , then\nB: up",
            "[B]",
            "Sentence:She sat",
            [", then", "up"],
            1,
            "AB",
        ),
        # PIQA: spaces at the ends
        ("pin\nA: melts \nB: fits ", "[A]", "pin", ["melts", "fits"], 0, "AB"),
        # WinoGrande and OpenBookQA: a reminder behind the options
        ("The _ fell.\nA: cup\nB: mat" + REMINDER, "[B]", "The _ fell.", ["cup", "mat"], 1, "AB"),
        # CodeMMLU: a listing before the options, options of several lines, an empty one
        (f"{CODE}\nA: if x:\n  y\nB: \nC: z", "[A]", CODE, ["if x:\n  y", "B", "z"], 0, "ABC"),
        # a dialogue in the question
        ("A: Hi.\nB: Oh.\nWho?\nA: x\nB: y", "[B]", "A: Hi.\nB: Oh.\nWho?", ["x", "y"], 1, "AB"),
    ],
)
def test_prompts_of_the_releases(prompt, response, question, choices, gold, letters):
    """Question, options and gold are told apart; the letter format shows the prompt as it stands
    and answers by its letters."""
    record = formats.released_record(release(prompt, response))
    assert (record["question"], record["choices"], record["gold"]) == (question, choices, gold)

    e = data.make_example("mine", record | {"id": "x"}, "letter")
    assert e.prompt == prompt and e.system == SYSTEM
    assert e.options == tuple(f"[{letter}]" for letter in letters)
    assert e.gold == gold and e.answer == response


def test_more_options_than_the_alphabet():
    """CodeMMLU's damaged rows run past Z; they are read, in either format."""
    record = formats.released_record(release(f"Which?{LONG}", "[D]")) | {"id": "x"}
    e = data.make_example("mine", record, "letter")
    assert len(e.options) == 34 and e.options[26:28] == ("[[]", "[\\]") and e.gold == 3
    assert data.make_example("mine", record, "cloze").options[33] == "text 98"


def test_release_in_the_cloze_format():
    """The bare question, and the options' texts, in the benchmark's own form."""
    prompt = "The cup fell off the _ today.\nA: desk\nB: rag" + REMINDER
    record = formats.released_record(release(prompt, "[B]")) | {"id": "x"}
    e = data.make_example("winogrande", record, "cloze")
    assert (e.prompt, e.options, e.suffix) == ("The cup fell off the", ("desk", "rag"), " today.")
    e = data.make_example("arc_e", record, "cloze")
    assert e.prompt == "Question: The cup fell off the _ today.\nAnswer:" and e.gold == 1


def test_boolq_as_true_or_false(tmp_path):
    """BoolQ without its passage: the prompt is the question, the answers are True and False."""
    rows = [release("is the sky blue?", "[True]"), release("is it green?", "[False]")]
    letter, cloze = examples_of(array(tmp_path / "BoolQ_test.json", rows), "boolq")
    assert [e.prompt for e in letter] == ["is the sky blue?", "is it green?"]
    assert {e.options for e in letter} == {("[True]", "[False]")}
    assert [e.gold for e in letter] == [0, 1] and letter[1].answer == "[False]"
    assert cloze[0].prompt == "Question: is the sky blue?\nAnswer:"
    assert {e.options for e in cloze} == {("True", "False")} and cloze[1].answer == "False"


def test_own_system_line_is_what_the_model_reads(tmp_path, tiny_lm):
    """Through the chat template: the row's system line in place of ours, the prompt untouched."""
    tiny_lm.form = "letter"
    rows = [release("Why?\nA: x\nB: y"), release("Why not?\nA: x\nB: y", system=None)]
    own, ours = examples_of(array(tmp_path / "t.json", rows))[0]
    end = "<|im_end|>\n<|im_start|>"
    user = f"user\nWhy?\nA: x\nB: y{end}assistant\n"
    assert scoring.input_text(tiny_lm, own) == f"<|im_start|>system\n{SYSTEM}{end}{user}"
    assert data.LETTER_SYSTEM in scoring.input_text(tiny_lm, ours)


def test_mc_evaluation(tmp_path):
    """GSM8K-MC's and MATH-MC's lines; columns after the last option may be empty."""
    row = {"Question": "1 + 1?", "A": "1.0", "B": "2.0", "C": "3.0", "D": "4.0", "Answer": "B"}
    short = row | {"C": None, "D": None, "Answer": "A", "Type": "algebra"}
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(short) + "\n")
    letter, cloze = examples_of(path, "gsm8k")
    assert letter[0].prompt == "1 + 1?\nA: 1.0\nB: 2.0\nC: 3.0\nD: 4.0" and letter[0].gold == 1
    assert cloze[0].options == ("1.0", "2.0", "3.0", "4.0") and cloze[1].options == ("1.0", "2.0")
    assert cloze[1].gold == 0


@pytest.mark.parametrize(
    "response, answer",
    [
        ("2 * 500 = 1,000.\n#### 1,000", "1000"),
        (r"So it is $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
    ],
)
def test_solutions_of_the_releases(tmp_path, response, answer):
    """GSM8K and MATH as worked solutions: free answers."""
    rows = [{"prompt": "How many?", "response": response}]
    (row,) = records.read_file(array(tmp_path / "GSM8K_train.json", rows))
    assert (row["question"], row["answer"]) == ("How many?", answer)


@pytest.mark.parametrize(
    "row, complaint",
    [
        (
            release("Why?\nA: x\nB: y", "[C]"),
            r"`response` is '\[C\]', which names no option of its row; expected \[A\], \[B\]",
        ),
        (release("Why?\nA: x\nB: y", "x"), "`response` is 'x', which names no option"),
        (release("Why?", "[A]"), r"`response` is '\[A\]', which names no option .* last lines"),
        (release("Why?\nA: x\nB: y", 3), "`prompt` and `response` must be texts"),
        (release("\nA: x\nB: y"), "`question` is missing or empty"),
        (release("Why?\nA: x\nB: y", system=["s"]), "`system` must be a text"),
        (
            {"Question": "1?", "A": "1", "B": "2", "Answer": "C"},
            "`Answer` is 'C', expected 0..1, A..B or the text of an option",
        ),
        (
            {"Question": "1?", "A": "1", "B": None, "Answer": "A"},
            "`A, B` must hold at least two texts",
        ),
        ("Why?", "expected an object, got str"),
    ],
)
def test_row_whose_answer_names_no_option(tmp_path, row, complaint):
    """The line where the item begins, what was found there, and what is expected."""
    path = array(tmp_path / "t.json", [release("Why?\nA: x\nB: y"), row])
    with pytest.raises(UserError, match=rf"^{path}:7: {complaint}.*; a good row: "):
        records.read_file(path)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('[\n{"prompt": "q",\n]', r":3: not JSON \("),
        ('[\n{"prompt": "q\\nA: x\\nB: y", "response": "[A]"}\n', r":3: not JSON \("),
        ("[" * 3000, r":1: not JSON \("),
        ("[]", ": no rows"),
    ],
)
def test_arrays_that_are_none(tmp_path, text, complaint):
    """The line of the fault, whatever the depth, and no traceback."""
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path}{complaint}"):
        records.read_file(path)


def test_an_array_in_one_line(tmp_path):
    """Items are called by their order, as they share a line."""
    path = tmp_path / "t.json"
    path.write_text(json.dumps([release(f"Why {i}?\nA: x\nB: y") for i in range(3)]))
    assert [row["id"] for row in records.read_file(path)] == ["t-1", "t-2", "t-3"]


def test_own_rows_are_no_release(tmp_path):
    """`prompt` beside our own columns keeps its meaning."""
    rows = [{"prompt": "Why?\nA: x\nB: y", "choices": ["p", "q"], "gold": 1, "system": SYSTEM}]
    letter, cloze = examples_of(array(tmp_path / "t.json", rows))
    assert cloze[0].options == ("p", "q") and letter[0].prompt.endswith("B: y\nA: p\nB: q")
    assert letter[0].system == SYSTEM


def test_hub_set_in_a_published_form(tmp_path, monkeypatch):
    """A hub set with these columns needs no data.columns; also under the name of a known one."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "gsm8k-mc"
    folder.mkdir()
    rows = [{"Question": f"{i}?", "A": "1", "B": "2", "Answer": "AB"[i % 2]} for i in range(4)]
    for split in ("train", "test"):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    for name in ("mine", "gsm8k"):
        cfg, _ = load_config([f"data.hub={{{name}: {folder}}}"])
        table = data.read_records(cfg, name)
        assert [row["gold"] for row in table.splits["test"]] == [0, 1, 0, 1]
        assert table.splits["train"][0]["choices"] == ["1", "2"]
        about = data.describe_data(cfg, name, table)
        assert about["source"] == str(folder) and about["form"] == "question and options"

    # one wrong answer is named by its row
    (folder / "test.jsonl").write_text(json.dumps(rows[0] | {"Answer": "D"}) + "\n")
    with pytest.raises(UserError, match=r"row gsm8k-test-0: `Answer` is 'D', expected 0..1"):
        data.read_records(cfg, "gsm8k")


def test_published_rows_with_further_columns(tmp_path):
    """Columns that nobody reads do no harm, and options of the row's own are used."""
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    rows = [{"messages": chat, "label": True}]
    (record,) = records.read_file(array(tmp_path / "chat.json", rows))
    assert record["answer"] == "so"
    rows = [{"prompt": f"q{i}", "options": ["a", "b"], "response": "b"} for i in range(3)]
    found = records.read_file(array(tmp_path / "own.json", rows))
    assert [(record["choices"], record["gold"]) for record in found] == [(["a", "b"], 1)] * 3


def test_text_behind_an_array_is_refused(tmp_path):
    path = array(tmp_path / "two.json", [{"question": "q", "answer": "a"}])
    path.write_text(path.read_text() * 2)
    with pytest.raises(UserError, match="more text behind the array"):
        records.read_file(path)
