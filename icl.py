"""In-context learning: solved examples stand before every question of a frozen base model.

Their cost is paid at every answer, in tokens. Here they are read once per task, and every row of
the task attends to what is kept of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import prefix
import scoring
from config import UserError
from data import Example
from scoring import LM


@dataclass(frozen=True)
class Shots:
    """Solved examples as every row of a task sees them. `LM.prefix` holds what the model keeps.

    Attributes:
        examples: those that fit before the longest row, in the order of the support set.
        text: what stands before each row.
        system: the system message of all rows, in the letter format.
    """

    examples: tuple[Example, ...]
    text: str
    system: str

    def chat_behind(self, lm: LM, example: Example) -> str:
        """What a chat goes on with when it asks this question, in the letter format."""
        whole = scoring.chat_prompt(
            lm.tokenizer, self.system, example.prompt, _turns(self.examples)
        )
        return whole[len(self.text) :]


def _turns(examples):
    """Questions and answers of a chat."""
    return [(example.prompt, example.answer) for example in examples]


@contextmanager
def in_front(
    lm: LM, support: tuple[Example, ...], examples: list[Example], tokens: int = 0
) -> Iterator[None]:
    """While this is open, every row begins with as many support examples as the model has room for.

    Args:
        support: () changes nothing.
        examples: the rows to come, whose longest decides how much room there is.
        tokens: of an answer that is generated.
    Raises: UserError: not one example fits.
    """
    if not support:
        yield
        return
    room = _window(lm) - max(tokens, 1) - _longest(lm, examples)
    chosen, system, text, ids = _fitting(lm, support, room)
    lm.prefix = prefix.read_prefix(lm, ids)
    lm.shots = Shots(tuple(chosen), text, system)
    try:
        yield
    finally:
        lm.shots = None
        lm.prefix = None


def _window(lm):
    """How many tokens the model was made for; no layer sees farther than its window."""
    shapes = lm.model.config.get_text_config()
    limits = [getattr(shapes, "max_position_embeddings", None)]
    limits.append(getattr(shapes, "sliding_window", None))
    # beyond this, positions rotate otherwise than those that are cached
    rope = getattr(shapes, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limits.append(rope["original_max_position_embeddings"])
    return min(limit for limit in limits if limit)


def _longest(lm, examples):
    longest = 0
    for example in examples:
        row = scoring.make_row(lm, example)
        longest = max(longest, len(row.context) + max(map(len, row.branches)))
    return longest


def _fitting(lm, support, room):
    """(examples, system message, text, token ids): the first of the support set, as many as fit."""
    system = scoring.system_message(support[0])
    for count in range(len(support), 0, -1):
        chosen = support[:count]
        text = _text(lm, chosen, system)
        ids = scoring.encode(lm, text)
        if len(ids) <= room:
            return chosen, system, text, ids
    raise UserError(
        f"icl: the first support example has {len(ids)} tokens and the model has room for {room} "
        "before the longest row; leave icl out of evaluate.methods, or lower data.max_tokens"
    )


def _text(lm, chosen, system):
    """What stands before a row: the examples with their answers, in the format of the run."""
    if lm.form == "cloze":
        solved = []
        for example in chosen:
            context, answer = scoring.continuations(lm, example)[example.gold or 0]
            solved.append(f"{context}{answer}\n\n")
        return "".join(solved)
    # whatever the template writes before two different questions
    turns = _turns(chosen)
    wholes = [scoring.chat_prompt(lm.tokenizer, system, user, turns) for user in ("a", "b")]
    return os.path.commonprefix(wholes)
