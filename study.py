"""When is a generated start worth it? Curves over labels and training tasks, and a search's room.

    make study        python degaml.py stage=study config=configs/study.yaml [study.parts=[labels]]

labels   accuracy against the number of labels, from different starts, and with labels in the prompt
tasks    accuracy against the number of training tasks
search   what label-free strategies are worth, with an oracle that no method may ask

A start is trained on a task set, which never holds the target. A cell is one target, start, draw of
labels and number of labels. Its setting was chosen on development examples of training tasks, by
the same search for every start. Cells are units: a study that was interrupted goes on.
A cell is scored on two blocks of test examples. What seems to hold on the first block has to hold
on the second.
Writes sets/, development/, cells/, search/ and, by curves.py, study/.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import time
from dataclasses import dataclass

import torch.distributed as dist

import assets
import baselines
import benchmarks
import collect
import conditions
import config
import curves
import data
import evaluate
import generator
import lora
import methods
import policy
import proof
import runtime
import scoring
import strategies
from config import UserError
from data import Example, Task
from lora import Adapter
from runtime import Run
from strategies import Refined, Strategy, Target

# starts that a task set has to be trained for, and by what
TRAINED = {
    "union": ["union"],
    "maml": ["maml"],
    "generated": ["generator"],
    "wrong_prompts": ["generator"],
    "around_union": ["union", "around"],
}
# starts that are drawn anew with every prompt batch
DRAWN = ("generated", "wrong_prompts", "around_union")


@dataclass(frozen=True)
class Cell:
    """One measurement: a start of a task set, fine-tuned on the labels of one draw."""

    set: str
    start: str
    target: str
    labels: int
    draw: int

    @property
    def folder(self) -> str:
        return f"cells/{self.set}/{self.start}/{self.target}/{self.labels}-{self.draw}"


def run_study(run: Run) -> dict:
    """The label curve, the task curve and the oracle of the search, as far as study.parts names."""
    parts = run.cfg.study.parts
    check(run)
    # a model that is scored wrongly is not worth the hours
    proof.ensure(run)
    run.barrier()
    scoring.load_lm(run)  # before the task sets, which share it
    data.load_tasks(run, _all_tasks(run))
    for name in run.cfg.data.targets:
        open_target(run, name)

    cells = plan_cells(run)
    choices = plan_choices(run, cells)
    train_starts(run, cells, choices)
    settings = choose_settings(run, choices)
    measure_cells(run, cells, settings)
    if "search" in parts:
        search(run)
    run.barrier()
    if run.rank == 0:
        curves.write_study(run, cells, settings)
    return {}


def check(run: Run) -> None:
    """Raises: UserError: a target is among what is trained on, a task's file is missing, or a
    setting that a study cannot measure by."""
    cfg = run.cfg
    if cfg.data.test_from != "test":
        raise UserError("data.test_from: a study scores test examples: leave it at `test`")
    if not cfg.data.targets:
        raise UserError("data.targets: a study needs its targets named, as in configs/study.yaml")
    if cfg.data.prompts_from != "train":
        raise UserError("data.prompts_from: a study reads no test input: leave it at `train`")
    if cfg.evaluate.metric not in ("norm", "raw"):
        raise UserError(f"evaluate.metric={cfg.evaluate.metric}: a study reads options: norm, raw")
    if "search" in cfg.study.parts and not cfg.study.strategies:
        raise UserError(
            "study.strategies: empty; list what the part `search` tries, or leave it out of "
            "study.parts"
        )
    further = cfg.study.further_tasks
    named = cfg.data.train_tasks + further
    twice = sorted({task for task in further if named.count(task) > 1})
    if twice:
        raise UserError(f"study.further_tasks: {twice}: in data.train_tasks too, or listed twice")
    overlap = set(further) & {*cfg.data.targets, *cfg.data.test_tasks}
    if overlap:
        raise UserError(
            f"study.further_tasks: {sorted(overlap)} are targets too; a start must not be trained "
            "on its target: leave them out"
        )
    strangers = set(cfg.study.development_tasks) - set(cfg.data.train_tasks)
    strangers |= set(cfg.study.development_tasks) & set(cfg.data.targets)
    if strangers:
        raise UserError(
            f"study.development_tasks: {sorted(strangers)}: expected tasks of data.train_tasks "
            "that are no targets"
        )
    have = len(cfg.data.train_tasks) + len(further)
    if max(cfg.study.set_sizes) > have:
        raise UserError(
            f"study.set_sizes: got {cfg.study.set_sizes}; data.train_tasks and "
            f"study.further_tasks are {have} tasks: at most {have}"
        )
    for fields in cfg.study.strategies:
        try:
            strategies.parse_strategy(fields, cfg.strategies, list(methods.LABEL_FREE))
        except ValueError as error:
            raise UserError(f"study.strategies: {fields}: {error}") from None
    for name in further:
        file = config.ROOT / cfg.data.dir / f"{name}.all.jsonl.gz"
        embedded = cfg.data.source == "assets" and name in benchmarks.FURTHER
        if embedded and not file.exists():
            raise UserError(
                f"{file}: missing; it is in the wheel {assets.wheel_of(name)}: run `make assets`"
            )


def _all_tasks(run):
    names = [*run.cfg.data.train_tasks, *run.cfg.study.further_tasks, *run.cfg.data.targets]
    return list(dict.fromkeys(names))


def set_name(run: Run, task: str) -> str:
    """The task set whose starts a target may begin from: all training tasks but itself."""
    if task in run.cfg.data.train_tasks:
        return f"without_{task}"
    return base_set(run)


def base_set(run: Run) -> str:
    """The task set of all training tasks, without the further ones."""
    return f"first_{len(run.cfg.data.train_tasks)}"


def set_tasks(run: Run, name: str) -> list[str]:
    """The training tasks of a task set."""
    base = run.cfg.data.train_tasks
    kind, _, rest = name.partition("_")
    if kind == "without":
        return [task for task in base if task != rest]
    return [*base, *run.cfg.study.further_tasks][: int(rest)]


def open_set(run: Run, name: str) -> Run:
    """A run on the tasks of one set, with nothing left out. Model, encoder and tasks are shared."""
    cfg = run.cfg
    taught = set_tasks(run, name)
    others = [task for task in cfg.data.targets if task not in taught]
    tasks = {"train_tasks": taught, "test_tasks": others, "targets": others}
    sections = {"data": cfg.data.model_copy(update=tasks)}
    return _sub_run(run, f"sets/{name}", sections)


def open_around(taught: Run) -> Run:
    """The same set, with checkpoints that were collected from its union adapter: fewer steps."""
    steps = taught.cfg.study.around_steps
    shorter = {"pretrain_steps": steps, "finetune_steps": steps // 2}
    sections = {"collect": taught.cfg.collect.model_copy(update=shorter)}
    return _sub_run(taught, "around", sections)


def _sub_run(run, folder, sections):
    shared = {key: run.cache[key] for key in ("lm", "tasks", "encoder") if key in run.cache}
    path = run.path / folder
    path.mkdir(parents=True, exist_ok=True)
    # encoder states are the same for all sets: they lie in the folder above
    prompts = path / "prompts"
    if not prompts.is_symlink():
        link = path / f".prompts.{os.getpid()}"  # whole at once, as ranks do it side by side
        link.symlink_to(os.path.relpath(run.path / "prompts", path))
        os.replace(link, prompts)
    cfg = run.cfg.model_copy(update=sections)
    return dataclasses.replace(run, cfg=cfg, path=path, cache=shared)


def plan_cells(run: Run) -> list[Cell]:
    """The cells of the parts `labels` and `tasks`: draw by draw, those with most labels first."""
    settings = run.cfg.study
    targets = run.cfg.data.targets
    found = []
    if "labels" in settings.parts:
        for target, start, labels in itertools.product(targets, settings.starts, settings.labels):
            if start == "icl" and not labels:
                continue  # the base model, which `plain` is
            found += _draws(run, set_name(run, target), start, target, labels)
    if "tasks" in settings.parts:
        unseen = [target for target in targets if target not in run.cfg.data.train_tasks]
        names = [f"first_{size}" for size in settings.set_sizes]
        for name, start, target in itertools.product(names, curves.TASK_STARTS, unseen):
            found += _draws(run, name, start, target, 0)
            if start != "wrong_prompts":
                found += _draws(run, name, start, target, curves.TASK_LABELS)
    # a set of both parts is measured once
    distinct = dict.fromkeys(found)
    return sorted(distinct, key=lambda cell: (cell.draw, -cell.labels))


def _draws(run, name, start, target, labels):
    """One cell per draw, or one alone for a start that reads neither labels nor prompts."""
    draws = run.cfg.study.draws
    if not labels and start not in DRAWN:
        draws = 1
    return [Cell(name, start, target, labels, draw) for draw in range(draws)]


def plan_choices(run: Run, cells: list[Cell]) -> list[Cell]:
    """Cells on development tasks, one for each start and number of labels that is fine-tuned."""
    wanted = {(cell.start, cell.labels) for cell in cells if cell.labels and cell.start != "icl"}
    found = []
    tasks = run.cfg.study.development_tasks
    for (start, labels), task in itertools.product(sorted(wanted), tasks):
        found.append(Cell(f"without_{task}", start, task, labels, 0))
    return sorted(found, key=lambda cell: -cell.labels)


def train_starts(run: Run, cells: list[Cell], choices: list[Cell]) -> None:
    """Checkpoints of every training task, then what each task set needs of them."""
    trainings = set()
    for cell in [*cells, *choices]:
        for kind in TRAINED.get(cell.start, []):
            trainings.add((cell.set, kind))
    names = sorted({cell.set for cell in [*cells, *choices]})
    if "search" in run.cfg.study.parts:
        names = sorted({*names, base_set(run)})
        trainings.add((base_set(run), "generator"))

    # a checkpoint depends on its own task alone: collected once, and linked into every set
    needed = []
    for name in names:
        needed += set_tasks(run, name)
    tasks = data.load_tasks(run, _all_tasks(run))
    for task in run.deal(list(dict.fromkeys(needed))):
        if not run.finished(f"adapters/{task}", "collect"):
            collect.collect_one(run, tasks[task])
    if run.rank == 0:
        for name in names:
            _link_checkpoints(run, open_set(run, name))
    _encode_prompts(run)

    # the trainings of a set are independent of each other, but for what lies around the union
    first = [unit for unit in sorted(trainings) if unit[1] != "around"]
    longest_first = ("maml", "generator", "union")
    first.sort(key=lambda unit: longest_first.index(unit[1]))
    for name, kind in run.deal(first):
        taught = open_set(run, name)
        if kind == "generator":
            _train_generator(taught)
        elif not taught.finished(f"baselines/{kind}/all", "baselines"):
            baselines.meta_train(taught, kind, "all")

    around = [name for name, kind in sorted(trainings) if kind == "around"]
    units = []
    for name in around:
        units += [(name, task) for task in set_tasks(run, name)]
    for name, task in run.deal(units):
        _collect_around(open_set(run, name), tasks[task])
    for name in run.deal(around):
        _train_generator(open_around(open_set(run, name)))


def _encode_prompts(run):
    """Encoder states of every task's prompts, in the study's own folder."""
    sections = {"train_tasks": _all_tasks(run), "test_tasks": []}
    whole = run.cfg.data.model_copy(update=sections)
    # a copy of the run counts its units anew: in a place of its own
    store = None
    if run.store is not None:
        store = dist.PrefixStore("study prompts", run.store)
    cfg = run.cfg.model_copy(update={"data": whole})
    conditions.encode_prompts(dataclasses.replace(run, cfg=cfg, store=store))


def _link_checkpoints(run, taught):
    """The checkpoints of a set's tasks, as hard links, with a record of its own."""
    for task in taught.cfg.data.train_tasks:
        unit = f"adapters/{task}"
        if not taught.finished(unit, "collect"):
            shutil.rmtree(taught.path / unit, ignore_errors=True)
            shutil.copytree(
                run.path / unit,
                taught.path / unit,
                ignore=shutil.ignore_patterns("DONE.json"),
                copy_function=os.link,
            )
            taught.finish(unit, "collect", time.monotonic())


