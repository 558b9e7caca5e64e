"""Tasks: prompts with options and honest splits, from benchmarks, the hub or a user's file.

Every source yields the same records {id, question, context, choices, gold, answer}. One function
turns a record into the `Example` that a model sees, so the sources cannot drift apart. Splits
depend on the seed and the task's name alone.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import yaml

import config
import runtime
from config import Columns, Config, UserError
from runtime import Run

LETTERS = "ABCDEFGHIJ"
LETTER_SYSTEM = (
    "You answer multiple-choice questions. Reply with nothing but the letter of the right option "
    "in square brackets, for example [A]."
)
GENERATE_SYSTEM = "Solve the problem. End with the final answer on a line of its own, after ####."


@dataclass(frozen=True)
class Example:
    """One question as the model sees it.

    Attributes:
        prompt: the text before the answer.
        options: the continuations to compare; () for a free-form answer.
        gold: the index of the right option.
        answer: the text of the right answer.
        suffix: the text after the option (WinoGrande's blank), which is then what is scored.
    """

    id: str
    prompt: str
    options: tuple[str, ...] = ()
    gold: int | None = None
    answer: str = ""
    suffix: str = ""

    @property
    def text(self) -> str:
        """The unlabelled input: what conditions the generator, what test-time training reads."""
        return f"{self.prompt} _{self.suffix}" if self.suffix else self.prompt


@dataclass(frozen=True)
class Task:
    """One benchmark with its splits. Only `evaluate` reads labels of the test split."""

    name: str
    title: str
    domain: str  # "id" (meta-training, leave-one-out) or "ood"
    source: str
    stand_in_for: str  # "" or the paper's benchmark this data stands in for
    context: str  # one paragraph for the policy
    train: tuple[Example, ...]
    support: tuple[Example, ...]
    test: tuple[Example, ...]
    prompts: tuple[str, ...]  # unlabelled


@dataclass(frozen=True)
class Benchmark:
    """A title for the tables, where the embedded data comes from, and what it stands in for."""

    title: str
    source: str
    stand_in_for: str = ""


_BUILT = "(options built here from gold answers and seeded distractors)"
BENCHMARKS = {
    "arc_c": Benchmark("ARC-c", "ARC-Challenge"),
    "arc_e": Benchmark("ARC-e", "ARC-Easy"),
    "hellaswag": Benchmark("HellaSwag", "HellaSwag, validation as test"),
    "boolq": Benchmark("BoolQ", "BoolQ with passage, validation as test"),
    "piqa": Benchmark("PIQA", "PIQA, validation as test"),
    "winogrande": Benchmark("WinoGrande", "WinoGrande XL, validation as test"),
    "gsm8k": Benchmark("GSM8K", "GSM8K test", f"GSM8K {_BUILT}"),
    "math": Benchmark("MATH", "MATH test", f"MATH {_BUILT}"),
    "divlogic": Benchmark("DivLogicEval", "basic-skills logical reasoning", "DivLogicEval"),
    "socialiqa": Benchmark("SocialIQA", "SocialIQA, validation as test"),
    "codemmlu": Benchmark("CodeMMLU", "basic-skills coding", "CodeMMLU"),
    "jama": Benchmark("JAMA", "MedQA (USMLE, English) test", "JAMA Clinical Challenge"),
}
# their records have an answer but no options
FREE_ANSWER = ("gsm8k", "math")


def read_records(cfg: Config, name: str) -> dict[str, list[dict]]:
    """{split: records} from the configured source. Raises: UserError."""
    if name in cfg.data.jsonl:
        return _read_user_files(cfg.data.jsonl[name], labels=name != cfg.task)
    if cfg.data.source == "hub" or name in cfg.data.hub:
        return _read_hub(cfg, name)
    if cfg.data.source == "assets":
        return _read_assets(config.ROOT / cfg.data.dir, name)
    raise UserError(
        f"data.jsonl: no file for task {name}; add `data.jsonl: {{{name}: {name}.jsonl}}`"
    )


def is_labelled(row: dict) -> bool:
    """Does a record say what the right answer is?"""
    return row.get("gold") is not None or row.get("answer") is not None


def _read_assets(folder, name):
    """Records of an embedded benchmark: a train and a test file, or one file of all."""
    one_pool = (folder / f"{name}.all.jsonl.gz").exists()
    records = {}
    for split in ("all",) if one_pool else ("train", "test"):
        file = folder / f"{name}.{split}.jsonl.gz"
        if not file.exists() and name not in BENCHMARKS:
            raise UserError(
                f"task {name} is not one of the embedded tasks ({', '.join(BENCHMARKS)}); give its "
                f"file as data.jsonl={{{name}: file.jsonl}}"
            )
        if not file.exists():
            raise UserError(f"{file}: missing; run `make assets`")
        try:
            with gzip.open(file, "rt") as lines:
                records[split] = [json.loads(line) for line in lines]
        except (OSError, EOFError, ValueError) as e:
            raise UserError(f"{file}: damaged ({e}); delete it and run `make assets`") from None
        if not one_pool:
            # both files count from 0
            for row in records[split]:
                row["id"] = row["id"].replace("-", f"-{split}-", 1)
    return records


GOOD_ROW = '{"id": "q1", "question": "Which ...?", "choices": ["one", "two"], "gold": 0}'


def _read_user_files(pattern, labels):
    """One file, or `my_{split}.jsonl` for the splits train and test."""
    seen = {}
    records = {}
    for split in ("train", "test") if "{split}" in pattern else ("all",):
        path = Path(pattern.replace("{split}", split))
        records[split] = read_user_file(path, seen, labels)
    return records


def read_user_file(
    path: Path, seen: dict[str, str] | None = None, labels: bool | None = True
) -> list[dict]:
    """Read and check a user's JSONL or CSV: {question, choices, gold} or {question, answer}.

    Args:
        seen: {id: where} of rows read before; this file's are added.
        labels: must every row be labelled? None: labels do not matter.
    Raises: UserError: the file and line of the first bad row, with an example of a good one.
    """
    seen = {} if seen is None else seen
    rows = []
    first_labelled = None
    for line, row in _user_rows(path):
        try:
            if isinstance(row, str):
                row = _parse_json(row)
            row = check_row({"id": f"{path.stem}-{line}", **row}, labels)
            if row["id"] in seen:
                raise ValueError(f"id {row['id']!r} was used before, at {seen[row['id']]}")
            if is_labelled(row):
                first_labelled = first_labelled or row
                if ("choices" in row) != ("choices" in first_labelled):
                    raise ValueError("rows with and without `choices` in one file")
        except ValueError as e:
            raise _bad_row(path, line, e) from None
        seen[row["id"]] = f"{path}:{line}"
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no rows; expected JSON lines such as {GOOD_ROW}")
    return rows


def _bad_row(path, line, what):
    return UserError(f"{path}:{line}: {what}; a good row: {GOOD_ROW}")


def _user_rows(path):
    """Yield (line number, text of JSON) or, of a CSV with a header, (line number, record)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{path}: cannot read ({e}); expected UTF-8 JSON lines such as {GOOD_ROW}"
        ) from None
    if path.suffix.lower() != ".csv":
        # not splitlines(): other separators than a newline may stand inside a JSON text
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, line
        return
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        # spreadsheets put spaces around the names, and capitals into them
        names = [cell.strip() for cell in reader.fieldnames or ()]
        reader.fieldnames = [name if len(name) == 1 else name.lower() for name in names]
        for cells in reader:
            if None in cells:
                raise csv.Error("more cells than the header has columns")
            yield reader.line_num, _from_cells(cells)
    except csv.Error as e:
        raise _bad_row(path, max(1, reader.line_num), f"not CSV ({e})") from None


