"""Check that a policy can tell the instructions of its training data apart.

Shape legend: N frames.
"""

from __future__ import annotations

import numpy as np

from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.inputs.tokenizer import Tokenizer, same_instruction


def check_instructions(tokenizer: Tokenizer, data: DemonstrationData) -> None:
    """Check that every instruction has words, and that different instructions have different token ids.

    Instructions that differ only in case, spaces, or punctuation beside words count as equal.

    Raises:
        ValueError: one is empty, or two have the same ids; the message names the episodes.
    """
    present, rows = np.unique(data.instruction_N.numpy(), return_index=True)
    seen: dict[tuple[int, ...], tuple[str, int]] = {}
    for text, row in zip((data.instructions[i] for i in present), rows, strict=True):
        episode = int(data.episode_N[row])
        if not same_instruction(text):
            raise ValueError(
                f"episode {episode} of the data has the instruction {text!r}, which has no words: record what the "
                "robot is asked to do, or leave the episode out"
            )
        ids_1T, _ = tokenizer.encode([text])
        other, first = seen.setdefault(tuple(ids_1T[0].tolist()), (text, episode))
        if same_instruction(other) != same_instruction(text):
            raise ValueError(
                f"the policy cannot tell {other!r} (episode {first} of the data) from {text!r} (episode {episode}): "
                "the tokenizer gives both the same ids. Write the difference in words that it knows"
            )
