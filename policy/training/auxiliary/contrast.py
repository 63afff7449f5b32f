"""Contrastive alignment: what the language model is shown has to be recognisable by the words that asked for it.

Source: CG-VLM (Contrastive Vision-Language Alignment Makes Efficient Instruction Learner). It contrasts, within a
batch, the mean similarity of a picture's pooled features to the words of its own text with that to the words of other
texts, beside the usual loss. With v_i the mean of the vision tokens of sample i, and e_jt word t of sample j,

    s_ij = mean_t cos(v_i, e_jt) / temperature
    loss = mean of -log(sum_{j like i} exp s_ij / sum_j exp s_ij) over rows i, and the same over columns

The paper gives no weight; 0.1 is a start. Ours: the temperature, both directions, and

- samples with equal instructions are positives of one another. A batch of one instruction costs 0 and teaches nothing;
- words are anchors: the loss does not move their embeddings (where stage 1 is on, FiLM does);
- the vision tokens are those that enter the language model, after a token router: what it leaves must still tell the
  instruction. With stage 1 the towers are told the instruction, and only have to keep it. Plain patches are not: there
  it asks which scenes belong to which instruction, and where one scene allows several, it cannot be met.

Negatives are those of one forward pass: `training.accumulation`, `training.cpu_parts` and several processes leave
fewer.

Shape legend: B pictures, C = B texts, N vision tokens, T words, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.1


def contrast_loss(vision_BND: Tensor, words_CTD: Tensor, ids_CT: Tensor, mask_CT: Tensor) -> Tensor:
    """InfoNCE between pictures and the instructions of the batch; 0 where each is nearest to its own.

    Args:
        vision_BND: vision tokens as the language model is given them.
        words_CTD: embeddings of the words.
        ids_CT: of the words.
        mask_CT: False on padding.
    """
    picture_BD = F.normalize(vision_BND.float().mean(1), dim=-1)
    weight_CT1 = mask_CT[..., None].float()
    word_CTD = F.normalize(words_CTD.detach().float(), dim=-1)
    # The mean of similarities to words is the similarity to the mean of words.
    text_CD = (word_CTD * weight_CT1).sum(1) / weight_CT1.sum(1)
    with torch.autocast(picture_BD.device.type, enabled=False):  # a small temperature asks for exact similarities
        similarity_BC = picture_BD @ text_CD.mT / TEMPERATURE
    written_CT = torch.where(mask_CT, ids_CT, -1)
    alike_BC = (written_CT[:, None] == written_CT[None]).all(-1)
    own_BC = similarity_BC.masked_fill(~alike_BC, float("-inf"))
    losses = [similarity_BC.logsumexp(dim).mean() - own_BC.logsumexp(dim).mean() for dim in (1, 0)]
    return (losses[0] + losses[1]) / 2