def _from_cells(cells):
    """Options are the columns choice1, choice2, … or A, B, C, …; empty cells are no values."""
    row = {column: cell for column, cell in cells.items() if cell}
    columns = [column for column in cells if re.fullmatch(r"choice_?\d+|[A-J]", column)]
    options = [row.pop(column, "") for column in columns]
    # a row may have fewer options than the header; a gap is a fault
    while options and not options[-1]:
        options.pop()
    if options:
        row["choices"] = options
    if row.get("gold", "").isdecimal():
        row["gold"] = int(row["gold"])
    return row


def _parse_json(text):
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON ({str(e)[:80]})") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    # refuse half of a surrogate pair, which is no text
    json.dumps(row, ensure_ascii=False).encode()
    return row


def check_row(row: dict, labels: bool | None) -> dict:
    """One record as the rest expects it. Raises: ValueError: its first fault."""
    row = {**row, "id": str(row["id"]), "question": row.get("question", row.get("prompt"))}
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise ValueError("`question` is missing or empty")
    for key in ("context", "kind", "solution"):
        if not isinstance(row.get(key) or "", str):
            raise ValueError(f"`{key}` must be a text")

    if row.get("choices") is not None:
        _check_choices(row, labels)
        row.pop("answer", None)
        return row
    answer = row.pop("answer", None)
    for key in ("choices", "gold"):
        row.pop(key, None)
    if answer is not None and str(answer).strip():
        row["answer"] = str(answer).strip()
    elif labels:
        raise ValueError("neither `choices` with `gold` nor `answer` is given")
    return row


