"""Your own task: an adapter from its prompts, exported as a folder other tools load, and answers to new inputs.

python degaml.py stage=adapt task=my_task.jsonl       unlabelled prompts are enough for `generator`;
                                                      labelled rows let the policy refine and tell the gain
python degaml.py stage=export task=arc_e output=my_adapter
python degaml.py stage=predict adapter=my_adapter input=new.jsonl output=answers.jsonl
"""

from __future__ import annotations

from pathlib import Path

import baselines
import data
import evaluate
import generator
import lora
import methods
import policy
import report
import runtime
import scoring
import strategies
from config import Config, UserError
from runtime import Run
from strategies import Refined, Router


def adapt_own(run: Run) -> dict:
    """Generate, refine where labels allow, measure on held-out rows, export. Prints what came out."""
    cfg = run.cfg
    name, task = cfg.task, data.load_tasks(run)[cfg.task]
    left_out = data.left_out_for(cfg, name)
    if not run.finished(f"generator/{left_out}", "generator", redo=False):
        raise UserError(
            f"run={cfg.run}: no trained generator in {run.path}/generator/{left_out}; finish that run with "
            "stage=all (stage=collect and stage=generator, where its methods need none), or name a "
            "finished one by run="
        )
    if not task.support:
        cfg.evaluate.methods = [m for m in cfg.evaluate.methods if m in methods.NEEDS_NO_LABELS]
    generator.encode_prompts(run)
    policy.adapt_targets(run)
    if task.support:
        baselines.train_baselines(run)
    if task.test:
        evaluate.evaluate_methods(run)
    run.barrier()
    if run.rank:
        return {}
    print(
        f"\n{name}: {len(task.prompts)} unlabelled prompts, {len(task.support)} support and {len(task.test)} "
        "held-out examples"
    )
    if not task.support:
        print(
            f"fewer than data.num_support={cfg.data.num_support} labelled rows: the generated adapter, not refined"
        )
    print("\n".join(held_out_table(run)))
    return export_adapter(run)


def held_out_table(run: Run) -> list[str]:
    """Accuracy of each method on the held-out rows and its paired gain over base and over a wrong task's adapter."""
    cfg = run.cfg
    name, metric = cfg.task, cfg.evaluate.metric
    scores = [report.load_scores(run.path, [name])]
    lines = []
    for method in cfg.evaluate.methods:
        if (found := report.accuracy(scores, method, name, metric)) is None:
            continue
        gains = [
            f"   {_points(d['diff'], d['se'], '+6.1f')} vs {other}"
            for other in ("base", "wrong_prompts")
            if (d := report.paired(scores, method, other, name, metric))
        ]
        lines.append(f"  {method:14} {_points(found['mean'], found['se'])} %{''.join(gains)}")
    if not lines:
        return ["no labelled rows are left to measure it on"]
    return [f"held-out accuracy ({metric}), paired difference in points ± standard error", *lines]


def _points(mean: float, se: float | None, form: str = "5.1f") -> str:
    return f"{100 * mean:{form}} ± {'n/a' if se is None else f'{100 * se:.1f}'}"


# ------------------------------------------------------------------------------------------------------------- export


def export_adapter(run: Run) -> dict:
    """What a method made of a task, as a folder: PEFT adapters and strategy.json. Prints how to use it.

    Layout: the (first) adapter at the top; those of an ensemble also in adapter_0/, adapter_1/, …; routing.safetensors,
    the embeddings of each adapter's prompts (prompts, d), where a router chooses between them.
    Raises: UserError: the task has no adapter in this run.
    """
    cfg = run.cfg
    if run.rank:
        return {}
    if not cfg.task:
        raise UserError(
            "stage=export needs task=: a task of the run, such as "
            f"task={(cfg.data.test_tasks or cfg.data.train_tasks)[0]}"
        )
    method = cfg.method
    if method == "auto":
        method = next(
            (
                m
                for m in ("degaml_plus", "generator")
                if m in (*cfg.evaluate.methods, "generator")
                and (run.path / f"adapted/{m}/{cfg.task}/DONE.json").is_file()
            ),
            "",
        )
    source = run.path / f"adapted/{method}/{cfg.task}"
    if not method or not (source / "DONE.json").is_file():
        have = sorted(
            p.parent.parent.name for p in run.path.glob(f"adapted/*/{cfg.task}/DONE.json")
        )
        raise UserError(
            f"task={cfg.task}: {method or 'nothing'} was not adapted in {run.path}"
            + (
                f"; method= may be {', '.join(have)}"
                if have
                else "; run stage=adapt task=your_file.jsonl"
            )
        )
    strategy, refined, target = strategies.KEEP.as_dict(), None, None
    if method in methods.PROPOSING:
        strategy = runtime.read_json(source / "strategy.json")["strategy"]
    lm, folder = scoring.load_lm(run), Path(cfg.output or run.path / "export" / cfg.task)
    if strategy["family"] in ("TTS", "Latent"):
        target = policy.make_target(
            run, data.load_tasks(run)[cfg.task], aligned=method in methods.ALIGNED
        )
        refined = evaluate.load_refined(run, target, source)
    else:
        refined = Refined([lora.load_adapter(source, lm.layout)])
    several = len(refined.adapters) > 1
    for i, adapter in enumerate(refined.adapters):
        for to in ([folder] if i == 0 else []) + ([folder / f"adapter_{i}"] if several else []):
            lora.save_adapter(to, adapter, lm.layout, cfg.model.name, cfg.model.revision)
    if refined.combine in strategies.ROUTERS:
        runtime.save_tensors(
            folder / "routing.safetensors",
            {str(i): batch for i, batch in enumerate(refined.router.batches)},
        )
    runtime.write_json(
        folder / "strategy.json",
        {
            "task": cfg.task,
            "method": method,
            "strategy": strategy,
            "adapters": len(refined.adapters),
            "combine": refined.combine,
            "slot": refined.slot,
            "base_model": cfg.model.name,
            "format": cfg.data.format,
        },
    )
    print("\n".join(usage(cfg, folder, refined, lm)))
    return {"exported": str(folder)}


