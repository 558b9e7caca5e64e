"""Every key a YAML file or the command line may set: its type, its range, whence its value came.

`configs/default.yaml` holds the value and the meaning of every key. A preset holds only what
differs. `key=value` on the command line wins over both. All faults are reported together.

    python degaml.py stage=config config=configs/smollm2.yaml generator.lr=1e-3
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    ValidationError,
    field_validator,
)

import methods

ROOT = Path(__file__).resolve().parent
DEFAULT = ROOT / "configs" / "default.yaml"
# maps with keys of their own
FREE_MAPS = ("data.jsonl", "data.hub", "data.columns", "strategies.proposal_grid")
# what one does with an adapter, besides stage=adapt task=
USER_STAGES = ("export", "predict")
# stages that read a run
READING = ("report", "analyze")
# stages that make no part of a run
ASIDE = (*USER_STAGES, *READING, "config", "doctor", "check", "assets")


class UserError(Exception):
    """A mistake the user can mend: what, where, what was expected, what to do.

    Shown without a traceback.
    """


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def _no_bool(value):
    # pydantic reads true as 1
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[Int, Field(ge=0)]
Positive = Annotated[Int, Field(ge=1)]
AtLeastOne = Field(min_length=1)  # of a list
Rate = Annotated[Float, Field(gt=0, le=1)]
Family = Literal[methods.WITH_LABELS]


class Model(_Section):
    name: str
    revision: str
    rank: Positive
    alpha: Positive
    modules: list[str]
    token_width: Positive  # lora.check_width knows what it must divide


class Columns(_Section):
    """Which columns of a file or a hub data set hold what.

    `choices` is a column, a column per option, or the classes that the numbers in `gold` count.
    """

    question: str
    gold: str
    choices: str | list[str] = ""
    context: str = ""


class Data(_Section):
    source: Literal["assets", "hub", "jsonl"]
    dir: str
    # leave-one-out asks for more: _data_faults
    train_tasks: Annotated[list[str], AtLeastOne]
    test_tasks: list[str]
    targets: list[str]
    jsonl: dict[str, str]
    hub: dict[str, str]
    columns: dict[str, Columns]
    format: Literal["cloze", "letter"]
    math_form: Literal["choice", "generate"]
    num_train: Positive
    num_support: Annotated[Int, Field(ge=2)]  # two folds at least
    num_test: Positive | Literal["all"]
    skip_test: Count
    test_from: Literal["test", "train"]
    num_prompts: Positive
    prompts_from: Literal["train", "test"]
    max_tokens: Annotated[Int, Field(ge=32)]  # a chat template alone takes a dozen


class Collect(_Section):
    pretrain_steps: Positive
    pretrain_lr: Rate
    finetune_steps: Count
    finetune_lr: Rate
    warmup_steps: Count
    batch_size: Positive
    save_last: Annotated[Int, Field(ge=2)] | Literal["all"]  # a spread needs two checkpoints


class Generator(_Section):
    encoder: str
    condition: Literal["input", "prompt"]
    max_length: Annotated[Int, Field(ge=8, le=512)]  # the encoder has 512 positions
    num_prompts: Positive
    # (N, L, C) of each layer
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
        # "same" padding has a middle
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
    sample: StrictBool
    meta_epochs: Positive
    inner_lr: Rate
    meta_lr: Rate
    batch_size: Positive
    kl_weight: Annotated[Float, Field(ge=0)]


class Strategies(_Section):
    # the upper limits are those of the papers and of SLOT
    max_ttl_steps: Positive
    max_ttl_lr: Rate
    ttl_threshold: Literal["median"] | Annotated[Float, Field(ge=0)]
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
    prompt: str
    proposals: Positive
    distinct: StrictBool
    steps: Positive
    iterations: Positive
    min_per_family: Count
    temperature: Annotated[Float, Field(gt=0)]
    top_p: Annotated[Float, Field(gt=0, le=1)]
    top_k: Positive
    max_new_tokens: Positive
    reward_margin: Count
    select_by: Literal["wins", "gold_logp", "family"]
    select_margin: Count
    sft_margin: Count
    folds: Annotated[Int, Field(ge=2)]  # no more than support examples: _cross_checks
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
    token_budget: Annotated[Int, Field(ge=32)]  # of a forward pass
    max_new_tokens: Positive
    generate: StrictBool


class Union(_Section):
    step_share: Annotated[Float, Field(gt=0)]


class Maml(_Section):
    modules: Annotated[list[str], Field(min_length=1)]
    alpha: Positive
    test_steps: Positive
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
    paper: Literal["none", "qwen2.5-0.5b", "qwen2.5-1.5b"]
    seed_runs: list[str]


class Analyze(_Section):
    methods: list[Literal[tuple(methods.METHODS)]]
    other_run: str


class Study(_Section):
    parts: Annotated[list[Literal["labels", "tasks", "search"]], AtLeastOne]
    labels: Annotated[list[Count], AtLeastOne]
    draws: Annotated[Int, Field(ge=2)]  # their spread is half of an interval
    starts: list[Literal["plain", "mean", "union", "generated", "around_union", "maml", "icl"]]
    development_tasks: Annotated[list[str], AtLeastOne]
    development_examples: Positive
    losses: Annotated[list[Literal["lm", "choice"]], AtLeastOne]
    steps: Annotated[list[Positive], AtLeastOne]
    learning_rate: Rate
    batch_size: Positive
    set_sizes: Annotated[list[Positive], AtLeastOne]
    further_tasks: list[str]
    around_steps: Annotated[Int, Field(ge=2)]
    strategies: list[dict]


class Config(_Section):
    """The whole configuration of a run; configs/default.yaml explains it key by key."""

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
    analyze: Analyze
    study: Study
    # is `task` the user's own, none that the run was made with?
    _own: bool = PrivateAttr(False)

    def is_own(self, name: str) -> bool:
        """Is this the user's own task, all of whose labelled rows may be used?"""
        return self._own and name == self.task


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
        # a SafeLoader: tags that would build objects are refused
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        # some faults of YAML have no place
        line = getattr(getattr(e, "problem_mark", None), "line", 0) + 1
        raise UserError(
            f"{where}:{line}: not valid YAML ({getattr(e, 'problem', e)}); "
            "expected lines of `key: value`"
        ) from None


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}; FREE_MAPS stay whole."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and path not in FREE_MAPS:
            flat |= flatten(value, path + ".")
        else:
            flat[path] = value
    return flat


