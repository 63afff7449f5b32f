"""Matching with hard negatives: does this instruction belong to this picture?

Source: ALBEF (Align before Fuse). For every pair it draws one other text and one other picture, the more often the more
similar they are, and a head on the fused pair says whether it belongs together. With s as in `contrast.py`,

    negative of i  ~  softmax(s_i / 0.07), without those like i        (one text, and one picture)
    loss = mean cross-entropy of head(picture_i, text_i): yes, head(picture_i, text'): no, head(picture', text_i): no

The head is a block in which the words attend to the vision tokens, their mean, and two logits. It is used in training
only.

Differences: ALBEF fuses in six layers of its text encoder; samples with the same instruction are no negatives, and a
batch with one instruction has loss 0; there is no queue, no momentum model and no masked language loss; as in
`contrast.py`, the words get no gradient. With stage 1 or FiLM, vision tokens were computed with their own instruction,
which makes the question easy: the loss then asks that it can still be read from the tokens.

The draw depends on the seeds of the samples (`ModelInput.draw`); without seeds, the most similar one is taken.

Shape legend: B pictures, C = B texts, N vision tokens, T words, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvla.policy.training.auxiliary.contrast import similarity
from cogvla.routing.attention_block import AttentionBlock
from cogvla.routing.draws import uniform

TEMPERATURE = 0.07
MATCHED = 0x414C4246
"""Added to a sample's seed, so that the draws differ from those of other parts."""


class Matching(nn.Module):
    """The matching head, and its loss.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = next(count for count in (4, 2, 1) if width % count == 0)
        self.block, self.norm = AttentionBlock(width, heads, width), nn.LayerNorm(width)
        self.logits = nn.Linear(width, 2)

    def forward(
        self, vision_BND: Tensor, words_CTD: Tensor, mask_CT: Tensor, instruction_C: Tensor, draw_B2: Tensor | None
    ) -> Tensor:
        """Compute the loss of a batch.

        Args:
            vision_BND: vision tokens at the input of the language model.
            words_CTD: embeddings of the words.
            mask_CT: False on padding.
            instruction_C: number of the instruction, whatever its wording.
            draw_B2: seeds, see `ModelInput`.
        """
        words_CTD, other_BC = words_CTD.detach(), instruction_C[:, None] != instruction_C[None]
        with torch.no_grad():
            close_BC = similarity(vision_BND, words_CTD, mask_CT) / TEMPERATURE
            text_B, picture_B = (negatives(s, other_BC, draw_B2, n) for n, s in enumerate((close_BC, close_BC.mT)))
        counts_B = other_BC.any(1)
        pairs = (
            self.match(vision_BND, words_CTD, mask_CT),
            self.match(vision_BND, words_CTD[text_B], mask_CT[text_B]),
            self.match(vision_BND[picture_B], words_CTD, mask_CT),
        )
        label_B = counts_B.new_zeros(counts_B.shape, dtype=torch.long)
        errors = [F.cross_entropy(logits, label_B + (n == 0), reduction="none") for n, logits in enumerate(pairs)]
        return (torch.stack(errors).mean(0) * counts_B).sum() / counts_B.sum().clamp_min(1)

    def match(self, vision_BND: Tensor, words_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the logits [B,2] of `no` and `yes` for each pair, float32."""
        weight_BT1 = mask_BT[..., None].to(words_BTD.dtype)
        read_BTD = self.block(words_BTD, vision_BND.to(words_BTD.dtype))
        return self.logits(self.norm((read_BTD * weight_BT1).sum(1) / weight_BT1.sum(1))).float()


def negatives(close_BC: Tensor, other_BC: Tensor, draw_B2: Tensor | None, which: int) -> Tensor:
    """Draw for each row one of the `other` columns, with the probabilities softmax(close); any if there is none.

    Args:
        close_BC: logits.
        other_BC: bool, columns that are negatives.
        draw_B2: seeds; None: take the largest.
        which: 0 or 1, for two independent draws with the same seeds.
    """
    if draw_B2 is not None:
        inside_BC = uniform(draw_B2[:, 0] + MATCHED + which, close_BC.shape[1]).clamp_min(1e-7)
        close_BC = close_BC - (-inside_BC.log()).log()  # Gumbel noise turns the largest into a draw
    return close_BC.masked_fill(~other_BC, float("-inf")).argmax(1)
