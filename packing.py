"""How rows share a forward pass: which go together, and how they lie in its sequences.

Rows are `scoring.Row`s. Padding costs as much as text, and attention the square of a sequence.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
import torch

import runtime

LAYOUTS = 12  # ways to lay rows side by side that are compared, at most
ATTENTION_WIDTH = 1000  # tokens of a sequence of which attention costs as much as all the rest
PREFIX_SHARE = 1 / 30  # what a token of the prefix costs each sequence, of a token that is read


def _longest_first(rows):
    return sorted(range(len(rows)), key=lambda i: -rows[i].length)


def plan_batches(rows: list, budget: int):
    """Row numbers in batches of similar length, longest first.

    Rows times longest stays within `budget` tokens, unless a single row exceeds it.
    """
    batches = []
    room = 0
    for i in _longest_first(rows):
        if room <= 0:
            batches.append([])
            room = budget // max(1, rows[i].length)
        batches[-1].append(i)
        room -= 1
    return batches


def similar_lengths(rows, enough):
    """Row numbers in groups of at least `enough` tokens, longest first.

    Attention costs the square of a group's longest row, so long and short rows are kept apart.
    """
    groups = []
    missing = 0
    for i in _longest_first(rows):
        if missing <= 0:
            groups.append([])
            missing = enough
        groups[-1].append(i)
        missing -= rows[i].length
    return groups


def pack(rows: list, device: str, before: int = 0):
    """Lay rows into a few sequences of one width, masked from each other.

    Args: before: tokens of the prefix, which every sequence attends to.
    Returns: ids (S, T), positions (S, T), mask (S, 1, T, T) bool, and for each row where its
        tokens start in the flattened (S * T) order.
    """
    places, count, width = _lay_out(rows, _likely_counts(rows), before)
    # the GPU's attention kernels read masks 16 bytes at a time
    if torch.device(device).type == "cuda":
        width += -width % 8
    starts = [sequence * width + offset for sequence, offset in places]

    # of every token: its id, its position, its branch (0 = context), its row
    laid = torch.zeros(4, count * width, dtype=torch.long)
    # each padding token is a row of its own: it sees itself, so no softmax is empty
    laid[3] = len(rows) + torch.arange(count * width)
    for number, row in enumerate(rows):
        length = len(row.context)
        ids = list(row.context)
        positions = list(range(length))
        branches = [0] * length
        for option, branch in enumerate(row.branches, 1):
            ids += branch
            # each branch continues the context: positions restart where that ended
            positions += range(length, length + len(branch))
            branches += [option] * len(branch)
        owners = [number] * row.length
        tokens = torch.tensor([ids, positions, branches, owners])
        laid[:, starts[number] : starts[number] + row.length] = tokens

    # the mask is T times as large as what it follows from: it is made where it is used
    laid = runtime.to_device(laid, device).view(4, count, width)
    ids, positions, branch, owner = laid
    same_row = owner[:, :, None] == owner[:, None, :]
    same_branch = branch[:, :, None] == branch[:, None, :]
    of_context = branch[:, None, :] == 0
    # a branch sees its row's context and itself, in both no later token
    mask = same_row & (same_branch | of_context)
    mask &= torch.ones_like(mask[0]).tril()
    return ids, positions, mask[:, None], starts


def _likely_counts(rows):
    """Numbers of sequences to try: from three of the longest row's length to a row in each."""
    total = sum(row.length for row in rows)
    longest = max(row.length for row in rows)
    fewest = math.ceil(total / (3 * longest))
    counts = np.linspace(fewest, len(rows), LAYOUTS, dtype=int)
    return np.unique(counts).tolist()


def _lay_out(rows, counts, before):
    """The cheapest layout: (sequence, offset) of each row, number of sequences, their width.

    The longest row first, each into the sequence with fewest tokens.
    """
    order = _longest_first(rows)
    lowest = math.inf
    for count in counts:
        used = [(0, sequence) for sequence in range(count)]
        places = [None] * len(rows)
        for i in order:
            offset, sequence = heapq.heappop(used)
            places[i] = sequence, offset
            heapq.heappush(used, (offset + rows[i].length, sequence))

        # padding costs as much as text; attention grows with the square of the width
        width, _ = max(used)
        cost = width * (1 + width / ATTENTION_WIDTH) + before * PREFIX_SHARE
        cost *= count
        if cost < lowest:
            lowest = cost
            found = places, count, width
    return found
