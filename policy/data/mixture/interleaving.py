"""The order in which the data sets of a mixture take turns: a function of the position, with exact shares.

A binary tree splits the positions: at each node, `round(share * p)` of the first p positions go to the left. So at any
position every data set is at its share, to half a sample for two data sets, to one for three and to two at most for
many; random draws would be off by the square root of their number. Nothing has to be counted from the start.

Shape legend: P positions.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, order=True)
class _Node:
    """A leaf with the index of a data set, or an inner node; the order is that of the shares."""

    share: float
    index: int
    children: tuple[_Node, ...] = field(default=(), compare=False)


class Interleaving:
    """The turns of data sets with these shares.

    Args:
        shares: positive numbers; only their ratios matter.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.size = len(shares)
        nodes = [_Node(share / math.fsum(shares), index) for index, share in enumerate(shares)]
        heapq.heapify(nodes)
        while len(nodes) > 1:  # the smallest first: a large data set is near the root, where rounding adds up least
            small, large = heapq.heappop(nodes), heapq.heappop(nodes)
            heapq.heappush(nodes, _Node(small.share + large.share, min(small.index, large.index), (small, large)))
        (self._root,) = nodes

    def turns(self, position_P: Tensor) -> tuple[Tensor, Tensor]:
        """Return for positions int64 [P] the data set, and how many earlier positions it had, both int64 [P]."""
        set_P, count_P = torch.empty_like(position_P), torch.empty_like(position_P)
        todo = [(self._root, torch.arange(len(position_P)), position_P)]
        while todo:
            node, where_p, position_p = todo.pop()
            if not node.children:
                set_P[where_p], count_P[where_p] = node.index, position_p
                continue
            left, right = node.children
            before_p = _left(node, position_p)
            is_left_p = _left(node, position_p + 1) > before_p
            todo.append((left, where_p[is_left_p], before_p[is_left_p]))
            todo.append((right, where_p[~is_left_p], (position_p - before_p)[~is_left_p]))
        return set_P, count_P

    def counts(self, positions: int) -> list[int]:
        """Return how many of the first positions each data set has."""
        found = [0] * self.size
        todo = [(self._root, torch.tensor(positions))]
        while todo:
            node, count = todo.pop()
            if not node.children:
                found[node.index] = int(count)
                continue
            of_left = _left(node, count)
            todo += [(node.children[0], of_left), (node.children[1], count - of_left)]
        return found


def _left(node: _Node, position_P: Tensor) -> Tensor:
    """Return how many of the first positions go to the left."""
    return (position_P.double() * (node.children[0].share / node.share) + 0.5).floor().long()
