"""Weights and activations in 8 bits: `float8_e4m3fn`, three bits of fraction, largest value 448.

Each weight has one scale; each input has one scale too, which is measured beforehand on recorded observations, so that
nothing waits for a maximum while the policy runs. Products are summed in float32 and come out in bfloat16. Layers that
read few numbers stay as they were, and so do routers: they cost nothing and lose most.

Needs a GPU of compute capability 8.9 or later to be fast (Ada, Hopper, Blackwell); on CPUs it computes the same slowly.

Shape legend: R rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from cogvla.policy.engine.linear import FusedLinear, large_linears, put

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


@dataclass(frozen=True)
class Calibration:
    """Input ranges of a network's large layers, measured on recorded observations, for 8 bits.

    Attributes:
        largest_inputs: name of a layer of the fused network -> largest absolute value that it read.
        about: how it was measured, and how far actions move, for reports.
    """

    largest_inputs: Mapping[str, float]
    about: Mapping[str, Any] = field(default_factory=dict)


def largest_inputs(network: nn.Module, play: Callable[[], None], smallest: int) -> dict[str, float]:
    """Name -> largest absolute value that each large linear layer reads; empty if nothing is played.

    Args:
        network: holds `FusedLinear`s in bfloat16.
        play: runs the network on recorded observations.
        smallest: inputs and outputs that a layer must have at least.

    Raises:
        ValueError: the network is not in bfloat16, or nothing in it is large enough.
    """
    linears = large_linears(network, smallest, MULTIPLE)
    _check_precision(linears.values())
    largest: dict[str, Tensor] = {}
    hooks = [linear.register_forward_pre_hook(_remember(largest, name)) for name, linear in linears.items()]
    try:
        play()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: float(value) for name, value in largest.items()}


def to_float8(network: nn.Module, largest: Mapping[str, float]) -> None:
    """Replace linear layers by 8-bit ones, in place; `largest` is what `largest_inputs` gave for this network.

    Raises:
        ValueError: the network is not in bfloat16, or not the one that was measured.
    """
    modules = dict(network.named_modules())
    if unknown := [name for name in largest if not isinstance(modules.get(name), FusedLinear)]:
        raise ValueError(
            f"the calibration names layers that this model does not have ({unknown[0]}, ...): it belongs to another "
            "model or version; run `calibrate_policy` again"
        )
    linears = {name: cast(FusedLinear, modules[name]) for name in largest}
    _check_precision(linears.values())
    for name, linear in linears.items():
        scale = torch.tensor(largest[name], device=linear.weight.device)
        put(network, name, Float8Linear(linear, scale))


def _check_precision(linears: Iterable[FusedLinear]) -> None:
    if any(linear.weight.dtype != torch.bfloat16 for linear in linears):
        raise ValueError("8-bit layers compute beside bfloat16 ones: set engine.dtype=bfloat16")


def _remember(largest: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found = inputs[0].abs().amax()
        largest[name] = torch.maximum(largest[name], found) if name in largest else found

    return hook
