"""An adapter as a folder that other tools load, and that folder, or a stranger's, read again.

    python degaml.py stage=export task=arc_e output=my_adapter

The (first) adapter lies at the top, where PEFT, transformers, vLLM, lm-eval and llama.cpp look for
it. README.md is its card. strategy.json is what `stage=predict` needs beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import sys
from pathlib import Path

import conditions
import config
import data
import evaluate
import lora
import methods
import policy
import proof
import runtime
import scoring
import strategies
import verdict
from config import Config, UserError
from data import Task
from runtime import Run
from scoring import LM
from strategies import Refined, Router
from verdict import Verdict

# The ranks that vLLM can reserve room for (vllm/config/lora.py, MaxLoRARanks).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Settings by which an adapter of PEFT is more than A and B.
BEYOND = (
    "use_dora",
    "modules_to_save",
    "bias",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "alora_invocation_tokens",
)
# Ways to begin that change the base model's own weights.
CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def export_adapter(run: Run) -> dict:
    """What a method made of a task, as a folder: PEFT adapters, card, strategy. Prints its use.

    Those of an ensemble are also in adapter_0/, adapter_1/, and so on. Where a router chooses
    between them, routing.safetensors holds the embeddings of each adapter's prompts, (prompts, d).
    Raises: UserError: the task has no adapter in this run.
    """
    cfg = run.cfg
    if run.rank:
        return {}

    # what the method chose
    method = adapted_method(run)
    source = run.path / f"adapted/{method}/{cfg.task}"
    strategy = strategies.KEEP
    if method in methods.PROPOSING:
        strategy = evaluate.load_strategy(source)

    # an ensemble or steering is made again, any other choice is a stored adapter
    lm = scoring.load_lm(run)
    proof.ensure(run)
    task = data.load_tasks(run)[cfg.task]
    if strategy.family in strategies.REPEATED:
        target = policy.make_target(run, task, aligned=method in methods.ALIGNED)
        refined = evaluate.remake(target, strategy, source)
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
        "base_model": lora.base_name(cfg.model),
        "format": cfg.data.format,
        "options": task.data.get("classes", []),
    }
    runtime.write_json(folder / "strategy.json", facts)

    # what it is worth, and how it is used
    judged = verdict.judge(run, task, method)
    shift = verdict.describe_shift(run, task, refined.adapters[0])
    lines = usage(cfg, folder, refined, lm)
    runtime.write_text(folder / "README.md", card(run, task, facts, judged, shift, lines, lm))
    print("\n".join([*shift, f"adapter: {folder} (README.md is its card)", *lines]))
    return {"exported": str(folder)}


def adapted_method(run: Run) -> str:
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
    """The lines that use an exported folder: each is whole, quoted for a shell, for any folder."""
    name = cfg.task
    place = str(folder.absolute())
    base = lora.base_name(cfg.model)
    rank = vllm_rank(lm.layout.rank)

    # JSON and double quotes within, as a shell's own quotes are single
    load = f"M.from_pretrained({json.dumps(place)})"
    served = json.dumps({"name": name, "path": place, "base_model_name": base})
    harness = json.dumps({"pretrained": base, "peft": place})
    commands = {
        "PEFT": ["python", "-c", f"from peft import AutoPeftModelForCausalLM as M; {load}"],
        "transformers": [
            *("python", "-c", f"from transformers import AutoModelForCausalLM as M; {load}"),
        ],
        "vLLM": [
            *("vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank)),
            *("--lora-modules", served),
        ],
        "lm-eval": [
            *("lm_eval", "--model", "hf", "--model_args", harness, "--tasks", "arc_easy"),
        ],
        "GGUF base": ["python", "convert_hf_to_gguf.py", base, "--outfile", "base.gguf"],
        "GGUF adapter": [
            *("python", "convert_lora_to_gguf.py", "--base", base),
            *("--outfile", f"{name}.gguf", place),
        ],
        "llama.cpp": ["llama-cli", "-m", "base.gguf", "--lora", f"{name}.gguf"],
        "here": [
            *(sys.executable, str(config.ROOT / "degaml.py"), "stage=predict"),
            *(f"run={(config.ROOT / cfg.run).absolute()}", f"adapter={place}"),
            *("input=new.jsonl", "output=answers.jsonl"),
        ],
    }
    lines = [f"  {tool:12}  {shlex.join(words)}" for tool, words in commands.items()]
    modelfile = f"printf 'FROM ./base.gguf\\nADAPTER ./{name}.gguf\\n' > Modelfile"
    lines.insert(-1, f"  {'Ollama':12}  {modelfile} && ollama create {name}")
    if refined.combine or refined.slot:
        kind = refined.combine or "latent steering"
        note = f"the chosen strategy is not one adapter ({kind}): stage=predict carries it out, "
        lines.append(f"  {'note':12}  {note}other tools load its first adapter alone")
    return lines


def vllm_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that holds an adapter of this rank."""
    large_enough = [legal for legal in VLLM_RANKS if legal >= rank]
    return large_enough[0] if large_enough else VLLM_RANKS[-1]


