"""A trained CogVLA behind the `Policy` contract."""

from __future__ import annotations

import time
from typing import Any

import torch

from cogvla.policy.interface import ActionChunk, Embodiment, Observation
from cogvla.policy.model import CogVLA
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
        """Nothing belongs to an episode."""

    @torch.inference_mode()
    def act(self, observation: Observation) -> ActionChunk:
        """[B] observations to actions float32 [B,K,A] in physical units, with the time of each stage in ms."""
        start = time.perf_counter()
        inputs = self.preprocessor.observation(observation)
        ready = time.perf_counter()
        normalised_BKA = self.model(inputs).actions
        actions = self.preprocessor.actions(normalised_BKA.float()).cpu().numpy()
        end = time.perf_counter()
        timing = {"preprocess_ms": 1e3 * (ready - start), "inference_ms": 1e3 * (end - ready)}
        return ActionChunk(actions, timing)