def _train_generator(taught):
    if not taught.finished("generator/all", "generator"):
        generator.train_one(taught, "all")


def _collect_around(taught, task):
    around = open_around(taught)
    if not around.finished(f"adapters/{task.name}", "collect"):
        union = lora.load_adapter(
            taught.path / "baselines/union/all", scoring.load_lm(taught).layout
        )
        collect.collect_one(around, task, first=union)


def load_start(run: Run, name: str, start: str, target: str, draw: int) -> Adapter:
    """The adapter that fine-tuning on a target begins from; draw = the prompt batch it reads."""
    lm = scoring.load_lm(run)
    taught = open_set(run, name)
    if target in taught.cfg.data.train_tasks:
        raise ValueError(f"{target} is in the task set {name}")
    if start == "plain":
        return lora.init_adapter(lm.layout, run.cfg.seed)
    if start == "mean":
        return collect.mean_adapter(taught, lm, target)
    if start in ("union", "maml"):
        return lora.load_adapter(taught.path / f"baselines/{start}/all", lm.layout)
    if start == "around_union":
        taught = open_around(taught)
    prompts_of = ""
    if start == "wrong_prompts":
        targets = run.cfg.data.targets
        prompts_of = targets[(targets.index(target) + 2) % len(targets)]
    adapter, _ = generator.generate_adapter(taught, target, draw, prompts_of, left_out="all")
    return adapter