def _check_choices(row, labels):
    """Check the options of a row, and make its `gold` an index."""
    choices = row["choices"]
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not texts or len(choices) < 2:
        raise ValueError("`choices` must be a list of at least two texts")
    for i, choice in enumerate(choices):
        if not choice.strip():
            raise ValueError(f"option {i} is empty")

    gold = row.get("gold")
    if gold is None and labels is not None:
        # a label under another name would be lost without a word
        for key, value in row.items():
            is_label = key.lower() in ("answer", "label", "answerkey", "gold")
            if is_label and value not in (None, ""):
                raise ValueError(
                    f"`{key}` is not read beside `choices`: name the right option in `gold`"
                )
    if gold is None and labels:
        raise ValueError("`gold` is missing: the index of the right option, or its letter")
    if gold is not None:
        row["gold"] = _read_gold(gold, len(choices))


def _read_gold(gold, count):
    index = _letter_index(gold) if isinstance(gold, str) else gold
    if type(index) is not int or not 0 <= index < count:
        raise ValueError(f"`gold` is {gold!r}, expected 0..{count - 1} or A..{LETTERS[:count][-1]}")
    return index


def _letter_index(text):
    """0 for A or a, and so on; -1 for what names no option."""
    return LETTERS.find(text.upper()) if len(text) == 1 else -1


def _by_columns(columns, row):
    """A row as a record; its options are a list, a column each, or {text: […], label: […]}."""
    label = row[columns.gold]
    if isinstance(columns.choices, list):
        choices = [row[column] for column in columns.choices]
    else:
        choices = row[columns.choices]
    if isinstance(choices, dict):
        labels = choices["label"]
        choices = choices["text"]
        label = labels.index(label) if label in labels else label
    record = {"question": row[columns.question], "choices": choices, "gold": label}
    if columns.context:
        record["context"] = row[columns.context]
    return record


def _reader(**columns):
    return partial(_by_columns, Columns(**columns))


def _read_hellaswag(row):
    """Activity, context and its second part; the markup of the how-to texts goes."""

    def clean(text):
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [clean(ending) for ending in row["endings"]]
    return {"question": clean(text), "choices": endings, "gold": row["label"]}


def _read_boolq(row):
    record = {"question": row["question"], "context": row["passage"]}
    return record | {"choices": ["yes", "no"], "gold": 0 if row["answer"] else 1}


def _read_codemmlu(row):
    # one of the nine configurations has a description beside the question
    record = {"question": row["question"], "context": row.get("problem_description")}
    return record | {"choices": row["choices"], "gold": row["answer"]}


def _read_gsm8k(row):
    answer = row["answer"].split("####")[1].strip().replace(",", "")
    return {"question": row["question"], "answer": answer, "solution": row["answer"]}


def _read_math(row):
    # a stored answer is damaged in places; the last box of the solution is not
    answer = last_boxed(row["solution"])
    return {"question": row["problem"], "answer": answer, "kind": row["type"]}


_read_arc = _reader(question="question", choices="choices", gold="answerKey")
_read_piqa = _reader(question="goal", choices=["sol1", "sol2"], gold="label")
_read_winogrande = _reader(question="sentence", choices=["option1", "option2"], gold="answer")
_read_socialiqa = _reader(
    question="question",
    context="context",
    choices=["answerA", "answerB", "answerC"],
    gold="label",
)


