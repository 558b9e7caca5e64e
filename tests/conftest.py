"""Shared fixtures: tiny random models, an encoder and five synthetic tasks, built offline; and the real
assets.

The tiny model goes through `save_pretrained` and `load_base`, the path a user's own model takes.
"""

import gc
import json
import os
import random
import re
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
TRAIN_TASKS, TEST_TASKS = ("alpha", "beta", "gamma"), ("delta", "epsilon")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "river",
    "stone",
    "cloud",
    "forest",
    "engine",
    "window",
    "garden",
    "letter",
    "number",
    "planet",
    "copper",
    "silver",
    "market",
    "bridge",
    "candle",
    "pencil",
    "rocket",
    "basket",
    "mirror",
    "ladder",
]


def tiny_rows(task: str, count: int = 60) -> list[dict]:
    """Records of one synthetic task. alpha, beta and delta can be learnt, gamma and epsilon are noise."""
    rng, rows = random.Random(task), []
    for i in range(count):
        a, b, c, d = rng.sample(WORDS, 4)
        gold = rng.randrange({"alpha": 2, "beta": 4}.get(task, 3))
        if task == "alpha":  # the right option is always the same word
            question, choices = f"Is the {a} {i} near the {b}?", ["never", "never"]
            choices[gold] = "always"
        elif task == "beta":  # the right option is the word asked for
            choices = rng.sample([a, b, c, d], 4)
            question = f"Item {i}: which word follows the {choices[gold]}?"
        elif task == "delta":
            choices = [f"a {a}", f"two {b} and a {c}", f"no {d}"]
            question, gold = f"Row {i} has a {c} and a {d}. What is here?", 1
        else:
            question, choices = (
                f"Case {i} of {task}: choose between {a} and {b}.",
                [a, b, f"{c} {d}"],
            )
        rows.append({"id": f"{task}-{i}", "question": question, "choices": choices, "gold": gold})
    return rows


def byte_tokenizer():
    """A byte-level BPE tokenizer with ChatML markers, trained on the synthetic rows: 400 entries, no
    opening token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=[AddedToken(s, special=True) for s in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tok.train_from_iterator(
        [
            f"Question: {r['question']}\nAnswer: {c}"
            for t in (*TRAIN_TASKS, *TEST_TASKS)
            for r in tiny_rows(t)
            for c in r["choices"]
        ],
        trainer,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def save_tiny(folder: Path, kind: str = "llama", **more) -> Path:
    """Save a two-layer random decoder of a transformers model type (adapted dimensions 16, 32, 64) with its
    tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **{
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
            **more,
        },
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
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


@pytest.fixture
def tiny_lm(tiny_model_dir):
    """The tiny model as `load_lm` makes it: packed attention, float32, rank 4, alpha 8, tokens of
    width 16."""
    from lora import attach_lora, find_layout
    from scoring import LM, load_base

    model, tokenizer = load_base(str(tiny_model_dir), "main", torch.float32, "cpu")
    layout = find_layout(model, 4, 8, 16, MODULES)
    attach_lora(model, layout)
    return LM(model, tokenizer, layout)


@pytest.fixture(scope="session")
def tiny_encoder_dir(tmp_path_factory) -> Path:
    """Folder of a two-layer random BERT of width 32 with a word-piece tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_encoder")
    text = " ".join(
        r["question"] for t in (*TRAIN_TASKS, *TEST_TASKS) for r in tiny_rows(t)
    ).lower()
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *sorted(set(re.findall(r"[a-z]+|\d+|[?.:]", text))),
    ]
    tok = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    tok.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    torch.manual_seed(1)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tasks_dir(tmp_path_factory) -> Path:
    """Folder of alpha, beta, gamma, delta and epsilon.jsonl, 60 rows each."""
    folder = tmp_path_factory.mktemp("tiny_tasks")
    for task in (*TRAIN_TASKS, *TEST_TASKS):
        (folder / f"{task}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in tiny_rows(task))
        )
    return folder


@pytest.fixture(scope="session")
def tiny_jsonl(tiny_tasks_dir) -> dict[str, str]:
    """{task: file} of the synthetic tasks, for data.jsonl."""
    return {t: str(tiny_tasks_dir / f"{t}.jsonl") for t in (*TRAIN_TASKS, *TEST_TASKS)}


@pytest.fixture
def tiny_args(tmp_path, tiny_model_dir, tiny_encoder_dir, tiny_jsonl) -> list[str]:
    """key=value words of a whole pipeline that takes seconds; its run folder is tmp_path/run. Later
    words win."""
    values = {
        "name": "tiny",
        "run": str(tmp_path / "run"),
        "seed": 1,
        "dtype": "float32",
        "device": os.environ.get("TEST_DEVICE", "cpu"),
        "model.name": str(tiny_model_dir),
        "model.rank": 4,
        "model.alpha": 8,
        "model.token_width": 16,
        "data.source": "jsonl",
        "data.jsonl": tiny_jsonl,
        "data.train_tasks": list(TRAIN_TASKS),
        "data.test_tasks": list(TEST_TASKS),
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
        "generator.encoder": str(tiny_encoder_dir),
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
    return [
        f"{k}={json.dumps(v)}" if not isinstance(v, str) else f"{k}={v}" for k, v in values.items()
    ]


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder `make assets` fills. Its absence is a failure, not a skip: claims about the real model
    rest on it."""
    folder = ROOT / "assets"
    wanted = (
        "data/arc_e.test.jsonl.gz",
        "data/jama.all.jsonl.gz",
        "models/smollm2-135m-instruct/model.safetensors",
        "models/all-minilm-l6-v2/model.safetensors",
    )
    missing = [w for w in wanted if not (folder / w).exists()]
    if missing:
        pytest.fail(f"{missing} not in {folder}: run make assets")
    return folder


@pytest.fixture(scope="session")
def real_lm(assets):
    """The embedded SmolLM2-135M-Instruct in float32, with the default configuration's layout."""
    from config import load_config
    from lora import attach_lora, find_layout
    from scoring import LM, load_base

    m = load_config([])[0].model
    model, tokenizer = load_base(
        str(assets / "models/smollm2-135m-instruct"), "main", torch.float32, "cpu"
    )
    layout = find_layout(model, m.rank, m.alpha, m.token_width, m.modules)
    attach_lora(model, layout)
    return LM(model, tokenizer, layout)


# --------------------------------------------------------------------------------------------- a whole tiny run

# a choice that ties is taken too, so that more than one family ends up in the results
LOOSE = ["policy.select_margin=0", "policy.sft_margin=0", "generator.steps=20"]
FULL_RUN: dict = {}


def run_command(words: list[str]) -> int:
    """The command in this process, after letting go of folders that earlier calls held."""
    import degaml

    gc.collect()
    return degaml.main(words)


@pytest.fixture
def one_thread():
    """Sums depend on the number of threads, and some tests compare bits with runs in processes of their own."""
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
        start = time.monotonic()
        assert run_command([*words, "stage=all", f"run={folder}"]) == 0
        FULL_RUN.update(run=folder, seconds=time.monotonic() - start)
    return FULL_RUN["run"]


@pytest.fixture
def copy(full, tmp_path) -> Path:
    """A copy of the full run at the place the words name."""
    shutil.copytree(full, tmp_path / "run")
    return tmp_path / "run"
