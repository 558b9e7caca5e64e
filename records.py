"""One reader for every source: files, folders and the hub give the same records by the same rules.

A record is {id, question, context, choices, gold, answer, …}. `gold` is the index of the right
option, or absent. What is dropped, cut or read in another way than it stands is counted, and said
in one line each (`Table.notes`). docs/own-task.md shows the rules as a table.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import benchmarks
import formats
from config import Columns, Config, UserError
from formats import Row

# Names of columns, best first, without capitals, spaces and underscores.
SYNONYMS = {
    "id": "id uid qid questionid",
    "question": "question prompt text sentence query problem questionstem stem goal input "
    "instruction hypothesis sentence2 review content",
    "context": "context passage paragraph article premise sentence1",
    "choices": "choices options endings candidates alternatives",
    "gold": "gold labeltext labelname label answerkey answerindex answeridx correctanswer "
    "correctoption correct answer target class category output completion response",
}
# Columns that each hold one option: choice1, option_b, answerC, opd, ending0, a; or a wrong one.
_OPTION = re.compile(r"(?:choice|option|opt|op|answer|ans|ending|sol)?(\d+|[a-j])")
_WRONG_OPTION = re.compile(r"(?:distractor|incorrect|incorrectanswer|wrong|wronganswer)\d+")
# Columns that keep their names.
_AS_THEY_ARE = ("kind", "solution", "system")
_DIGITS = re.compile(r"\d+(\.0+)?")
_LETTER = re.compile(r"[\[(]?([A-Ja-j])[\])]?[.:]?")

# Answers are the names of classes if each comes this often, and if they are short and few.
_ROWS_PER_CLASS = 5
_MOST_CLASSES = 50
_LONGEST_CLASS = 100
# With fewer rows it is chance that no label is 0.
_ENOUGH_LABELS = 10


@dataclass(frozen=True)
class Roles:
    """Which column has which role; "" and () where none has it.

    Attributes:
        options: one column per option, in order.
        wrong: columns of wrong options, beside the right one in `gold`.
        gold: columns of labels; the first that a row fills is its label.
        classes: the names that a numeric label counts, where they are known.
    """

    id: str = ""
    question: str = ""
    context: str = ""
    choices: str = ""
    gold: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def columns(self) -> set[str]:
        """All columns that are read."""
        one_each = {self.id, self.question, self.context, self.choices}
        return one_each.union(self.gold, self.options, self.wrong) - {""}


@dataclass
class Table:
    """The records of a task by split, and what its user is to know about them.

    Attributes:
        classes: the options that rows without options of their own have.
        revision: the commit of a hub data set.
    """

    splits: dict[str, list[dict]]
    notes: list[str] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    revision: str = ""


def read_file(path: Path, labels: bool | None = False, **settings) -> list[dict]:
    """The records of one file. Arguments and faults as of `read_rows`."""
    return read_files({"all": path}, labels, **settings).splits["all"]


def read_files(paths: dict[str, Path], labels: bool | None, **settings) -> Table:
    """Read {split: file}. Arguments and faults as of `read_rows`."""
    rows = {}
    classes: dict[str, list[str]] = {}
    for split, path in paths.items():
        rows[split], found = formats.read_file(path)
        classes |= found
    return read_rows(rows, ", ".join(map(str, paths.values())), labels, classes, **settings)


def read_rows(
    rows: dict[str, list[Row]],
    where: str,
    labels: bool | None,
    class_names: dict[str, list[str]],
    columns: Columns | None = None,
    free: bool = False,
    options: tuple[str, ...] = (),
    task: str = "",
) -> Table:
    """Rows of any source as records.

    Args:
        rows: {split: rows}.
        where: the source, for messages.
        labels: are rows without a label dropped? None: all rows stay, they are to be answered.
        class_names: {column: names} of a source that has them.
        columns: what the user says of the columns.
        free: are answers free texts even where they look like classes?
        options: the options of rows without their own.
        task: its name, for messages.
    Raises: UserError: the place and the first fault, with an example of a good row.
    """
    table = Table({})
    flat = list(chain.from_iterable(rows.values()))
    if not flat:
        raise UserError(f"{where}: no rows; expected rows such as {formats.GOOD_ROW}")
    cells = [row.cells for row in flat]
    plain = [row for row in cells if not formats.released_form(row)]
    roles = Roles()
    if plain and columns:
        roles = _given_roles(_names(plain), where, columns, task, labels is not None, class_names)
    elif plain:
        roles = _find_roles(plain, where, class_names, task)
    if plain:
        table.notes += _describe_roles(roles, plain)
    if roles.classes:
        table.notes.append(f"the options of every row: {', '.join(roles.classes)}")

    for split, of_split in rows.items():
        table.splits[split] = []
        for row in of_split:
            try:
                table.splits[split].append(_read_row(row, roles, options))
            except ValueError as e:
                raise formats.bad_row(row.place, e) from None

    # what only all of the rows together tell
    everything = list(chain.from_iterable(table.splits.values()))
    _settle_labels(everything, table, roles, where, task)
    if not free:
        _find_classes(everything, table)
    _refuse_mixtures(everything)
    if labels is not None:
        ids: set[str] = set()  # the splits share one name space
        for split, records in table.splits.items():
            table.splits[split] = _clean(records, table, labels, ids)
        if not any(table.splits.values()):
            raise UserError(
                f"{where}: no row has a label (columns: {_names(cells)}); expected rows such as "
                f"{formats.GOOD_ROW}, or name the columns: {_columns_hint(task)}"
            )
    for record in everything:
        record.pop("place")
        record.pop("column", None)
    return table


def _columns_hint(task):
    return (
        f"data.columns='{{{task or 'my_task'}: {{question: …, choices: … or [… , …], gold: …}}}}'"
    )


def _names(rows):
    """The columns of rows, in order of first appearance."""
    return list(dict.fromkeys(chain.from_iterable(rows)))


def _plain_name(column):
    return re.sub(r"[\W_]+", "", column).lower()


def _find_roles(rows, where, class_names, task):
    """The role of each column by its name. Raises: UserError: none is a question."""
    names = _names(rows)
    by_plain_name = {}
    for name in names:
        by_plain_name.setdefault(_plain_name(name), name)
    found = {}
    for role, synonyms in SYNONYMS.items():
        known = [by_plain_name[synonym] for synonym in synonyms.split() if synonym in by_plain_name]
        # a column that is always empty is none
        filled = [name for name in known if _is_filled(name, rows)]
        found[role] = (filled or [""])[0]
        if role == "gold":
            # one that is filled beside the first is something else
            others = [name for name in filled[1:] if not _stand_together(name, filled[0], rows)]
            found[role] = (*filled[:1], *others)

    options = tuple(_option_columns(by_plain_name))
    wrong = tuple(name for plain, name in by_plain_name.items() if _WRONG_OPTION.fullmatch(plain))
    if not found["question"]:
        raise UserError(
            f"{where}: `question` is missing: no column of {names} is known as one; rename it, or "
            f"name the columns: {_columns_hint(task)}; a good row: {formats.GOOD_ROW}"
        )
    classes = tuple(class_names.get(found["gold"][0], ())) if found["gold"] else ()
    return Roles(**found, options=options, wrong=wrong, classes=classes)


def _is_filled(name, rows):
    return any(row.get(name) is not None for row in rows)


def _stand_together(first, second, rows):
    """Does any row fill both columns?"""
    return any(row.get(first) is not None and row.get(second) is not None for row in rows)


def _option_columns(by_plain_name):
    """The columns of options in order, where there are two or more of one kind, from 0, 1 or A."""
    kinds: dict[str, dict[str, str]] = {}
    for plain, name in by_plain_name.items():
        match = _OPTION.fullmatch(plain)
        if match and plain not in SYNONYMS["gold"].split():
            kinds.setdefault(plain.removesuffix(match[1]), {})[match[1]] = name
    for numbered in kinds.values():
        begins = {"0", "1", "a"} & set(numbered)
        if len(numbered) > 1 and begins:
            order = sorted(numbered, key=lambda mark: (len(mark), mark))
            return [numbered[mark] for mark in order]
    return []


def _given_roles(names, where, columns, task, labelled, class_names):
    """Roles by data.columns. Raises: UserError: a column that is not there.

    Args:
        labelled: must there be a column of labels?
        class_names: {column: names} of a source that has them.
    """
    choices = columns.choices
    listed = choices if isinstance(choices, list) else []
    # a list names columns of options, or the classes that a number in `gold` stands for
    classes = tuple(listed) if listed and not set(listed) & set(names) else ()
    options = () if classes else tuple(listed)
    if not choices:
        classes = tuple(class_names.get(columns.gold, ()))
    wanted = [columns.question, *options]
    if labelled:
        wanted.append(columns.gold)
    wanted += [name for name in (columns.context, choices) if name and isinstance(name, str)]
    absent = [name for name in wanted if name not in names]
    if absent:
        raise UserError(
            f"data.columns.{task}: no {absent[0]!r}; {where} has the columns {names}; set "
            f"data.columns={{{task}: {{question: …, choices: … or […, …], gold: …}}}}"
        )
    single = choices if isinstance(choices, str) else ""
    id_column = "id" if "id" in names else ""
    return Roles(
        id_column, columns.question, columns.context, single, (columns.gold,), options, (), classes
    )


def _describe_roles(roles, rows):
    """A line for the columns that have other names than ours, and for those that nobody reads."""
    parts = []
    found = {"question": roles.question, "context": roles.context, "choices": roles.choices}
    if roles.gold:
        found["gold"] = roles.gold[0]
    for role, column in found.items():
        if column and column.lower() != role:
            parts.append(f"{role} = {column}")
    unread = [n for n in _names(rows) if n not in roles.columns() and n.lower() not in _AS_THEY_ARE]
    if unread:
        parts.append(f"not read: {', '.join(unread[:8])}")
    return ["columns: " + ", ".join(parts)] if parts else []


def _read_row(row, roles, options):
    """One row as a record whose `label` is still as it stands. Raises: ValueError: its fault."""
    cells = row.cells
    if formats.released_form(cells):
        record = formats.released_record(cells)
        record.setdefault("id", row.name)
    else:
        record = _by_roles(row, roles)

    record["id"] = str(record["id"])
    record["place"] = row.place
    if not isinstance(record.get("question"), str) or not record["question"].strip():
        raise ValueError(f"`{roles.question or 'question'}` is missing or empty")
    for key in ("context", *_AS_THEY_ARE):
        if not isinstance(record.get(key) or "", str):
            column = roles.context if key == "context" and roles.context else key
            raise ValueError(f"`{column}` must be a text")
    if record.get("choices") is None and options:
        record["choices"] = list(options)
    if record.get("choices") is not None:
        _check_options(record["choices"], roles)
    return record


def _by_roles(row, roles):
    cells = row.cells
    name = cells.get(roles.id)
    record = {"id": row.name if name in (None, "") else name}
    record["question"] = cells.get(roles.question)
    if cells.get(roles.context):
        record["context"] = cells[roles.context]
    for column, value in cells.items():
        if column.lower() in _AS_THEY_ARE and value:
            record[column.lower()] = value

    label = None
    for column in roles.gold:
        label = _plain_label(cells.get(column))
        if label is not None:
            record["column"] = column
            break
    choices, names = _read_options(cells, roles, label)
    if choices is None and label is not None and (roles.choices or roles.options):
        missing = roles.choices or roles.options[0]
        raise ValueError(f"rows with and without `choices` in one file: no `{missing}` here")
    if choices is not None:
        record["choices"] = choices
    if label is not None and str(label) in names:
        record["gold"] = names.index(str(label))
    elif label is not None:
        record["label"] = label
    return record


def _read_options(cells, roles, label):
    """(options or None, their own names) of a row, in whatever shape they stand."""
    value = cells.get(roles.choices)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = formats.parse_list(value)  # a list in a cell of a table
    if value is None and roles.options:
        value = ["" if cells.get(c) is None else cells[c] for c in roles.options]
        # a row may have fewer options than the header; a gap is a fault
        while value and value[-1] == "":
            value.pop()
        value = value or None
    if value is None and roles.wrong and label is not None:
        wrong = [cells[c] for c in roles.wrong if cells.get(c) not in (None, "")]
        # a number among texts would be a place, not an option
        if isinstance(label, str) or not any(isinstance(option, str) for option in wrong):
            # in an order that does not tell which is right; the label is its option's own text
            value = sorted(str(_number_as_text(option)) for option in [label, *wrong])
            return value, value
    if value is None and roles.classes:
        value = list(roles.classes)

    # {text: [...], label: [...]} as in ARC, {"A": ..., "B": ...} as in MedQA, [{text, label}, ...]
    names: list = []
    if isinstance(value, dict) and set(value) == {"text", "label"}:
        names = value["label"]
        value = value["text"]
    elif isinstance(value, dict):
        names = [str(name) for name in value]
        value = list(value.values())
    elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        names = [str(option.get("label")) for option in value]
        value = [option.get("text") for option in value]
    # names that do not fit their options are none
    if not isinstance(names, list) or not isinstance(value, list) or len(names) != len(value):
        names = []
    names = [str(name) for name in names]
    if isinstance(value, list):
        value = [_number_as_text(option) for option in value]
    return value, names


def _number_as_text(value):
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        return value
    return str(int(value) if value == int(value) else value)


def _plain_label(label):
    """A label without disguise: None where it is hidden, an int where it is a whole number."""
    if isinstance(label, str):
        label = label.strip()
        return None if label.lower() in ("", "-1", "-1.0", "nan", "null") else label
    if isinstance(label, float) and math.isfinite(label) and label == int(label):
        label = int(label)
    if isinstance(label, float) and math.isnan(label):
        return None
    return None if label == -1 and not isinstance(label, bool) else label


def _check_options(choices, roles):
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not texts or len(choices) < 2:
        if roles.options:
            raise ValueError(f"`{', '.join(roles.options)}` must hold at least two texts")
        raise ValueError(f"`{roles.choices or 'choices'}` must be a list of at least two texts")
    for i, choice in enumerate(choices):
        if not choice.strip():
            column = roles.options[i] if i < len(roles.options) else roles.choices or "choices"
            raise ValueError(f"option {i} is empty, in `{column}`")


def _settle_labels(records, table, roles, where, task):
    """Make each label the index of an option, or a free answer, by one reading for all rows.

    Raises: UserError: a label that names no option, or a number that nothing explains.
    """
    with_options = [r for r in records if "label" in r and r.get("choices") is not None]
    first = _settle_numbers(with_options, table)
    for record in with_options:
        label = record.pop("label")
        index = _option_index(label, record["choices"], first)
        if index is None:
            count = len(record["choices"])
            last = benchmarks.LETTERS[:count][-1]
            raise formats.bad_row(
                record["place"],
                f"`{record['column']}` is {label!r}, expected {first}..{count - 1 + first}, "
                f"A..{last} or the text of an option",
            )
        record["gold"] = index

    # without options the label is the answer itself
    for record in records:
        label = record.pop("label", None)
        if label is None:
            continue
        is_number = isinstance(label, int | float) and not isinstance(label, bool)
        column = record["column"]
        named = _plain_name(column).startswith(("gold", "label", "class", "categor"))
        if named and (is_number or str(label).isdecimal()):
            raise UserError(
                f"{record['place']}: `{column}` is {label}, and nothing says what that number "
                f"stands for; {where} has a question (`{roles.question}`) and a label "
                f"(`{column}`) but no options; name the classes in order: data.columns="
                f"'{{{task or 'my_task'}: {{question: {roles.question}, gold: {column}, "
                f"choices: [negative, positive]}}}}'"
            )
        if not isinstance(label, str | int | float):
            raise formats.bad_row(record["place"], f"`{column}` must be a text or a number")
        record["answer"] = str(label)


def _settle_numbers(records, table):
    """What numbers count from: 0, or 1 where all of them say so.

    Digits become numbers, unless all of them are options' own texts.
    """
    digits = [r for r in records if isinstance(r["label"], str) and _DIGITS.fullmatch(r["label"])]
    texts = [_text_index(r["label"], r["choices"]) for r in digits]
    if digits and None not in texts:
        places = [int(float(r["label"])) for r in digits]
        if places != texts:
            table.notes.append(
                f"the labels of {len(digits)} rows are numbers and texts of options: they are read "
                "as texts; write letters where they are places"
            )
        digits = []
    for record in digits:
        record["label"] = int(float(record["label"]))

    numbers = [r for r in records if type(r["label"]) is int]
    if len(numbers) < _ENOUGH_LABELS or any(r["label"] < 1 for r in numbers):
        return 0
    # how far each label is from the row's last option, counted from 1
    beyond = [r["label"] - len(r["choices"]) for r in numbers]
    if max(beyond) == 0:
        table.notes.append(
            f"labels are counted from 1: of {len(numbers)} none is 0, and some name the last "
            "option only so"
        )
        return 1
    table.notes.append(
        f"of {len(numbers)} labels none is 0: they are counted from 0 all the same; if yours count "
        "from 1, write letters or the options' texts"
    )
    return 0


def _text_index(label, choices):
    """The first option with this text, whatever its capitals if there is no other; else None."""
    texts = [choice.strip() for choice in choices]
    if label in texts:
        return texts.index(label)
    lowered = [text.lower() for text in texts]
    return lowered.index(label.lower()) if lowered.count(label.lower()) == 1 else None


def _option_index(label, choices, first):
    """The place of the option that a label names, by its text, its letter or its number."""
    if type(label) is int:
        return label - first if first <= label < len(choices) + first else None
    names = {True: ("true", "yes"), False: ("false", "no")}
    said = names[label] if isinstance(label, bool) else (label,)
    for text in said:
        index = _text_index(text, choices) if isinstance(text, str) else None
        if index is not None:
            return index
    letter = _LETTER.fullmatch(label) if isinstance(label, str) else None
    index = benchmarks.letter_index(letter[1]) if letter else -1
    return index if 0 <= index < len(choices) else None


def _find_classes(records, table):
    """Make the distinct answers the options of every row, where they are few, short and repeated.

    A review is "positive" or "negative"; a sum is a number of its own.
    """
    answered = [r for r in records if "answer" in r and r.get("choices") is None]
    counts = Counter(r["answer"].strip() for r in answered)
    looks_like_classes = (
        2 <= len(counts) <= min(_MOST_CLASSES, len(answered) // _ROWS_PER_CLASS)
        and max(map(len, counts)) <= _LONGEST_CLASS
        and "" not in counts
        and not any("solution" in r for r in answered)
    )
    if not looks_like_classes:
        return

    classes = sorted(counts)
    table.classes = tuple(classes)
    for record in records:
        if record.get("choices") is None:
            record["choices"] = classes
            if "answer" in record:
                record["gold"] = classes.index(record.pop("answer").strip())
    shown = ", ".join(f"{name} ({counts[name]})" for name in classes[:10])
    table.notes.append(f"the {len(classes)} distinct answers are the options of every row: {shown}")


def is_labelled(record: dict) -> bool:
    """Does a record say what the right answer is?"""
    return record.get("gold") is not None or record.get("answer") is not None


def _refuse_mixtures(records):
    """Options are compared and free answers generated: a task does one or the other."""
    labelled = [r for r in records if is_labelled(r)]
    for record in labelled:
        if ("choices" in record) != ("choices" in labelled[0]):
            raise formats.bad_row(record["place"], "rows with and without `choices` in one file")


def _clean(records, table, labels, ids):
    """What a task is made of: rows with one clear label, each once, under an id of its own."""
    kept = []
    questions: dict[tuple, dict] = {}
    unlabelled = []
    unclear = []
    repeated = []
    contradicting = []
    renamed = []
    for record in records:
        if not is_labelled(record):
            if labels:
                unlabelled.append(record)
                continue
        elif _is_unclear(record):
            unclear.append(record)
            continue
        else:
            first = questions.setdefault(_question_key(record), record)
            if first is not record:
                same = _right_answer(first) == _right_answer(record)
                (repeated if same else contradicting).append(record)
                continue
        if record["id"] in ids:
            record["id"] = f"{record['id']}, {record['place']}"
            renamed.append(record)
        ids.add(record["id"])
        kept.append(record)

    table.notes += _describe_dropped(unlabelled, "have no label and are dropped")
    table.notes += _describe_dropped(unclear, "have the right answer twice and are dropped")
    table.notes += _describe_dropped(repeated, "repeat an earlier one and are dropped")
    table.notes += _describe_dropped(
        contradicting, "repeat an earlier one with another label and are dropped: the first stays"
    )
    table.notes += _describe_dropped(renamed, "have an id that came before: their place is added")
    return kept


def _is_unclear(record):
    """Is the right option's text that of another option too? By letter they can be told apart."""
    if "gold" not in record or "letters_in_prompt" in record:
        return False
    texts = [choice.strip() for choice in record["choices"]]
    return texts.count(texts[record["gold"]]) > 1