@dataclass(frozen=True)
class HubSet:
    """A benchmark on the hub, and how its rows become records.

    Attributes:
        path: the hub id.
        splits: {our split: theirs}; what has no test split is one pool, `all`.
        read: from a row to a record; None where data.columns must say how.
        configs: the configurations that make it up.
        first_label: what its numeric labels count from.
    """

    path: str
    splits: dict[str, str]
    read: Callable[[dict], dict] | None = None
    configs: tuple[str | None, ...] = (None,)
    first_label: int = 0


_TEST = {"train": "train", "test": "test"}
_VALIDATION = {"train": "train", "test": "validation"}
MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
_CODEMMLU = (
    "programming_syntax",
    "software_principles",
    "api_frameworks",
    "dbms_sql",
    "code_completion",
    "code_repair",
    "execution_prediction",
    "fill_in_the_middle",
    "others",
)
# JAMA is licensed and has none. The card of DivLogicEval does not name its columns.
HUB = {
    "arc_c": HubSet("allenai/ai2_arc", _TEST, _read_arc, ("ARC-Challenge",)),
    "arc_e": HubSet("allenai/ai2_arc", _TEST, _read_arc, ("ARC-Easy",)),
    "hellaswag": HubSet("Rowan/hellaswag", _VALIDATION, _read_hellaswag),
    "boolq": HubSet("google/boolq", _VALIDATION, _read_boolq),
    # the original of PIQA is a script, which the library no longer runs
    "piqa": HubSet("baber/piqa", _VALIDATION, _read_piqa),
    "winogrande": HubSet(
        "allenai/winogrande", _VALIDATION, _read_winogrande, ("winogrande_xl",), 1
    ),
    "gsm8k": HubSet("openai/gsm8k", _TEST, _read_gsm8k, ("main",)),
    "math": HubSet("EleutherAI/hendrycks_math", _TEST, _read_math, MATH_SUBJECTS),
    "divlogic": HubSet("ttchungc/DivLogicEval", {"all": "polished"}),
    "socialiqa": HubSet("lighteval/siqa", _VALIDATION, _read_socialiqa, first_label=1),
    "codemmlu": HubSet("Fsoft-AIC/CodeMMLU", {"all": "test"}, _read_codemmlu, _CODEMMLU),
}


def _read_hub(cfg, name):
    """Records of a hub id or a local folder of parquet or JSON files, by `load_dataset`."""
    from datasets import load_dataset

    known = HUB.get(name, HubSet("", {}))
    path = cfg.data.hub.get(name, known.path)
    configs = known.configs
    if not path:
        raise UserError(
            f"task {name}: no hub data set known (JAMA is licensed: bring your own file); use "
            f"data.jsonl={{{name}: file.jsonl}} or data.hub={{{name}: org/name}}"
        )
    if Path(path).is_dir():
        configs = (None,)
    elif name not in HUB and path.count("/") == 2:
        path, _, subset = path.rpartition("/")  # org/name/configuration
        configs = (subset,)

    records = {}
    for subset in configs:
        try:
            loaded = load_dataset(path, subset)
            splits = known.splits or _our_splits(loaded)
            found = {ours: loaded[theirs] for ours, theirs in splits.items()}
        except Exception as e:  # the library raises many types; each means the same to the user
            raise UserError(
                f"data.hub.{name}={path}: cannot load it ({type(e).__name__}: {str(e)[:160]}); "
                f"check the network, or set data.hub={{{name}: org/name, org/name/configuration "
                f"or a folder of parquet or JSON files}} or data.jsonl={{{name}: file.jsonl}}"
            ) from None
        for split, rows in found.items():
            prefix = f"{name}-{subset}-{split}" if len(configs) > 1 else f"{name}-{split}"
            records.setdefault(split, [])
            records[split] += _hub_records(cfg, name, path, rows, prefix)
    return records


def _our_splits(loaded):
    """{our split: theirs} of any data set; one without a test split is one pool, which we cut."""
    for test in ("test", "validation"):
        if test in loaded and "train" in loaded:
            return {"train": "train", "test": test}
    return {"all": next(iter(loaded))}


