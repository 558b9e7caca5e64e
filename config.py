"""Every key a YAML file or the command line may set: its type, its range, and where its value came from.

`configs/default.yaml` holds the value and the meaning of every key; a preset holds only what differs;
`key=value` on the command line wins over both. All faults are gathered and reported together.

    python degaml.py stage=config config=configs/smollm2.yaml generator.lr=1e-3
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    field_validator,
)

import methods

ROOT = Path(__file__).resolve().parent
DEFAULT = ROOT / "configs" / "default.yaml"
FREE_MAPS = (
    "data.jsonl",
    "data.hub",
    "data.columns",
    "strategies.proposal_grid",
)  # maps with keys of their own


class UserError(Exception):
    """A mistake the user can mend: what, where, what was expected, what to do. Shown without a traceback."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def _no_bool(value):
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[Int, Field(ge=0)]
Positive = Annotated[Int, Field(ge=1)]
Rate = Annotated[Float, Field(gt=0, le=1)]
USER_STAGES = ("export", "predict")  # what one does with an adapter, besides stage=adapt task=
ASIDE = (*USER_STAGES, "config", "doctor", "check", "assets")  # stages that make no part of a run
Family = Literal["TTT", "LORA", "TTS", "Latent", "SFT"]


class Model(_Section):
    name: str
    revision: str
    rank: Positive
    alpha: Positive
    modules: list[str]
    token_width: Positive


class Data(_Section):
    source: Literal["assets", "hub", "jsonl"]
    dir: str
    train_tasks: Annotated[list[str], Field(min_length=1)]
    test_tasks: list[str]
    targets: list[str]
    jsonl: dict[str, str]
    hub: dict[str, str]
    columns: dict[str, dict[str, str]]
    format: Literal["cloze", "letter"]
    math_form: Literal["choice", "generate"]
    num_train: Positive
    num_support: Annotated[Int, Field(ge=2)]
    num_test: Positive
    skip_test: Count
    num_prompts: Positive
    prompts_from: Literal["train", "test"]
    max_tokens: Annotated[Int, Field(ge=32)]


class Collect(_Section):
    pretrain_steps: Positive
    pretrain_lr: Rate
    finetune_steps: Count
    finetune_lr: Rate
    warmup_steps: Count
    batch_size: Positive
    save_last: Annotated[Int, Field(ge=2)]


