"""Open published checkpoints from the hub or a folder: kind, configuration, weights and statistics.

`openvla` is OpenVLA, OpenVLA-OFT or Prismatic, a base to fine-tune; `cogvla` is a complete CogVLA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cogvla.errors import first_line
from cogvla.files import read_object, visible
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig, LanguageConfig
from cogvla.policy.weights.import_cogvla import cogvla_names, cogvla_weights
from cogvla.policy.weights.import_openvla import openvla_names, openvla_weights
from cogvla.policy.weights.import_weights import Names, unused_tensors
from cogvla.policy.weights.safetensor_files import AGAIN, SafetensorFiles

KINDS = ("openvla", "cogvla")
_TEXT_CONFIG = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "intermediate",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "rms_norm_eps": "rms_norm_eps",
}
_COMPUTED = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}
"""Settings of a language model that ours has no choice of -> what it computes."""


def rope_theta(text: Mapping[str, Any], name: str | Path) -> float | None:
    """Return the base of the positions of a language model that ours can compute; None: not given.

    Args:
        text: its settings; transformers 5 writes those of the positions as `rope_parameters`, 4 as `rope_theta` and
            `rope_scaling`.
        name: its name, for errors.

    Raises:
        ValueError: our language model does not compute what the settings say.
    """
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    given = {**text, **rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    wrong = [] if kind == "default" else [f"positions of type {kind!r} (only 'default')"]
    for key, ours in _COMPUTED.items():
        if given.get(key) not in (None, ours):
            wrong.append(f"{key} {given[key]!r} (only {ours!r})")
    if wrong:
        raise ValueError(f"{str(name)!r} has {', '.join(wrong)}, which is not computed here: choose another model")
    return given.get("rope_theta")


def with_published(config: LanguageConfig, text: Mapping[str, Any], name: str | Path) -> LanguageConfig:
    """Return the configuration with what the settings (`text`) of a published language model say.

    Raises:
        ValueError: that language model computes something else than ours.
    """
    if (kind := text.get("model_type", config.architecture)) != config.architecture:
        raise ValueError(
            f"{name} has architecture {kind}, the configuration {config.architecture}: set "
            "policy.language.architecture, or choose a Llama or Qwen2"
        )
    sizes = {ours: text[theirs] for theirs, ours in _TEXT_CONFIG.items() if theirs in text}
    if (theta := rope_theta(text, name)) is not None:
        sizes["rope_theta"] = theta
    if "heads" in sizes:
        sizes.setdefault("kv_heads", None)  # default: as many as heads
    return replace(config, **sizes)


@dataclass(frozen=True)
class Release:
    """A published checkpoint.

    Attributes:
        folder: folder of its files.
        kind: one of `KINDS`.
        config: content of `config.json`; empty without this file.
        weights: weights by name, read from the files at each access.
    """

    folder: Path
    kind: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    def names(self, model: CogVLA) -> Names:
        """Return the function from the model's parameter names to names in `weights`."""
        return cogvla_names(model) if self.kind == "cogvla" else openvla_names(model)

    def configure(self, config: CogVLAConfig) -> CogVLAConfig:
        """Return the configuration with the sizes, towers and routing of `config.json`.

        Raises:
            ValueError: the release is a variant of CogVLA that has no aggregation tokens, FiLM or stream weights, or
                its language model computes something else than ours.
        """
        text = self.config.get("text_config", {})
        towers = {}
        for name, timm in zip(("dinov2", "siglip"), self.config.get("timm_model_ids", ()), strict=False):
            tower = getattr(config.vision, name)
            towers[name] = replace(tower, timm=timm, width=None, depth=None, heads=None)
        config = replace(config, language=self.language(config.language), vision=replace(config.vision, **towers))
        if self.kind != "cogvla":
            return config
        for switch, needed in (("use_aggr", True), ("use_film", True), ("vision_aggregate_type", "moe")):
            if self.config.get(switch, needed) != needed:
                raise ValueError(
                    f"{self.folder} is an ablation of CogVLA ({switch} is not {needed}); it cannot be imported"
                )
        routing = config.routing
        if "use_lfp" in text:
            routing = replace(routing, lfp=bool(text["use_lfp"]))
        for theirs, ours in (("lfp_type", "schedule"), ("lfp_average_factor", "mean_keep")):
            if routing.lfp and theirs in text:
                routing = replace(routing, **{ours: text[theirs]})
        tokens = self.config.get("num_vision_aggr", config.vision.aggregation_tokens)
        return replace(config, routing=routing, vision=replace(config.vision, aggregation_tokens=tokens))

    def language(self, config: LanguageConfig) -> LanguageConfig:
        """Return the configuration of the language model with what `config.json` says of it, see `with_published`."""
        return with_published(config, self.config.get("text_config", {}), self.folder)

    def statistics(self, dataset: str | None = None) -> tuple[dict[str, Statistics], tuple[bool, ...]]:
        """Read the statistics of state and action, and the mask of normalised action dimensions.

        Args:
            dataset: name of the data set; None: the only one.

        Raises:
            ValueError: there are no statistics of this data set, they are incomplete, or there are several data sets
                and `dataset` is None.
        """
        path = self.folder / "dataset_statistics.json"
        sets = read_object(path, AGAIN) if path.is_file() else self.config.get("norm_stats") or {}
        if dataset is None and len(sets) == 1:
            dataset = next(iter(sets))
        if dataset is None or dataset not in sets:
            asked = "several data sets" if dataset is None else f"no data set {dataset!r}"
            raise ValueError(
                f"{self.folder} has statistics of {asked}; choose dataset= from {', '.join(sets) or 'none'}"
            )
        where = f"the statistics of {dataset!r} in {self.folder}"
        found: dict[str, Statistics] = {}
        masks: dict[str, tuple[bool, ...]] = {}
        for ours, theirs in (("action", "action"), ("state", "proprio")):
            values = sets[dataset].get(theirs) if isinstance(sets[dataset], Mapping) else None
            names = list(Statistics.__dataclass_fields__)
            absent = [name for name in names if not isinstance(values, Mapping) or name not in values]
            if absent or not isinstance(values, Mapping):
                raise ValueError(f"{where} are incomplete: {theirs} has no {', '.join(absent)}")
            try:
                found[ours] = Statistics(**{name: values[name] for name in names})
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where} are wrong: {theirs}: {error}") from error
            mask = values.get("mask", [True] * found[ours].dim)
            if not isinstance(mask, list) or len(mask) != found[ours].dim or any(m not in (True, False) for m in mask):
                raise ValueError(
                    f"{where} are wrong: the mask of {theirs} must be {found[ours].dim} times true or false"
                )
            masks[ours] = tuple(bool(value) for value in mask)
        if not all(masks["state"]):
            raise ValueError(f"{where} do not normalise all of proprio (its mask has false); this cannot be imported")
        return found, masks["action"]

    def left_out(self, model: CogVLA) -> list[str]:
        """Return lines about tensors and files that nothing has read."""
        lines = []
        if unused := unused_tensors(model, self.weights, self.names(model)):
            parts = sorted({".".join(name.split(".")[:3]) for name in unused})
            more = f" and {len(parts) - 6} more parts" if len(parts) > 6 else ""
            lines.append(f"not used, no place in the model: {len(unused)} tensors of {', '.join(parts[:6])}{more}")
        read: tuple[str, ...] = ("action_head--", "proprio_projector--", "vision_backbone--", "non_lora_trainables--")
        read = read if self.kind == "cogvla" else read[:2]
        shards = SafetensorFiles(self.folder).files if visible(self.folder, "*.safetensors") else ()
        files = [
            path.name
            for path in visible(self.folder, "*")
            if path.suffix in (".safetensors", ".pt", ".pth", ".bin")
            and path not in shards
            and not path.name.startswith(read)
        ]
        adapters = [
            str(path.parent.relative_to(self.folder)) for path in visible(self.folder, "**/adapter_config.json")
        ]
        known = "lora_adapter" if self.kind == "cogvla" else None
        files += [f"the adapter in {name}" for name in sorted(adapters) if name != known]
        return lines + ([f"not read: {', '.join(files)}"] if files else [])


