"""Files as others write them: JSON lines, JSON arrays, CSV, TSV, parquet, and published forms.

records.py makes records of the rows. The published forms are those of DeGAML-LLM's and
Drag-and-Drop's releases, chats and Alpaca's.
"""

from __future__ import annotations

import ast
import csv
import io
import itertools
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import benchmarks
from config import UserError

GOOD_ROW = '{"id": "q1", "question": "Which ...?", "choices": ["one", "two"], "gold": 0}'

# a field of a CSV may be a whole document
csv.field_size_limit(2**31 - 1)


class Row(NamedTuple):
    """One row of a source: where it stands, what it is called without an id, what it holds."""

    place: str
    name: str
    cells: dict


def bad_row(place: object, what: object) -> UserError:
    """One fault of a source, with an example of a good row."""
    return UserError(f"{place}: {what}; a good row: {GOOD_ROW}")


def read_file(path: Path) -> tuple[list[Row], dict[str, list[str]]]:
    """(rows, names of classes by column) of JSON lines, a JSON array, CSV, TSV or parquet.

    Rows are numbered by their lines, those of an array or of parquet by their order.
    Raises: UserError: unreadable, or none of these.
    """
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{path}: cannot read ({e}); expected UTF-8 JSON lines such as {GOOD_ROW}"
        ) from None
    if path.suffix.lower() in (".csv", ".tsv"):
        found = _csv_rows(path, text)
    elif text.lstrip().startswith("["):
        found = _array_items(path, text)
    else:
        found = _json_lines(path, text)
    rows = [Row(f"{path}:{line}", f"{path.stem}-{number}", cells) for line, number, cells in found]
    return rows, {}


def _read_parquet(path):
    from datasets import Dataset, disable_progress_bars  # slow to import

    disable_progress_bars()
    try:
        # the library copies what it reads into a cache, which nobody needs again
        with tempfile.TemporaryDirectory() as cache:
            table = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
            cells = list(table)
    except Exception as e:  # the library raises many types; each means the same to the user
        cause = e.__cause__ or e
        raise UserError(f"{path}: cannot read it as parquet ({str(cause)[:120]})") from None
    rows = [Row(f"{path}:{i}", f"{path.stem}-{i}", row) for i, row in enumerate(cells, 1)]
    return rows, class_names(table)


def class_names(table) -> dict[str, list[str]]:
    """{column: names of its classes} of a `datasets.Dataset`, whose labels are then numbers."""
    features = table.features.items()
    return {column: feature.names for column, feature in features if hasattr(feature, "names")}


def _json_lines(path, text):
    # not splitlines(): other separators than a newline may stand inside a JSON text
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise _no_json(f"{path}:{number}", e) from None
            yield number, number, _checked(f"{path}:{number}", row)


def _csv_rows(path, text):
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
    try:
        # spreadsheets put spaces around a name
        reader.fieldnames = [cell.strip() for cell in reader.fieldnames or ()]
        for cells in reader:
            if None in cells:
                raise csv.Error("more cells than the header has columns")
            # an empty cell is no value, and a row may have fewer cells than the header
            row = {column: cell or None for column, cell in cells.items()}
            yield reader.line_num, reader.line_num, row
    except csv.Error as e:
        raise bad_row(f"{path}:{max(1, reader.line_num)}", f"not CSV ({e})") from None


def _delimiter(text):
    """What stands most often between the names of the header; a comma where nothing does."""
    header = re.sub(r'"[^"]*"', "", text.lstrip("\n").split("\n", 1)[0])
    return max(",;\t|", key=header.count)


def _array_items(path, text):
    """Yield (line where it begins, number from 1, cells) of each item of a JSON array."""
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    end = text.index("[") + 1
    line = 1 + text.count("\n", 0, end)
    for number in itertools.count(1):
        start = between.match(text, end).end()
        line += text.count("\n", end, start)
        if text.startswith("]", start):
            if text[start + 1 :].strip():
                raise bad_row(f"{path}:{line}", "not JSON (more text behind the array)")
            return

        try:
            row, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as e:
            raise _no_json(f"{path}:{getattr(e, 'lineno', line)}", e) from None
        yield line, number, _checked(f"{path}:{line}", row)
        line += text.count("\n", start, end)