def _hub_records(cfg, name, path, rows, prefix):
    """Rows of a hub data set as records; rows whose label is hidden are left out.

    Raises: UserError: columns that nobody named or that are not there; a row that is no question.
    """
    columns = cfg.data.columns.get(name)
    known = HUB.get(name)
    found = (
        f"{path} has the columns {rows.column_names}; set data.columns={{{name}: "
        "{question: …, choices: … or […, …], gold: …}}"
    )
    if columns is None and (known is None or known.read is None):
        raise UserError(f"data.columns.{name}: not given; {found}")
    records = []
    for i, row in enumerate(rows):
        key = f"{prefix}-{i}"
        try:
            record = {"id": key, **hub_record(row, known, columns)}
            if not is_labelled(record):
                continue
            if columns:
                record = check_row(record, True)
        except (KeyError, IndexError) as e:
            raise UserError(f"data.columns.{name}: no {e}; {found}") from None
        except ValueError as e:
            raise UserError(f"data.hub.{name}={path}, row {key}: {e}") from None
        records.append(record)
    return records


def hub_record(row: dict, known: HubSet | None, columns: Columns | None = None) -> dict:
    """One row as a record: by its columns where they are given, else as of a known data set."""
    record = _by_columns(columns, row) if columns else known.read(row)
    if "gold" in record:
        # what the user says comes before what we know
        record["gold"] = _read_label(record, None if columns else known)
    return record


def _read_label(record, known):
    """The index of the right option; None where the label is hidden.

    A label of a known data set is what its card says. Of any other it is an option's own text,
    a letter or an index from 0.
    Raises: ValueError: such a label names no option.
    """
    label = record["gold"]
    choices = record["choices"]
    said = str(label).strip()
    if label is None or said in ("", "-1"):
        return None
    if not isinstance(choices, list):
        raise ValueError("`choices` must be a list of at least two texts")
    if not known and isinstance(label, str) and choices.count(label) == 1:
        return choices.index(label)
    index = _letter_index(said)
    if said.isdecimal():
        index = int(said) - (known.first_label if known else 0)
    if 0 <= index < len(choices):
        return index
    if known:
        return None
    raise ValueError(
        f"its label {label!r} names none of its {len(choices)} options (an index from 0, a letter "
        "or an option's text); use data.jsonl={task: file.jsonl}"
    )


def make_example(name: str, record: dict, form: str) -> Example:
    """One record in the cloze or the letter format; without choices, a generation example."""
    question = record["question"].strip()
    context = (record.get("context") or "").strip()
    if record.get("choices") is None:
        prompt = f"{context}\n{question}".strip()
        if form == "cloze":
            prompt = f"Question: {prompt}\nAnswer:"
        return Example(record["id"], prompt, answer=str(record.get("answer", "")))

    choices = tuple(choice.strip() for choice in record["choices"])
    gold = record.get("gold")
    if form == "letter":
        return _letter_example(record["id"], f"{context}\n{question}".strip(), choices, gold)

    prompt = f"Question: {context} {question}\nAnswer:"
    suffix = ""
    if not context:
        prompt = f"Question: {question}\nAnswer:"
    if name == "winogrande" and question.count("_") == 1:
        # partial evaluation: the options fill the blank, and the text after it is scored
        before, after = question.split("_")
        prompt = before.strip()
        suffix = " " + after.strip()
    elif name in ("hellaswag", "divlogic"):
        prompt = question
    elif name == "codemmlu" and question.endswith("return"):
        # a function stub to be completed, not a question; its indentation counts
        prompt = record["question"].rstrip()
    elif name == "boolq":
        prompt = f"{context}\nQuestion: {question.rstrip('?')}?\nAnswer:"
    answer = "" if gold is None else choices[gold]
    return Example(record["id"], prompt, choices, gold, answer, suffix)


def _letter_example(key, head, choices, gold):
    """Lettered options in the prompt; the answers are bracketed letters (the papers' format)."""
    if len(choices) > len(LETTERS):
        raise UserError(
            f"{key}: {len(choices)} options, the letter format has {len(LETTERS)} letters; use "
            "data.format=cloze"
        )
    prompt = head
    options = ()
    for letter, choice in zip(LETTERS, choices, strict=False):
        prompt += f"\n{letter}: {choice}"
        options += (f"[{letter}]",)
    answer = "" if gold is None else options[gold]
    return Example(key, prompt, options, gold, answer)