def _unflatten(flat: dict) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *sections, leaf = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


def _read(path: Path) -> dict:
    """A YAML file as flat keys. Raises: UserError: there is none, or it is no configuration."""
    if not path.is_file():
        files = sorted((ROOT / "configs").glob("*.yaml"))
        presets = [f"configs/{f.name}" for f in files if f.stem not in ("contexts", "models")]
        raise UserError(f"config={path}: no such file; presets here: {', '.join(presets)}")
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
    words = _split_words(args)
    stage = words.get("stage", "all")

    # each layer wins over those before it
    flat = _read(DEFAULT)
    # whence each value came, for the messages
    where = dict.fromkeys(flat, "configs/default.yaml")
    layers = [_preset(words, stage), ("command line", _typed_words(words))]
    faults = []
    for source, layer in layers:
        faults += _lay_over(flat, where, source, layer)

    # the user's own files: relative to where the command is given, not to this folder
    for key in ("adapter", "input", "output"):
        if flat[key] and isinstance(flat[key], str):
            flat[key] = str(Path(flat[key]).absolute())
    known = [flat["data.train_tasks"], flat["data.test_tasks"]]
    # the user's own task becomes the one target of the run it is adapted with
    if flat["task"]:
        faults += _take_in(flat, str(flat["task"]), stage, "evaluate.methods" in words)

    # what one key tells comes with the faults of the layers; what two tell needs a legal whole
    cfg = None
    try:
        cfg = Config.model_validate(_unflatten(flat))
    except ValidationError as e:
        faults += _schema_faults(e, flat, where)
    if cfg is not None:
        cfg._own = bool(cfg.task) and not any(cfg.task in tasks for tasks in known)
        # a user's task and a run that is only read draw no proposals for the run's own methods
        samples = not cfg.task and stage not in (*READING, *USER_STAGES)
        faults += _cross_checks(cfg, where, samples)
    if faults:
        raise UserError(f"{len(faults)} fault(s) in the configuration:\n  " + "\n  ".join(faults))
    return cfg, stage


def _split_words(args: list[str]) -> dict[str, str]:
    words = {}
    # a key that is given twice counts as given last
    for word in args:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(
                f"argument {word!r}: expected key=value, such as stage=all or generator.lr=1e-3"
            )
        words[key] = value
    return words


def _typed_words(words: dict[str, str]) -> dict:
    typed = {}
    for key, value in words.items():
        if key not in ("stage", "config"):
            typed[key] = parse_yaml(value, f"{key}={value}")
    return typed


def _preset(words: dict[str, str], stage: str) -> tuple[str, dict]:
    """(its name, flat keys) of what lies between default and command line: `config=`, else a run's
    own record where the command is about a run that is there already, else nothing."""
    path = words.get("config", "")
    if path:
        return path, _read(Path(path))
    if stage not in (*USER_STAGES, *READING) and "task" not in words:
        return "", {}
    path = _trained_run(words.get("run"))
    # what the run is, not what was last done with it
    flat = _read(Path(path))
    for key in ("task", "method", "adapter", "input", "output", "overwrite"):
        flat.pop(key, None)
    return path, flat