def open_release(
    source: str | Path, kind: str = "auto", base: str | Path | None = None, merge_adapter: bool | None = None
) -> Release:
    """Open a published checkpoint.

    Args:
        source: a folder, or the id of a repository on the hub, which is downloaded.
        kind: one of `KINDS`; `auto`: detect it from the files.
        base: folder or hub id of the base of an adapter, see `cogvla_weights`.
        merge_adapter: see `cogvla_weights`.

    Raises:
        ValueError: the kind is unknown, or files are missing or damaged.
    """
    if kind not in ("auto", *KINDS):
        raise ValueError(f"unknown kind {kind!r}; one of auto, {', '.join(KINDS)}")
    folder = checkpoint_folder(source)
    config_path = folder / "config.json"
    config = read_object(config_path, AGAIN) if config_path.is_file() else {}
    if kind == "auto":
        kind = "cogvla" if config.get("use_aggr") or any(folder.glob("vision_backbone--*")) else "openvla"
    if kind == "openvla":
        if base is not None or merge_adapter:
            raise ValueError(f"{source} is an openvla: base= and merge_adapter= are only for adapters of a cogvla")
        return Release(folder, kind, config, openvla_weights(folder))
    base_weights = None if base is None else openvla_weights(checkpoint_folder(base))
    return Release(folder, kind, config, cogvla_weights(folder, base_weights, merge_adapter))


def checkpoint_folder(source: str | Path) -> Path:
    """Return the folder; download the files first if it is a repository on the hub.

    Raises:
        ValueError: no such folder, and the hub has no such repository or cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        files = ["*.json", "*.safetensors", "*.pt", "*.model", "*.txt"]
        return Path(snapshot_download(str(source), allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{source} is not a folder, and cannot be downloaded from the hub ({first_line(error)})"
        ) from error