def add_distractors(records: list[dict], seed: int) -> list[dict]:
    """A multiple-choice form of gsm8k and math: the gold answer among three seeded distractors.

    Distractors are, in this order of preference: numbers of the worked solution or the question,
    the gold answer shifted or scaled, answers of the same look to other problems of the same kind.
    """
    alike = {}
    for record in records:
        alike.setdefault(_shape(record), []).append(record["answer"])
    built = []
    for record in records:
        rng = runtime.rng_for(seed, "distractors", record["id"])
        others = alike[_shape(record)]
        candidates = _near_numbers(record, rng)
        candidates += [others[i] for i in rng.integers(len(others), size=16)]

        # the first text of each value; the gold answer's own comes first of all
        texts = {_plain_tex(record["answer"]): record["answer"]}
        for text in filter(None, candidates):
            texts.setdefault(_plain_tex(text), text)
        gold, *wrong = texts.values()
        if not gold or len(wrong) < 3:
            continue

        choices = [*wrong[:3], gold]
        order = rng.permutation(4).tolist()
        shuffled = [choices[i] for i in order]
        built.append({**record, "choices": shuffled, "gold": order.index(3)})
    return built


def _shape(record):
    """Answers of one kind and look: a lone fraction among integers would give itself away."""
    look = "text"
    if _is_integer(record):
        look = "integer"
    elif "\\" in record["answer"]:
        look = "tex"
    return record.get("kind", ""), look


def _is_integer(record):
    return re.fullmatch(r"-?\d+", record["answer"])


def _plain_tex(text):
    text = re.sub(r"\\left|\\right|\\[!,]|[\s$]", "", text)
    return text.replace("dfrac", "frac").replace("tfrac", "frac")


