"""Linear layers in 8-bit floating point: `float8_e4m3fn`, with three bits of fraction and a largest value of 448.

Each weight matrix has one scale, and so has each layer's input. Input scales are measured beforehand on recorded
observations, so that no maximum has to be computed while the policy runs. Products are summed in float32 and returned
in bfloat16. Small layers and routers are not converted: they take little time and lose most accuracy.

It is fast on GPUs of compute capability 8.9 or later (Ada, Hopper, Blackwell). CPUs have no units for it: they
multiply the same 8-bit numbers in float32, which shows its errors, not its speed.

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
"""Inputs and outputs of an 8-bit layer must be multiples of this."""


class Float8Linear(nn.Module):
    """A `FusedLinear` in 8 bits.

    Args:
        linear: layer in bfloat16 whose sizes are multiples of 16.
        largest_input: largest absolute value of its inputs.
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
        if x.is_cuda:
            y_RO = torch._scaled_mm(
                x_RI,
                self.weight.T,
                scale_a=self.input_scale,
                scale_b=self.weight_scale,
                bias=self.bias,
                out_dtype=self.dtype,
            )
        else:  # torch's own product for CPUs goes number by number: 200 times the time
            y_RO = (x_RI.float() @ self.weight.float().T).mul_(self.input_scale * self.weight_scale)
            y_RO = (y_RO if self.bias is None else y_RO.add_(self.bias)).to(self.dtype)
        return y_RO.unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class Calibration:
    """Input ranges of a network's large layers, measured on recorded observations, for 8 bits.

    Attributes:
        largest_inputs: name of a layer of the fused network -> largest absolute value of its inputs.
        about: description for reports: data, command, and change of the actions.
    """

    largest_inputs: Mapping[str, float]
    about: Mapping[str, Any] = field(default_factory=dict)


def largest_inputs(network: nn.Module, play: Callable[[], None], smallest: int) -> dict[str, float]:
    """Return the largest absolute input of each large linear layer, by name; empty if `play` does not run the network.

    Args:
        network: network with `FusedLinear` layers in bfloat16.
        play: function that runs the network on recorded observations.
        smallest: least number of inputs and of outputs of a large layer.

    Raises:
        ValueError: the network is not in bfloat16, or has no large layer.
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
    """Replace linear layers by 8-bit layers, in place.

    Args:
        network: network with `FusedLinear` layers in bfloat16.
        largest: result of `largest_inputs` for this network.

    Raises:
        ValueError: the network is not in bfloat16, or `largest` was measured on another network.
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
        raise ValueError("float8 layers need the other layers in bfloat16: set engine.dtype=bfloat16")


def _remember(largest: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found = inputs[0].abs().amax()
        largest[name] = torch.maximum(largest[name], found) if name in largest else found

    return hook
