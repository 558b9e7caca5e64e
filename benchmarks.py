"""The twelve benchmarks: what they are, where the hub has them, and how their rows become records.

A record is {id, question, context, choices, gold, answer, …}; data.py makes an example of it.
GSM8K and MATH have no options: here they get some, built from gold answers and distractors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import runtime
from config import Columns

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Benchmark:
    """A title for the tables, where the embedded data comes from, and what it stands in for."""

    title: str
    source: str
    stand_in_for: str = ""


# what the tables and the report say of each
_BUILT = "(options built here from gold answers and seeded distractors)"
TABLE = {
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
# What the study trains on besides: embedded like the twelve, and near none of the targets.
_SKILLS = "basic-skills {} (ODC-BY)"
_MMLU = "MMLU test, {} (MIT)"
_MEDMCQA = "MedMCQA validation, {} (Apache-2.0)"
FURTHER = {
    "humanities": Benchmark(
        "Humanities", _MMLU.format("philosophy, religions, moral disputes, prehistory")
    ),
    "economics": Benchmark("Economics", _MMLU.format("macro- and microeconomics")),
    "common_knowledge": Benchmark("Common knowledge", _SKILLS.format("common knowledge")),
    "psychology": Benchmark("Psychology", _MMLU.format("psychology")),
    "dental": Benchmark("Dentistry", _MEDMCQA.format("dental")),
    "strings": Benchmark("Strings", _SKILLS.format("string operations")),
    "politics": Benchmark("Politics", _MMLU.format("government, foreign policy, security")),
    "business": Benchmark("Business", _MMLU.format("marketing, management, accounting")),
    "science": Benchmark("Science", _MMLU.format("physics, chemistry, biology, astronomy")),
    "arithmetic": Benchmark("Arithmetic", _SKILLS.format("arithmetic")),
    "patterns": Benchmark("Patterns", _SKILLS.format("patterns")),
    "anatomy": Benchmark("Anatomy", _MEDMCQA.format("anatomy, physiology, biochemistry")),
}
EMBEDDED = TABLE | FURTHER
# their records have an answer but no options
FREE_ANSWER = ("gsm8k", "math")


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


def _by_columns(columns, row):
    """A row as a record; its options are a list, a column each, or {text: […], label: […]}."""
    label = row[columns.gold]
    if isinstance(columns.choices, list):
        choices = [row[column] for column in columns.choices]
    else:
        choices = row[columns.choices]
    # ARC labels its options A to E or 1 to 5: what counts is their place
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


def read_gsm8k(row: dict) -> dict:
    """A question whose worked solution stands in `answer`."""
    # the worked solution ends in the number, which may have a comma at the thousands
    _, mark, answer = str(row["answer"]).rpartition("####")
    if not mark:
        raise KeyError("answer with ####")
    answer = answer.strip().replace(",", "")
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

# where a benchmark hides the labels of its test split, its validation split is the test
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
    "gsm8k": HubSet("openai/gsm8k", _TEST, read_gsm8k, ("main",)),
    "math": HubSet("EleutherAI/hendrycks_math", _TEST, _read_math, MATH_SUBJECTS),
    "divlogic": HubSet("ttchungc/DivLogicEval", {"all": "polished"}),
    "socialiqa": HubSet("lighteval/siqa", _VALIDATION, _read_socialiqa, first_label=1),
    "codemmlu": HubSet("Fsoft-AIC/CodeMMLU", {"all": "test"}, _read_codemmlu, _CODEMMLU),
}


def hub_record(row: dict, known: HubSet) -> dict:
    """One row of a known data set as a record; `gold` is None where its label is hidden."""
    record = known.read(row)
    if "gold" in record:
        record["gold"] = _read_label(record, known.first_label)
    return record


def _read_label(record, first_label):
    """The index of the right option by its letter or number; None for what names no option."""
    said = str(record["gold"]).strip()
    index = letter_index(said)
    if said.isdecimal():
        index = int(said) - first_label
    return index if 0 <= index < len(record["choices"]) else None


def letter_index(text: str) -> int:
    """0 for A or a, and so on; -1 for what names no option."""
    return LETTERS.find(text.upper()) if len(text) == 1 else -1


def add_distractors(records: list[dict], seed: int) -> list[dict]:
    """A multiple-choice form of gsm8k and math: the gold answer among three seeded distractors.

    Distractors are numbers of the worked solution or the question and the gold answer shifted or
    scaled, in seeded order; then answers of the same look to other problems of the same kind.
    """
    # the answers of other problems are the last resort
    alike = {}
    for record in records:
        alike.setdefault(_shape(record), []).append(record["answer"])
    built = []
    for record in records:
        # seeded by the problem: what it draws does not depend on how many came before
        rng = runtime.rng_for(seed, "distractors", record["id"])
        others = alike[_shape(record)]
        candidates = _near_numbers(record, rng)
        candidates += [others[i] for i in rng.integers(len(others), size=16)]

        # the first text of each value; the gold answer's own comes first of all
        texts = {_plain_tex(record["answer"]): record["answer"]}
        for text in filter(None, candidates):
            texts.setdefault(_plain_tex(text), text)
        gold, *wrong = texts.values()
        # a problem that cannot get three is left out, not padded
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
    """Wrong integers for an integer answer, in seeded order; [] for another answer."""
    if not _is_integer(record):
        return []
    gold = int(record["answer"])
    text = (record.get("solution") or "") + " " + record["question"]
    # numbers on the way to the answer are what a slip would end in
    seen = re.findall(r"(?<![\w.])\d+(?![\w.])", text.replace(",", ""))
    shifted = [gold + step for step in (1, 2, 10, -1, -2, -10)]
    scaled = [gold * 2, gold * 10, gold // 2, gold // 10]
    # a negative number stands out beside a positive answer
    numbers = dict.fromkeys([*map(int, seen), *shifted, *scaled])
    pool = [x for x in numbers if x != gold and (x >= 0 or gold < 0)]
    pool = [pool[i] for i in rng.permutation(len(pool))]
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
    # to the brace that closes the first one
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i].strip()
    return rest[1:].strip()