def usage(cfg: Config, folder: Path, refined: Refined, lm) -> list[str]:
    """The lines that load an exported folder elsewhere."""
    lines = [
        f"adapter: {folder}",
        f"  PEFT     PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({cfg.model.name!r}), "
        f"{str(folder)!r})",
        f"  vLLM     vllm serve {cfg.model.name} --enable-lora --max-lora-rank {lm.layout.rank} "
        f"--lora-modules {cfg.task}={folder}",
        f"  lm-eval  lm_eval --model hf --model_args pretrained={cfg.model.name},peft={folder} --tasks <task>",
        f"  here     python degaml.py stage=predict run={cfg.run} adapter={folder} input=new.jsonl "
        f"output=answers.jsonl",
    ]
    if refined.combine or refined.slot:
        lines.append(
            f"  note     the chosen strategy is not one adapter ({refined.combine or 'latent steering'}): "
            "stage=predict executes it, other tools load its first adapter alone"
        )
    return lines


# ------------------------------------------------------------------------------------------------------------ predict


def load_exported(folder: Path, run: Run) -> tuple[str, Refined]:
    """An exported folder, ready to score. Returns: the name of its task, and what it holds.

    Raises: UserError: a file is missing, damaged, or names what this code does not know.
    """
    cfg = run.cfg
    facts, lm = runtime.read_json(folder / "strategy.json"), scoring.load_lm(run)
    try:
        count, combine, slot = int(facts["adapters"]), str(facts["combine"]), facts["slot"]
        slot = slot and (int(slot[0]), float(slot[1]))
        bounds = cfg.strategies
        if not 1 <= count <= bounds.max_prompt_batches or (
            slot
            and not (1 <= slot[0] <= bounds.max_slot_steps and 0 < slot[1] <= bounds.max_slot_lr)
        ):
            raise ValueError("adapters or slot lie outside strategies.* of the configuration")
        if combine not in ("", *strategies.METHODS) or bool(combine) != (count > 1):
            raise ValueError(f"combine is {combine!r} for {count} adapter(s)")
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise UserError(
            f"{folder}/strategy.json: {type(e).__name__} {e}; expected a folder made by stage=export"
        ) from None
    if facts.get("base_model") != cfg.model.name:
        raise UserError(
            f"{folder}/strategy.json: made for {facts.get('base_model')!r}, model.name is "
            f"{cfg.model.name!r}; name the run it came from by run="
        )
    if facts.get("format") != cfg.data.format:
        raise UserError(
            f"{folder}/strategy.json: adapted to data.format={facts.get('format')}, this is "
            f"{cfg.data.format}; name the run it came from by run="
        )
    adapters = [
        lora.load_adapter(folder / f"adapter_{i}" if count > 1 else folder, lm.layout)
        for i in range(count)
    ]
    routing = (
        runtime.load_tensors(folder / "routing.safetensors")
        if combine in strategies.ROUTERS
        else {}
    )
    if combine in strategies.ROUTERS and sorted(routing) != sorted(map(str, range(count))):
        raise UserError(
            f"{folder}/routing.safetensors: holds {sorted(routing)}, expected one entry per adapter"
        )
    parts = [routing[str(i)] for i in range(len(routing))]
    router = Router(parts, lambda texts: generator.encode_texts(run, texts)[1]) if parts else None
    return str(facts.get("task")), Refined(adapters, combine, slot, router)


def predict(run: Run) -> dict:
    """Answer new inputs with an exported adapter or strategy: JSON lines or CSV in, JSON lines out, in the same order.

    Rows with `choices` get {"id", "prediction", "index", "logprobs"}, the others {"id", "prediction"} by greedy
    generation (with the first adapter of an ensemble). With `gold` given, the accuracy is printed.
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
    lm = scoring.load_lm(run)
    task_name, refined = load_exported(folder, run)
    rows = data.read_user_file(Path(cfg.input), labels=None)
    examples = [
        data.make_example(task_name, r, cfg.data.format) for r in rows
    ]  # prompts as its task has them
    choose, write = (
        [i for i, e in enumerate(examples) if bool(e.options) is b] for b in (True, False)
    )
    out: list[dict] = [{} for _ in rows]
    if choose:
        for i, s in zip(
            choose,
            strategies.score_refined(lm, refined, [examples[i] for i in choose]),
            strict=True,
        ):
            index = s.pick(cfg.evaluate.metric)
            out[i] = {
                "id": rows[i]["id"],
                "prediction": rows[i]["choices"][index],
                "index": index,
                "logprobs": [round(x, 4) for x in s.raw],
            }
    if write:
        texts = scoring.generate_answers(
            lm,
            refined.adapters[0],
            [examples[i] for i in write],
            cfg.evaluate.max_new_tokens,
        )
        for i, text in zip(write, texts, strict=True):
            out[i] = {"id": rows[i]["id"], "prediction": text.strip()}
    runtime.write_jsonl(Path(cfg.output), out)
    print(f"{len(out)} answers -> {cfg.output}")
    known = [i for i in choose if examples[i].gold is not None]
    if known:
        right = sum(out[i]["index"] == examples[i].gold for i in known)
        print(
            f"{right} of {len(known)} rows with a gold answer are right ({100 * right / len(known):.1f} %)"
        )
    return {"answers": len(out)}
