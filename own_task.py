"""Your own task: an adapter from its prompts, a folder other tools load, answers to new inputs.

    python degaml.py stage=adapt task=my_task.jsonl
    python degaml.py stage=export task=arc_e output=my_adapter
    python degaml.py stage=predict adapter=my_adapter input=new.jsonl output=answers.jsonl

Unlabelled prompts are enough for a generated adapter. With labelled rows the policy refines it, and
rows held out tell the gain. `export` also takes a task of the run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import baselines
import conditions
import config
import data
import evaluate
import lora
import methods
import policy
import records
import report
import results
import runtime
import scoring
import strategies
from config import Config, UserError
from runtime import Run
from scoring import LM
from strategies import Refined, Router


def adapt_own(run: Run) -> dict:
    """Generate, refine where labels allow, measure on held-out rows, export. Prints the outcome."""
    cfg = run.cfg
    task = data.load_tasks(run)[cfg.task]
    left_out = data.left_out_for(cfg, cfg.task)
    if not run.finished(f"generator/{left_out}", "generator", redo=False):
        raise UserError(
            f"run={cfg.run}: no trained generator in {run.path}/generator/{left_out}; finish that "
            "run with stage=all (stage=collect and stage=generator, where its methods need none), "
            "or name a finished one by run="
        )

    # the next file of this name gets another one
    place = cfg.data.jsonl.get(cfg.task) or cfg.data.hub.get(cfg.task)
    if place and run.rank == 0:
        known = config.own_tasks(run.path)
        runtime.write_json(run.path / config.OWN_TASKS, {**known, cfg.task: place})

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
    print("\n".join(held_out_table(run)))
    return export_adapter(run)


def _label_free(run):
    """The same run with only the methods that need no labels. The loaded model stays shared."""
    wanted = [m for m in run.cfg.evaluate.methods if m in methods.NEEDS_NO_LABELS]
    section = run.cfg.evaluate.model_copy(update={"methods": wanted})
    cfg = run.cfg.model_copy(update={"evaluate": section})
    return dataclasses.replace(run, cfg=cfg)


def held_out_table(run: Run) -> list[str]:
    """Accuracy of each method on the held-out rows, and its paired gains.

    Gains are over the base model and over an adapter from a wrong task's prompts.
    """
    cfg = run.cfg
    metric = cfg.evaluate.metric
    frame = results.load_frame(run.path, [cfg.task])
    lines = []
    for method in cfg.evaluate.methods:
        found = results.accuracy(frame, method, cfg.task, metric)
        if found is None:
            continue
        line = f"  {method:14} {100 * found['mean']:5.1f} ± {report.in_percent(found['se'], 1)} %"
        for other in ("base", "wrong_prompts"):
            gain = results.paired(frame, method, other, cfg.task, metric)
            if gain:
                points = f"{100 * gain['diff']:+6.1f} ± {report.in_percent(gain['se'], 1)}"
                line += f"   {points} vs {other}"
        lines.append(line)
    if not lines:
        return ["no labelled rows are left to measure it on"]
    return [f"held-out accuracy ({metric}), paired difference in points ± standard error", *lines]


def export_adapter(run: Run) -> dict:
    """What a method made of a task, as a folder: PEFT adapters and strategy.json. Prints its use.

    The (first) adapter is at the top, where other tools look for it. Those of an ensemble are also
    in adapter_0/, adapter_1/, and so on. Where a router chooses between them, routing.safetensors
    holds the embeddings of each adapter's prompts, (prompts, d).
    Raises: UserError: the task has no adapter in this run.
    """
    cfg = run.cfg
    if run.rank:
        return {}

    # what the method chose
    method = _adapted_method(run)
    source = run.path / f"adapted/{method}/{cfg.task}"
    strategy = strategies.KEEP
    if method in methods.PROPOSING:
        strategy = evaluate.load_strategy(source)

    # an ensemble or steering is made again, any other choice is a stored adapter
    lm = scoring.load_lm(run)
    if strategy.family in strategies.REPEATED:
        task = data.load_tasks(run)[cfg.task]
        target = policy.make_target(run, task, aligned=method in methods.ALIGNED)
        refined = strategies.execute(target, strategy)
    else:
        refined = Refined([lora.load_adapter(source, lm.layout)])

    # the folder
    folder = Path(cfg.output or run.path / "export" / cfg.task)
    _save_adapters(cfg, folder, refined, lm)
    facts = {
        # where they come from
        "task": cfg.task,
        "method": method,
        "strategy": strategy.as_dict(),
        # how they are used
        "adapters": len(refined.adapters),
        "combine": refined.combine,
        "slot": refined.slot,
        # what they fit
        "base_model": cfg.model.name,
        "format": cfg.data.format,
        "options": data.load_tasks(run)[cfg.task].data.get("classes", []),
    }
    runtime.write_json(folder / "strategy.json", facts)
    print("\n".join(usage(cfg, folder, refined, lm)))
    return {"exported": str(folder)}


def _adapted_method(run):
    """The method to export: `method`, or for `auto` the best one that adapted the task.

    Raises: UserError: there is none; the methods that did are named.
    """
    cfg = run.cfg
    if not cfg.task:
        known = cfg.data.test_tasks or cfg.data.train_tasks
        raise UserError(f"stage=export needs task=: a task of the run, such as task={known[0]}")

    done = sorted(run.path.glob(f"adapted/*/{cfg.task}/DONE.json"))
    adapted = [record.parent.parent.name for record in done]
    method = cfg.method
    if method == "auto":
        # a refined adapter of an earlier file is passed over where no policy is asked for now
        refines = "degaml_plus" in adapted and "degaml_plus" in cfg.evaluate.methods
        method = "degaml_plus" if refines else "generator"
    if method in adapted:
        return method

    hint = "run stage=adapt task=your_file.jsonl"
    if adapted:
        hint = f"method= may be {', '.join(adapted)}"
    raise UserError(f"task={cfg.task}: {method} was not adapted in {run.path}; {hint}")


def _save_adapters(cfg, folder, refined, lm):
    """The adapters as PEFT folders, and what a router needs to choose between them."""
    adapters = refined.adapters
    # other tools look for an adapter at the top
    places = {folder: adapters[0]}
    if len(adapters) > 1:
        places |= zip(_places(folder, len(adapters)), adapters, strict=True)
    for place, adapter in places.items():
        lora.save_adapter(place, adapter, lm.layout, cfg.model)
    if refined.router is not None:
        embeddings = {str(i): batch for i, batch in enumerate(refined.router.batches)}
        runtime.save_tensors(folder / "routing.safetensors", embeddings)


def _places(folder, count):
    """Where the adapters of an exported folder lie."""
    if count == 1:
        return [folder]
    return [folder / f"adapter_{i}" for i in range(count)]


def usage(cfg: Config, folder: Path, refined: Refined, lm: LM) -> list[str]:
    """The lines that load an exported folder elsewhere."""
    model = cfg.model.name
    # each is whole, to be copied
    lines = [
        f"adapter: {folder}",
        f"  PEFT     PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({model!r}), "
        f"{str(folder)!r})",
        f"  vLLM     vllm serve {model} --enable-lora --max-lora-rank {lm.layout.rank} "
        f"--lora-modules {cfg.task}={folder}",
        f"  lm-eval  lm_eval --model hf --model_args pretrained={model},peft={folder} "
        "--tasks <task>",
        f"  here     python degaml.py stage=predict run={cfg.run} adapter={folder} "
        "input=new.jsonl output=answers.jsonl",
    ]
    if refined.combine or refined.slot:
        kind = refined.combine or "latent steering"
        lines.append(
            f"  note     the chosen strategy is not one adapter ({kind}): stage=predict executes "
            "it, other tools load its first adapter alone"
        )
    return lines


def load_exported(folder: Path, run: Run) -> tuple[str, tuple[str, ...], Refined]:
    """An exported folder, ready to score.

    Returns: the name of its task, the options of rows that have none, and what it holds.
    Raises: UserError: a file is missing, damaged, or names what this code does not know.
    """
    facts = runtime.read_json(folder / "strategy.json")
    count, combine, slot = _checked_facts(folder, facts, run.cfg)
    layout = scoring.load_lm(run).layout
    adapters = [lora.load_adapter(place, layout) for place in _places(folder, count)]
    router = None
    if combine in strategies.ROUTERS:
        router = _load_router(folder, count, run)
    options = tuple(map(str, facts.get("options") or ()))
    return str(facts.get("task")), options, Refined(adapters, combine, slot, router)


def _checked_facts(folder, facts, cfg):
    """(number of adapters, how to combine them, latent steering) of a strategy.json.

    Nothing in it may ask for more work than the configuration allows.
    """
    bounds = cfg.strategies
    # the file may come from anywhere: its types are not to be relied on
    try:
        count = int(facts["adapters"])
        combine = str(facts["combine"])
        slot = facts["slot"]
        allowed = 1 <= count <= bounds.max_prompt_batches
        if slot:  # null: no steering
            slot = (int(slot[0]), float(slot[1]))
            allowed &= 1 <= slot[0] <= bounds.max_slot_steps
            allowed &= 0 < slot[1] <= bounds.max_slot_lr
        if not allowed:
            raise ValueError("adapters or slot lie outside strategies.* of the configuration")
        known = combine in ("", *strategies.TTS_METHODS)
        if not known or bool(combine) != (count > 1):
            raise ValueError(f"combine is {combine!r} for {count} adapter(s)")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{folder}/strategy.json: {type(error).__name__} {error}; expected a folder made by "
            "stage=export"
        ) from None

    # an adapter fits one base model, and one form of prompt
    needed = {"base_model": cfg.model.name, "format": cfg.data.format}
    keys = {"base_model": "model.name", "format": "data.format"}
    for fact, here in needed.items():
        if facts.get(fact) != here:
            raise UserError(
                f"{folder}/strategy.json: made for {keys[fact]}={facts.get(fact)}, here {here}; "
                "name the run it came from by run="
            )
    return count, combine, slot


def _load_router(folder, count, run):
    """What chooses between the adapters. Raises: UserError: it is not for as many."""
    file = folder / "routing.safetensors"
    batches = runtime.load_tensors(file)
    # in numbers' order, as 10 sorts before 2 in a file
    names = [str(i) for i in range(count)]
    if set(batches) != set(names):
        raise UserError(f"{file}: holds {sorted(batches)}, expected one entry per adapter")
    in_order = [batches[name] for name in names]

    def embed(examples):
        texts = [conditions.condition_text(run, example) for example in examples]
        return conditions.encode_texts(run, texts)[1]

    return Router(in_order, embed)


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
    lm = scoring.load_lm(run)
    task_name, options, refined = load_exported(folder, run)
    rows = records.read_file(Path(cfg.input), labels=None, free=True, options=options)
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
