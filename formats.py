"""Rows as others write them: JSON lines, JSON arrays, CSV, and the columns of published files.

data.py checks what comes out. The published forms are those of DeGAML-LLM's and Drag-and-Drop's
releases, and of MC-Evaluation (github.com/Geralt-Targaryen/MC-Evaluation).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import benchmarks
from config import UserError

GOOD_ROW = '{"id": "q1", "question": "Which ...?", "choices": ["one", "two"], "gold": 0}'


def bad_row(path: Path, line: int, what: object) -> UserError:
    """One fault of a file, with an example of a good row."""
    return UserError(f"{path}:{line}: {what}; a good row: {GOOD_ROW}")


def read_rows(path: Path) -> Iterator[tuple[int, int, str | dict]]:
    """Yield (line, number, row): a row of JSON as its text, a row of a CSV as a record.

    Rows are numbered by their lines, the items of a JSON array by their order.
    Raises: UserError: unreadable, or not JSON or CSV.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{path}: cannot read ({e}); expected UTF-8 JSON lines such as {GOOD_ROW}"
        ) from None
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path, text)
    elif text.lstrip().startswith("["):
        yield from _array_items(path, text)
    else:
        # not splitlines(): other separators than a newline may stand inside a JSON text
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, number, line


def _csv_rows(path, text):
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        reader.fieldnames = [_column_name(cell) for cell in reader.fieldnames or ()]
        for cells in reader:
            if None in cells:
                raise csv.Error("more cells than the header has columns")
            yield reader.line_num, reader.line_num, _from_cells(cells)
    except csv.Error as e:
        raise bad_row(path, max(1, reader.line_num), f"not CSV ({e})") from None


def _array_items(path, text):
    """Yield (line where it begins, number from 1, text) of each item of a JSON array."""
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    end = text.index("[") + 1
    line = 1 + text.count("\n", 0, end)
    number = 0
    while True:
        start = between.match(text, end).end()
        line += text.count("\n", end, start)
        if text.startswith("]", start):
            return

        try:
            _, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as e:
            raise bad_row(path, getattr(e, "lineno", line), _not_json(e)) from None

        number += 1
        yield line, number, text[start:end]
        line += text.count("\n", start, end)


def _column_name(cell):
    """As we write it: spreadsheets put spaces around a name, and capitals into it."""
    name = cell.strip()
    return name if len(name) == 1 else name.lower()


def _from_cells(cells):
    """Options are the columns choice1, choice2, … or A, B, C, …; empty cells are no values."""
    # a row may have fewer cells than the header has columns
    row = {column: cell for column, cell in cells.items() if cell}
    options = []
    for column in cells:
        if re.fullmatch(r"choice_?\d+|[A-J]", column):
            options.append(row.pop(column, ""))
    # a row may have fewer options than the header; a gap is a fault
    while options and not options[-1]:
        options.pop()
    if options:
        row["choices"] = options
    if row.get("gold", "").isdecimal():
        row["gold"] = int(row["gold"])
    return row