def open_target(run: Run, name: str) -> tuple[Task, int]:
    """A target with both blocks of test examples, and the size of the first.

    The second block is what data.skip_test would score. It is taken out of the train split.
    Raises: UserError: there are no further test examples.
    """
    opened = run.cache.setdefault("study targets", {})
    if name not in opened:
        task = data.load_tasks(run, [name])[name]
        size = len(task.test)
        settings = run.cfg.data
        behind = settings.model_copy(update={"skip_test": settings.skip_test + size})
        later = data.load_task(run.cfg.model_copy(update={"data": behind}), name)
        both = (*task.test, *later.test)
        opened[name] = dataclasses.replace(task, train=later.train, test=both), size
    return opened[name]


def mark_blocks(run: Run, name: str, refined: Refined) -> dict[str, str]:
    """{right, fresh}: a digit per test example of the first and of the second block, 1 = right."""
    task, size = open_target(run, name)
    marks = evaluate.mark_test(run, task, refined)
    return {"right": marks[:size], "fresh": marks[size:]}


def draw_labels(run: Run, task: Task, draw: int) -> tuple[list[Example], list[Example]]:
    """(labelled examples in the order in which a user would get them, development examples).

    Both are of the support set and the train split. Fewer labels are the first of more. Development
    examples are the same in every draw; a target has none.
    Raises: UserError: the task has fewer labels.
    """
    settings = run.cfg.study
    pool = [*task.support, *task.train]
    held_out = []
    if task.name in settings.development_tasks:
        held_out = pool[-settings.development_examples :]
        pool = pool[: -settings.development_examples]
    rng = runtime.rng_for(run.cfg.seed, "labels", task.name, draw)
    shuffled = [pool[i] for i in rng.permutation(len(pool))]
    # no question of either block is a label: it may come again, with other options
    labelled = data.without_questions(shuffled, task.test, task.name)
    most = max(*settings.labels, curves.TASK_LABELS)
    if most > len(labelled):
        raise UserError(
            f"study.labels: task {task.name} has {len(labelled)} labelled examples, {most} are "
            "asked for; ask for fewer, or lower data.num_test or study.development_examples"
        )
    return labelled[:most], held_out


