"""Linear layers in 8-bit integers, for CPUs that have no bfloat16 units.

The weights of each output have one scale, and so has each row of the input (a token). So no calibration is needed, and
a sample does not depend on the others of its batch. Sums are exact in int32; the result is float32. Inputs have 7 bits,
because older CPUs add two products in 16 bits, which would overflow with 8 bits; so all CPUs compute the same numbers.
Small layers and routers are not converted: they take little time and lose most accuracy.

Shape legend: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cogvla.policy.engine.linear import FusedLinear, large_linears, put

LEVELS = 63
"""Levels of an input on each side of zero; the zero point is `LEVELS + 1` in the range 0 to 127."""
WEIGHT_LEVELS = 127
LIBRARY = "fbgemm"
"""Backend of PyTorch's quantised kernels whose linear layer takes and returns float32."""


class Int8Linear(nn.Module):
    """A `FusedLinear` in 8-bit integers.

    Args:
        linear: layer in float32, on a CPU.
    """

    bias: Tensor | None

    def __init__(self, linear: FusedLinear) -> None:
        super().__init__()
        weight_OI = linear.weight
        scale_O = weight_OI.abs().amax(1).clamp_min(1e-12) / WEIGHT_LEVELS
        zero_O = torch.zeros(len(weight_OI), dtype=torch.long)
        quantised_OI = torch.quantize_per_channel(weight_OI, scale_O, zero_O, 0, torch.qint8)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = LIBRARY
        try:
            self._packed = torch.ops.quantized.linear_prepack(quantised_OI, None)
        finally:
            torch.backends.quantized.engine = before
        self.register_buffer("bias", linear.bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        largest_R1 = x.abs().amax(-1, keepdim=True).clamp_min(1e-12)
        y_RO = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest_R1, 1 / LEVELS, LEVELS + 1, self._packed
        )
        return y_RO * largest_R1 if self.bias is None else torch.addcmul(self.bias, y_RO, largest_R1)


def to_int8(network: nn.Module, smallest: int) -> None:
    """Replace large linear layers by 8-bit layers, in place.

    Args:
        network: network with `FusedLinear` layers in float32, on a CPU.
        smallest: least number of inputs and of outputs of a large layer.

    Raises:
        ValueError: the CPU does not support it, the network is on a GPU, or it has no large layer.
    """
    if LIBRARY not in torch.backends.quantized.supported_engines:
        raise ValueError("engine.dtype=int8 needs an x86 CPU with AVX2: give engine.dtype=null")
    linears = large_linears(network, smallest)
    if any(linear.weight.is_cuda for linear in linears.values()):
        raise ValueError("engine.dtype=int8 is for CPUs; on a GPU give engine.dtype=float8 or bfloat16")
    for name, linear in linears.items():
        put(network, name, Int8Linear(linear))
