"""Linear layers with the normalisation before them and the scale after them folded in.

Shape legend: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedLinear(nn.Module):
    """`x @ weight.T + bias` for inference: weight and bias are buffers.

    Args:
        weight_OI: weight, in any precision.
        bias_O: bias, in any precision; None: no bias.
        dtype: precision that both are converted to.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        for name, tensor in (("weight", weight_OI), ("bias", bias_O)):
            kept = None if tensor is None else tensor.detach().to(dtype).contiguous()
            self.register_buffer(name, kept, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def fused(
    linears: Sequence[nn.Linear],
    gain_I: Tensor | None = None,
    offset_I: Tensor | None = None,
    scale_O: Tensor | None = None,
) -> FusedLinear:
    """Fold linear layers of one input into one with concatenated outputs: `scale * linears(x * gain + offset)`.

    Folding is done in float32 and rounded once.

    Args:
        linears: layers that read the same input.
        gain_I: weight of the normalisation before the layers; None: 1.
        offset_I: bias of that normalisation; None: 0.
        scale_O: LayerScale after the layers; None: 1.
    """
    weight_OI = torch.cat([linear.weight.detach().float() for linear in linears])
    bias_O = torch.cat([_bias(linear) for linear in linears])
    if offset_I is not None:
        bias_O = bias_O + weight_OI @ offset_I.detach().float()
    if gain_I is not None:
        weight_OI = weight_OI * gain_I.detach().float()
    if scale_O is not None:
        weight_OI, bias_O = weight_OI * scale_O.detach().float()[:, None], bias_O * scale_O.detach().float()
    biased = offset_I is not None or any(linear.bias is not None for linear in linears)
    return FusedLinear(weight_OI, bias_O if biased else None, linears[0].weight.dtype)


def large_linears(network: nn.Module, smallest: int, multiple: int = 1) -> dict[str, FusedLinear]:
    """Return the layers that are large enough for 8 or 4 bits, by name; routers are left out.

    Args:
        network: network with `FusedLinear` layers.
        smallest: least number of inputs and of outputs of a large layer.
        multiple: both numbers must be multiples of this.

    Raises:
        ValueError: there is no such layer.
    """
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, FusedLinear)
        and all(size >= smallest and size % multiple == 0 for size in module.weight.shape)
        and ".router." not in name
    }
    if not found:
        raise ValueError(
            f"no layer of this model has {smallest} or more inputs and outputs: 8 bits or less would not help, set "
            "engine.dtype=null"
        )
    return found


def put(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the layer with this name, in place."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, layer)


def _bias(linear: nn.Linear) -> Tensor:
    """Return the bias in float32; zeros for a layer without bias."""
    if linear.bias is None:
        return torch.zeros(linear.out_features, device=linear.weight.device)
    return linear.bias.detach().float()