def train_on_labels(
    run: Run, cell: Cell, task: Task, loss: str, steps: list[int]
) -> dict[int, Adapter]:
    """{steps: adapter} of one training from a cell's start on the labels of its draw."""
    settings = run.cfg.study
    labelled, _ = draw_labels(run, task, cell.draw)
    start = load_start(run, cell.set, cell.start, cell.target, cell.draw)
    lm = scoring.load_lm(run)
    target = Target(task.name, lm, start, run.cfg.strategies, run.cfg.seed)
    strategy = Strategy.from_dict(
        {
            "family": "SFT",
            "sft_steps": max(steps),
            "learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
            "loss": loss,
            "init_scale": 1.0,
        }
    )
    return strategies.train_on_support(target, strategy, labelled[: cell.labels], steps)


def choose_settings(run: Run, choices: list[Cell]) -> dict[str, dict[int, dict]]:
    """{start: {labels: {loss, steps, accuracy}}}: the best on development examples, for each.

    Every start has the same trainings. Of equals the shorter one is taken.
    """
    settings = run.cfg.study
    tasks = data.load_tasks(run, _all_tasks(run))
    units = list(itertools.product(choices, settings.losses))
    for cell, loss in run.deal(units):
        unit = f"development/{cell.start}/{cell.target}/{cell.labels}-{loss}"
        if run.finished(unit, "study"):
            continue
        began = time.monotonic()
        task = tasks[cell.target]
        _, held_out = draw_labels(run, task, cell.draw)
        lm = scoring.load_lm(run)
        found = {}
        for steps, adapter in train_on_labels(run, cell, task, loss, settings.steps).items():
            scores = scoring.score_examples(lm, adapter, held_out)
            found[steps] = scoring.accuracy(scores, held_out, run.cfg.evaluate.metric)
        run.finish(unit, "study", began, accuracy=found)

    chosen: dict = {}
    wanted = sorted({(cell.start, cell.labels) for cell in choices})
    for start, labels in wanted:
        best = None
        for steps, loss in itertools.product(sorted(settings.steps), settings.losses):
            accuracies = []
            for task in settings.development_tasks:
                record = run.path / f"development/{start}/{task}/{labels}-{loss}/DONE.json"
                accuracies.append(runtime.read_json(record)["accuracy"][str(steps)])
            accuracy = sum(accuracies) / len(accuracies)
            if best is None or accuracy > best["accuracy"]:
                best = {"loss": loss, "steps": steps, "accuracy": accuracy}
        chosen.setdefault(start, {})[labels] = best
    return chosen