def _trained_run(run: str | None) -> str:
    """The record of `run=`, or of the first of the presets' own folders that has one.

    Raises: UserError: no trained run there.
    """
    for folder in [run] if run else ["runs/smollm2", "runs/demo"]:
        record = ROOT / folder / "config.yaml"
        if record.is_file():
            return str(record)
    raise UserError(
        f"run={run or 'runs/smollm2'}: no trained run there; `make demo` (runs/demo, five minutes) "
        "or `make reproduce` (runs/smollm2) trains one, run=folder names another"
    )


def _lay_over(flat: dict, where: dict, source: str, layer: dict) -> list[str]:
    """Set the keys of a layer in `flat`, and in `where` whence they are. Returns faults."""
    faults = []
    for key, value in layer.items():
        if key in flat:
            flat[key] = value
            where[key] = source
            continue
        near = difflib.get_close_matches(key, flat, n=1, cutoff=0.4)
        hint = f"did you mean `{near[0]}`?" if near else "see configs/default.yaml"
        faults.append(f"{key} ({source}): unknown key; {hint}")
    return faults


def _schema_faults(error: ValidationError, flat: dict, where: dict) -> list[str]:
    faults: dict[str, list[str]] = {}
    for e in error.errors():
        path = ".".join(str(part) for part in e["loc"])
        # a key that takes a number or a word has a fault by each reading: one line names both
        path = re.sub(r"\.(literal|function-).*", "", path)
        # the key that was set: a fault may lie inside its list or map
        key = path
        while key not in flat and "." in key:
            key = key.rpartition(".")[0]
        got = flat.get(key, e["input"])
        text = e["msg"].removeprefix("Value error, ")
        start = f"{path} ({where.get(key, 'configuration')}): got {got!r}; "
        faults.setdefault(start, []).append(text)
    return [start + ", or: ".join(texts) for start, texts in faults.items()]


def _take_in(flat: dict, source: str, stage: str, methods_given: bool) -> list[str]:
    """Make `task=` the one target: a file, a hub data set or a task of the run. Returns faults."""
    if stage not in ("adapt", "check", *USER_STAGES):
        stages = f"stage=adapt, check, {' or '.join(USER_STAGES)}"
        return [f"task (command line): goes with {stages}, not stage={stage}"]
    for key, kind in _TAKEN_IN.items():
        if not isinstance(flat[key], kind):
            return []  # the schema says so

    # a task of the run wins over a file of the same name
    known = flat["data.train_tasks"] + flat["data.test_tasks"]
    name, section, place = _locate(source)
    # export and predict may name a task that was adapted before: its folder is asked for later
    adapted = stage in USER_STAGES and re.fullmatch(r"\w+", source)
    if source in known or (adapted and not name):
        name = source
        place = own_tasks(flat["run"]).get(name, "")
        section = _section_of(place) if place else ""
    if not name:
        return [
            f"task (command line): got {source!r}; expected a file ({', '.join(FILES)}), "
            f"hf:org/name or one of {known}"
        ]
    if (name in known and name != source) or name == "all":
        return [
            f"task (command line): {source} would be called {name}, which is a name of the run's "
            "own; rename it"
        ]
    if section:
        name = _free_name(flat["run"], name, place)
    flat["task"] = name
    flat["data.targets"] = [name]
    if section:
        flat[section] = {**flat[section], name: place}
    if name not in known:
        # the run's own targets are not needed, nor their files
        flat["data.test_tasks"] = [name]
    if not methods_given:
        flat["evaluate.methods"] = list(methods.OWN_TASK)
    return []


OWN_TASKS = "own_tasks.json"
FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_TAKEN_IN = {
    "data.train_tasks": list,
    "data.test_tasks": list,
    "data.jsonl": dict,
    "data.hub": dict,
}


def _section_of(source):
    """The key of the map that a user's data belongs into."""
    suffix = Path(source).suffix.lower()
    return "data.jsonl" if suffix in FILES and not source.startswith("hf:") else "data.hub"


def _locate(source: str) -> tuple[str, str, str]:
    """(name, key of its map, place) of a user's data; three empty texts where it is none."""
    on_hub = source.startswith("hf:")
    place = source.removeprefix("hf:")
    path = Path(place).expanduser()
    name = ""
    section = _section_of(source)
    if on_hub and not path.is_dir():
        # org/name and org/name/configuration are called by their name
        name = path.parts[:2][-1]
    elif on_hub or path.suffix.lower() in FILES:
        name = path.name if on_hub else path.stem
        place = str(path.absolute())
    return re.sub(r"\W+", "_", name), section, place