def _question_key(record):
    texts = [record["question"], record.get("context") or ""]
    options = sorted(choice.strip() for choice in record.get("choices") or ())
    return (*(" ".join(text.split()) for text in texts), *options)


def _right_answer(record):
    return record["choices"][record["gold"]].strip() if "gold" in record else record["answer"]


def _describe_dropped(records, what):
    places = [record["place"].rpartition(":")[2].strip() for record in records[:3]]
    more = ", …" if len(records) > 3 else ""
    return [f"{len(records)} rows {what} ({', '.join(places)}{more})"] if records else []


def read_hub(cfg: Config, name: str, labels: bool) -> Table:
    """Records of a hub id or a local folder of parquet or JSON files, by `load_dataset`.

    Raises: UserError: it cannot be loaded, or its columns or rows are none of a task.
    """
    from datasets import load_dataset  # slow to import

    known = benchmarks.HUB.get(name, benchmarks.HubSet("", {}))
    path = cfg.data.hub.get(name, known.path)
    subsets = known.configs
    if not path:
        raise UserError(
            f"task {name}: no hub data set known (JAMA is licensed: bring your own file); use "
            f"data.jsonl={{{name}: file.jsonl}} or data.hub={{{name}: org/name}}"
        )
    # a folder has no configurations
    if Path(path).is_dir():
        subsets = (None,)
    elif path.count("/") == 2:
        path, _, subset = path.rpartition("/")  # org/name/configuration
        subsets = (subset,)

    rows: dict[str, list[Row]] = {}
    class_names: dict[str, list[str]] = {}
    revision = ""
    for subset in subsets:
        try:
            loaded = load_dataset(path, subset)
            # of the twelve it is known which split the papers test on
            splits = known.splits or _our_splits(loaded)
            found = {ours: loaded[theirs] for ours, theirs in splits.items()}
        except Exception as e:  # the library raises many types; each means the same to the user
            raise UserError(
                f"data.hub.{name}={path}: cannot load it ({type(e).__name__}: {str(e)[:160]}); "
                f"check the network, or set data.hub={{{name}: org/name, org/name/configuration "
                f"or a folder of parquet or JSON files}} or data.jsonl={{{name}: file.jsonl}}"
            ) from None
        for split, of_split in found.items():
            # rows are counted per configuration and split: both make an id unique
            prefix = f"{name}-{subset}-{split}" if len(subsets) > 1 else f"{name}-{split}"
            class_names |= formats.class_names(of_split)
            revision = hub_revision(of_split)
            rows.setdefault(split, [])
            for i, cells in enumerate(of_split):
                key = f"{prefix}-{i}"
                rows[split].append(Row(f"data.hub.{name}={path}, row {key}", key, cells))

    columns = cfg.data.columns.get(name)
    every_row = list(chain.from_iterable(rows.values()))
    first = every_row[0].cells if every_row else {}
    # others publish the same benchmarks with options of their own
    published = formats.released_form(first) or {"A", "B"} <= set(first)
    if known.read and not columns and not published:
        table = Table({split: _known_records(known, of_split) for split, of_split in rows.items()})
    else:
        table = read_rows(
            rows, path, labels, class_names, columns, free=is_free(cfg, name), task=name
        )
    table.revision = revision
    return table