def measure_cells(run: Run, cells: list[Cell], settings: dict) -> None:
    """Fine-tune and score every cell."""
    for cell in run.deal(cells):
        if run.finished(cell.folder, "study"):
            continue
        began = time.monotonic()
        task, _ = open_target(run, cell.target)
        facts = {}
        if cell.start == "icl":
            labelled, _ = draw_labels(run, task, cell.draw)
            refined = Refined([], shots=tuple(labelled[: cell.labels]))
        elif cell.labels:
            facts = settings[cell.start][cell.labels]
            steps = facts["steps"]
            trained = train_on_labels(run, cell, task, facts["loss"], [steps])
            refined = Refined([trained[steps]])
        else:
            refined = Refined([load_start(run, cell.set, cell.start, cell.target, cell.draw)])
        marks = mark_blocks(run, cell.target, refined)
        run.finish(cell.folder, "study", began, setting=facts, **marks)
        right = marks["right"]
        run.log(f"{cell.folder}: {right.count('1') / len(right):.3f}", True)


def search(run: Run) -> None:
    """Every listed strategy on every unseen target: its support labels, and its test examples.

    The second is for an oracle alone: it says what a perfect choice could gain, and is no method.
    """
    unseen = [name for name in run.cfg.data.targets if name not in run.cfg.data.train_tasks]
    keep = [{"family": "none"}]
    units = list(itertools.product(unseen, [*run.cfg.study.strategies, *keep]))
    taught = open_set(run, base_set(run))
    for name, fields in run.deal(units):
        # named by what it is, so that the list may grow
        unit = f"search/{name}/{fields['family']}-{runtime.seed_for(str(fields)):x}"
        if run.finished(unit, "study"):
            continue
        began = time.monotonic()
        task, _ = open_target(run, name)
        target = policy.make_target(taught, task, left_out="all")
        refined = strategies.execute_finite(target, Strategy.from_dict(fields), [])
        lm = scoring.load_lm(run)
        support = list(task.support)
        scores = strategies.score_refined(lm, refined, support)
        judged = scoring.judge(scores, support, run.cfg.evaluate.metric)
        marks = mark_blocks(run, name, refined)
        run.finish(unit, "study", began, strategy=fields, support=judged, **marks)
