"""Estimate the GPU memory of training from the model's shapes alone: nothing is computed.

Weights, gradients and optimiser state are exact. Activations are those that autograd keeps of a forward pass on the
meta device in bfloat16: an estimate, as kernels keep a little more or less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA, ModelInput
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.training import adapters
from cogvla.policy.training.config import TrainingConfig

MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2}
WORDS = 30
"""Text tokens of a sample; LIBERO's prompts have about as many."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a run takes of one GPU.

    Attributes:
        frozen, trained: weights, in bfloat16 and float32.
        gradients, moments, average: of the trained weights.
        activations: of one sample.
        samples: that are computed at a time.
    """

    frozen: int
    trained: int
    gradients: int
    moments: int
    average: int
    activations: int
    samples: int

    def total(self, shards: int = 1) -> int:
        """On each of so many GPUs that share weights and state among them (FSDP); 1 is DDP or one GPU."""
        state = self.frozen + self.trained + self.gradients + self.moments + self.average
        return state // shards + self.activations * self.samples


def estimate_memory(
    config: CogVLAConfig, embodiment: Embodiment, training: TrainingConfig, gpus: int = 1
) -> tuple[TrainingMemory, str]:
    """Compute the memory of a bfloat16 run on several GPUs, and a line that says what is trained."""
    with torch.device("meta"):
        model = CogVLA(config, embodiment)
    adapters.prepare(model, training.finetune)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    model.recompute_blocks(training.gradient_checkpointing)
    memory = TrainingMemory(
        frozen=2 * frozen,
        trained=4 * trained,
        gradients=4 * trained,
        moments=MOMENT_BYTES[training.optimiser] * trained,
        average=4 * trained if training.ema_decay else 0,
        activations=_kept(model.to("meta", torch.bfloat16), embodiment),
        samples=training.batch_size // (gpus * training.accumulation),
    )
    return memory, adapters.summary(model)


def _kept(model: CogVLA, embodiment: Embodiment) -> int:
    """Bytes that autograd keeps of one sample, weights not counted."""
    own = {_storage(p) for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor
        return tensor

    camera, language = embodiment.cameras[0], model.config.language
    model.decoder.llm.rotary_emb = _Rotations(language.width // language.heads)
    with torch.device("meta"):
        inputs = ModelInput(
            torch.zeros(1, len(embodiment.cameras), 3, camera.height, camera.width, dtype=torch.bfloat16),
            torch.zeros(1, WORDS, dtype=torch.long),
            torch.ones(1, WORDS, dtype=torch.bool),
            torch.zeros(1, embodiment.state_dim, dtype=torch.bfloat16),
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, _given):
            output = model(inputs)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


class _Rotations(nn.Module):
    """Cosines and sines by shape: transformers' own do not run on the meta device."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, like: Tensor, position_1S: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_empty(*position_1S.shape, self.width), like.new_empty(*position_1S.shape, self.width)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _given(value: Any) -> Any:
    return value


def report(memory: TrainingMemory, gpus: int, said: str) -> str:
    """Format a table in GB for one GPU of several, without and with sharding."""
    lines = [said, f"{'GB per GPU':>24} {'DDP':>8} {f'FSDP x{gpus}':>9}"]
    for name in ("frozen", "trained", "gradients", "moments", "average"):
        value = getattr(memory, name)
        lines.append(f"{name:>24} {value / 1e9:8.1f} {value / gpus / 1e9:9.1f}")
    activations = memory.activations * memory.samples
    lines.append(f"{f'activations, {memory.samples} samples':>24} {activations / 1e9:8.1f} {activations / 1e9:9.1f}")
    lines.append(f"{'total':>24} {memory.total() / 1e9:8.1f} {memory.total(gpus) / 1e9:9.1f}")
    return "\n".join(lines)