def is_free(cfg: Config, name: str) -> bool:
    """Are a task's answers free texts even where they look like the names of classes?"""
    return name in benchmarks.FREE_ANSWER or cfg.data.math_form == "generate"


def _our_splits(loaded):
    """{our split: theirs} of any data set; one without a test split is one pool, which we cut."""
    for test in ("test", "validation"):
        if test in loaded and "train" in loaded:
            return {"train": "train", "test": test}
    return {"all": next(iter(loaded))}


def _known_records(known, rows):
    """Rows of one of the twelve as its card describes them; rows whose label is hidden go."""
    records = []
    for row in rows:
        try:
            record = benchmarks.hub_record(row.cells, known)
        except (KeyError, IndexError) as e:
            name = row.name.split("-")[0]
            raise UserError(
                f"data.columns.{name}: no {e}; {row.place} has the columns {list(row.cells)}; set "
                f"data.columns={{{name}: {{question: …, choices: … or […, …], gold: …}}}}"
            ) from None
        if is_labelled(record):
            records.append({**record, "id": row.name})
    return records


def hub_revision(rows) -> str:
    """The commit of a hub data set, by which its cached files are filed; "" for a local folder."""
    for file in rows.cache_files:
        found = re.search(r"/([0-9a-f]{40})/", file["filename"])
        if found:
            return found[1]
    return ""
