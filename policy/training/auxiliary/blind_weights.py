"""Weight actions by the error of a policy without vision, so that actions that need the picture count more.

Source: PRIOR (Prioritizing Image-Related Tokens), which weights the loss of each text token by the uncertainty of a
model that reads the text only. The exact formula is not published. Here, with the error e of a blind policy for each
action,

    w = clip(e / mean e, 0.5, 2),          factor = 1 + strength * (w - 1)

The mean is over all imitated actions of the whole step, so that neither accumulation nor the number of processes
changes it. Afterwards the weights of the step are scaled to a mean of 1 (`policy/training/batches.py`). The error is
that of the blind policy's own head. The state is hidden in the same samples as in training, because these need the
picture more.

The blind policy is a separate checkpoint, trained with `objective=blind` on vision tokens that are 0. The trained
policy itself is not used: it never learned to act without pictures, so its error on zeros would say little. A frozen
checkpoint also gives the same weights after a resume and on every process. Only its language model and head run here,
on every process for the whole step.

Shape legend: B batch, K chunk, A action, S state, N vision tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.training.auxiliary.frozen_policy import load_frozen

LEAST, MOST = 0.5, 2.0


class BlindWeights:
    """Computes weights with a blind policy.

    Args:
        folder: checkpoint folder of the blind policy.
        strength: strength in (0,1], see above.
        preprocessor: preprocessor of the training.
        instructions: distinct instructions of the data.

    Raises:
        ValueError: see `load_frozen`.
    """

    def __init__(self, folder: str, strength: float, preprocessor: Preprocessor, instructions: Sequence[str]) -> None:
        self.strength, self.preprocessor = strength, preprocessor
        self.model = load_frozen(folder, "blind", preprocessor, instructions)

    @torch.no_grad()
    def __call__(
        self,
        samples: Mapping[str, Tensor],
        instructions: Sequence[str],
        keep_state_B: Tensor,
        weight_BK: Tensor,
        noise_BRKA: Tensor,
        time_BR: Tensor,
    ) -> Tensor:
        """Compute the factors [B,K] of a whole step, on the CPU.

        Args:
            samples: `state` [B,S] and `actions` [B,K,A], in physical units.
            instructions: instruction of each sample.
            keep_state_B: False where the state is hidden.
            weight_BK: weights of the actions from other sources; 0 where there is no action to imitate.
            noise_BRKA: see `ActionHead.error`.
            time_BR: see `ActionHead.error`.
        """
        device = self.preprocessor.device
        model = self.model.to(device)
        state_BS = self.preprocessor.normalised_state(samples["state"].to(device), samples.get("set"))
        state_BS = state_BS * keep_state_B[:, None].to(device)
        actions_BKA = self.preprocessor.normalised_actions(samples["actions"].to(device), samples.get("set"))
        text = model.encode_text(*self.preprocessor.text(instructions))
        nothing_BND = text.bos_B1D.new_zeros(len(state_BS), model.vision_tokens, model.width)
        states_BJD = model.decide(nothing_BND, state_BS, text, decode=False).states
        error_BK = model.head.error(states_BJD, actions_BKA, noise_BRKA.to(device), time_BR.to(device))
        return 1 + self.strength * (relative_weight(error_BK.float().cpu(), weight_BK) - 1)


def relative_weight(error_BK: Tensor, weight_BK: Tensor) -> Tensor:
    """Divide errors by their weighted mean, and clip the result to [0.5,2]."""
    mean = (error_BK * weight_BK).sum() / weight_BK.sum().clamp(min=1e-6)
    return (error_BK / mean.clamp(min=1e-6)).clamp(LEAST, MOST)
