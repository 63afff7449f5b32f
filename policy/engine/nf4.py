"""Linear layers whose weights are in 4 bits (NF4 with double quantisation), for less memory.

Source: QLoRA, Dettmers et al. 2023; bitsandbytes does the quantisation. Each layer takes its weights back to the
precision of its input when it computes, and again in the backward pass: nothing but the 4 bits is kept.

Shape legend: I inputs, O outputs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvla.errors import first_line
from cogvla.policy.engine.linear import large_linears, put

BLOCK, BLOCK_OF_SCALES = 64, 256
"""Weights that share a scale of 8 bits, and scales that share one of 32 bits."""


def nf4_bytes(weights: int) -> float:
    """Return the bytes that a number of weights takes."""
    return weights * (1 / 2 + 1 / BLOCK + 4 / (BLOCK * BLOCK_OF_SCALES))


class Nf4Linear(nn.Module):
    """A linear layer with frozen weights in 4 bits.

    Args:
        weight_OI: weights; on the meta device only the shapes are kept.
        bias_O: bias; None: no bias.

    Raises:
        ValueError: bitsandbytes is not installed, or does not work on this machine.
    """

    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self._dtype, self._state = weight_OI.dtype, None
        if weight_OI.is_meta:
            packed = torch.empty((weight_OI.numel() + 1) // 2, dtype=torch.uint8, device="meta")
        else:
            packed, self._state = _quantise(weight_OI.detach().contiguous())
        self.packed = nn.Parameter(packed, requires_grad=False)
        if isinstance(bias_O, nn.Parameter):
            self.bias = bias_O
        else:
            self.register_buffer("bias", bias_O, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weights [O,I] that 4 bits stand for, in the precision that they came in."""
        if self._state is None:
            return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed.data, self._state)

    def answer_in(self, dtype: torch.dtype) -> None:
        """Let `weight` have this precision."""
        self._dtype = dtype
        if self._state is not None:
            self._state.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self) if torch.is_grad_enabled() else F.linear(x, self.weight.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Nf4Linear:
        super()._apply(fn, recurse)
        if self._state is not None and self._state.absmax.device != self.packed.device:
            self._state = copy.deepcopy(self._state)  # copies of this layer may be elsewhere
            self._state.to(self.packed.device)
        return self


class _Product(torch.autograd.Function):
    """`x @ weight.T` that keeps neither x nor the weights for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def _quantise(weight_OI: Tensor) -> tuple[Tensor, Any]:
    try:
        from bitsandbytes.functional import quantize_4bit
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            f'weights in 4 bits need bitsandbytes ({first_line(error)}): `uv pip install "cogvla[nf4]"`, or choose '
            "another precision"
        ) from error
    return quantize_4bit(weight_OI, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")


def to_nf4(network: nn.Module, smallest: int) -> None:
    """Replace large linear layers by layers with weights in 4 bits, in place.

    Args:
        network: network with `FusedLinear` layers.
        smallest: least number of inputs and of outputs of a large layer.

    Raises:
        ValueError: it has no large layer; or see `Nf4Linear`.
    """
    for name, linear in large_linears(network, smallest).items():
        put(network, name, Nf4Linear(linear.weight, linear.bias))
