"""Tasks: prompts with options and honest splits, from benchmarks, the hub or a user's file.

Every source yields the same records {id, question, context, choices, gold, answer}. One function
turns a record into the `Example` that a model sees, so the sources cannot drift apart. What
shuffles a task's pool is the seed and its name alone.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import yaml

import benchmarks
import config
import records
import runtime
from config import Config, UserError
from records import Table, is_labelled
from runtime import Run

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
        system: the row's own system message in the letter format; "" for ours.
        question: what is asked, where the prompt shows the options too (letter format).
    """

    id: str
    prompt: str
    options: tuple[str, ...] = ()
    gold: int | None = None
    answer: str = ""
    suffix: str = ""
    system: str = ""
    question: str = field(default="", compare=False)

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
    data: dict  # where its rows come from, and in which form, for tasks.json
    stand_in_for: str  # "" or the paper's benchmark this data stands in for
    context: str  # one paragraph for the policy
    train: tuple[Example, ...]
    support: tuple[Example, ...]
    test: tuple[Example, ...]
    prompts: tuple[str, ...]  # unlabelled; what the task is conditioned on as a target
    train_prompts: tuple[str, ...] = ()  # of a training task: what models learn from


def text_size(examples: Sequence[Example]) -> int:
    """Characters of questions and answers: by them ranks take the longest work first."""
    total = 0
    for example in examples:
        total += len(example.text) + len("".join(example.options)) + len(example.answer)
    return total


def read_records(cfg: Config, name: str) -> Table:
    """The records of a task from its configured source. Raises: UserError."""
    # unlabelled rows of the user's own task are prompts
    labels = not cfg.is_own(name)
    # a place that is given for one task wins over the source of all
    if name in cfg.data.jsonl:
        return records.read_files(
            _user_files(cfg.data.jsonl[name]),
            labels,
            columns=cfg.data.columns.get(name),
            free=records.is_free(cfg, name),
            task=name,
        )
    if _is_embedded(cfg, name):
        return Table(_read_assets(config.ROOT / cfg.data.dir, name))
    if cfg.data.source == "hub" or name in cfg.data.hub:
        return records.read_hub(cfg, name, labels)
    raise UserError(
        f"data.jsonl: no file for task {name}; add `data.jsonl: {{{name}: {name}.jsonl}}`"
    )


def _read_assets(folder, name):
    """Records of an embedded benchmark: a train and a test file, or one file of all."""
    one_pool = (folder / f"{name}.all.jsonl.gz").exists()
    rows_of = {}
    for split in ("all",) if one_pool else ("train", "test"):
        file = folder / f"{name}.{split}.jsonl.gz"
        if not file.exists() and name not in benchmarks.EMBEDDED:
            raise UserError(
                f"task {name} is not one of the embedded tasks ({', '.join(benchmarks.EMBEDDED)}); "
                f"give its file as data.jsonl={{{name}: file.jsonl}}"
            )
        if not file.exists():
            raise UserError(f"{file}: missing; run `make assets`")
        try:
            with gzip.open(file, "rt") as lines:
                rows_of[split] = [json.loads(line) for line in lines]
        except (OSError, EOFError, ValueError) as e:
            raise UserError(f"{file}: damaged ({e}); delete it and run `make assets`") from None
        if not one_pool:
            # both files count from 0: without the split an id would name two examples
            for row in rows_of[split]:
                row["id"] = row["id"].replace("-", f"-{split}-", 1)
    return rows_of


def _user_files(pattern):
    """{split: path} of one file, or of `my_{split}.jsonl` for the splits train and test."""
    splits = ("train", "test") if "{split}" in pattern else ("all",)
    return {split: Path(pattern.replace("{split}", split)) for split in splits}


def make_example(name: str, record: dict, form: str) -> Example:
    """One record in the cloze or the letter format; without choices, a generation example."""
    question = record["question"].strip()
    context = (record.get("context") or "").strip()
    if record.get("choices") is None:
        prompt = f"{context}\n{question}".strip()
        if form == "cloze":
            prompt = f"Question: {prompt}\nAnswer:"
        answer = str(record.get("answer", ""))
        return Example(record["id"], prompt, answer=answer, system=record.get("system") or "")

    choices = tuple(choice.strip() for choice in record["choices"])
    gold = record.get("gold")
    if form == "letter":
        return _letter_example(record, f"{context}\n{question}".strip(), choices)

    # the forms in which the benchmarks are usually scored
    body = f"{context} {question}" if context else question
    prompt = f"Question: {body}\nAnswer:"
    suffix = ""
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
        prompt = f"{context}\nQuestion: {question.rstrip('?')}?\nAnswer:".lstrip()
    answer = "" if gold is None else choices[gold]
    return Example(record["id"], prompt, choices, gold, answer, suffix)