def parse_row(text: str) -> dict:
    """One row of JSON. Raises: ValueError: it is none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(_not_json(e)) from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    # refuse half of a surrogate pair, which is no text
    json.dumps(row, ensure_ascii=False).encode()
    return row


def _not_json(error):
    return f"not JSON ({str(error)[:80]})"


# the forms in which others publish multiple choice, as a run's records name them
RELEASE = "release (prompt, response, system)"
MC_EVALUATION = "MC-Evaluation"


def released_form(columns: Iterable[str]) -> str:
    """The published form that rows with these columns have; an empty text for none."""
    columns = set(columns)
    ours = {"question", "choices", "gold", "answer"}
    if "prompt" in columns and columns & {"response", "system"} and not columns & ours:
        return RELEASE
    if {"Question", "A", "B"} <= columns:
        return MC_EVALUATION
    return ""


def released_record(row: dict) -> dict:
    """A row in a published form as a record, beside what the row itself holds.

    `read_as` names the form. `letters_in_prompt` are a prompt's own names of its options.
    Raises: ValueError: its answer names no option.
    """
    form = released_form(row)
    read = _read_release if form == RELEASE else _read_mc_evaluation
    return {**row, "read_as": form, **read(row)}


def _read_release(row):
    """{prompt, response: "[A]", system} of DeGAML-LLM and Drag-and-Drop.

    The options are the last lines of the prompt, which the letter format shows as it stands.
    """
    prompt = row["prompt"]
    response = row.get("response")
    if not isinstance(prompt, str) or not isinstance(response or "", str):
        raise ValueError("`prompt` and `response` must be texts")
    question, options = _split_options(prompt)
    form = RELEASE
    # BoolQ has a question alone, without passage or options
    if not options and response in ("[True]", "[False]"):
        options = {"True": "True", "False": "False"}
        form = f"{RELEASE}, True or False without passage"
    if not options:
        return _read_solution(question, response)

    # in CodeMMLU some options are empty: they are known by their letter
    choices = [text or letter for letter, text in options.items()]
    record = {"question": question, "choices": choices, "read_as": form}
    record["letters_in_prompt"] = list(options)
    if response is not None:
        record["gold"] = _named_option("response", response, list(options))
    return record


def _split_options(prompt: str) -> tuple[str, dict[str, str]]:
    """(question, {letter: option}) of a prompt that ends in lines `A: …`, `B: …` or `1: …`, `2: …`.

    An option may go on over several lines. Without options the prompt is the question.
    """
    # a reminder at the end is no part of the last option
    body = re.sub(r"\nPlease answer the question choosing from .*$", "", prompt.rstrip())
    # HellaSwag's first option stands behind a word of its own line
    marks = list(re.finditer(r"(?:^|\n|Choices:)(\S): ?", body))

    # the last run of letters counts: a dialogue or a listing in the question may look like options
    for place in reversed(range(len(marks))):
        run = [marks[place]]
        if run[0][1] not in "A1":
            continue
        for mark in marks[place + 1 :]:
            if ord(mark[1]) == ord(run[-1][1]) + 1:
                run.append(mark)
        if len(run) == 1:
            continue

        ends = [mark.start() for mark in run[1:]] + [len(body)]
        options = {}
        for mark, end in zip(run, ends, strict=True):
            options[mark[1]] = body[mark.end() : end].strip()
        return body[: run[0].start()].strip(), options
    return prompt.strip(), {}


def _read_solution(question, response):
    """GSM8K or MATH without options: the answer stands behind ####, or in the last box."""
    if response is None:
        return {"question": question}
    if "####" in response:
        return benchmarks.read_gsm8k({"question": question, "answer": response})
    answer = benchmarks.last_boxed(response)
    if not answer:
        raise ValueError(
            f"`response` is {response[:40]!r}, which names no option of its row; expected options "
            "as last lines `A: …` of `prompt`, or [True], [False] or a solution in `response`"
        )
    return {"question": question, "answer": answer, "solution": response}


def _read_mc_evaluation(row):
    """{Question, A, B, C, D, Answer: "B"} of GSM8K-MC and MATH-MC."""
    choices = []
    for letter in benchmarks.LETTERS:
        # rows with fewer options have empty columns, or none
        if row.get(letter) in (None, ""):
            break
        choices.append(str(row[letter]))
    record = {"question": row["Question"], "choices": choices}
    if row.get("Answer") not in (None, ""):
        record["gold"] = _named_option("Answer", row["Answer"], benchmarks.LETTERS[: len(choices)])
    return record


def _named_option(key, said, letters):
    """The place of the option that an answer names, with or without brackets."""
    for place, letter in enumerate(letters):
        if said in (letter, f"[{letter}]"):
            return place
    options = ", ".join(f"[{letter}]" for letter in letters)
    raise ValueError(f"`{key}` is {said!r}, which names no option of its row; expected {options}")
