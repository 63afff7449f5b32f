"""Pre- and postprocessing as steps of lerobot's pipelines, with our statistics, tokenizer and image sizes.

Shape legend: B batch, K chunk, A action, H, W image, C colours, V views.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    ProcessorStepRegistry,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import (
    OBS_IMAGES,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
)
from torch import Tensor

from cogvla.configs.build import build
from cogvla.files import read_object
from cogvla.policy.checkpoint import FORMAT, described
from cogvla.policy.inputs.normalise import Normaliser, normalisers
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.config import CogVLAConfig as NetworkConfig
from lerobot_policy_cogvla.configuration_cogvla import CogVLAConfig

VERSION = 1
"""Version of the steps; raised when they would do something else with what is saved."""
OBS_PIXELS = "observation.cogvla_pixels"
BEFORE, AFTER = f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json", f"{POLICY_POSTPROCESSOR_DEFAULT_NAME}.json"
INPUTS, ACTIONS = "cogvla_inputs", "cogvla_actions"
NEEDED = {INPUTS: ("format", "embodiment", "statistics", "tokenizer", "model"), ACTIONS: ("embodiment", "statistics")}
SHARED = ("embodiment", "statistics", "tokenizer", "pictures")
"""Settings that the processors and the policy's configuration share."""
AGAIN = "give another checkpoint, or convert it again with convert_checkpoint"


def network_and_words(saved: dict[str, Any]) -> tuple[NetworkConfig, Preprocessor]:
    """Return what a configuration's `cogvla` describes: the network, and the preprocessor with its words.

    Raises:
        ValueError: something is missing, does not fit, or has a format of another version.
    """
    if saved.get("format") != FORMAT:
        raise ValueError(f"the checkpoint has format {saved.get('format')!r}; this version of cogvla reads {FORMAT}")
    try:
        return described(saved, saved["statistics"], Path())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint's description is damaged ({type(error).__name__}: {error}); {AGAIN}"
        ) from error


def _checked(step: str, config: dict[str, Any]) -> None:
    """Raise ValueError for the configuration of a step that another version saved, or that lacks something."""
    version, saved = config.get("version", 0), config.get("saved") or {}
    if version != VERSION or config.keys() - {"saved", "version"}:
        raise ValueError(
            f"the processor was saved by another version of lerobot_policy_cogvla (its steps have version {version}, "
            f"these read {VERSION}): convert the checkpoint again with convert_checkpoint, or install that version"
        )
    if missing := [key for key in NEEDED[step] if key not in saved]:
        raise ValueError(f"step {step} of the processor does not say its {', '.join(missing)}; {AGAIN}")


def check_processors(folder: Path, policy: dict[str, Any]) -> None:
    """Check that the processors in a checkpoint are those of its policy; files that are not there are left to lerobot.

    Args:
        folder: lerobot's `pretrained_model` folder.
        policy: `CogVLAConfig.cogvla` of the policy.

    Raises:
        ValueError: a file is damaged, of another version of the plugin, or of another checkpoint.
    """
    for name, step in ((BEFORE, INPUTS), (AFTER, ACTIONS)):
        file = folder / name
        if not file.is_file():
            continue
        steps = [s for s in read_object(file, AGAIN).get("steps") or [] if isinstance(s, dict)]
        names = [str(s["registry_name"]) for s in steps if "registry_name" in s]
        if unknown := [name for name in names if name not in ProcessorStepRegistry.list()]:
            raise ValueError(
                f"{file} has the step {', '.join(unknown)}, which is not installed: another version saved it"
            )
        found = [s for s in steps if s.get("registry_name") == step]
        if len(found) != 1:
            raise ValueError(f"{file} has no step {step}; {AGAIN}")
        values = found[0].get("config") or {}
        _checked(step, values)
        saved = values["saved"]
        others = [key for key in SHARED if key in saved and saved[key] != policy.get(key)]
        if others:
            raise ValueError(f"{file} is of another checkpoint than the policy: other {', '.join(others)}; {AGAIN}")


@ProcessorStepRegistry.register(INPUTS)
@dataclass
class CogVLAInputsStep(ProcessorStep):
    """Normalise state and actions, resize images, and turn instructions into ids, as `Preprocessor` does.

    Attributes:
        saved: what a checkpoint of ours says, with "statistics".
        version: see `VERSION`.
    """

    saved: dict[str, Any] = field(default_factory=dict)
    version: int = 0

    def __post_init__(self) -> None:
        _checked(INPUTS, self.get_config())

    @cached_property
    def preprocessor(self) -> Preprocessor:
        """The preprocessor that is described."""
        return network_and_words(self.saved)[1]

    def get_config(self) -> dict[str, Any]:
        """See `ProcessorStep`."""
        return {"saved": self.saved, "version": self.version}

    def __call__(self, transition: Any) -> Any:
        """Add pixels uint8 [B,V,3,H,W], ids [B,T] and mask [B,T]; normalise state [B,S] and actions [B,K,A].

        Raises:
            ValueError: a camera, the state or the instruction is missing or of another shape, or a number not finite.
        """
        found = dict(transition)
        seen = dict(found.get("observation") or {})
        names = self.preprocessor.embodiment.camera_names
        images = [_image(seen, f"{OBS_IMAGES}.{name}") for name in names]
        state_BS = _state(seen, self.preprocessor.embodiment)
        instructions = _instructions(found.get("complementary_data") or {}, len(state_BS))
        preprocessor = self.preprocessor.to(state_BS.device)
        words_BT, mask_BT = preprocessor.text(instructions)
        seen[OBS_PIXELS] = preprocessor.pixels(images)
        seen[OBS_LANGUAGE_TOKENS], seen[OBS_LANGUAGE_ATTENTION_MASK] = words_BT, mask_BT
        seen[OBS_STATE] = preprocessor.normalised_state(state_BS)
        action = found.get("action")
        if action is not None:
            if not action.isfinite().all():
                raise ValueError("action holds NaN or infinite values; check the data set")
            found["action"] = preprocessor.normalised_actions(action)
        return found | {"observation": seen}

    def transform_features(self, features: Any) -> Any:
        """See `ProcessorStep`; what others declare does not change."""
        return features


