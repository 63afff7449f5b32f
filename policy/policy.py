"""A trained CogVLA behind the `Policy` contract."""

from __future__ import annotations

import time
from typing import Any

import torch

from cogvla.policy.interface import ActionChunk, Embodiment, Observation
from cogvla.policy.model import CogVLA, ModelInput, TextFeatures
from cogvla.policy.preprocess import Preprocessor


class CogVLAPolicy:
    """Preprocess, one batched forward pass, unnormalise.

    Args:
        model: the network, on its device.
        preprocessor: the one it was trained with.
        description: what reports say about it (checkpoint, step, data set); preset and parameters are added here.
    """

    def __init__(self, model: CogVLA, preprocessor: Preprocessor, description: dict[str, Any] | None = None) -> None:
        self.model = model.eval()
        device = next(model.parameters()).device
        self.preprocessor = preprocessor.to(device)
        self._description = description or {}
        self._text: tuple[tuple[str, ...], TextFeatures] | None = None

    @property
    def embodiment(self) -> Embodiment:
        return self.preprocessor.embodiment

    def describe(self) -> dict[str, Any]:
        """Checkpoint, parameters, device and precision, for reports."""
        first = next(self.model.parameters())
        return {
            "policy": "cogvla",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": str(first.device),
            "dtype": str(first.dtype).removeprefix("torch."),
            **self._description,
        }

    def reset(self) -> None:
        """Forget the instruction of the episode."""
        self._text = None

    @torch.inference_mode()
    def act(self, observation: Observation) -> ActionChunk:
        """[B] observations to actions float32 [B,K,A] in physical units, with the time of each stage in ms."""
        start = time.perf_counter()
        inputs = self.preprocessor.observation(observation)
        ready = time.perf_counter()
        normalised_BKA = self.model(inputs, self._text_features(observation, inputs)).actions
        actions = self.preprocessor.actions(normalised_BKA.float()).cpu().numpy()
        end = time.perf_counter()
        timing = {"preprocess_ms": 1e3 * (ready - start), "inference_ms": 1e3 * (end - ready)}
        return ActionChunk(actions, timing)

    def _text_features(self, observation: Observation, inputs: ModelInput) -> TextFeatures:
        """What depends on the instructions only; kept as long as they stay, which is mostly a whole episode."""
        instructions = tuple(observation.instruction)
        if self._text is None or self._text[0] != instructions:
            self._text = (instructions, self.model.encode_text(inputs.text_ids, inputs.text_mask))
        return self._text[1]