def parse_list(text: str) -> list | None:
    """A list that stands as text in a cell, as JSON or Python writes it; None if it is none."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return list(parse(text))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _no_json(place, error):
    return bad_row(place, f"not JSON ({str(error)[:80]})")


def _checked(place, row):
    """A row that is one. Raises: UserError: no object, or text that is none."""
    if not isinstance(row, dict):
        raise bad_row(place, f"expected an object, got {type(row).__name__}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except ValueError as e:  # half of a surrogate pair
        raise bad_row(place, e) from None
    return row


# the forms in which others publish rows, as a run's records name them
RELEASE = "release (prompt, response, system)"
CHAT = "chat (messages)"
ALPACA = "Alpaca (instruction, input, output)"


def released_form(columns: Iterable[str]) -> str:
    """The published form that rows with these columns have; an empty text for none."""
    columns = set(columns)
    ours = {"question", "choices", "options", "gold", "answer"}
    if columns & ours:
        return ""
    if "prompt" in columns and "label" not in columns and columns & {"response", "system"}:
        return RELEASE
    if columns & {"messages", "conversations"}:
        return CHAT
    if {"instruction", "output"} <= columns:
        return ALPACA
    return ""


def released_record(row: dict) -> dict:
    """A row in a published form as a record, beside what the row itself holds.

    `read_as` names the form. `letters_in_prompt` are a prompt's own names of its options.
    Raises: ValueError: its answer names no option, or it is no question and answer.
    """
    form = released_form(row)
    readers = {RELEASE: _read_release, CHAT: _read_chat, ALPACA: _read_alpaca}
    # columns that nobody reads are left behind
    own = {key: row[key] for key in ("id", "prompt", "context", "system") if row.get(key)}
    return {**own, "read_as": form, **readers[form](row)}


def _read_chat(row):
    """One question and one answer of {messages: [{role, content}, …]}, or of {from, value}."""
    messages = row.get("messages") or row.get("conversations")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("`messages` must be a list of {role, content}")
    turns = []
    record = {}
    for message in messages:
        role = message.get("role") or message.get("from")
        content = message.get("content") or message.get("value")
        if not isinstance(content, str):
            raise ValueError("`content` of a message must be a text")
        if role == "system":
            record["system"] = content
        else:
            turns.append((role, content))
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["human"], ["user", "assistant"], ["human", "gpt"]):
        raise ValueError(f"a chat of {roles}: expected one question of the user and one answer")
    record["question"] = turns[0][1]
    if len(turns) == 2:
        record["answer"] = turns[1][1].strip()
    return record


def _read_alpaca(row):
    """{instruction, input, output}: the input goes on with the question."""
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("`instruction` and `input` must be texts")
    record = {"question": "\n".join(part for part in parts if part.strip())}
    if row["output"] is not None:
        record["answer"] = str(row["output"]).strip()
    return record


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
    # "[B]" names an option, any other text is the answer itself
    if not answer and not re.fullmatch(r"\[\S{1,5}\]", response.strip()):
        return {"question": question, "answer": response.strip()}
    if not answer:
        raise ValueError(
            f"`response` is {response[:40]!r}, which names no option of its row; expected options "
            "as last lines `A: …` of `prompt`, or [True], [False] or a solution in `response`"
        )
    return {"question": question, "answer": answer, "solution": response}


def _named_option(key, said, letters):
    """The place of the option that an answer names, with or without brackets."""
    for place, letter in enumerate(letters):
        if said in (letter, f"[{letter}]"):
            return place
    options = ", ".join(f"[{letter}]" for letter in letters)
    raise ValueError(f"`{key}` is {said!r}, which names no option of its row; expected {options}")
