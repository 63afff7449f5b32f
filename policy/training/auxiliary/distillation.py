"""Distillation: a policy with few vision tokens learns from a policy with all of them.

Source: Align-TI. It has two parts; the released code does not contain their exact losses, so the formulas are ours.

**IVA** (instruction-aware vision alignment): the student learns the teacher's attention to the regions that matter for
the instruction. Here these regions are the vision tokens that the student's routers keep. In every language layer, with
t and s the attention from the action tokens to these tokens (mean over heads and action tokens) of teacher and student,
each divided by its sum,

    attention loss = mean over layers and samples of sum_k t_k log(t_k / s_k)

**TPA** (transition probability alignment): the student learns the teacher's probability of each next token, given the
tokens before it. Here actions are decoded in parallel, without the earlier ones as input, so p(a_k | a_<k, o) becomes
p(a_k | o). The student's head is trained on the teacher's actions with its own error:

    action loss = mean over the chunk of head.error(states, teacher's actions)

This is the L1 distance for the paper's head, the error of the velocity for heads that start from noise, and the
cross-entropy with the teacher's tokens for the discrete head. It also counts for counterfactual samples, for which
there are no expert actions.

The teacher is a checkpoint of the same policy for the same data, used without its token router. Its stages 1 and 2 are
as it was trained; for a teacher with all tokens in all layers, train it with routing=patches. It is frozen and not
saved in checkpoints; a run must be resumed with the same teacher.

New tokens of a router (-1 in `RoutedTokens.index_Bn`), as from pooling, have no counterpart in the teacher and are left
out of the attention loss, also those of a router in a language layer. The student computes every row of its last layer,
so that its attention can be read.

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
    """Holds the teacher, frozen and in evaluation mode.

    Args:
        teacher: network with all vision tokens.
        student: network that is trained.

    Raises:
        ValueError: teacher and student differ in the number of the towers' vision tokens or of language layers.
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
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, inputs: ModelInput) -> tuple[Tensor, Mapping[str, Any]]:
        """Return the teacher's normalised actions [B,K,A] and its intermediate results, see `ModelOutput.debug`."""
        output = self.teacher(inputs, debug=True)
        assert output.debug is not None
        return output.actions.float(), output.debug


def attention_match(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Tensor:
    """Compute the attention loss (IVA) from intermediate results of student and teacher, see `ModelOutput.debug`."""
    routed, tokens = student.get("routed"), teacher["layout"].vision
    terms: list[Tensor] = []
    for layer, read_Bk in student["attention"].items():
        # Map the layer's tokens to the tokens at the input of the language model, and these to the towers' tokens.
        index_Bk = student["present"][layer]
        if routed is not None:
            index_Bk = routed.index_Bn if index_Bk is None else routed.index_Bn.gather(1, index_Bk)
        taught_BN, present_Bn = teacher["attention"][layer], teacher["present"][layer]
        if present_Bn is not None:
            taught_BN = taught_BN.new_zeros(len(taught_BN), tokens).scatter(1, present_Bn, taught_BN)
        if index_Bk is None:
            index_Bk = torch.arange(tokens, device=read_Bk.device).expand_as(read_Bk)
        common_Bk = (index_Bk >= 0) & (read_Bk > 0)  # hidden tokens get no attention
        if (new_Bk := student["new"][layer]) is not None:
            common_Bk = common_Bk & ~new_Bk
        terms.append(_divergence(taught_BN.gather(1, index_Bk.clamp(min=0)), read_Bk, common_Bk))
    return torch.stack(terms).mean()


def _divergence(taught_Bk: Tensor, read_Bk: Tensor, common_Bk: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence over the common tokens, mean over samples."""
    shares = [x_Bk.float() * common_Bk for x_Bk in (taught_Bk, read_Bk)]
    taught_Bk, read_Bk = (x_Bk / x_Bk.sum(1, keepdim=True).clamp(min=SMALL) for x_Bk in shares)
    log_ratio_Bk = taught_Bk.clamp(min=SMALL).log() - read_Bk.clamp(min=SMALL).log()
    return (taught_Bk * log_ratio_Bk).sum(1).mean()