def _near_numbers(record, rng):
    """Wrong integers for an integer answer, in the order of preference; [] for another answer."""
    if not _is_integer(record):
        return []
    gold = int(record["answer"])
    text = (record.get("solution") or "") + " " + record["question"]
    seen = re.findall(r"(?<![\w.])\d+(?![\w.])", text.replace(",", ""))
    shifted = [gold + step for step in (1, 2, 10, -1, -2, -10)]
    scaled = [gold * 2, gold * 10, gold // 2, gold // 10]
    # a negative number stands out beside a positive answer
    numbers = dict.fromkeys([*map(int, seen), *shifted, *scaled])
    pool = _shuffled([x for x in numbers if x != gold and (x >= 0 or gold < 0)], rng)
    low = [x for x in pool if x < gold]
    high = [x for x in pool if x > gold]
    # how many are smaller is drawn first: the gold answer's rank by size gives nothing away
    k = int(rng.integers(4))
    preferred = low[:k] + high[: 3 - k] + low[k:] + high[3 - k :]
    return [str(x) for x in preferred]


def last_boxed(solution: str) -> str:
    """Content of the last \\boxed{...} (or `\\boxed 5`), braces balanced; "" without a box."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*", solution))
    if not boxes:
        return ""
    rest = solution[boxes[-1].end() :]
    if not rest.startswith("{"):
        return re.split(r"[ $]", rest)[0]
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i].strip()
    return rest[1:].strip()


def make_splits(
    cfg: Config, name: str, pools: dict[str, list[Example]]
) -> tuple[tuple, tuple, tuple]:
    """Disjoint train, support and test examples, after one seeded shuffle of each pool.

    Args: pools: {"train": …, "test": …} where the benchmark has both, else {"all": …}.
    Raises: UserError: too few for the support set, or no test example behind skip_test.
    """
    d = cfg.data
    rng = runtime.rng_for(cfg.seed, "split", name)
    pools = {split: _shuffled(_unique(pool, name), rng) for split, pool in pools.items()}
    skips = d.skip_test and name in (d.targets or [name])
    if "test" in pools:
        rest = pools["train"]
        # the whole benchmark test set is kept out of training, not only the part scored here
        held_out = pools["test"]
        test = held_out[d.skip_test : d.skip_test + d.num_test]
        if skips and not test:
            raise _skipped_too_far(cfg, name, f"{len(held_out)} test examples")
    else:
        if skips and name in (cfg.task, *d.train_tasks):
            # what is left of the one pool was trained on
            raise _skipped_too_far(cfg, name, "no test split of its own")
        test, rest = _cut_test(cfg, name, pools["all"])
        held_out = test

    rest = _without(rest, held_out, name)
    support = rest[: d.num_support]
    if len(support) < d.num_support:
        if name == cfg.task:
            return (), (), tuple(test)  # too few labels to refine with: all of them test
        raise UserError(
            f"task {name}: {len(support)} examples remain for the support set, data.num_support="
            f"{d.num_support} are needed (after {len(test)} for the test); lower data.num_test or "
            "data.num_support, or add rows"
        )
    # a question of the support set may come again, with other options
    train = _without(rest[d.num_support :], support, name)
    if skips and "all" in pools:
        test, train = _skip_in_pool(cfg, name, test, train)
    return tuple(train), tuple(support), tuple(test)


def _cut_test(cfg, name, pool):
    """(test, rest) of one pool: the test examples first, then the support set, then train."""
    d = cfg.data
    num_test = d.num_test
    left = len(pool) - d.num_support
    if name == cfg.task:
        # a user's file of any size: the support set is served first; fewer labels than that test
        num_test = min(num_test, left) if left >= 0 else len(pool)
    elif num_test > left:
        # a benchmark smaller than was asked for: the test takes all that the support set leaves,
        # or half of it where train or prompts need the rest
        transductive = d.prompts_from == "test" and name not in d.train_tasks
        most = left if transductive else left // 2
        # a test smaller than the support set tells nothing: then the support set is refused
        if most >= d.num_support:
            num_test = most
            # the support set comes last in the pool, as it does for the user's own task
            pool = pool[:most] + pool[left:] + pool[most:left]
    return pool[:num_test], pool[num_test:]


def _skip_in_pool(cfg, name, test, train):
    """(test, train) where one pool feeds both: a fresh test is what nothing else uses."""
    d = cfg.data
    prompts = () if d.prompts_from == "test" else _distinct_texts(train)[: d.num_prompts]
    asked = {_key(text, name) for text in prompts}
    unused = test + [e for e in train if _key(e.text, name) not in asked]
    fresh = unused[d.skip_test : d.skip_test + len(test)]
    if not fresh:
        raise _skipped_too_far(cfg, name, f"{len(unused)} test examples")
    taken = set(fresh)
    return fresh, [e for e in train if e not in taken]


def _skipped_too_far(cfg, name, have):
    return UserError(
        f"data.skip_test={cfg.data.skip_test}: task {name} has {have}; skip less, or name "
        "data.targets without it"
    )


def _key(text, name):
    """What makes two questions the same: letters and digits in the twelve. In a user's task all
    but marks of punctuation, as an operator or a bracket may be the question."""
    ignored = r"\W+" if name in BENCHMARKS else r"[\s.,;:!?'\"]+"
    return re.sub(ignored, " ", text.lower()).strip()


def _unique(examples, name):
    """The first of each question with the same options, in whatever order they stand."""
    seen = {}
    for e in examples:
        seen.setdefault((_key(e.text, name), *sorted(e.options)), e)
    return list(seen.values())


def _without(examples, held_out, name):
    """The examples whose question is not among the held-out ones."""
    asked = {_key(e.text, name) for e in held_out}
    return [e for e in examples if _key(e.text, name) not in asked]


def _shuffled(items, rng):
    return [items[i] for i in rng.permutation(len(items))]


def _distinct_texts(examples):
    """What an unlabelled prompt may be, in order: prompts are the first, skip_test spares those."""
    return tuple(dict.fromkeys(e.text for e in examples))


def load_tasks(run: Run, names: list[str] | None = None) -> dict[str, Task]:
    """The tasks of this run, loaded once per process, in configuration order.

    Raises: UserError: missing files, damaged rows, too few examples.
    """
    names = names or run.cfg.data.train_tasks + run.cfg.data.test_tasks
    cache = run.cache.setdefault("tasks", {})
    for name in names:
        if name not in cache:
            cache[name] = load_task(run.cfg, name)
    return {name: cache[name] for name in names}


def load_task(cfg: Config, name: str) -> Task:
    """Read, format and split one task. Raises: UserError."""
    d = cfg.data
    records = read_records(cfg, name)
    pools = {split: _examples(cfg, name, rows) for split, rows in records.items()}
    train, support, test = make_splits(cfg, name, pools)
    if name in d.train_tasks and not train:
        raise UserError(
            f"task {name}: no training examples remain after {len(test)} for the test and "
            f"{len(support)} for the support set; add rows, or lower data.num_test"
        )
    rows = list(chain.from_iterable(records.values()))
    known = BENCHMARKS.get(name, Benchmark(name, d.source))
    embedded = d.source == "assets"
    stands_in = d.math_form == "choice" if name in FREE_ANSWER else embedded
    return Task(
        name=name,
        title=known.title,
        domain="id" if name in d.train_tasks else "ood",
        source=known.source if embedded else d.source,
        stand_in_for=known.stand_in_for if stands_in else "",
        context=read_contexts(cfg).get(name, ""),
        train=train[: d.num_train],
        support=support,
        test=test,
        prompts=_choose_prompts(cfg, name, rows, train, support, test),
    )


def _examples(cfg, name, rows):
    """The labelled records of a split as examples of the configured format."""
    rows = [row for row in rows if is_labelled(row)]
    if rows and "choices" not in rows[0] and cfg.data.math_form == "choice":
        rows = add_distractors(rows, cfg.seed)
    return [make_example(name, row, cfg.data.format) for row in rows]


def _choose_prompts(cfg, name, rows, train, support, test):
    """The unlabelled inputs: rows without a label, then inputs of train (or of test, if asked)."""
    # a question listed twice, once with its label, stays held out
    test_ids = {e.id for e in test}
    held_out = {_key(row["question"], name) for row in rows if row["id"] in test_ids}
    source = []
    for row in rows:
        if not is_labelled(row) and _key(row["question"], name) not in held_out:
            source.append(make_example(name, row, cfg.data.format))
    source += test if cfg.data.prompts_from == "test" else train
    if name == cfg.task and len(source) < cfg.generator.num_prompts:
        source += support  # a small file

    prompts = _distinct_texts(source)[: cfg.data.num_prompts]
    if not prompts:
        how = "lower data.num_test or add rows"
        if name == cfg.task:
            how = "add rows with nothing but a question"
        raise UserError(
            f"task {name}: no unlabelled prompts remain (data.prompts_from="
            f"{cfg.data.prompts_from}); {how}"
        )
    return prompts


def read_contexts(cfg: Config) -> dict[str, str]:
    """{task: paragraph} of policy.contexts. Raises: UserError."""
    path = Path(cfg.policy.contexts)
    path = path if path.exists() else config.ROOT / path
    wrong = f"policy.contexts={path}: expected YAML lines `task: paragraph`"
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise UserError(f"{wrong}; cannot read it ({str(e)[:100]})") from None
    if not isinstance(tree, dict) or not all(isinstance(v, str) for v in tree.values()):
        raise UserError(wrong)
    return {task: " ".join(paragraph.split()) for task, paragraph in tree.items()}


def training_tasks(cfg: Config, left_out: str) -> list[str]:
    """The tasks a model named after its left-out task may learn from."""
    return [task for task in cfg.data.train_tasks if task != left_out]


def left_out_for(cfg: Config, target: str) -> str:
    """Leave-one-out name of a target: itself in-domain, `all` (nothing left out) out of domain."""
    return target if target in cfg.data.train_tasks else "all"


def seed_name(left_out: str) -> str:
    """A left-out set's name in seeds: the committed results were drawn when `all` was `none`."""
    return "none" if left_out == "all" else left_out


def keep_example_ids(run: Run, wanted: list[Task]) -> None:
    """Write tasks.json, which is about the run's own tasks: a user's own leaves it as it is."""
    if not run.cfg.task:
        tasks = {task.name: task for task in wanted}
        described = describe_tasks(tasks, run.cfg.data.prompts_from)
        runtime.write_json(run.path / "tasks.json", described)


def describe_tasks(tasks: dict[str, Task], prompts_from: str) -> dict:
    """Sizes, chance and majority rates and example ids of each task, for tasks.json."""
    described = {}
    for task in tasks.values():
        chances = [1 / len(e.options) for e in task.test if e.options]
        golds = Counter(e.gold for e in task.test if e.gold is not None)
        num_test = max(1, len(task.test))
        described[task.name] = {
            "domain": task.domain,
            "title": task.title,
            "source": task.source,
            "stand_in_for": task.stand_in_for or None,
            "n_train": len(task.train),
            "n_support": len(task.support),
            "n_test": len(task.test),
            "n_prompts": len(task.prompts),
            "prompts_from": prompts_from,
            "chance": round(sum(chances) / num_test, 4),
            "majority": round(max(golds.values(), default=0) / num_test, 4),
            "support_ids": [e.id for e in task.support],
            "test_ids": [e.id for e in task.test],
        }
    return described