class Generator(_Section):
    encoder: str
    max_length: Annotated[Int, Field(ge=8, le=512)]
    num_prompts: Positive
    flow: list[Annotated[list[Positive], Field(min_length=3, max_length=3)]]
    kernel: Positive
    scale_code: Literal["dnd", "element"]
    criterion_weight: Literal["std", "none"]
    steps: Positive
    lr: Rate
    warmup_steps: Count
    weight_decay: Annotated[Float, Field(ge=0)]
    batch_size: Positive
    micro_batch: Positive
    pairs_per_task: Positive
    noise: Annotated[Float, Field(ge=0)]
    save_every: Positive
    seed: Int

    @field_validator("kernel")
    @classmethod
    def _odd_kernel(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd ('same' padding): try {kernel + 1}")
        return kernel


class Align(_Section):
    pairs: Literal["gen2ckpt", "ckpt2ckpt", "alg1"]
    draws: Positive
    prompts: Positive
    latent: Positive
    pos_table: StrictBool
    residual: StrictBool
    meta_epochs: Positive
    inner_lr: Rate
    meta_lr: Rate
    batch_size: Positive
    kl_weight: Annotated[Float, Field(ge=0)]


class Strategies(_Section):
    max_ttl_steps: Positive
    max_ttl_lr: Rate
    ttl_threshold: Annotated[Float, Field(ge=0)]
    ttl_lambda: Annotated[Float, Field(gt=0)]
    mix: Literal["interp", "magdir"]
    max_prompt_batches: Annotated[Int, Field(ge=1, le=50)]
    max_slot_steps: Annotated[Int, Field(ge=1, le=20)]
    max_slot_lr: Rate
    max_sft_steps: Annotated[Int, Field(ge=1, le=200)]
    max_sft_lr: Rate
    max_batch_size: Annotated[Int, Field(ge=1, le=64)]
    proposal_grid: dict[str, list]


class Policy(_Section):
    mode: Literal["meta", "per_task"]
    families: Annotated[list[Family], Field(min_length=1)]
    proposals: Positive
    iterations: Positive
    min_per_family: Count
    temperature: Annotated[Float, Field(gt=0)]
    top_p: Annotated[Float, Field(gt=0, le=1)]
    top_k: Positive
    max_new_tokens: Positive
    reward_margin: Count
    select_by: Literal["wins", "gold_logp"]
    select_margin: Count
    sft_margin: Count
    folds: Annotated[Int, Field(ge=2)]
    contexts: str
    rank: Positive
    alpha: Positive
    modules: list[str]
    epochs: Positive
    batch_size: Positive
    lr: Rate


class Evaluate(_Section):
    metric: Literal["norm", "raw", "strict", "lenient"]
    methods: Annotated[list[Literal[tuple(methods.METHODS)]], Field(min_length=1)]
    prompt_batches: Positive
    token_budget: Annotated[Int, Field(ge=32)]
    max_new_tokens: Positive
    generate: StrictBool


class Union(_Section):
    step_share: Annotated[Float, Field(gt=0)]


class Maml(_Section):
    order: Literal[1, 2]
    meta_steps: Positive
    tasks_per_step: Positive
    inner_steps: Count
    batch_size: Positive
    inner_lr: Rate
    outer_lr: Rate


class Abmll(_Section):
    space: Literal["factor", "product"]
    meta_steps: Positive
    tasks_per_step: Positive
    inner_steps: Count
    batch_size: Positive
    inner_lr: Rate
    outer_lr: Rate
    beta: Annotated[Float, Field(ge=0)]
    init_log_sd: Float
    test_samples: Positive


class Sft(_Section):
    sft_steps: Positive
    learning_rate: Rate
    batch_size: Positive
    loss: Literal["lm", "choice"]


class Baselines(_Section):
    sft: list[Sft]
    union: Union
    maml: Maml
    abmll: Abmll


class Report(_Section):
    paper: Literal["none", "degaml-qwen2.5-0.5b", "degaml-qwen2.5-1.5b"]
    seed_runs: list[str]


class Config(_Section):
    """The whole configuration of a run. Sections are explained key by key in configs/default.yaml."""

    name: str
    run: str
    task: str
    method: Literal["auto", "generator", "aligned", *methods.PROPOSING]
    adapter: str
    input: str
    output: str
    seed: Int
    device: Literal["auto", "cpu", "cuda", "mps"]
    dtype: Literal["auto", "float32", "bfloat16"]
    data_parallel: StrictBool
    overwrite: StrictBool
    model: Model
    data: Data
    collect: Collect
    generator: Generator
    align: Align
    strategies: Strategies
    policy: Policy
    baselines: Baselines
    evaluate: Evaluate
    report: Report


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-5 as text; everyone who writes it means a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str):
    """Parse YAML text. Raises: UserError: naming the line, if it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        line = getattr(getattr(e, "problem_mark", None), "line", 0) + 1
        raise UserError(
            f"{where}:{line}: not valid YAML ({getattr(e, 'problem', e)}); "
            "expected lines of `key: value`"
        ) from None


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}; FREE_MAPS stay whole."""
    out = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and path not in FREE_MAPS:
            out |= flatten(value, path + ".")
        else:
            out[path] = value
    return out


def _unflatten(flat: dict) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for p in parents:
            node = node.setdefault(p, {})
        node[leaf] = value
    return tree


def _read(path: Path) -> dict:
    if not path.is_file():
        have = ", ".join(
            sorted(
                str(p.relative_to(ROOT))
                for p in (ROOT / "configs").glob("*.yaml")
                if p.name not in ("contexts.yaml", "models.yaml")
            )
        )
        raise UserError(f"config={path}: no such file; presets here: {have}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected `key: value` lines, got {type(tree).__name__}")
    return flatten(tree)