def own_tasks(run: str | Path) -> dict[str, str]:
    """{name: file or hub id} of the users' tasks that a run has been adapted to."""
    record = ROOT / str(run) / OWN_TASKS
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _free_name(run, name, place):
    """The name, with a number behind it where another file has it already in this run."""
    taken = own_tasks(run)
    number = 1
    free = name
    while taken.get(free, place) != place:
        number += 1
        free = f"{name}_{number}"
    return free


def _cross_checks(cfg: Config, where: dict, samples: bool) -> list[str]:
    """Faults that need two keys to see.

    Args: samples: will this command draw proposals for the run's own methods?
    """
    found = _data_faults(cfg) | _method_faults(cfg)
    # checkpoints are the last steps of training
    steps = cfg.collect.pretrain_steps + cfg.collect.finetune_steps
    if cfg.collect.save_last != "all" and cfg.collect.save_last > steps:
        found["collect.save_last"] = (
            f"got {cfg.collect.save_last}; training has {steps} steps: at most {steps}"
        )
    # the first layer receives the prompts of a batch, each as its encoder states
    g = cfg.generator
    if not g.flow or g.flow[0][:2] != [g.num_prompts, g.max_length]:
        found["generator.flow"] = (
            f"its first entry must be [num_prompts, max_length, encoder width] = "
            f"[{g.num_prompts}, {g.max_length}, 384], got {g.flow[:1]}"
        )
    p = cfg.policy
    # the minimum of each family has to fit into the proposals
    families = len(methods.sampled_families(cfg.evaluate.methods, p.families))
    if samples and p.min_per_family * families > p.proposals:
        found["policy.min_per_family"] = (
            f"{p.min_per_family} x {families} families exceed policy.proposals = {p.proposals}: "
            f"at most {p.proposals // families}"
        )
    # strategies.CHAINED: only these make an adapter that has read no label
    if p.steps > 1 and not {"TTT", "LORA"} & set(p.families):
        found["policy.steps"] = (
            f"{p.steps} steps, but none of {p.families} can be chained: add TTT or LORA to "
            "policy.families, or set policy.steps=1"
        )
    if p.folds > cfg.data.num_support:
        found["policy.folds"] = f"got {p.folds} folds of {cfg.data.num_support} support examples"
    return [f"{key} ({where[key]}): {text}" for key, text in found.items()]


def _data_faults(cfg: Config) -> dict[str, str]:
    d = cfg.data
    tasks = d.train_tasks + d.test_tasks
    found = {}
    unknown = [task for task in d.targets if task not in tasks]
    if unknown:
        found["data.targets"] = f"{unknown} are in neither data.train_tasks nor data.test_tasks"
    if d.skip_test and d.test_from == "train":
        found["data.skip_test"] = f"got {d.skip_test}; data.test_from=train scores no test example"
    twice = sorted(task for task, count in Counter(tasks).items() if count > 1)
    if twice:
        found["data.test_tasks"] = (
            f"{twice} are listed twice (train_tasks and test_tasks are disjoint)"
        )
    # an in-domain target is left out of what its adapter is learnt from
    in_domain = set(d.targets or d.train_tasks) & set(d.train_tasks)
    if in_domain and len(d.train_tasks) < 3:
        found["data.train_tasks"] = "leave-one-out needs at least 3 tasks (2 remain to learn from)"
    return found


def _method_faults(cfg: Config) -> dict[str, str]:
    e = cfg.evaluate
    found = {}
    if e.metric in ("strict", "lenient") and not e.generate:
        found["evaluate.metric"] = f"{e.metric} needs generated answers: evaluate.generate=true"
    maml = cfg.baselines.maml
    absent = [name for name in maml.modules if name not in cfg.model.modules]
    if "maml_qvo" in e.methods and absent:
        found["baselines.maml.modules"] = (
            f"{absent} not adapted in this run; model.modules has {cfg.model.modules}"
        )
    # ABMLL and appendix H's MAML adapt by their own steps
    own_steps = ("abmll", "maml_qvo")
    tuned = [m for m in methods.BASELINES if m in e.methods and m not in own_steps]
    if tuned and not cfg.baselines.sft and "degaml_plus" not in e.methods:
        found["evaluate.methods"] = (
            f"{tuned[0]} tries the SFT settings proposed for degaml_plus: add degaml_plus, or give "
            "settings in baselines.sft"
        )
    return found


def differences(cfg: Config) -> dict:
    """Keys whose value is not the default's, for the log."""
    default = _read(DEFAULT)
    flat = flatten(cfg.model_dump())
    return {key: value for key, value in flat.items() if value != default.get(key)}
