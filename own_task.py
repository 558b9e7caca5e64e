"""Your own task: an adapter from its prompts, a verdict on it, answers to new inputs.

    python degaml.py stage=adapt task=my_task.jsonl
    python degaml.py stage=predict adapter=my_adapter input=new.jsonl output=answers.jsonl

Unlabelled prompts are enough for a generated adapter. With labelled rows the policy refines it, and
all rows beyond the support set are held out: they tell whether it is worth using.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import baselines
import conditions
import config
import data
import evaluate
import export
import methods
import policy
import proof
import records
import runtime
import scoring
import strategies
import verdict
from config import UserError
from runtime import Run


def adapt_own(run: Run) -> dict:
    """Generate, refine where labels allow, judge on held-out rows, export what is not worse."""
    cfg = run.cfg
    task = data.load_tasks(run)[cfg.task]
    left_out = data.left_out_for(cfg, cfg.task)
    if not run.finished(f"generator/{left_out}", "generator", redo=False):
        raise UserError(
            f"run={cfg.run}: no trained generator in {run.path}/generator/{left_out}; finish that "
            "run with stage=all (stage=collect and stage=generator, where its methods need none), "
            "or name a finished one by run="
        )

    proof.ensure(run)
    run.barrier()

    # the next file of this name gets another one
    place = cfg.data.jsonl.get(cfg.task) or cfg.data.hub.get(cfg.task)
    if place and run.rank == 0:
        known = config.own_tasks(run.path)
        runtime.write_json(run.path / config.OWN_TASKS, {**known, cfg.task: place})

    if run.rank == 0:
        _log_what_is_cut(run, task)

    # the stages of a run, on this one task
    if not task.support:
        run = _label_free(run)
    conditions.encode_prompts(run)
    policy.adapt_targets(run)
    if task.support:
        baselines.train_baselines(run)
    if task.test:
        evaluate.evaluate_methods(run)
    run.barrier()  # every rank's part is there
    if run.rank:
        return {}

    # what came out
    print(
        f"\n{cfg.task}: {len(task.prompts)} unlabelled prompts, {len(task.support)} support and "
        f"{len(task.test)} held-out examples"
    )
    if not task.support:
        print(
            f"fewer than data.num_support={cfg.data.num_support} labelled rows: the generated "
            "adapter, not refined"
        )
    method = export.adapted_method(run)
    judged = verdict.judge(run, task, method)
    print("\n".join([*judged.table, judged.text]))

    # a worse adapter is not what anyone came for
    if judged.decision == verdict.KEEP_BASE and cfg.method == "auto":
        print(
            f"not exported; stage=export run={cfg.run} task={cfg.task} method={method} exports it "
            "all the same"
        )
        return {"exported": ""}
    return export.export_adapter(run)


def _log_what_is_cut(run, task):
    """Too long a row loses its beginning: say how many do."""
    lm = scoring.load_lm(run)
    rows = [*task.support, *task.test]
    lengths = [len(scoring.encode(lm, scoring.input_text(lm, example))) for example in rows]
    cut = sum(length > lm.max_tokens for length in lengths)
    if cut:
        run.log(
            f"{task.name}: {cut} of {len(rows)} rows have more than data.max_tokens="
            f"{lm.max_tokens} tokens and lose their beginning"
        )


def _label_free(run):
    """The same run with only the methods that need no labels. The loaded model stays shared."""
    wanted = [m for m in run.cfg.evaluate.methods if m in methods.NEEDS_NO_LABELS]
    section = run.cfg.evaluate.model_copy(update={"methods": wanted})
    cfg = run.cfg.model_copy(update={"evaluate": section})
    return dataclasses.replace(run, cfg=cfg)


def predict(run: Run) -> dict:
    """Answer new inputs with an exported folder. A file as of a task in, JSON lines out, in order.

    Rows with `choices` get {"id", "prediction", "index", "logprobs"}. The others get {"id",
    "prediction"} by greedy generation, on which the adapters of an ensemble vote. Where rows have
    `gold`, the accuracy is printed.
    """
    cfg = run.cfg
    if run.rank:
        return {}
    if not cfg.input or not cfg.output:
        raise UserError("stage=predict needs input=new.jsonl and output=answers.jsonl")
    folder = Path(cfg.adapter or run.path / "export" / cfg.task)
    if not (cfg.adapter or cfg.task) or not folder.is_dir():
        raise UserError(
            f"adapter={folder}: no such folder; stage=adapt task=… or stage=export task=… makes one"
        )
    # the folder, and the inputs: prompts have the form of the adapter's task
    run, task_name, options, refined = export.load_exported(folder, run)
    lm = scoring.load_lm(run)
    proof.ensure(run)
    new = Path(cfg.input)
    columns = cfg.data.columns.get(new.stem)
    table = records.read_files(
        {"all": new}, None, columns=columns, free=True, options=options, task=new.stem
    )
    rows = table.splits["all"]
    for note in table.notes:
        print(f"{new}: {note}")
    examples = [data.make_example(task_name, row, cfg.data.format) for row in rows]

    answers = [{"id": row["id"]} for row in rows]

    # rows with options: the best-scored one
    with_options = [i for i, example in enumerate(examples) if example.options]
    if with_options:
        scored = [examples[i] for i in with_options]
        scores = strategies.score_refined(lm, refined, scored)
        # a user wants an answer to every row: options are ranked, whatever the run reads
        metric = "norm" if cfg.evaluate.metric == "norm" else "raw"
        for i, score in zip(with_options, scores, strict=True):
            index = score.pick(metric)
            answers[i]["prediction"] = rows[i]["choices"][index]
            answers[i]["index"] = index
            answers[i]["logprobs"] = [round(value, 4) for value in score.raw]

    # rows without: what the model writes
    without = [i for i, example in enumerate(examples) if not example.options]
    asked = [examples[i] for i in without]
    tokens = cfg.evaluate.max_new_tokens
    scores = strategies.score_refined(lm, refined, asked, tokens=tokens)
    for i, score in zip(without, scores, strict=True):
        answers[i]["prediction"] = score.text.strip()

    runtime.write_jsonl(Path(cfg.output), answers)
    print(f"{len(answers)} answers -> {cfg.output}")
    _print_accuracy(answers, examples)
    return {"answers": len(answers)}


def _print_accuracy(answers, examples):
    """How many are right, of the rows that came with a gold answer."""
    right = []
    for answer, example in zip(answers, examples, strict=True):
        if example.gold is not None:
            right.append(answer["index"] == example.gold)
    if right:
        share = 100 * sum(right) / len(right)
        print(f"{sum(right)} of {len(right)} rows with a gold answer are right ({share:.1f} %)")