def load_config(args: list[str]) -> tuple[Config, str]:
    """Default < `config=file.yaml` < `key=value`, validated.

    Args:
        args: command-line words, each `key=value` (split at the first `=`, value read as YAML).
    Returns: the config and the name of the stage (`stage=`, default `all`).
    Raises: UserError: one text naming every unknown key, wrong type and out-of-range value.
    """
    words = []
    for a in args:
        if "=" not in a:
            raise UserError(
                f"argument {a!r}: expected key=value, such as stage=all or generator.lr=1e-3"
            )
        words.append(a.split("=", 1))
    given = dict(words)
    stage, preset = given.get("stage", "all"), given.get("config", "")
    if not preset and (stage in USER_STAGES or "task" in given):
        preset = _trained_run(given.get("run"))
    elif (
        not preset
        and stage in ("report", "analyze")
        and (ROOT / given.get("run", "-") / "config.yaml").is_file()
    ):
        preset = str(ROOT / given["run"] / "config.yaml")  # reading a run does not describe it anew
    flat = _read(DEFAULT)
    known, where = dict(flat), dict.fromkeys(flat, "configs/default.yaml")
    layers = (
        [(preset, _read(Path(preset)) if "config" in given else _recorded(Path(preset), stage))]
        if preset
        else []
    )
    layers.append(
        (
            "command line",
            {k: parse_yaml(v, f"{k}={v}") for k, v in words if k not in ("stage", "config")},
        )
    )
    faults = []
    for source, layer in layers:
        for key, value in layer.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
                hint = f"; did you mean `{near[0]}`?" if near else "; see configs/default.yaml"
                faults.append(f"{key} ({source}): unknown key{hint}")
                continue
            flat[key], where[key] = value, source
    for key in (
        "adapter",
        "input",
        "output",
    ):  # the user's own files: relative to where the command is given
        flat[key] = (
            str(Path(flat[key]).absolute())
            if flat[key] and isinstance(flat[key], str)
            else flat[key]
        )
    if flat["task"]:
        faults += _take_in(flat, str(flat["task"]), stage, "evaluate.methods" in given)
    try:
        cfg = Config.model_validate(_unflatten(flat))
    except ValidationError as e:
        for err in e.errors():
            path = ".".join(str(p) for p in err["loc"])
            key = next(
                (
                    k
                    for k in sorted(flat, key=len, reverse=True)
                    if path == k or path.startswith(k + ".")
                ),
                path,
            )
            faults.append(
                f"{path} ({where.get(key, preset)}): got {flat.get(key, err['input'])!r}; "
                f"{err['msg'].removeprefix('Value error, ')}"
            )
        cfg = None
    if cfg is not None:
        faults += _cross_checks(
            cfg, where, samples=not cfg.task and stage not in ("report", "analyze", *USER_STAGES)
        )
    if faults:
        raise UserError(f"{len(faults)} fault(s) in the configuration:\n  " + "\n  ".join(faults))
    return cfg, stage


def _recorded(path: Path, stage: str) -> dict:
    """A run's own record: what it is, not what was last done with it."""
    flat = _read(path)
    for key in ("task", "method", "adapter", "input", "output", "overwrite"):
        flat.pop(key, None)
    return flat


def _trained_run(run: str | None) -> str:
    """The configuration a run folder was made with: of `run`, else of the presets' own folders. Raises: UserError."""
    folders = [ROOT / (run or "runs/smollm2"), *([] if run else [ROOT / "runs/demo"])]
    found = next((f / "config.yaml" for f in folders if (f / "config.yaml").is_file()), None)
    if found is None:
        raise UserError(
            f"run={run or 'runs/smollm2'}: no trained run there; `make demo` (runs/demo, five minutes) or "
            "`make reproduce` (runs/smollm2) trains one, run=folder names another"
        )
    return str(found)


