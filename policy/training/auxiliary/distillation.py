"""Distillation: a policy that sees few vision tokens learns from one that sees them all.

Source: Align-TI. It has two parts, whose exact losses the released code does not hold, so that the formulas are ours.

**IVA** (instruction-aware vision alignment): the student attends to the regions that matter for the instruction as the
teacher does. Those are here the vision tokens that the student's routers kept. In every language layer, with t and s
the attention from the action tokens to these tokens (mean over heads and action tokens), each divided by its sum,

    attention = mean over layers and samples of sum_k t_k log(t_k / s_k)

**TPA** (transition probability alignment): the student's probability of each next token given the ones before it is
the teacher's. Actions here are decoded in parallel: none is given another, so that what remains of p(a_k | a_<k, o) is
p(a_k | o), and our heads regress, sample or classify it. The student's head is trained on the teacher's actions by its
own error:

    actions = mean over the chunk of head.error(states, teacher's actions)

which is the L1 distance for the paper's head, the velocity towards them for heads that start from noise, cross-entropy
with the teacher's tokens for the discrete one. It counts for samples with another instruction too, for which there is
no expert to imitate, but the teacher answers.

The teacher is a checkpoint of the same policy for the same data, with its token router taken out; its own stages 1 and
2 stay as they were trained. For a teacher with really all tokens in all layers, train it with routing=patches. It is
frozen, and not part of what is saved; training goes on from a checkpoint only with the same teacher.

Tokens that a router makes anew (-1 in `RoutedTokens.index_Bn`) are nowhere in the teacher: with pooling, attention is
0. The student computes every row of its last layer, so that its attention can be read.

Shape legend: B batch, N vision tokens of the teacher, n of them in the student, k those of a layer, J action tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cogvla.policy.model.cogvla import CogVLA, ModelInput

SMALL = 1e-8


class Distillation(nn.Module):
    """Holds the teacher, which stays in evaluation mode and frozen.

    Args:
        teacher: with all tokens.
        student: whose vision tokens, chunk and depth the teacher must have.

    Raises:
        ValueError: it does not.
    """

    def __init__(self, teacher: CogVLA, student: CogVLA) -> None:
        super().__init__()
        sizes = [(m.vision.tokens, len(m.decoder.llm.layers)) for m in (teacher, student)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                "objective.teacher must be the policy that is trained, with all of its tokens: it has {} vision tokens "
                "and {} language layers, the policy {} and {}; train it with the same policy= and "
                "routing.efa".format(*sizes[0], *sizes[1])
            )
        self.teacher = teacher.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Distillation:
        """Ignore the mode: a teacher is never in training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, inputs: ModelInput) -> tuple[Tensor, Mapping[str, Any]]:
        """Return the teacher's normalised actions [B,K,A], and its intermediate results."""
        output = self.teacher(inputs, debug=True)
        assert output.debug is not None
        return output.actions.float(), output.debug


def attention_match(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Tensor:
    """Compute the loss of IVA from intermediate results of student and teacher, see `ModelOutput.debug`."""
    routed, tokens = student.get("routed"), teacher["layout"].vision
    terms: list[Tensor] = []
    for layer, read_Bk in student["attention"].items():
        # From a layer's tokens to those that entered the language model, and on to those that the towers gave.
        index_Bk = student["present"][layer]
        if routed is not None:
            index_Bk = routed.index_Bn if index_Bk is None else routed.index_Bn.gather(1, index_Bk)
        taught_BN, present_Bn = teacher["attention"][layer], teacher["present"][layer]
        if present_Bn is not None:
            taught_BN = taught_BN.new_zeros(len(taught_BN), tokens).scatter(1, present_Bn, taught_BN)
        if index_Bk is None:
            index_Bk = torch.arange(tokens, device=read_Bk.device).expand_as(read_Bk)
        common_Bk = (index_Bk >= 0) & (read_Bk > 0)  # a token that is hidden gets no attention at all
        terms.append(_divergence(taught_BN.gather(1, index_Bk.clamp(min=0)), read_Bk, common_Bk))
    return torch.stack(terms).mean()


def _divergence(taught_Bk: Tensor, read_Bk: Tensor, common_Bk: Tensor) -> Tensor:
    """Kullback-Leibler divergence over the common tokens, mean over samples."""
    shares = [x_Bk.float() * common_Bk for x_Bk in (taught_Bk, read_Bk)]
    taught_Bk, read_Bk = (x_Bk / x_Bk.sum(1, keepdim=True).clamp(min=SMALL) for x_Bk in shares)
    log_ratio_Bk = taught_Bk.clamp(min=SMALL).log() - read_Bk.clamp(min=SMALL).log()
    return (taught_Bk * log_ratio_Bk).sum(1).mean()
