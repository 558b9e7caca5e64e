"""Prompts as the generator meets them: which of a task's it may see, and what they become.

A prompt set is a task's unlabelled prompts under a name. A frozen sentence encoder turns it into
states, which condition the generator, and embeddings, by which questions are routed.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import runtime
import scoring
from config import UserError
from data import Example, Task
from runtime import Run
from scoring import LM

FROM_TRAIN = ".train"  # ends the name of a training task's prompts from its train split


def encode_prompts(run: Run) -> None:
    """Cache the frozen encoder's token states of every task's prompts, once per prompt.

    Writes prompts/<prompt set>/states.npy, (prompts, L, d) float16, and pooled.npy, (prompts, d)
    float32.
    """
    names = list(data.load_tasks(run))
    # a training task that is conditioned on test prompts as a target has others to learn from
    if run.cfg.data.prompts_from == "test":
        names += [task + FROM_TRAIN for task in run.cfg.data.train_tasks]
    for name in run.deal(names):
        unit = f"prompts/{name}"
        if run.finished(unit, "prompts"):
            continue
        began = time.monotonic()
        folder = run.path / unit
        examples = prompt_examples(*_task_and_prompts(run, name))
        conditions = [condition_text(run, example) for example in examples]
        states, pooled = encode_texts(run, conditions, f"encode {name}")
        runtime.save_array(folder / "states.npy", states.numpy())
        runtime.save_array(folder / "pooled.npy", pooled.numpy())
        run.finish(unit, "prompts", began)


def prompt_set(cfg, task: str, left_out: str) -> str:
    """Which of a task's prompts the models of a left-out set may see: a name under prompts/.

    Those that learn from the task see prompts of its train split. Only as a target is it
    conditioned on the prompts that `data.prompts_from` says.
    """
    learnt_from = task in data.training_tasks(cfg, left_out)
    if learnt_from and cfg.data.prompts_from == "test":
        return task + FROM_TRAIN
    return task


def _task_and_prompts(run, name):
    """The task of a prompt set, and its unlabelled prompts."""
    task = data.load_tasks(run)[name.removesuffix(FROM_TRAIN)]
    if name.endswith(FROM_TRAIN):
        return task, task.train_prompts
    return task, task.prompts


def prompt_examples(task: Task, prompts: list[str]) -> list[Example]:
    """Prompts put as the task's own questions are, with their system message."""
    # options tell a choice from a free answer; no label is read
    known = [*task.support[:1], *task.train[:1], *task.test[:1]]
    like = known[0] if known else Example("", "", ("",))
    return [Example("", prompt, like.options, system=like.system) for prompt in prompts]


def texts_of(lm: LM, task: Task, prompts: list[str]) -> list[str]:
    """Prompts exactly as the base model reads them."""
    return [scoring.input_text(lm, example) for example in prompt_examples(task, prompts)]


def task_texts(run: Run, name: str) -> list[str]:
    """The prompts of a prompt set exactly as the base model reads them."""
    return texts_of(scoring.load_lm(run), *_task_and_prompts(run, name))


def embed(run: Run, examples: list[Example]) -> Tensor:
    """(n, d) embeddings of questions, by which a router chooses."""
    texts = [condition_text(run, example) for example in examples]
    return encode_texts(run, texts)[1]


def condition_text(run: Run, example: Example) -> str:
    """What the encoder reads of a question: `generator.condition`.

    input: exactly what the base model reads. prompt: the question alone, without system line and
    chat markup (DeGAML; Drag-and-Drop). In cloze format they are the same.
    """
    if run.cfg.generator.condition == "prompt":
        return example.text
    return scoring.input_text(scoring.load_lm(run), example)


def check_encoder(cfg) -> None:
    """Look at the encoder's configuration alone, before the hours of collection.

    Raises: UserError: the encoder is not to be had, or generator.flow begins with another width.
    """
    from transformers import AutoConfig

    g = cfg.generator
    try:
        width = AutoConfig.from_pretrained(g.encoder).hidden_size
    except (OSError, ValueError) as error:
        raise _no_encoder(g.encoder, error) from None
    if g.flow[0][2] != width:
        raise UserError(
            f"generator.flow: its first entry ends in {g.flow[0][2]}, the width of {g.encoder} "
            f"is {width}"
        )


def _no_encoder(name, why):
    first_line = f"{type(why).__name__}: {why}".splitlines()[0]
    return UserError(
        f"generator.encoder={name}: cannot be loaded ({first_line[:120]}); run `make assets` or "
        "name a folder or hub id"
    )


def _load_encoder(run):
    """The frozen SentenceTransformer, loaded once per process. Raises: UserError."""
    if "encoder" not in run.cache:
        check_encoder(run.cfg)
        # Imported here because it takes seconds, and most commands encode nothing.
        from huggingface_hub import is_offline_mode
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        name = run.cfg.generator.encoder
        # Nobody asks the hub where it has nothing to give: it would warn of being out of reach.
        local = Path(name).is_dir() or is_offline_mode()
        try:
            encoder = SentenceTransformer(name, device=run.device, local_files_only=local)
        except (OSError, ValueError) as error:
            raise _no_encoder(name, error) from None
        run.cache["encoder"] = encoder.eval()
    return run.cache["encoder"]


@torch.no_grad()
def encode_texts(run: Run, texts: list[str], label: str = "encode") -> tuple[Tensor, Tensor]:
    """What the encoder makes of texts: states of its last hidden layer, and their mean.

    Returns: (n, L, d) float16 states at all L positions, padding included, and (n, d) float32
        embeddings, mean-pooled over the text and L2-normalised.
    Source: DeGAML, E.1 (all-MiniLM-L6-v2, last hidden state, no pooling).
    """
    encoder = _load_encoder(run)
    states = []
    pooled = []
    starts = range(0, len(texts), 32)
    for at in run.track(starts, label):
        # The decoder convolves over positions, so every text takes all L of them.
        tokens = encoder.tokenizer(
            texts[at : at + 32],
            padding="max_length",
            truncation=True,
            max_length=run.cfg.generator.max_length,
            return_tensors="pt",
        ).to(run.device)
        # The transformer alone: the encoder's own pooling may be another than the mean.
        # In float32, whatever the encoder is stored in: distances are taken between embeddings.
        hidden = encoder[0](tokens)["token_embeddings"].float()
        states.append(hidden.half().cpu())

        # Padding has states too, which say nothing about the text.
        is_text = tokens["attention_mask"][..., None]
        mean = (hidden * is_text).sum(1) / is_text.sum(1)
        mean = F.normalize(mean, dim=-1)
        pooled.append(mean.cpu())
    return torch.cat(states), torch.cat(pooled)


def load_states(run: Run, name: str) -> np.ndarray:
    """(prompts, L, d) float16 of a prompt set, memory-mapped. Raises: UserError: not made."""
    return runtime.load_array(run.path / f"prompts/{name}/states.npy", "r")


def load_pooled(run: Run, name: str) -> Tensor:
    """(prompts, d) float32 embeddings of a prompt set. Raises: UserError: none, or damaged."""
    path = run.path / f"prompts/{name}/pooled.npy"
    return torch.from_numpy(runtime.load_array(path))


def draw_prompts(cfg, task: str, count: int, *key) -> np.ndarray:
    """Indices of one prompt batch: `num_prompts` of `count`, drawn without replacement.

    A task with fewer prompts repeats its shuffled order cyclically.
    """
    g = cfg.generator
    rng = runtime.rng_for(g.seed, "prompts", task, *key)
    order = rng.permutation(count)
    return np.resize(order, g.num_prompts)
