"""Tasks: twelve benchmarks from the assets, the hub or a user's JSONL, as prompts with options and honest splits.

Every source yields the same records {id, question, context, choices, gold, answer}; one function turns a record into
the `Example` a model sees, so the three sources cannot drift apart. Splits depend on the seed and the task's name.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

import config
import runtime
from config import Config, UserError
from runtime import Run

LETTERS = "ABCDEFGHIJ"
LETTER_SYSTEM = (
    "You answer multiple-choice questions. Reply with nothing but the letter of the right option in "
    "square brackets, for example [A]."
)
GENERATE_SYSTEM = "Solve the problem. End with the final answer on a line of its own, after ####."


@dataclass(frozen=True)
class Example:
    """One question as the model sees it.

    Attributes:
        prompt: text before the answer. options: continuations to compare, () for free-form answers.
        gold: index into options. answer: gold text. suffix: text after the option (WinoGrande's blank), which is
        then what is scored. question, choices: the record's own words, for the letter format and the reports.
    """

    id: str
    prompt: str
    options: tuple[str, ...] = ()
    gold: int | None = None
    answer: str = ""
    suffix: str = ""

    @property
    def text(self) -> str:
        """The unlabelled input: what conditions the generator and what test-time training reads."""
        return f"{self.prompt} _{self.suffix}" if self.suffix else self.prompt


@dataclass(frozen=True)
class Task:
    """One benchmark with its splits. Test labels are read by `evaluate` and by nothing before it."""

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


# title, source of the embedded data, stand-in note
SPECS = {
    "arc_c": ("ARC-c", "ARC-Challenge", ""),
    "arc_e": ("ARC-e", "ARC-Easy", ""),
    "hellaswag": ("HellaSwag", "HellaSwag, validation as test", ""),
    "boolq": ("BoolQ", "BoolQ with passage, validation as test", ""),
    "piqa": ("PIQA", "PIQA, validation as test", ""),
    "winogrande": ("WinoGrande", "WinoGrande XL, validation as test", ""),
    "gsm8k": (
        "GSM8K",
        "GSM8K test",
        "GSM8K (options built here from gold answers and seeded distractors)",
    ),
    "math": (
        "MATH",
        "MATH test",
        "MATH (options built here from gold answers and seeded distractors)",
    ),
    "divlogic": ("DivLogicEval", "basic-skills logical reasoning", "DivLogicEval"),
    "socialiqa": ("SocialIQA", "SocialIQA, validation as test", ""),
    "codemmlu": ("CodeMMLU", "basic-skills coding", "CodeMMLU"),
    "jama": ("JAMA", "MedQA (USMLE, English) test", "JAMA Clinical Challenge"),
}
GENERATED = ("gsm8k", "math")  # tasks whose records have an answer but no options

# hub id, configuration, {our split: hub split}
HUB = {
    "arc_c": ("allenai/ai2_arc", "ARC-Challenge", {"train": "train", "test": "test"}),
    "arc_e": ("allenai/ai2_arc", "ARC-Easy", {"train": "train", "test": "test"}),
    "hellaswag": ("Rowan/hellaswag", None, {"train": "train", "test": "validation"}),
    "boolq": ("google/boolq", None, {"train": "train", "test": "validation"}),
    "piqa": (
        "baber/piqa",
        None,
        {"train": "train", "test": "validation"},
    ),  # the original is still a script
    "winogrande": ("allenai/winogrande", "winogrande_xl", {"train": "train", "test": "validation"}),
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "math": (
        "EleutherAI/hendrycks_math",
        (
            "algebra",
            "counting_and_probability",
            "geometry",
            "intermediate_algebra",
            "number_theory",
            "prealgebra",
            "precalculus",
        ),
        {"train": "train", "test": "test"},
    ),
    "divlogic": ("ttchungc/DivLogicEval", None, {"all": "polished"}),
    "socialiqa": ("lighteval/siqa", None, {"train": "train", "test": "validation"}),
    "codemmlu": (
        "Fsoft-AIC/CodeMMLU",
        (
            "programming_syntax",
            "software_principles",
            "api_frameworks",
            "dbms_sql",
            "code_completion",
            "code_repair",
            "execution_prediction",
            "fill_in_the_middle",
            "others",
        ),
        {"all": "test"},
    ),
}


def load_tasks(run: Run, names: list[str] | None = None) -> dict[str, Task]:
    """The tasks of this run, loaded once per process, in configuration order.

    Raises: UserError: missing files, damaged rows, too few examples.
    """
    d = run.cfg.data
    wanted = names or d.train_tasks + d.test_tasks
    cache = run.cache.setdefault("tasks", {})
    for name in wanted:
        if name not in cache:
            cache[name] = load_task(run.cfg, name)
    return {name: cache[name] for name in wanted}


def load_task(cfg: Config, name: str) -> Task:
    """Read, format and split one task. Raises: UserError."""
    records = read_records(cfg, name)
    bare = [r for rows in records.values() for r in rows if not is_labelled(r)]
    pools = {
        split: _examples(cfg, name, [r for r in rows if is_labelled(r)])
        for split, rows in records.items()
    }
    train, support, test = make_splits(cfg, name, pools)
    if name in cfg.data.train_tasks and not train:
        raise UserError(
            f"task {name}: no training examples remain after {len(test)} for the test and {len(support)} "
            "for the support set; add rows, or lower data.num_test"
        )
    asked = (
        {r["id"]: _key(r["question"], name) for rows in records.values() for r in rows}
        if bare
        else {}
    )
    held = (
        {asked[e.id] for e in test} if bare else ()
    )  # a question listed twice, once with its label, stays held out
    source = [make_example(name, r, cfg.data.format) for r in bare if asked[r["id"]] not in held]
    source += test if cfg.data.prompts_from == "test" else train
    if (
        name == cfg.task and len(source) < cfg.generator.num_prompts
    ):  # a small file: its support inputs, unlabelled
        source += support
    prompts = _distinct_texts(source)[: cfg.data.num_prompts]
    if not prompts:
        how = (
            "add rows with nothing but a question"
            if name == cfg.task
            else "lower data.num_test or add rows"
        )
        raise UserError(
            f"task {name}: no unlabelled prompts remain (data.prompts_from={cfg.data.prompts_from}); {how}"
        )
    title, origin, stand_in = SPECS.get(name, (name, cfg.data.source, ""))
    if cfg.data.source != "assets":
        origin, stand_in = (
            cfg.data.source,
            stand_in if name in GENERATED and cfg.data.math_form == "choice" else "",
        )
    if name in GENERATED and cfg.data.math_form == "generate":
        stand_in = ""
    return Task(
        name,
        title,
        "id" if name in cfg.data.train_tasks else "ood",
        origin,
        stand_in,
        read_contexts(cfg).get(name, ""),
        train[: cfg.data.num_train],
        support,
        test,
        prompts,
    )


def make_splits(
    cfg: Config, name: str, pools: dict[str, list[Example]]
) -> tuple[tuple, tuple, tuple]:
    """Disjoint train, support and test examples; duplicates across splits are dropped from the training side.

    Args: pools: {"train": …, "test": …} where the benchmark has both, else {"all": …}, cut in the order test,
        support, train after one seeded shuffle. Where num_test is more than the support set leaves, the support set
        comes last, and the test takes all of it with prompts_from=test, else half. Of the user's own task (`task=`) it
        takes all of it, and fewer labels than num_support are all for the test. With skip_test the test set of one
        pool goes on where test, support set and prompts end.
    Raises: UserError: fewer than num_support examples remain, or no test example lies behind skip_test.
    """
    d, rng = cfg.data, runtime.rng_for(cfg.seed, "split", name)
    pools = {k: _unique(v, name) for k, v in pools.items()}
    own, further = name == cfg.task, d.skip_test and name in (d.targets or [name])
    if (
        further and "test" not in pools and (own or name in d.train_tasks)
    ):  # what is left was trained on
        raise _skipped_too_far(cfg, name, "no test split of its own")
    if further and "test" in pools and d.skip_test >= len(pools["test"]):
        raise _skipped_too_far(cfg, name, f"{len(pools['test'])} test examples")
    pools = {k: [v[i] for i in rng.permutation(len(v))] for k, v in pools.items()}
    rest, num_test = pools.get("train", pools.get("all", [])), d.num_test
    left = len(rest) - d.num_support
    if (
        own and "test" not in pools
    ):  # a file of any size: the support set first, what is left of it tests
        num_test = min(num_test, left) if left >= 0 else len(rest)
    elif "test" not in pools and num_test > left:
        most = left if d.prompts_from == "test" and name not in d.train_tasks else left // 2
        if most >= d.num_support:  # fewer tell nothing: refused below
            num_test, rest = most, rest[:most] + rest[left:] + rest[most:left]
    test = (
        pools["test"][d.skip_test : d.skip_test + num_test] if "test" in pools else rest[:num_test]
    )
    if "test" not in pools:
        rest = rest[num_test:]
    # the whole benchmark test set is kept out of training, not only the part scored here
    held = {_key(e.text, name) for e in pools.get("test", test)}
    rest = [e for e in rest if _key(e.text, name) not in held]
    support, seen = rest[: d.num_support], {_key(e.text, name) for e in rest[: d.num_support]}
    rest = support + [e for e in rest[d.num_support :] if _key(e.text, name) not in seen]
    if own and len(rest) < d.num_support:  # too few labels to refine with: all of them test
        return (), (), tuple(test)
    if len(rest) < d.num_support:
        raise UserError(
            f"task {name}: {len(rest)} examples remain for the support set, data.num_support="
            f"{d.num_support} are needed (after {len(test)} for the test); lower data.num_test or "
            "data.num_support, or add rows"
        )
    train = rest[d.num_support :]
    if further and "test" not in pools:
        prompts = () if d.prompts_from == "test" else _distinct_texts(train)[: d.num_prompts]
        asked = {_key(text, name) for text in prompts}
        unused = [*test, *(e for e in train if _key(e.text, name) not in asked)]
        if d.skip_test >= len(unused):
            raise _skipped_too_far(cfg, name, f"{len(unused)} test examples")
        test = unused[d.skip_test : d.skip_test + num_test]
        taken = {e.id for e in test}
        train = [e for e in train if e.id not in taken]
    return tuple(train), tuple(rest[: d.num_support]), tuple(test)


def _distinct_texts(examples) -> tuple[str, ...]:
    """What an unlabelled prompt may be, in order: load_task takes the first, skip_test passes those over."""
    return tuple({e.text: None for e in examples})


def _skipped_too_far(cfg: Config, name: str, have: str) -> UserError:
    return UserError(
        f"data.skip_test={cfg.data.skip_test}: task {name} has {have}; skip less, or name data.targets "
        "without it"
    )


def _key(text: str, name: str) -> str:
    """What makes two questions the same: letters and digits in the twelve; all but marks of punctuation in a user's
    task, where an operator or a bracket may be the question."""
    return re.sub(r"\W+" if name in SPECS else r"[\s.,;:!?'\"]+", " ", text.lower()).strip()


def _unique(examples: list[Example], name: str) -> list[Example]:
    seen: dict = {}
    for e in examples:
        seen.setdefault((_key(e.text, name), tuple(sorted(e.options))), e)
    return list(seen.values())


def read_records(cfg: Config, name: str) -> dict[str, list[dict]]:
    """{split: records} from the configured source. Raises: UserError."""
    if name in cfg.data.jsonl:
        return _read_user_jsonl(cfg.data.jsonl[name], labels=name != cfg.task)
    if cfg.data.source == "hub" or name in cfg.data.hub:
        return _read_hub(cfg, name)
    if cfg.data.source == "assets":
        return _read_assets(Path(cfg.data.dir), name)
    raise UserError(
        f"data.jsonl: no file for task {name}; add `data.jsonl: {{{name}: {name}.jsonl}}`"
    )


def _read_assets(folder: Path, name: str) -> dict[str, list[dict]]:
    folder = folder if folder.is_absolute() else config.ROOT / folder
    files = {s: folder / f"{name}.{s}.jsonl.gz" for s in ("train", "test", "all")}
    found = {s: f for s, f in files.items() if f.exists()}
    if not ("all" in found or {"train", "test"} <= set(found)):
        raise UserError(
            f"{files['train']}: missing; run `make assets`"
            if name in SPECS
            else f"task {name} is not one of the embedded tasks ({', '.join(SPECS)}); give its file as "
            f"data.jsonl={{{name}: file.jsonl}}"
        )
    out = {}
    for split, file in found.items():
        try:
            with gzip.open(file, "rt") as f:
                out[split] = [json.loads(line) for line in f]
            if split != "all":  # both files count from 0
                for r in out[split]:
                    r["id"] = r["id"].replace("-", f"-{split}-", 1)
        except (OSError, EOFError, ValueError) as e:
            raise UserError(f"{file}: damaged ({e}); delete it and run `make assets`") from None
    return out


def _read_user_jsonl(pattern: str, labels: bool) -> dict[str, list[dict]]:
    """One file, or `my_{split}.jsonl` for splits train and test."""
    files = (
        {s: Path(pattern.replace("{split}", s)) for s in ("train", "test")}
        if "{split}" in pattern
        else {"all": Path(pattern)}
    )
    seen: dict[str, str] = {}
    return {split: read_user_file(path, seen, labels) for split, path in files.items()}


GOOD_ROW = '{"id": "q1", "question": "Which ...?", "choices": ["one", "two"], "gold": 0}'


def is_labelled(row: dict) -> bool:
    """Does a record say what the right answer is?"""
    return row.get("gold") is not None or row.get("answer") is not None


def _bad_row(path: Path, line: int, what: str) -> UserError:
    return UserError(f"{path}:{line}: {what}; a good row: {GOOD_ROW}")


def _user_lines(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, value) of JSON lines, or of a CSV file with a header.

    A CSV's options are its columns choice1, choice2, … or A, B, C, …; empty cells are no values.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{path}: cannot read ({e}); expected UTF-8 JSON lines such as {GOOD_ROW}"
        ) from None
    if path.suffix.lower() != ".csv":
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield n, json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise _bad_row(path, n, f"not JSON ({str(e)[:80]})") from None
        return
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names = [n.strip() for n in reader.fieldnames or ()]
    except csv.Error as e:
        raise _bad_row(path, 1, f"not CSV ({e})") from None
    reader.fieldnames = [
        n.lower() if n.lower() in ("id", "question", "prompt", "context", "gold", "answer") else n
        for n in names
    ]
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            raise _bad_row(path, reader.line_num, f"not CSV ({e})") from None
        if None in cells:
            raise _bad_row(path, reader.line_num, "more cells than the header has columns")
        row = {k: v for k, v in cells.items() if v}
        options = [k for k in cells if k and re.fullmatch(r"choice_?\d+|[A-J]", k)]
        given = [row.pop(k, "") for k in options]
        while (
            given and not given[-1]
        ):  # a row may have fewer options than the header; a gap is a fault
            given.pop()
        if given:
            row["choices"] = given
        if row.get("gold", "").isdecimal():
            row["gold"] = int(row["gold"])
        yield reader.line_num, row


def read_user_file(
    path: Path, seen: dict[str, str] | None = None, labels: bool | None = True
) -> list[dict]:
    """Read and check a user's JSONL or CSV: {question, choices, gold} or {question, answer}; id, context are optional.

    Args: labels: must every row be labelled? None: labels do not matter.
    Raises: UserError: naming file and line of the first bad row, with an example of a good one.
    """
    seen, rows, first = {} if seen is None else seen, [], None
    for n, row in _user_lines(path):
        bad = partial(_bad_row, path, n)
        if not isinstance(row, dict):
            raise bad(f"expected an object, got {type(row).__name__}")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise bad("holds half of a surrogate pair, which is no text") from None
        row = check_row({"id": f"{path.stem}-{n}", **row}, labels, bad)
        if row["id"] in seen:
            raise bad(f"id {row['id']!r} was used before, at {seen[row['id']]}")
        seen[row["id"]] = f"{path}:{n}"
        if is_labelled(row):
            first = first or row
            if ("choices" in row) != ("choices" in first):
                raise bad("rows with and without `choices` in one file")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no rows; expected JSON lines such as {GOOD_ROW}")
    return rows


def check_row(row: dict, labels: bool | None, bad) -> dict:
    """One record as the rest expects it. Raises: what `bad(text)` makes of the first fault."""
    row = {**row, "id": str(row["id"]), "question": row.get("question", row.get("prompt"))}
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise bad("`question` is missing or empty")
    for key in ("context", "kind", "solution"):
        if not isinstance(row.get(key) or "", str):
            raise bad(f"`{key}` must be a text")
    choices = row.get("choices")
    if choices is not None:
        if (
            not isinstance(choices, list)
            or len(choices) < 2
            or not all(isinstance(c, str) for c in choices)
        ):
            raise bad("`choices` must be a list of at least two texts")
        if not all(c.strip() for c in choices):
            raise bad(f"option {[bool(c.strip()) for c in choices].index(False)} is empty")
        other = next(
            (k for k in ("answer", "label", "answerKey", "Gold") if row.get(k) not in (None, "")),
            None,
        )
        if row.get("gold") is None and other and labels is not None:
            raise bad(f"`{other}` is not read beside `choices`: name the right option in `gold`")
        if labels or row.get("gold") is not None:
            row["gold"] = _read_gold(row.get("gold"), len(choices), bad)
        return {k: v for k, v in row.items() if k != "answer"}
    if row.get("answer") is not None and str(row["answer"]).strip():
        return {k: v for k, v in row.items() if k != "choices"} | {
            "answer": str(row["answer"]).strip()
        }
    if labels:
        raise bad("neither `choices` with `gold` nor `answer` is given")
    return {k: v for k, v in row.items() if k not in ("choices", "gold", "answer")}


def _read_gold(gold, n: int, bad) -> int:
    if gold is None or isinstance(gold, bool):
        raise bad("`gold` is missing: the index of the right option, or its letter")
    if isinstance(gold, str) and len(gold) == 1 and gold.upper() in LETTERS:
        gold = LETTERS.index(gold.upper())
    if not isinstance(gold, int) or not 0 <= gold < n:
        raise bad(f"`gold` is {gold!r}, expected 0..{n - 1} or A..{LETTERS[:n][-1]}")
    return gold


def _read_hub(cfg: Config, name: str) -> dict[str, list[dict]]:
    """Records from `datasets.load_dataset`, by hub id or from a local folder of parquet/JSON files (data.hub)."""
    from datasets import load_dataset

    if name not in HUB and name not in cfg.data.hub:
        raise UserError(
            f"task {name}: no hub data set known (JAMA is licensed: bring your own file); use "
            f"data.jsonl={{{name}: file.jsonl}} or data.hub={{{name}: org/name}}"
        )
    path, configs, splits = HUB.get(name, ("", None, None))
    if name in cfg.data.hub:
        path, configs = cfg.data.hub[name], None if Path(cfg.data.hub[name]).is_dir() else configs
    if (
        splits is None and not Path(path).is_dir() and path.count("/") == 2
    ):  # org/name/configuration
        path, configs = path.rsplit("/", 1)
    splits = splits or _hub_splits(name, path, configs)
    like = next((task for task, (of, *_) in HUB.items() if of == path), name)
    out = {}
    for ours, theirs in splits.items():
        rows = []
        for subset in configs if isinstance(configs, tuple) else (configs,):
            try:
                ds = load_dataset(path, subset, split=theirs, revision=None)
            except Exception as e:  # the library raises many types; each means the same to the user
                raise UserError(
                    f"data.source=hub: cannot load {path} {subset or ''} split {theirs} "
                    f"({type(e).__name__}: {str(e)[:160]}); check the network, or set "
                    f"data.hub={{{name}: folder}} or data.jsonl={{{name}: file.jsonl}}"
                ) from None
            try:
                rows += [
                    _hub_record(cfg, name, like, subset, f"{ours}-{i}", r, ds.column_names)
                    for i, r in enumerate(ds)
                ]
            except KeyError as e:
                raise UserError(
                    f"data.columns.{name}: {path} has no column {e}; its columns are {ds.column_names}; "
                    f"use data.jsonl={{{name}: file.jsonl}}"
                ) from None
        out[ours] = [r for r in rows if r is not None]
        if name not in HUB:

            def bad(row, what, path=path):
                return UserError(f"data.hub.{name}={path}, row {row['id']}: {what}")

            out[ours] = [check_row(r, True, partial(bad, r)) for r in out[ours]]
    return out


_COLUMNS = {  # candidates in order; data.columns overrides
    "question": (
        "question",
        "question_stem",
        "query",
        "goal",
        "sentence",
        "problem",
        "ctx",
        "premise",
        "premises",
    ),
    "context": ("passage", "context", "problem_description"),
    "choices": ("choices", "options", "endings"),
    "gold": ("answerKey", "label", "answer", "gold"),
}
_SPLIT_CHOICES = (
    ("sol1", "sol2"),
    ("option1", "option2"),
    ("answerA", "answerB", "answerC"),
    ("A", "B", "C", "D"),
)


def _hub_splits(name: str, path: str, config: str | None) -> dict[str, str]:
    """{our split: theirs} of a data set that is none of the twelve; one without a test split is cut by us."""
    from datasets import get_dataset_split_names

    try:
        have = get_dataset_split_names(path, config)
    except Exception as e:  # as in _read_hub
        raise UserError(
            f"data.hub.{name}={path}: cannot read its splits ({type(e).__name__}: {str(e)[:160]}); "
            "expected org/name, org/name/configuration or a folder of parquet or JSON files"
        ) from None
    test = next((s for s in ("test", "validation") if s in have), None)
    return {"train": "train", "test": test} if test and "train" in have else {"all": have[0]}


def _hub_record(
    cfg: Config, name: str, like: str, config: str | None, i: str, row: dict, columns: list[str]
) -> dict | None:
    """One hub row as a record, None without a label. `like`: which of the twelve the data set is, if any."""
    asked = cfg.data.columns.get(name, {})
    col = {
        k: asked.get(k) or next((c for c in names if c in row), None)
        for k, names in _COLUMNS.items()
    }
    missing = [c for c in asked.values() if c not in row]
    if col["question"] is None or missing:
        raise UserError(
            f"data.columns.{name}: {missing or ['question']} not among the columns {columns}"
        )
    rec = {
        "id": f"{name}-{config + '-' if config and name in ('math', 'codemmlu') else ''}{i}",
        "question": row[col["question"]],
        "context": row[col["context"]] if col["context"] else "",
    }
    if name == "math" and "solution" in row:  # else a copy of it that has options
        return rec | {
            "context": "",
            "answer": last_boxed(row["solution"]),
            "kind": row.get("type", config),
        }
    if name == "gsm8k" and "####" in str(row.get("answer")):
        return rec | {
            "answer": row["answer"].split("####")[-1].strip().replace(",", ""),
            "solution": row["answer"],
        }
    if name == "hellaswag":
        rec["question"] = _hellaswag_text(
            f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        )
        return _with_gold(rec, [_hellaswag_text(e) for e in row["endings"]], row["label"], None)
    if name == "boolq":
        return rec | {"choices": ["yes", "no"], "gold": 0 if row["answer"] else 1}
    choices = (
        row[col["choices"]]
        if col["choices"]
        else next(([row[c] for c in group] for group in _SPLIT_CHOICES if group[0] in row), None)
    )
    if choices is None or col["gold"] is None:
        raise UserError(
            f"data.columns.{name}: no choices or gold among the columns {columns}; set "
            f"data.columns={{{name}: {{question: …, choices: …, gold: …}}}}"
        )
    labels = choices["label"] if isinstance(choices, dict) else None
    choices = choices["text"] if isinstance(choices, dict) else choices
    # these two count their string labels from 1
    offset = 1 if like in ("winogrande", "socialiqa") else 0
    choices = (
        choices if isinstance(choices, str) else list(choices)
    )  # a text is no list of options: check_row says so
    return _with_gold(rec, choices, row[col["gold"]], labels, offset, like in HUB)


def _with_gold(
    rec: dict, choices: list[str], gold, labels: list | None, offset: int = 0, known: bool = True
) -> dict | None:
    """The record with its options and the index of the right one; None where it is hidden. Of the twelve (`known`) a
    label is what their cards say; of any other data set an option's own text, a letter or an index from 0.

    Raises: UserError: a label of another data set that names no option.
    """
    said = str(gold).strip()
    if gold is None or said in ("", "-1"):
        return None
    if labels is not None and gold in labels:
        index = labels.index(gold)
    elif not known and isinstance(gold, str) and choices.count(gold) == 1:  # the option itself
        index = choices.index(gold)
    elif len(said) == 1 and said.upper() in LETTERS:
        index = LETTERS.index(said.upper())
    else:
        index = int(said) - offset if said.isdecimal() else -1
    if known and not 0 <= index < len(choices):
        return None
    if not 0 <= index < len(choices):
        raise UserError(
            f"data.columns: row {rec['id']}: its label {gold!r} names none of its {len(choices)} options "
            "(an index from 0, a letter or an option's text); use data.jsonl={task: file.jsonl}"
        )
    return rec | {"choices": choices, "gold": index}


def _hellaswag_text(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _examples(cfg: Config, name: str, records: list[dict]) -> list[Example]:
    """Records as the examples of the configured format."""
    if records and "choices" not in records[0] and cfg.data.math_form == "choice":
        records = add_distractors(records, cfg.seed)
    return [make_example(name, r, cfg.data.format) for r in records]


def make_example(name: str, r: dict, form: str) -> Example:
    """One record in the cloze or the letter format. A record without choices becomes a generation example."""
    q, context = r["question"].strip(), (r.get("context") or "").strip()
    if "choices" not in r or r["choices"] is None:
        body = f"{context}\n{q}".strip()
        prompt = f"Question: {body}\nAnswer:" if form == "cloze" else body
        return Example(r["id"], prompt, (), None, str(r.get("answer", "")))
    choices, gold = tuple(c.strip() for c in r["choices"]), r.get("gold")
    answer = "" if gold is None else choices[gold]
    if form == "letter":
        if len(choices) > len(LETTERS):
            raise UserError(
                f"{r['id']}: {len(choices)} options, the letter format has {len(LETTERS)} letters; use "
                "data.format=cloze"
            )
        options = "\n".join(f"{LETTERS[i]}: {c}" for i, c in enumerate(choices))
        head = f"{context}\n{q}" if context else q
        return Example(
            r["id"],
            f"{head}\n{options}",
            tuple(f"[{LETTERS[i]}]" for i in range(len(choices))),
            gold,
            answer and f"[{LETTERS[gold]}]",
        )
    if (
        name == "winogrande" and q.count("_") == 1
    ):  # partial evaluation: the text after the blank is scored
        before, after = q.split("_")
        return Example(r["id"], before.strip(), choices, gold, answer, " " + after.strip())
    if name in ("hellaswag", "divlogic"):
        prompt = q
    elif name == "codemmlu" and q.endswith(
        "return"
    ):  # a function stub to be completed, not a question
        prompt = r["question"].rstrip()
    elif name == "boolq":
        prompt = f"{context}\nQuestion: {q.rstrip('?')}?\nAnswer:"
    else:
        prompt = f"Question: {context + ' ' if context else ''}{q}\nAnswer:"
    return Example(r["id"], prompt, choices, gold, answer)


def add_distractors(records: list[dict], seed: int, n: int = 4) -> list[dict]:
    """A multiple-choice form of gsm8k/math, built here: the gold answer among seeded distractors.

    Distractors are, in this order of preference: numbers of the worked solution or the question, the gold answer
    shifted or scaled, answers of the same look to other problems of the same kind.
    """
    alike: dict[tuple, list[str]] = {}
    for r in records:
        alike.setdefault(_shape(r), []).append(r["answer"])
    out = []
    for r in records:
        rng, pool = runtime.rng_for(seed, "distractors", r["id"]), alike[_shape(r)]
        wrong = _near_numbers(r, rng) + [pool[i] for i in rng.integers(len(pool), size=4 * n)]
        same = {_plain_tex(r["answer"])}
        wrong = [w for w in wrong if w and not (_plain_tex(w) in same or same.add(_plain_tex(w)))][
            : n - 1
        ]
        if not r["answer"] or len(wrong) < n - 1:
            continue
        choices = [*wrong, r["answer"]]
        order = rng.permutation(n)
        out.append(
            {**r, "choices": [choices[i] for i in order], "gold": int(list(order).index(n - 1))}
        )
    return out


def _shape(r: dict) -> tuple:
    """Answers of one kind and look: a lone fraction among integers would give itself away."""
    a = r["answer"]
    return r.get("kind", ""), "integer" if re.fullmatch(
        r"-?\d+", a
    ) else "tex" if "\\" in a else "text"


def _plain_tex(text: str) -> str:
    return (
        re.sub(r"\\left|\\right|\\[!,]|[\s$]", "", text)
        .replace("dfrac", "frac")
        .replace("tfrac", "frac")
    )


def _near_numbers(r: dict, rng) -> list[str]:
    if not re.fullmatch(r"-?\d+", r["answer"]):
        return []
    gold, text = int(r["answer"]), (r.get("solution") or "") + " " + r["question"]
    seen = [int(x) for x in re.findall(r"(?<![\w.])\d+(?![\w.])", text.replace(",", ""))]
    near = [gold + k for k in (1, 2, 10, -1, -2, -10)] + [
        gold * 2,
        gold * 10,
        gold // 2,
        gold // 10,
    ]
    pool = [*seen, *near]
    pool = [x for x in dict.fromkeys(pool) if x != gold and (x >= 0 or gold < 0)]
    pool = [pool[i] for i in rng.permutation(len(pool))]
    # how many are smaller is drawn first: the gold answer's rank by size gives nothing away
    low, high, k = (
        [x for x in pool if x < gold],
        [x for x in pool if x > gold],
        int(rng.integers(4)),
    )
    return [str(x) for x in low[:k] + high[: 3 - k] + low[k:] + high[3 - k :]]


def read_contexts(cfg: Config) -> dict[str, str]:
    """{task: paragraph} of policy.contexts. Raises: UserError."""
    path = Path(cfg.policy.contexts)
    path = path if path.is_absolute() or path.exists() else config.ROOT / path
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as e:
        raise UserError(
            f"policy.contexts={path}: cannot read ({str(e)[:100]}); expected YAML lines "
            "`task: paragraph`"
        ) from None
    if not isinstance(tree, dict) or not all(isinstance(v, str) for v in tree.values()):
        raise UserError(f"policy.contexts={path}: expected YAML lines `task: paragraph`")
    return {k: " ".join(v.split()) for k, v in tree.items()}


def describe_tasks(tasks: dict[str, Task], prompts_from: str) -> dict:
    """Sizes, chance and majority rates and example ids of each task, for tasks.json."""
    out = {}
    for t in tasks.values():
        golds = [e.gold for e in t.test if e.gold is not None]
        out[t.name] = {
            "domain": t.domain,
            "title": t.title,
            "source": t.source,
            "stand_in_for": t.stand_in_for or None,
            "n_train": len(t.train),
            "n_support": len(t.support),
            "n_test": len(t.test),
            "n_prompts": len(t.prompts),
            "prompts_from": prompts_from,
            "chance": round(
                sum(1 / len(e.options) for e in t.test if e.options) / max(1, len(t.test)), 4
            ),
            "majority": round(
                max((golds.count(g) for g in set(golds)), default=0) / max(1, len(t.test)), 4
            ),
            "support_ids": [e.id for e in t.support],
            "test_ids": [e.id for e in t.test],
        }
    return out


def training_tasks(cfg, left_out: str) -> list[str]:
    """The tasks a model named after its left-out task may learn from."""
    return [t for t in cfg.data.train_tasks if t != left_out]


def left_out_for(cfg, target: str) -> str:
    """Leave-one-out name of a target: itself in-domain, `all` (nothing left out) out of domain."""
    return target if target in cfg.data.train_tasks else "all"


def keep_example_ids(run: Run, wanted: list[Task]) -> None:
    if not run.cfg.task:  # the report is about the run's own tasks
        runtime.write_json(
            run.path / "tasks.json",
            describe_tasks({t.name: t for t in wanted}, run.cfg.data.prompts_from),
        )


def last_boxed(solution: str) -> str:
    """Content of the last \\boxed{...} (or `\\boxed 5`), braces balanced; "" if there is none."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*", solution))
    if not boxes:
        return ""
    rest = solution[boxes[-1].end() :]
    if not rest.startswith("{"):
        return re.split(r"[ $]", rest)[0]
    depth = 0
    for i, c in enumerate(rest):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return rest[1:i].strip()
    return rest[1:].strip()


def seed_name(left_out: str) -> str:
    """A left-out set's name in seeds: `all` was once called `none`, and the committed results were drawn under it."""
    return "none" if left_out == "all" else left_out
