"""Weighting by a policy that does not see: actions that only the picture can tell count more.

Source: PRIOR (Prioritizing Image-Related Tokens). It weights the loss of each text token by how unsure a model is that
reads the text alone. The exact form is not published; here, with the error e of a blind policy for each action,

    w = clip(e / mean e, 0.5, 2)          and 1 + strength * (w - 1) is what counts

The mean is over all actions of the step that are imitated, before the step is divided, so that neither accumulation
nor processes change it; the weights of a step average 1 afterwards, as all others do (`policy/training/batches.py`).
Errors are those of the blind policy's own head, with the state hidden where the sample hides it: such a sample needs
the picture more.

The blind policy is a checkpoint, whose vision tokens are set to zero. Why not the policy itself without pictures? It
never learned what can be known without them, so that its error would say how far zeros are from what it knows. And a
frozen one gives the same weights after a resume, and to every process. It is trained with `objective=blind`. Only its
language model runs here, on every process for the whole step.

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
    """Asks a blind policy.

    Args:
        folder: of its checkpoint.
        strength: in (0,1], see above.
        preprocessor: of the training.
        instructions: of the data.

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
        """Factors [B,K] on the CPU, for a whole step.

        Args:
            samples: `state` and `actions`, in physical units.
            instructions: of B samples.
            keep_state_B: False where the state is hidden.
            weight_BK: what the actions count otherwise; 0 where there is none.
            noise_BRKA, time_BR: see `ActionHead.error`.
        """
        device = self.preprocessor.device
        model = self.model.to(device)
        state_BS = self.preprocessor.state_normaliser(samples["state"].to(device)) * keep_state_B[:, None].to(device)
        actions_BKA = self.preprocessor.action_normaliser(samples["actions"].to(device))
        text = model.encode_text(*self.preprocessor.text(instructions))
        nothing_BND = text.bos_B1D.new_zeros(len(state_BS), model.vision_tokens, model.width)
        states_BJD = model.decide(nothing_BND, state_BS, text, decode=False).states
        error_BK = model.head.error(states_BJD, actions_BKA, noise_BRKA.to(device), time_BR.to(device))
        return 1 + self.strength * (relative_weight(error_BK.float().cpu(), weight_BK) - 1)


def relative_weight(error_BK: Tensor, weight_BK: Tensor) -> Tensor:
    """Error over its mean, between 0.5 and 2; the mean is over what has weight."""
    mean = (error_BK * weight_BK).sum() / weight_BK.sum().clamp(min=1e-6)
    return (error_BK / mean.clamp(min=1e-6)).clamp(LEAST, MOST)
