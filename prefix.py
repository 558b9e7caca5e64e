"""Tokens that stand before every row of a pass: read once, and attended to by all rows.

Solved examples are such a prefix (icl.py), and so is the system message of a chat.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

WORTHWHILE = 16  # tokens: a shorter beginning is read faster than it is kept


@dataclass(frozen=True)
class Prefix:
    """What a model keeps of tokens that it has read.

    Attributes: layers: of each layer keys and values, (1, heads, P, head width).
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def tokens(self) -> int:
        """P: how many there are."""
        return self.layers[0][0].shape[2]

    def before(self, mask: Tensor, positions: Tensor):
        """(mask, positions, cache) of sequences that go on behind it.

        Args: mask: (S, …, T), what each token sees of its own sequence. positions: (S, T).
        """
        from transformers import DynamicCache

        # every token sees all of the prefix
        seen = mask.new_ones(*mask.shape[:-1], self.tokens)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.layers):
            if keys is None:  # one of the last, which read an earlier layer's (Gemma 3n)
                continue
            shape = (len(positions), -1, -1, -1)
            cache.update(keys.expand(shape), values.expand(shape), layer)
        return torch.cat([seen, mask], -1), positions + self.tokens, cache


@torch.no_grad()
def read_prefix(lm, ids) -> Prefix:
    """Read tokens with whatever adapter the model has."""
    lm.forwards += 1
    ids = torch.tensor([ids], device=lm.model.device)
    out = lm.model.get_decoder()(ids, use_cache=True)
    return Prefix(tuple((layer.keys, layer.values) for layer in out.past_key_values.layers))


@contextmanager
def read_once(lm, rows: list, steered: bool = False) -> Iterator[list]:
    """Rows without the tokens that all of them begin with: while this is open the model has these.

    Where that is not worth while, the rows as they are.
    Args: steered: latent steering needs the states of every token of a row, so nothing is shared.
    """
    shared = 0
    if len(rows) > 1 and not lm.prefix and not steered:
        shared = len(os.path.commonprefix([row.context for row in rows]))
        # each row keeps a token of its own, from which its answer is predicted
        shared = min(shared, *(len(row.context) - 1 for row in rows))
    if shared < WORTHWHILE:
        yield rows
        return

    lm.read += shared
    lm.prefix = read_prefix(lm, rows[0].context[:shared])
    try:
        yield [dataclasses.replace(row, context=row.context[shared:]) for row in rows]
    finally:
        lm.prefix = None
