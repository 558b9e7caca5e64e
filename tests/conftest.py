"""Shared fixtures: tiny random models, an encoder and five synthetic tasks, built offline; and the
real assets.

The tiny model goes through `save_pretrained` and `load_base`, the path a user's own model takes.
"""

import contextlib
import gc
import json
import os
import random
import re
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub library is first imported, by a test
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import collect
import conditions
import config
import degaml
import generator
import lora
import scoring
from runtime import Run
from scoring import LM

TRAIN_TASKS = ("alpha", "beta", "gamma")
TEST_TASKS = ("delta", "epsilon")
TASKS = (*TRAIN_TASKS, *TEST_TASKS)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    *("river", "stone", "cloud", "forest", "engine", "window", "garden"),
    *("letter", "number", "planet", "copper", "silver", "market", "bridge"),
    *("candle", "pencil", "rocket", "basket", "mirror", "ladder"),
]


def tiny_rows(task: str, count: int = 60) -> list[dict]:
    """Records of one synthetic task. alpha, beta and delta can be learnt, the others are noise."""
    rng = random.Random(task)
    rows = []
    for i in range(count):
        a, b, c, d = rng.sample(WORDS, 4)
        gold = rng.randrange({"alpha": 2, "beta": 4}.get(task, 3))
        if task == "alpha":  # the right option is always the same word
            question = f"Is the {a} {i} near the {b}?"
            choices = ["never", "never"]
            choices[gold] = "always"
        elif task == "beta":  # the right option is the word asked for
            choices = rng.sample([a, b, c, d], 4)
            question = f"Item {i}: which word follows the {choices[gold]}?"
        elif task == "delta":  # the right option is always the longest
            question = f"Row {i} has a {c} and a {d}. What is here?"
            choices = [f"a {a}", f"two {b} and a {c}", f"no {d}"]
            gold = 1
        else:
            question = f"Case {i} of {task}: choose between {a} and {b}."
            choices = [a, b, f"{c} {d}"]
        rows.append({"id": f"{task}-{i}", "question": question, "choices": choices, "gold": gold})
    return rows


def byte_tokenizer():
    """A byte-level BPE tokenizer with ChatML markers, trained on the synthetic rows.

    It has 400 entries and no opening token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = []
    for task in TASKS:
        for row in tiny_rows(task):
            texts += [f"Question: {row['question']}\nAnswer: {c}" for c in row["choices"]]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def save_tiny(folder: Path, kind: str = "llama", **more) -> Path:
    """Save a two-layer random decoder of a transformers model type with its tokenizer.

    Its adapted dimensions are 16, 32 and 64.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | more))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """Folder of a two-layer random Llama with its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_architecture(tmp_path_factory):
    """name -> folder of a two-layer random model of that type, made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_tiny(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return make


def load_lm(folder: Path, rank: int, alpha: int, width: int, modules: list[str]) -> LM:
    """A model as `scoring.load_lm` makes it: packed attention, float32, ready for adapters."""
    model, tokenizer = scoring.load_base(str(folder), "main", torch.float32, "cpu")
    layout = lora.find_layout(model, rank, alpha, width, modules)
    lora.attach_lora(model, layout)
    return LM(model, tokenizer, layout)


@pytest.fixture
def tiny_lm(tiny_model_dir) -> LM:
    """The tiny model with rank 4, alpha 8 and tokens of width 16."""
    return load_lm(tiny_model_dir, 4, 8, 16, MODULES)


@pytest.fixture(scope="session")
def tiny_encoder_dir(tmp_path_factory) -> Path:
    """Folder of a two-layer random BERT of width 32 with a word-piece tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    questions = []
    for task in TASKS:
        questions += [row["question"].lower() for row in tiny_rows(task)]
    found = set(re.findall(r"[a-z]+|\d+|[?.:]", " ".join(questions)))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(found)]
    numbers = {word: i for i, word in enumerate(vocabulary)}

    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(1)
    shape = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("tiny_encoder")
    BertModel(shape).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tasks_dir(tmp_path_factory) -> Path:
    """Folder of alpha, beta, gamma, delta and epsilon.jsonl, 60 rows each."""
    folder = tmp_path_factory.mktemp("tiny_tasks")
    for task in TASKS:
        lines = [json.dumps(row) + "\n" for row in tiny_rows(task)]
        (folder / f"{task}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny_jsonl(tiny_tasks_dir) -> dict[str, str]:
    """{task: file} of the synthetic tasks, for data.jsonl."""
    return {task: str(tiny_tasks_dir / f"{task}.jsonl") for task in TASKS}


# A whole pipeline that takes seconds.
TINY = {
    "name": "tiny",
    "seed": 1,
    "dtype": "float32",
    "device": os.environ.get("TEST_DEVICE", "cpu"),
    "model.rank": 4,
    "model.alpha": 8,
    "model.token_width": 16,
    "data.source": "jsonl",
    "data.train_tasks": TRAIN_TASKS,
    "data.test_tasks": TEST_TASKS,
    "data.num_train": 24,
    "data.num_support": 8,
    "data.num_test": 12,
    "data.num_prompts": 16,
    "data.max_tokens": 256,
    "collect.pretrain_steps": 6,
    "collect.pretrain_lr": 1e-2,
    "collect.finetune_steps": 3,
    "collect.finetune_lr": 1e-3,
    "collect.warmup_steps": 1,
    "collect.batch_size": 4,
    "collect.save_last": 3,
    "generator.max_length": 16,
    "generator.num_prompts": 4,
    "generator.flow": [[4, 16, 32], [8, 8, 16]],
    "generator.kernel": 3,
    "generator.scale_code": "element",
    "generator.criterion_weight": "none",
    "generator.steps": 6,
    "generator.lr": 1e-3,
    "generator.batch_size": 3,
    "generator.micro_batch": 2,
    "generator.pairs_per_task": 20,
    "generator.save_every": 2,
    "generator.seed": 1,
    "strategies.proposal_grid": {
        "TTT.ttl_steps": [2],
        "TTT.learning_rate": [1e-3],
        "TTT.batch_size": [4],
        "LORA.lambda": [0.5, 1.0],
        "TTS.num_prompt_batches": [2],
        "Latent.slot_steps": [2],
        "Latent.slot_lr": [0.01, 0.1],
        "SFT.sft_steps": [2, 8],
        "SFT.learning_rate": [0.03],
        "SFT.batch_size": [4],
        "SFT.init_scale": [0.5, 1.0],
    },
    "strategies.max_sft_lr": 0.1,  # high enough for a random model to win rewards
    "policy.proposals": 5,
    "policy.iterations": 2,
    "policy.max_new_tokens": 160,
    "policy.folds": 2,
    "policy.rank": 4,
    "policy.alpha": 4,
    "policy.epochs": 1,
    "policy.batch_size": 2,
    "policy.lr": 1e-3,
    "evaluate.prompt_batches": 2,
    "evaluate.max_new_tokens": 4,
}


def as_words(settings: dict) -> list[str]:
    """Settings as the key=value words of a command line."""
    words = []
    for key, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words.append(f"{key}={text}")
    return words


@pytest.fixture
def tiny_args(tmp_path, tiny_model_dir, tiny_encoder_dir, tiny_jsonl) -> list[str]:
    """The words of the tiny pipeline; its run folder is tmp_path/run. Later words win."""
    places = {
        "run": str(tmp_path / "run"),
        "model.name": str(tiny_model_dir),
        "generator.encoder": str(tiny_encoder_dir),
        "data.jsonl": tiny_jsonl,
    }
    return as_words(TINY | places)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder `make assets` fills.

    Its absence is a failure, not a skip: claims about the real model rest on it.
    """
    folder = ROOT / "assets"
    wanted = (
        "data/arc_e.test.jsonl.gz",
        "data/jama.all.jsonl.gz",
        "models/smollm2-135m-instruct/model.safetensors",
        "models/all-minilm-l6-v2/model.safetensors",
    )
    missing = [file for file in wanted if not (folder / file).exists()]
    if missing:
        pytest.fail(f"{missing} not in {folder}: run make assets")
    return folder


@pytest.fixture(scope="session")
def real_lm(assets) -> LM:
    """The embedded SmolLM2-135M-Instruct in float32, with the default configuration's layout."""
    m = config.load_config([])[0].model
    folder = assets / "models/smollm2-135m-instruct"
    return load_lm(folder, m.rank, m.alpha, m.token_width, m.modules)


def make_run(words: list[str], *more: str) -> Run:
    """The run that some key=value words describe, without the command's lock and records."""
    cfg, _ = config.load_config([*words, *more])
    folder = Path(cfg.run)
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, cfg, quiet=True)


