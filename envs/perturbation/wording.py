"""Say an instruction in words and patterns that training never sees. Works for every suite."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from cogvla.envs.perturbation.perturbation import Values, by_level
from cogvla.policy.instructions.paraphrase import reword

LEVELS: Sequence[Values] = by_level(
    verbs=(True, True, True),
    patterns=(False, True, True),  # with politeness and order; or a thing that is not meant
    nouns=(False, False, True),  # with colours; or the colour alone, or a typing error
)


def reworded(
    instruction: str, level: int, seed: Sequence[int], instructions: Iterable[str], present: Iterable[str] = ()
) -> str:
    """Return another wording of an instruction.

    Args:
        instruction: the instruction.
        level: level of the dimension `wording`.
        seed: see `Perturbation.seed`.
        instructions: all of the suite; what tells them apart stays.
        present: those of the other tasks that are possible in the scene.
    """
    return reword(instruction, level, random.Random(repr(list(seed))), tuple(instructions), tuple(present))
