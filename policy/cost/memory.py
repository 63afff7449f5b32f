"""Estimate the GPU memory of training from the shapes of the model, without computing anything.

Weights, gradients and optimiser state are exact. Activations are the tensors that autograd stores for a forward pass on
the meta device in bfloat16. This is an estimate, because real kernels store slightly different tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cogvla.policy.engine.nf4 import nf4_bytes
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA, ModelInput
from cogvla.policy.model.config import CogVLAConfig, LanguageConfig
from cogvla.policy.training import adapters
from cogvla.policy.training.config import TrainingConfig

MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2}
WORDS = 30
"""Text tokens of a sample, about as in LIBERO's prompts."""


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of a training run, in bytes without sharding.

    Attributes:
        frozen: frozen weights, in bfloat16 or 4 bits.
        trained: trained weights, in float32.
        gradients: gradients of the trained weights.
        moments: optimiser state of the trained weights.
        average: moving average of the trained weights.
        activations: stored activations of one sample.
        samples: number of samples in one pass on one GPU.
    """

    frozen: int
    trained: int
    gradients: int
    moments: int
    average: int
    activations: int
    samples: int

    def total(self, shards: int = 1) -> int:
        """Return the bytes per GPU; weights and state are divided among `shards` GPUs (FSDP; 1: DDP or one GPU)."""
        state = self.frozen + self.trained + self.gradients + self.moments + self.average
        return state // shards + self.activations * self.samples


def estimate_memory(
    config: CogVLAConfig, embodiment: Embodiment, training: TrainingConfig, gpus: int = 1
) -> tuple[TrainingMemory, str]:
    """Estimate the memory of a bfloat16 run on `gpus` GPUs; also return a line about the trained parameters."""
    with torch.device("meta"):
        model = CogVLA(config, embodiment)
    adapters.prepare(model, training.finetune)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen, packed = adapters.frozen_numbers(model)
    model.recompute_blocks(training.gradient_checkpointing)
    memory = TrainingMemory(
        frozen=2 * (frozen - packed) + round(nf4_bytes(packed)),
        trained=4 * trained,
        gradients=4 * trained,
        moments=MOMENT_BYTES[training.optimiser] * trained,
        average=4 * trained if training.ema_decay else 0,
        activations=_kept(model.to("meta", torch.bfloat16), embodiment),
        samples=training.batch_size // (gpus * training.accumulation),
    )
    return memory, adapters.summary(model)


def _kept(model: CogVLA, embodiment: Embodiment) -> int:
    """Return the bytes that autograd stores for one sample, without weights."""
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
            _words(language),
            torch.ones(1, WORDS, dtype=torch.bool),
            torch.zeros(1, embodiment.state_dim, dtype=torch.bfloat16),
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, _given):
            output = model(inputs)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


def _words(language: LanguageConfig) -> Tensor:
    """Return the words of an instruction as the network reads them: ids, or states of a text encoder."""
    if language.encoder_width is None:
        return torch.zeros(1, WORDS, dtype=torch.long)
    return torch.zeros(1, WORDS, language.encoder_width, dtype=torch.bfloat16)


class _Rotations(nn.Module):
    """Rotary embedding that returns shapes only, because that of transformers does not run on the meta device."""

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
    """Format a table of the memory per GPU in GB, without sharding (DDP) and with it (FSDP)."""
    lines = [said, f"{'GB per GPU':>24} {'DDP':>8} {f'FSDP x{gpus}':>9}"]
    for name in ("frozen", "trained", "gradients", "moments", "average"):
        value = getattr(memory, name)
        lines.append(f"{name:>24} {value / 1e9:8.1f} {value / gpus / 1e9:9.1f}")
    activations = memory.activations * memory.samples
    lines.append(f"{f'activations, {memory.samples} samples':>24} {activations / 1e9:8.1f} {activations / 1e9:9.1f}")
    lines.append(f"{'total':>24} {memory.total() / 1e9:8.1f} {memory.total(gpus) / 1e9:9.1f}")
    return "\n".join(lines)