def card(
    run: Run,
    task: Task,
    facts: dict,
    judged: Verdict,
    shift: list[str],
    lines: list[str],
    lm: LM,
) -> str:
    """The README.md of an exported folder, with the header that model hubs read."""
    cfg = run.cfg
    base = facts["base_model"]
    licence = _licence(base)
    example = _example_text(lm, task)
    command = run.path / "command.txt"
    source = cfg.task
    if cfg.is_own(source):
        hub = cfg.data.hub.get(source)
        source = f"hf:{hub}" if hub else cfg.data.jsonl[source]
    words = ["python", "degaml.py", "stage=adapt", f"run={cfg.run}", f"task={source}"]
    made_by = [shlex.join(words)]
    if command.is_file():
        made_by = [*command.read_text(encoding="utf-8").splitlines()[-1:], *made_by]
    warning = ""
    if judged.decision == verdict.KEEP_BASE:
        warning = (
            "\n> **Warning:** on held-out rows this adapter is worse than the base model. It was "
            "exported because it was asked for.\n"
        )
    held_out = "\n".join([*judged.table, judged.text, *shift])
    usage_lines = "\n".join(line.strip() for line in lines)
    return f"""---
base_model: {base}
library_name: peft
license: {licence}
tags: [lora, degaml]
---
# A LoRA adapter for {cfg.task}
{warning}
| | |
|---|---|
| base model | {base}, revision {cfg.model.revision} |
| licence of the base model | {licence} |
| made by | {facts["method"]} ({facts["strategy"]["family"]}), seed {cfg.seed} |
| LoRA rank, alpha | {lm.layout.rank}, {lm.layout.alpha} |
| prompt form | {cfg.data.format} |

## What it is worth

```
{held_out}
```

## How to ask it

The model was trained on prompts of exactly this form. An example, up to where the answer begins:

```
{example}
```

Answers are options such as {_answer_text(lm, task)}, compared by their log-probability.

## How to load it

```
{usage_lines}
```

## How it was made

```
{chr(10).join(made_by)}
```
"""


def _licence(base):
    """What the base model's own card says; the embedded model's is known."""
    readme = Path(base) / "README.md"
    if readme.is_file():
        for line in readme.read_text(encoding="utf-8", errors="replace").splitlines()[:40]:
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()
    return "apache-2.0" if Path(base).name == "smollm2-135m-instruct" else "other"


def _example_text(lm, task):
    shown = [*task.support, *task.test]
    if shown:
        return scoring.input_text(lm, shown[0])
    return conditions.texts_of(lm, task, task.prompts[:1])[0]


def _answer_text(lm, task):
    shown = [example for example in (*task.support, *task.test) if example.options]
    if not shown:
        return "`[A]`" if lm.form == "letter" else "a space and the option's text"
    return ", ".join(f"`{text}`" for _, text in scoring.continuations(lm, shown[0]))


