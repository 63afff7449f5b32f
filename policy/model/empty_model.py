"""Build a model without allocating its parameters, so that a large checkpoint needs memory only once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig


def empty_model(config: CogVLAConfig, embodiment: Embodiment) -> CogVLA:
    """Build the model with its parameters on the meta device; buffers, which checkpoints do not have, are ready.

    Fill it with `load_parameters`, or with `load_state_dict(assign=True)`.
    """
    with _parameters_on_meta():
        return CogVLA(config, embodiment).eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as soon as a module registers it, before its memory is written."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # torch allows a result
    try:
        yield
    finally:
        hook.remove()
