"""Settings of a GPU report, and the networks that its parts measure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cogvla.policy.cost.variants import VARIANTS, Variant, preset
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.config import CogVLAConfig

REHEARSED_SIZE, REHEARSED_LAYERS = 32, 2


@dataclass(frozen=True)
class Settings:
    """Settings of all parts.

    Attributes:
        output: folder of the report.
        device: torch device.
        rehearse: measure small stand-ins for the networks, with few calls; traces replace CUDA graphs.
        demonstrations: file from `gpu_report --pack`; None: nothing is learned, except in a rehearsal.
        threads: threads of torch on the CPU.
        limits: limit in seconds by name of the part; other parts have their own.
    """

    output: str
    device: str
    rehearse: bool = False
    demonstrations: str | None = None
    threads: int = 8
    limits: tuple[tuple[str, float], ...] = ()

    @property
    def graph(self) -> str:
        """The engine that stands for CUDA graphs."""
        return "trace" if self.rehearse else "cuda_graph"

    @property
    def smallest(self) -> int:
        """Least number of inputs and of outputs of an 8-bit layer."""
        return 32 if self.rehearse else 256


def network(
    settings: Settings, name: str, variant: str, layers: int | None = None
) -> tuple[CogVLAConfig, Embodiment, Variant]:
    """Return model configuration and embodiment of a preset with a variant's routing, and the variant.

    In a rehearsal, the network has the sizes of `tiny`, two layers and small images, and the head of the preset.

    Args:
        settings: settings of the report.
        name: a file of configs/policy.
        variant: a key of `VARIANTS`.
        layers: number of layers of the language model; None: those of the preset.
    """
    chosen = VARIANTS[variant]
    config, robot = preset(chosen, name)
    if settings.rehearse:
        head, layers = config.head, REHEARSED_LAYERS
        config, robot = preset(chosen, "tiny", size=REHEARSED_SIZE)
        config = replace(config, head=head)
    if layers is not None:
        config = replace(config, language=replace(config.language, layers=layers))
    return config, robot, chosen
