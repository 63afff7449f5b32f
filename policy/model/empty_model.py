"""A model without memory for its parameters, to be filled from a file: large ones load in the space they take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig


def empty_model(config: CogVLAConfig, embodiment: Embodiment) -> CogVLA:
    """The model with its parameters on the meta device and its buffers, which no checkpoint has, as they should be.

    Fill it with `load_parameters`, or with `load_state_dict(assign=True)`.
    """
    with _parameters_on_meta():
        return CogVLA(config, embodiment).eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their memory as soon as a module gets them, before anything is written into it."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # torch allows answers
    try:
        yield
    finally:
        hook.remove()
