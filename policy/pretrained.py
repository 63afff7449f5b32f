"""Published backbones into a new model: vision towers through timm, the language model through transformers.

FiLM, aggregation tokens, projectors, routers and head have no published weights and stay as they were initialised.
"""

from __future__ import annotations

import timm
from torch import Tensor, nn
from transformers import AutoModel

from cogvla.policy.model import CogVLA


def load_backbones(model: CogVLA) -> list[str]:
    """Load what the configuration names (`tower.timm`, `language.hub`), in place.

    Returns:
        What was loaded, for the log; empty for a model whose configuration names nothing.

    Raises:
        ValueError: published weights do not have the configured sizes.
    """
    loaded = []
    camera = model.embodiment.cameras[0]
    for (name, tower), config in zip(
        model.vision.named_towers(), (model.config.vision.dinov2, model.config.vision.siglip), strict=True
    ):
        if config.timm is None:
            continue
        # timm resamples patches and positions where the sizes differ from the published ones.
        donor = timm.create_model(
            config.timm,
            pretrained=True,
            num_classes=0,
            img_size=(camera.height, camera.width),
            patch_size=config.patch_size,
        )
        _copy(donor.state_dict(), tower.vit, config.timm)
        loaded.append(f"{name}: {config.timm}")
    if hub := model.config.language.hub:
        _copy(AutoModel.from_pretrained(hub).state_dict(), model.decoder.llm, hub)
        loaded.append(f"language: {hub}")
    return loaded


def _copy(source: dict[str, Tensor], target: nn.Module, name: str) -> None:
    wanted = target.state_dict()
    wrong = [key for key, value in wanted.items() if key not in source or source[key].shape != value.shape]
    if wrong:
        raise ValueError(
            f"the weights of {name!r} do not fit the configuration: {', '.join(wrong[:3])} "
            f"({len(wrong)} of {len(wanted)} parameters); take its sizes into the policy's YAML"
        )
    target.load_state_dict({key: source[key] for key in wanted})