def load_exported(folder: Path, run: Run) -> tuple[Run, str, tuple[str, ...], Refined]:
    """An exported folder, or a plain LoRA of PEFT, ready to score.

    Returns: the run with the model laid out for it, the name of its task, the options of rows that
        have none, and what it holds.
    Raises: UserError: a file is missing, damaged, or asks for what this code does not do.
    """
    facts = {"task": folder.name, "adapters": 1, "combine": "", "slot": None}
    facts |= {"base_model": "", "format": run.cfg.data.format}
    if (folder / "strategy.json").is_file():
        facts = runtime.read_json(folder / "strategy.json")
    count, combine, slot = _checked_facts(folder, facts, run.cfg)
    _check_base(folder / "strategy.json", facts.get("base_model"), run.cfg.model)

    # the adapter's own configuration says at which rank and scale it was trained
    run = _laid_out_for(folder, run)
    layout = scoring.load_lm(run).layout
    adapters = [lora.load_adapter(place, layout) for place in _places(folder, count)]
    router = None
    if combine in strategies.ROUTERS:
        router = _load_router(folder, count, run)
    options = tuple(map(str, facts.get("options") or ()))
    return run, str(facts.get("task")), options, Refined(adapters, combine, slot, router)


def _laid_out_for(folder, run):
    """The run with rank, scale and modules of a PEFT folder.

    Raises: UserError: it is no plain LoRA, or of another base model.
    """
    settings, modules = _read_peft(folder)
    _check_base(folder / "adapter_config.json", settings.base_model_name_or_path, run.cfg.model)
    wanted = {"rank": settings.r, "alpha": _alpha(settings), "modules": modules}
    here = run.cfg.model
    if wanted == {key: getattr(here, key) for key in wanted}:
        return run
    # a token width of 1 fits every module; nothing is generated here
    model = here.model_copy(update={**wanted, "token_width": 1})
    cfg = run.cfg.model_copy(update={"model": model})
    return dataclasses.replace(run, cfg=cfg, cache={})


def _read_peft(folder):
    """(LoraConfig, module names in its tensors). Raises: UserError: missing, or no plain LoRA."""
    from peft import LoraConfig  # slow to import

    file = folder / "adapter_config.json"
    fields = runtime.read_json(file)
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != "LORA":
        raise UserError(f"{file}: peft_type is {kind!r}; only plain LORA can be loaded here")
    try:
        settings = LoraConfig.from_peft_type(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: PEFT cannot read it ({str(error)[:120]})") from None
    beyond = {name: getattr(settings, name, None) for name in BEYOND}
    if str(settings.init_lora_weights).lower().startswith(CHANGED_BASE):
        beyond["init_lora_weights"] = settings.init_lora_weights
    for name, found in beyond.items():
        if found and found != "none":
            raise UserError(
                f"{file}: {name} is {found!r}, which is more than a plain LoRA; only adapters of A "
                "and B on linear layers can be loaded here"
            )
    tensors = runtime.load_tensors(folder / "adapter_model.safetensors")
    modules = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in tensors if ".lora_" in key}
    return settings, sorted(modules)


def _alpha(settings):
    """alpha such that alpha / r is the scale that PEFT applies."""
    alpha = settings.lora_alpha
    if settings.use_rslora:
        alpha *= settings.r**0.5
    return alpha


def _check_base(file, base, model):
    """Raises: UserError: the adapter belongs to another base model."""
    here = lora.base_name(model)
    if not base or Path(str(base)).name.lower() == Path(here).name.lower():
        return
    raise UserError(
        f"{file}: made for the base model {base}, here model.name={here}; "
        "name the run it came from by run=, or its base model by model.name="
    )


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

    # an adapter fits one form of prompt
    if facts.get("format") != cfg.data.format:
        raise UserError(
            f"{folder}/strategy.json: made for data.format={facts.get('format')}, here "
            f"{cfg.data.format}; name the run it came from by run="
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

    return Router(in_order, functools.partial(conditions.embed, run))
