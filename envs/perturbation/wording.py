"""Say an instruction in words and patterns that training never sees. Works for every suite."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from cogvla.envs.perturbation.perturbation import Values, by_level
from cogvla.policy.instructions.paraphrase import reword

LEVELS: Sequence[Values] = by_level(
    verbs=(True, True, True),
    patterns=(False, True, True),  # with politeness and order
    not_meant=(False, True, True),  # a thing of the scene, in some
    nouns=(False, False, True),  # with colours; or a typing error
    attributes=(False, False, True),  # the colour alone, in some
)


def reworded(
    instruction: str, level: int, seed: Sequence[int], instructions: Iterable[str], present: Iterable[str] | None = None
) -> str:
    """Return another wording of an instruction.

    Args:
        instruction: the instruction.
        level: level of the dimension `wording`.
        seed: see `Perturbation.seed`.
        instructions: all of the suite; what tells them apart stays.
        present: those of the other tasks that are possible in the scene; None: it is not known.
    """
    possible = None if present is None else tuple(present)
    return reword(instruction, level, random.Random(repr(list(seed))), tuple(instructions), possible)
