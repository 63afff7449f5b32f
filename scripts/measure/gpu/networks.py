"""The networks that the parts of a GPU report measure."""

from __future__ import annotations

from dataclasses import replace

from cogvla.policy.cost.variants import VARIANTS, Variant, preset
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.config import CogVLAConfig
from cogvla.scripts.measure.gpu.settings import Settings

REHEARSED_SIZE, REHEARSED_LAYERS = 32, 2


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