@ProcessorStepRegistry.register(ACTIONS)
@dataclass
class CogVLAActionsStep(ProcessorStep):
    """Bring normalised actions back to physical units; attributes as in `CogVLAInputsStep`."""

    saved: dict[str, Any] = field(default_factory=dict)
    version: int = 0

    def __post_init__(self) -> None:
        _checked(ACTIONS, self.get_config())

    @cached_property
    def normaliser(self) -> Normaliser:
        """The normaliser of actions."""
        return normalisers(build(Embodiment, self.saved["embodiment"], "embodiment"), self.saved["statistics"])[1]

    def get_config(self) -> dict[str, Any]:
        """See `ProcessorStep`."""
        return {"saved": self.saved, "version": self.version}

    def __call__(self, transition: Any) -> Any:
        """Convert actions [B,A] or [B,K,A]."""
        action = transition["action"]
        return {**transition, "action": self.normaliser.to(action.device).inverse(action)}

    def transform_features(self, features: Any) -> Any:
        """See `ProcessorStep`."""
        return features


def make_cogvla_pre_post_processors(
    config: CogVLAConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Build the pipelines of a policy, whose configuration holds statistics and words.

    Args:
        config: configuration of a policy that was built.
        dataset_stats: not used: lerobot's quantiles are means over episodes, ours are those of all frames.
    """
    if not config.cogvla:
        raise ValueError("build the policy first: it fills in the configuration from the data set")
    features = {**(config.input_features or {}), **(config.output_features or {})}
    mapping = config.normalization_mapping
    numbers = {key: config.cogvla[key] for key in ("embodiment", "statistics")}
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        CogVLAInputsStep(config.cogvla, VERSION),
        DeviceProcessorStep(device=config.device),
        NormalizerProcessorStep(features=features, norm_map=mapping),  # both are for lerobot's overrides
    ]
    after = [
        UnnormalizerProcessorStep(features=config.output_features or {}, norm_map=mapping),
        CogVLAActionsStep(numbers, VERSION),
        DeviceProcessorStep(device="cpu"),
    ]
    return (
        PolicyProcessorPipeline(steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME),
        PolicyProcessorPipeline(
            steps=after,
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )


def _image(seen: dict[str, Any], key: str) -> Tensor:
    """Return a camera's image as uint8 [B,H,W,3]."""
    if key not in seen:
        cameras = sorted(name for name in seen if name.startswith(OBS_IMAGES))
        raise ValueError(
            f"the observation has no {key}; it has {', '.join(cameras) or 'no cameras'}: rename them with "
            f'--rename_map=\'{{"observation.images.YOURS": "{key}"}}\''
        )
    image_BCHW = seen[key]
    if image_BCHW.ndim != 4 or image_BCHW.shape[1] != 3:
        raise ValueError(f"{key} must have shape [B,3,H,W], got {list(image_BCHW.shape)}")
    if image_BCHW.dtype != torch.uint8:
        if image_BCHW.numel() and not -1e-3 <= float(image_BCHW.min()) <= float(image_BCHW.max()) <= 1.001:
            raise ValueError(f"{key} has values outside of 0 to 1, as lerobot's images have them; divide them by 255")
        image_BCHW = (image_BCHW * 255).round().to(torch.uint8)
    return rearrange(image_BCHW, "b c h w -> b h w c")


def _state(seen: dict[str, Any], robot: Embodiment) -> Tensor:
    """Return the state [B,S]."""
    state = seen.get(OBS_STATE)
    if state is None or state.ndim != 2 or state.shape[1] != robot.state_dim:
        found = "is missing" if state is None else f"has shape {list(state.shape)}"
        raise ValueError(f"{OBS_STATE} {found}; the policy needs [B,{robot.state_dim}]")
    if not state.isfinite().all():
        raise ValueError(f"{OBS_STATE} holds NaN or infinite values; check the robot's joint states")
    return state.float()


def _instructions(data: dict[str, Any], batch: int) -> list[str]:
    task = data.get("task")
    texts = [task] * batch if isinstance(task, str) else list(task or ())
    if len(texts) != batch or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"the policy needs an instruction for each of {batch} observations, got task={task!r}")
    return texts
