"""Contrastive alignment: the vision tokens of a sample should be most similar to the words of its own instruction.

Source: CG-VLM (Contrastive Vision-Language Alignment Makes Efficient Instruction Learner). In addition to the usual
loss, it compares within a batch the mean similarity of a picture's pooled features to the words of its own text and to
the words of other texts. With v_i the mean of the vision tokens of sample i, and e_jt word t of sample j,

    s_ij = mean_t cos(v_i, e_jt) / temperature
    loss = mean over rows i of -log(sum_{j like i} exp s_ij / sum_j exp s_ij), averaged with the same over columns

where "j like i" are the samples with the same instruction as i. The paper gives no weight; 0.1 is a start. Our
additions are the temperature, both directions, and:

- Samples with equal instructions are positives of each other. A batch with one instruction has loss 0.
- The loss has no gradients to the embeddings of the words.
- The vision tokens are those that enter the language model, after a token router, so the kept tokens must still
  identify the instruction. With stage 1, FiLM gives the instruction to the towers, which only have to preserve it.
  Without it, the loss asks which scenes belong to which instruction; if a scene allows several, it cannot reach 0.

Negatives are from one forward pass: with `training.accumulation`, `training.cpu_parts` or several processes there are
fewer of them.

Shape legend: B pictures, C = B texts, N vision tokens, T words, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.1


def contrast_loss(vision_BND: Tensor, words_CTD: Tensor, mask_CT: Tensor, instruction_C: Tensor) -> Tensor:
    """Compute the InfoNCE loss between the pictures and the instructions of a batch.

    Args:
        vision_BND: vision tokens at the input of the language model.
        words_CTD: embeddings of the words.
        mask_CT: False on padding.
        instruction_C: number of the instruction, whatever its wording.
    """
    return info_nce(similarity(vision_BND, words_CTD, mask_CT) / TEMPERATURE, instruction_C)


def similarity(vision_BND: Tensor, words_CTD: Tensor, mask_CT: Tensor) -> Tensor:
    """Return the mean cosine [B,C] of each picture with the words of each text, which get no gradient."""
    picture_BD = F.normalize(vision_BND.float().mean(1), dim=-1)
    weight_CT1 = mask_CT[..., None].float()
    word_CTD = F.normalize(words_CTD.detach().float(), dim=-1)
    # The mean of the similarities to words equals the similarity to the mean of the words.
    text_CD = (word_CTD * weight_CT1).sum(1) / weight_CT1.sum(1)
    with torch.autocast(picture_BD.device.type, enabled=False):  # a small temperature needs exact similarities
        return picture_BD @ text_CD.mT


def info_nce(similarity_BC: Tensor, instruction_C: Tensor) -> Tensor:
    """Return the InfoNCE loss of rows and columns; those with the same instruction are positives of each other."""
    alike_BC = instruction_C[:, None] == instruction_C[None]
    own_BC = similarity_BC.masked_fill(~alike_BC, float("-inf"))
    losses = [similarity_BC.logsumexp(dim).mean() - own_BC.logsumexp(dim).mean() for dim in (1, 0)]
    return (losses[0] + losses[1]) / 2
