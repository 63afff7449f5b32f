"""Weights and activations in 8 bits: `float8_e4m3fn`, three bits of fraction, largest value 448.

Each weight has one scale; each input has one scale too, which is measured beforehand on recorded observations, so that
nothing waits for a maximum while the policy runs. Products are summed in float32 and come out in bfloat16. Layers that
read few numbers stay as they were, and so do routers: they cost nothing and lose most.

Needs a GPU of compute capability 8.9 or later to be fast (Ada, Hopper, Blackwell); on CPUs it computes the same slowly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cogvla.policy.engine.linear import FusedLinear

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
MULTIPLE = 16
"""Sizes of both sides that the 8-bit product takes."""


class Float8Linear(nn.Module):
    """A `FusedLinear` in 8 bits.

    Args:
        linear: in bfloat16; its sizes are multiples of 16.
        largest_input: of the absolute values that it reads.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: FusedLinear, largest_input: Tensor) -> None:
        super().__init__()
        weight_OI = linear.weight.float()
        weight_scale = weight_OI.abs().amax().clamp_min(1e-12) / LARGEST
        self.register_buffer("weight", (weight_OI / weight_scale).to(FLOAT8), persistent=False)
        self.register_buffer("weight_scale", weight_scale, persistent=False)
        self.register_buffer("input_scale", largest_input.float().clamp_min(1e-12) / LARGEST, persistent=False)
        self.register_buffer("bias", linear.bias, persistent=False)
        self.dtype = linear.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        x_RI = (x.flatten(0, -2) / self.input_scale.to(x.dtype)).clamp(-LARGEST, LARGEST).to(FLOAT8)
        y_RO = torch._scaled_mm(
            x_RI,
            self.weight.T,
            scale_a=self.input_scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=self.dtype,
        )
        return y_RO.unflatten(0, x.shape[:-1])


def to_float8(network: nn.Module, calibrate: Callable[[], None], smallest: int) -> int:
    """Replace linear layers in place; returns how many.

    Args:
        network: holds `FusedLinear`s in bfloat16.
        calibrate: runs the network on recorded observations.
        smallest: inputs and outputs that a layer must have at least.

    Raises:
        ValueError: the network is not in bfloat16, or nothing in it is large enough.
    """
    linears = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, FusedLinear) and _fits(module.weight, smallest) and ".router." not in name
    }
    if not linears:
        raise ValueError(f"no layer of this model reads and writes {smallest} numbers or more: leave engine.float8 off")
    if any(linear.weight.dtype != torch.bfloat16 for linear in linears.values()):
        raise ValueError("8-bit layers compute beside bfloat16 ones: set engine.dtype=bfloat16")
    largest: dict[str, Tensor] = {}
    hooks = [linear.register_forward_pre_hook(_remember(largest, name)) for name, linear in linears.items()]
    try:
        calibrate()
    finally:
        for hook in hooks:
            hook.remove()
    for name in largest:
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, Float8Linear(linears[name], largest[name]))
    return len(largest)


def _fits(weight_OI: Tensor, smallest: int) -> bool:
    return all(size >= smallest and size % MULTIPLE == 0 for size in weight_OI.shape)


def _remember(largest: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found = inputs[0].abs().amax()
        largest[name] = torch.maximum(largest[name], found) if name in largest else found

    return hook