def _take_in(flat: dict, source: str, stage: str, methods_given: bool) -> list[str]:
    """Make `task=` the one target: a file, a hub data set or a task the run knows. Returns faults."""
    if stage not in ("adapt", *USER_STAGES):
        return [
            f"task (command line): goes with stage=adapt, {' or '.join(USER_STAGES)}, not stage={stage}"
        ]
    if not all(
        isinstance(flat[k], t)
        for k, t in (
            ("data.train_tasks", list),
            ("data.test_tasks", list),
            ("data.jsonl", dict),
            ("data.hub", dict),
        )
    ):
        return []  # of another type: the schema says so
    known = flat["data.train_tasks"] + flat["data.test_tasks"]
    path = Path(source).expanduser()
    if source in known:
        name = source
    elif source.startswith("hf:"):
        parts = source[3:].rstrip("/").split("/")
        name = re.sub(
            r"\W+", "_", parts[-1] if Path(source[3:]).is_dir() else parts[min(1, len(parts) - 1)]
        )
        where = str(Path(source[3:]).absolute()) if Path(source[3:]).is_dir() else source[3:]
        flat["data.hub"] = flat["data.hub"] | {name: where}
    elif path.suffix.lower() in (".jsonl", ".csv"):
        name = re.sub(r"\W+", "_", path.stem)
        flat["data.jsonl"] = flat["data.jsonl"] | {name: str(path.absolute())}
    elif stage in USER_STAGES and re.fullmatch(r"\w+", source):
        name = source  # adapted before; its folder is asked for later
    else:
        return [
            f"task (command line): got {source!r}; expected a .jsonl or .csv file, hf:org/name or one of {known}"
        ]
    if (name in known and name != source) or name == "all":
        return [
            f"task (command line): {source} would be called {name}, which is a name of the run's own; rename it"
        ]
    flat["task"], flat["data.targets"] = name, [name]
    flat["data.test_tasks"] = [*flat["data.test_tasks"], *([] if name in known else [name])]
    if not methods_given:
        flat["evaluate.methods"] = ["base", "wrong_prompts", "generator", "degaml_plus", "no_meta"]
    return []


def _cross_checks(cfg: Config, where: dict, samples: bool = True) -> list[str]:
    """Faults that need two keys to see. `samples`: will this command draw proposals for the run's own methods?"""
    faults = []

    def fault(key, text):
        faults.append(f"{key} ({where[key]}): {text}")

    d, g, p = cfg.data, cfg.generator, cfg.policy
    steps = cfg.collect.pretrain_steps + cfg.collect.finetune_steps
    if cfg.collect.save_last > steps:
        fault(
            "collect.save_last",
            f"got {cfg.collect.save_last}; training has {steps} steps: at most {steps}",
        )
    unknown = [t for t in d.targets if t not in d.train_tasks + d.test_tasks]
    if unknown:
        fault("data.targets", f"{unknown} are in neither data.train_tasks nor data.test_tasks")
    twice = sorted(
        {t for t in d.train_tasks + d.test_tasks if (d.train_tasks + d.test_tasks).count(t) > 1}
    )
    if twice:
        fault(
            "data.test_tasks", f"{twice} are listed twice (train_tasks and test_tasks are disjoint)"
        )
    if not g.flow or g.flow[0][:2] != [g.num_prompts, g.max_length]:
        fault(
            "generator.flow",
            f"its first entry must be [num_prompts, max_length, encoder width] = "
            f"[{g.num_prompts}, {g.max_length}, 384], got {g.flow[:1]}",
        )
    sampled = methods.sampled_families(cfg.evaluate.methods, p.families)
    if samples and p.min_per_family * len(sampled) > p.proposals:
        fault(
            "policy.min_per_family",
            f"{p.min_per_family} x {len(sampled)} families exceed policy.proposals"
            f" = {p.proposals}: at most {p.proposals // len(sampled)}",
        )
    if p.folds > d.num_support:
        fault("policy.folds", f"got {p.folds} folds of {d.num_support} support examples")
    if cfg.evaluate.metric in ("strict", "lenient") and not cfg.evaluate.generate:
        fault(
            "evaluate.metric",
            f"{cfg.evaluate.metric} needs generated answers: evaluate.generate=true",
        )
    tuned = [m for m in methods.BASELINES if m in cfg.evaluate.methods and m != "abmll"]
    if tuned and not cfg.baselines.sft and "degaml_plus" not in cfg.evaluate.methods:
        fault(
            "evaluate.methods",
            f"{tuned[0]} tries the SFT settings proposed for degaml_plus: add degaml_plus, "
            "or give settings in baselines.sft",
        )
    if len(d.train_tasks) < 3 and set(d.targets or d.train_tasks) & set(d.train_tasks):
        fault("data.train_tasks", "leave-one-out needs at least 3 tasks (2 remain to learn from)")
    return faults


def differences(cfg: Config) -> dict:
    """Keys whose value is not the default's, for the log."""
    default = _read(DEFAULT)
    return {k: v for k, v in flatten(cfg.model_dump()).items() if v != default.get(k)}