def _letter_example(record, head, choices):
    """Lettered options in the prompt; the answers are bracketed letters (the papers' format).

    A released row has its options in the prompt already, by letters of its own.
    """
    letters = record.get("letters_in_prompt") or benchmarks.LETTERS
    if len(choices) > len(letters):
        raise UserError(
            f"{record['id']}: {len(choices)} options, the letter format has {len(letters)} "
            "letters; use data.format=cloze"
        )
    prompt = head
    options = ()
    for letter, choice in zip(letters, choices, strict=False):
        prompt += f"\n{letter}: {choice}"
        options += (f"[{letter}]",)
    if "letters_in_prompt" in record:
        prompt = record["prompt"]

    gold = record.get("gold")
    answer = "" if gold is None else options[gold]
    system = record.get("system") or ""
    return Example(record["id"], prompt, options, gold, answer, system=system, question=head)


def make_splits(
    cfg: Config, name: str, pools: dict[str, list[Example]]
) -> tuple[tuple, tuple, tuple]:
    """Disjoint train, support and test examples, after one seeded shuffle of each pool.

    Args: pools: {"train": …, "test": …} where the benchmark has both, else {"all": …}.
    Raises: UserError: too few for the support set, or no test example behind skip_test.
    """
    d = cfg.data
    # the shuffle depends on seed and name alone, so that every stage and rank splits alike
    rng = runtime.rng_for(cfg.seed, "split", name)
    pools = {split: _shuffled(_unique(pool, name), rng) for split, pool in pools.items()}
    if "test" in pools and not pools["test"]:
        if not cfg.is_own(name):
            raise UserError(f"task {name}: no row of its test split has a label; name another file")
        pools = {"all": pools["train"]}  # hidden labels, as hubs have them: the train split is cut
    skips = d.skip_test and name in (d.targets or [name])
    if "test" in pools:
        rest = pools["train"]
        # the whole benchmark test set is kept out of training, not only the part scored here
        held_out = pools["test"]
        limit = len(held_out) if cfg.is_own(name) else test_limit(d)
        test = held_out[d.skip_test :][:limit]
        if skips and not test:
            raise _skipped_too_far(cfg, name, f"{len(held_out)} test examples")
    else:
        if skips and (cfg.is_own(name) or name in d.train_tasks):
            # what is left of the one pool was trained on
            raise _skipped_too_far(cfg, name, "no test split of its own")
        test, rest = _cut_test(cfg, name, pools["all"])
        held_out = test

    # the support set comes before train: its examples stay the same whatever num_train is
    rest = without_questions(rest, held_out, name)
    support = rest[: d.num_support]
    if len(support) < d.num_support:
        if cfg.is_own(name):
            return (), (), tuple(test)  # too few labels to refine with: all of them test
        raise UserError(
            f"task {name}: {len(support)} examples remain for the support set, data.num_support="
            f"{d.num_support} are needed (after {len(test)} for the test); lower data.num_test or "
            "data.num_support, or add rows"
        )
    # a question of the support set may come again, with other options
    train = without_questions(rest[d.num_support :], support, name)
    if skips and "all" in pools:
        test, train = _skip_in_pool(cfg, name, test, train)
    if d.test_from == "train" and not cfg.is_own(name):
        # the last ones, which nothing trains on from here on: settings may be chosen by them
        size = min(len(test), len(train) // 2)
        test = train[len(train) - size :]
        train = without_questions(train[: len(train) - size], test, name)
    return tuple(train), tuple(support), tuple(test)


def test_limit(settings) -> int:
    """How many test examples a task may have, by the section `data`; `all` is more than any has."""
    if settings.num_test == "all":
        return sys.maxsize
    return settings.num_test


def _cut_test(cfg, name, pool):
    """(test, rest) of one pool: the test examples first, then the support set, then train."""
    d = cfg.data
    num_test = test_limit(d)
    left = len(pool) - d.num_support
    if cfg.is_own(name):
        if left < 0:
            return pool, []  # fewer labels than the support set needs: all of them test
        # the support set is served first, and all other questions test
        support = pool[left:]
        return without_questions(pool[:left], support, name), support
    if num_test > left:
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
    # the prompts will be the first of train: load_task takes them
    prompts = () if d.prompts_from == "test" else _distinct_texts(train)[: d.num_prompts]
    asked = {_key(text, name) for text in prompts}
    unused = test + [e for e in train if _key(e.text, name) not in asked]
    # the first test set leads, so that parts of one size do not overlap
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
    ignored = r"\W+" if name in benchmarks.TABLE else r"[\s.,;:!?'\"]+"
    return re.sub(ignored, " ", text.lower()).strip()


def _unique(examples, name):
    """The first of each question with the same options, in whatever order they stand."""
    seen = {}
    for e in examples:
        seen.setdefault((_key(e.text, name), *sorted(e.options)), e)
    return list(seen.values())


def without_questions(examples, held_out, name: str) -> list[Example]:
    """The examples whose question is not among the held-out ones, whatever their options."""
    asked = {_key(e.question or e.text, name) for e in held_out}
    return [e for e in examples if _key(e.question or e.text, name) not in asked]


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
            for note in cache[name].data.get("notes", ()):
                run.log(f"{name}: {note}")
    return {name: cache[name] for name in names}


def load_task(cfg: Config, name: str) -> Task:
    """Read, format and split one task. Raises: UserError."""
    d = cfg.data
    table = read_records(cfg, name)
    pools = {split: _examples(cfg, name, rows) for split, rows in table.splits.items()}
    rows = list(chain.from_iterable(table.splits.values()))
    labelled = any(is_labelled(row) for row in rows)
    if labelled and not any(pools.values()):
        raise UserError(
            f"task {name}: its answers are too few to be classes (each five times) or to make "
            "options of (three others each); give `choices`, more rows, or data.math_form=generate"
        )
    train, support, test = make_splits(cfg, name, pools)
    if name in d.train_tasks and not train:
        raise UserError(
            f"task {name}: no training examples remain after {len(test)} for the test and "
            f"{len(support)} for the support set; add rows, or lower data.num_test"
        )
    # the held-out rows of your own file are for the verdict alone
    prompts_from = "train" if cfg.is_own(name) else d.prompts_from
    prompts = _choose_prompts(cfg, name, rows, train, support, test, prompts_from)
    train_prompts = ()
    if name in d.train_tasks:
        train_prompts = _choose_prompts(cfg, name, rows, train, support, test, "train")
    # built options stand in for free answers; other data stands in where it is embedded
    known = benchmarks.EMBEDDED.get(name, benchmarks.Benchmark(name, ""))
    stands_in = _is_embedded(cfg, name)
    if name in benchmarks.FREE_ANSWER:
        stands_in = _gets_options(cfg, rows)
    return Task(
        name=name,
        title=known.title,
        domain="id" if name in d.train_tasks else "ood",
        data=describe_data(cfg, name, table),
        stand_in_for=known.stand_in_for if stands_in else "",
        context=read_contexts(cfg).get(name, ""),
        train=train[: d.num_train],
        support=support,
        test=test,
        prompts=prompts,
        train_prompts=train_prompts,
    )


def _examples(cfg, name, rows):
    """The labelled records of a split as examples of the configured format."""
    rows = [row for row in rows if is_labelled(row)]
    if _gets_options(cfg, rows):
        rows = benchmarks.add_distractors(rows, cfg.seed)
    return [make_example(name, row, cfg.data.format) for row in rows]


def _gets_options(cfg, rows):
    """What has answers alone gets options built, unless answers are to be generated."""
    labelled = [row for row in rows if is_labelled(row)]
    free = bool(labelled) and "choices" not in labelled[0]
    return free and cfg.data.math_form == "choice"


def describe_data(cfg: Config, name: str, table: Table) -> dict:
    """Which data a task has, for tasks.json: source, form, number of rows; hashes of files.

    Where the reader has them, also its notes, and the classes that are the options of every row.
    """
    rows = list(chain.from_iterable(table.splits.values()))
    about = {"source": "", "form": _data_form(cfg, name, rows), "rows": len(rows)}
    if _is_embedded(cfg, name):
        about["source"] = benchmarks.EMBEDDED[name].source
    elif name in cfg.data.jsonl:
        about["sha256"] = {}
        places = []
        for path in _user_files(cfg.data.jsonl[name]).values():
            digest = runtime.sha256(path)
            about["sha256"][str(path)] = digest
            places.append(f"{path.name} (sha256 {digest[:12]})")
        about["source"] = ", ".join(places)
    else:
        known = benchmarks.HUB.get(name, benchmarks.HubSet("", {}))
        about["source"] = cfg.data.hub.get(name, known.path)
        about["revision"] = table.revision
        if about["revision"]:
            about["source"] += f" at {about['revision'][:12]}"
    if table.notes:
        about["notes"] = table.notes
    if table.classes:
        about["classes"] = list(table.classes)
    return about


def _is_embedded(cfg, name):
    """Is it read from what `make assets` extracts? A place of its own wins."""
    d = cfg.data
    return d.source == "assets" and name not in d.jsonl and name not in d.hub


def _data_form(cfg, name, rows):
    """How its rows put the question: as others published them, or as built here."""
    forms = sorted({row["read_as"] for row in rows if "read_as" in row})
    if _gets_options(cfg, rows):
        forms.append("gold answers among distractors built here")
    elif name == "boolq" and rows[0].get("context"):
        forms.append("yes or no, with passage")
    elif not forms:
        options = any("choices" in row for row in rows)
        forms.append("question and options" if options else "free answers")
    return ", ".join(forms)


def _choose_prompts(cfg, name, rows, train, support, test, prompts_from):
    """The unlabelled inputs: rows without a label, then inputs of train (or of test, if asked)."""
    # a question listed twice, once with its label, stays held out
    test_ids = {e.id for e in test}
    held_out = {_key(row["question"], name) for row in rows if row["id"] in test_ids}
    source = []
    for row in rows:
        if not is_labelled(row) and _key(row["question"], name) not in held_out:
            source.append(make_example(name, row, cfg.data.format))
    # transductive prompts are the papers' way: stated in every report
    source += test if prompts_from == "test" else train
    if cfg.is_own(name) and len(source) < cfg.generator.num_prompts:
        source += support  # a small file

    prompts = _distinct_texts(source)[: cfg.data.num_prompts]
    if not prompts:
        how = "lower data.num_test or add rows"
        if cfg.is_own(name):
            how = "add rows with nothing but a question"
        raise UserError(
            f"task {name}: no unlabelled prompts remain (data.prompts_from={prompts_from}); {how}"
        )
    return prompts


def read_contexts(cfg: Config) -> dict[str, str]:
    """{task: paragraph} of policy.contexts. Raises: UserError."""
    path = Path(cfg.policy.contexts)
    path = config.ROOT / path  # an absolute path stays as it is
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


def left_out_sets(cfg: Config) -> list[str]:
    """The left-out sets that the targets need: `all`, which takes longest, first."""
    targets = cfg.data.targets or cfg.data.train_tasks + cfg.data.test_tasks
    needed = {left_out_for(cfg, target) for target in targets}
    # sorted, because ranks take units by number and a set has no order
    return sorted(needed, key=lambda name: (name != "all", name))


def left_out_label(left_out: str) -> str:
    """How logs and reports name a left-out set."""
    return "on all tasks" if left_out == "all" else f"without {left_out}"


def seed_name(left_out: str) -> str:
    """A left-out set's name in seeds: the committed results were drawn when `all` was `none`."""
    return "none" if left_out == "all" else left_out


def keep_example_ids(run: Run) -> None:
    """Write tasks.json: the targets in the configuration's order, whoever worked on which first.

    It is about the run's own tasks. A user's own task leaves it as it is.
    """
    cfg = run.cfg
    if cfg.task:
        return
    tasks = load_tasks(run)
    targets = {name: tasks[name] for name in cfg.data.targets or tasks}
    runtime.write_json(run.path / "tasks.json", describe_tasks(targets, cfg.data))


def describe_tasks(tasks: dict[str, Task], settings) -> dict:
    """Sizes, chance and majority rates and example ids of each task, for tasks.json.

    Args: settings: the section `data`.
    """
    described = {}
    for task in tasks.values():
        chances = [1 / len(e.options) for e in task.test if e.options]
        golds = Counter(e.gold for e in task.test if e.gold is not None)
        num_test = max(1, len(task.test))
        described[task.name] = {
            "domain": task.domain,
            "title": task.title,
            **task.data,
            "stand_in_for": task.stand_in_for or None,
            "n_train": len(task.train),
            "n_support": len(task.support),
            "n_test": len(task.test),
            "n_prompts": len(task.prompts),
            "prompts_from": settings.prompts_from,
            "test_from": settings.test_from,
            # what guessing gets, and always the most frequent place
            "chance": round(sum(chances) / num_test, 4),
            "majority": round(max(golds.values(), default=0) / num_test, 4),
            "support_ids": [e.id for e in task.support],
            "test_ids": [e.id for e in task.test],
        }
    return described
