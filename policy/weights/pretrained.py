"""Load published weights into a new model, in place: separate backbones, or a vision-language-action model as the base.

Parameters without published weights keep their initial values.
"""

from __future__ import annotations

import re
from pathlib import Path

import timm
from torch import Tensor, nn
from transformers import AutoModel

from cogvla.policy.inputs.pretrained_source import load_pretrained
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.weights.base import check_language
from cogvla.policy.weights.import_weights import check_numbers, load_parameters
from cogvla.policy.weights.release import Release, open_release, with_published

_PART = re.compile(
    r"decoder\.(?:llm|routers\.\d+)|vision\.(?:towers\.\w+\.\w+|fusion)|\w+"  # parts that are loaded completely or not
)
_REQUIRED = re.compile(r"decoder\.llm|vision\.towers\.\w+\.vit")


def load_backbones(model: CogVLA) -> list[str]:
    """Load the published weights that the configuration names (`tower.timm`, `language.hub`), in place.

    Returns:
        Lines for the log; empty if the configuration names no weights.

    Raises:
        ValueError: published weights do not have the configured sizes, or their model computes something else.
    """
    loaded = []
    camera = model.embodiment.cameras[0]
    for (name, tower), config in zip(
        model.vision.named_towers(), (model.config.vision.dinov2, model.config.vision.siglip), strict=True
    ):
        if config.timm is None:
            continue
        # timm resamples patch projection and positions if the sizes differ from the published ones.
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
        published, found = load_pretrained(AutoModel, hub, output_loading_info=True)
        if missing := sorted(found["missing_keys"]):  # transformers initialises them randomly, with only a warning
            raise ValueError(
                f"the weights of {hub!r} lack {', '.join(missing[:3])} ({len(missing)}); download them again"
            )
        language = model.config.language
        check_language(with_published(language, published.config.to_dict(), hub), language, hub)
        _copy(published.state_dict(), model.decoder.llm, hub)
        loaded.append(f"language: {hub}")
    return loaded


def load_base(model: CogVLA, source: str | Path | Release) -> tuple[set[str], list[str]]:
    """Load the weights that a model and a published checkpoint have in common, in place.

    Towers and language model must fit. Each other part (head, state projector, fusion, ...) is loaded if the source has
    all its tensors in the model's shapes; otherwise it keeps its initial values.

    Args:
        model: model to fine-tune.
        source: folder or hub id of OpenVLA, OpenVLA-OFT, Prismatic or a CogVLA release, or an open `Release`.

    Returns:
        The parts that were loaded, such as `head`, and lines for the log: which parts were loaded and which are new.

    Raises:
        ValueError: there is no such checkpoint, or its towers or language model do not fit the configuration.
    """
    release = source if isinstance(source, Release) else open_release(source)
    check_language(release.language(model.config.language), model.config.language, release.folder)
    names, weights = release.names(model), release.weights
    new: set[str] = set()
    loaded: set[str] = set()
    for ours, parameter in model.state_dict().items():
        part = _part(ours)
        theirs = names(ours)
        fits = bool(theirs) and all(name in weights for name in theirs)
        if fits and not _REQUIRED.fullmatch(part):
            shape = tuple(parameter.shape)
            share = (shape[0] // len(theirs), *shape[1:]) if len(theirs) > 1 else shape
            fits = all(tuple(weights[name].shape) in (share, (1, *share)) for name in theirs)
        (loaded if fits or _REQUIRED.fullmatch(part) else new).add(part)
    loaded -= new
    load_parameters(model, weights, lambda ours: names(ours) if _part(ours) in loaded else ())
    said = [f"{release.kind} from {release.folder}: {', '.join(sorted(loaded))}"]
    if new:
        said.append(f"not in {release.folder}, initialised randomly: {', '.join(sorted(new))}")
    return loaded, said


def _part(name: str) -> str:
    match = _PART.match(name)
    assert match, f"a parameter has a name, got {name!r}"
    return match[0]


def _copy(source: dict[str, Tensor], target: nn.Module, name: str) -> None:
    wanted = target.state_dict()
    wrong = [key for key, value in wanted.items() if key not in source or source[key].shape != value.shape]
    if wrong:
        raise ValueError(
            f"the weights of {name!r} do not fit the configuration: {', '.join(wrong[:3])} "
            f"({len(wrong)} of {len(wanted)} parameters); set its sizes in the policy's YAML"
        )
    modules = {_module(key) for key in wanted}
    if more := [key for key in source if key not in wanted and (key.startswith("layers.") or _module(key) in modules)]:
        raise ValueError(
            f"the weights of {name!r} have {', '.join(more[:3])} ({len(more)} tensors), for which the configuration has"
            " no place; set its sizes in the policy's YAML"
        )
    for key in wanted:
        check_numbers(f"{key} of {name!r}", source[key])
    target.load_state_dict({key: source[key] for key in wanted})


def _module(name: str) -> str:
    return name.rpartition(".")[0]