# Run folders that are made once and copied by every test that asks for one.
MADE: dict[str, Path] = {}


@pytest.fixture
def collected(tiny_args, tmp_path, tmp_path_factory) -> list[str]:
    """Words of a run folder in which collection is done and prompts are encoded."""
    if "collected" not in MADE:
        folder = tmp_path_factory.mktemp("collected") / "run"
        run = make_run(tiny_args, f"run={folder}")
        collect.collect_adapters(run)
        conditions.encode_prompts(run)
        MADE["collected"] = folder
    shutil.copytree(MADE["collected"], tmp_path / "run")
    return tiny_args


@pytest.fixture
def trained(tiny_args, tmp_path, tmp_path_factory) -> list[str]:
    """Words of a run folder in which checkpoints and all generators are trained."""
    if "trained" not in MADE:
        folder = tmp_path_factory.mktemp("trained") / "run"
        run = make_run(tiny_args, f"run={folder}")
        collect.collect_adapters(run)
        generator.train_generators(run)
        MADE["trained"] = folder
    shutil.copytree(MADE["trained"], tmp_path / "run")
    return tiny_args


# A choice that ties is taken too, so that more than one family ends up in the results.
LOOSE = ["policy.select_margin=0", "policy.sft_margin=0", "generator.steps=20"]
FULL_RUN: dict = {}


def run_command(words: list[str]) -> int:
    """The command in this process, after letting go of folders that earlier calls held."""
    gc.collect()
    return degaml.main(words)


@contextlib.contextmanager
def file_size_limit(size: int):
    """No file grows beyond so many bytes: a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def one_thread():
    """Sums depend on the number of threads, and some tests compare bits with other processes'."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def words(tiny_args) -> list[str]:
    return [*tiny_args, *LOOSE]


@pytest.fixture
def full(words, one_thread, tmp_path_factory) -> Path:
    """The folder of one uninterrupted run in this process. Read it, or take `copy`."""
    if "run" not in FULL_RUN:
        folder = tmp_path_factory.mktemp("full") / "run"
        began = time.monotonic()
        assert run_command([*words, "stage=all", f"run={folder}"]) == 0
        FULL_RUN.update(run=folder, seconds=time.monotonic() - began)
    return FULL_RUN["run"]


@pytest.fixture
def copy(full, tmp_path) -> Path:
    """A copy of the full run at the place the words name."""
    shutil.copytree(full, tmp_path / "run")
    return tmp_path / "run"
