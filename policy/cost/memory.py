"""Estimate the GPU memory of training from the shapes of the model, without computing anything.

Weights, gradients and optimiser state are exact. Activations are the tensors that autograd stores for a forward pass on
the meta device in bfloat16. This is an estimate, because real kernels store slightly different tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cogvla.policy.engine.nf4 import nf4_bytes
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA, ModelInput
from cogvla.policy.model.config import CogVLAConfig, LanguageConfig
from cogvla.policy.training import adapters
from cogvla.policy.training.config import TrainingConfig
from cogvla.routing.router import RouterConfig

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
        teacher: weights of the teacher of `objective.distillation`, in bfloat16.
        blind: weights of the policy without vision of `objective.prior`, in float32; every GPU holds all of them.
        activations: stored activations of one sample, with what the distillation reads of student and teacher.
        samples: number of samples in one pass on one GPU.
    """

    frozen: int
    trained: int
    gradients: int
    moments: int
    average: int
    teacher: int
    blind: int
    activations: int
    samples: int

    def total(self, shards: int = 1) -> int:
        """Return the bytes per GPU; weights and state are divided among `shards` GPUs (FSDP; 1: DDP or one GPU)."""
        state = self.frozen + self.trained + self.gradients + self.moments + self.average + self.teacher
        return state // shards + self.blind + self.activations * self.samples


def estimate_memory(
    config: CogVLAConfig,
    embodiment: Embodiment,
    training: TrainingConfig,
    gpus: int = 1,
    teacher: CogVLAConfig | None = None,
    blind: CogVLAConfig | None = None,
) -> tuple[TrainingMemory, str]:
    """Estimate the memory of a bfloat16 run on `gpus` GPUs; also return a line about the trained parameters.

    Args:
        config: the policy.
        embodiment: its robot.
        training: settings of the training.
        gpus: number of GPUs.
        teacher: policy from which it learns (`objective.distillation`); None: none.
        blind: policy without vision that weights the actions (`objective.prior`); None: none.
    """
    with torch.device("meta"):
        model = CogVLA(config, embodiment)
    taught, unseeing = _frozen(teacher, embodiment), _frozen(blind, embodiment)
    adapters.prepare(model, training.finetune)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen, packed = adapters.frozen_numbers(model)
    model.recompute_blocks(training.gradient_checkpointing)
    activations = _kept(model.to("meta", torch.bfloat16), embodiment, debug=taught is not None)
    if taught is not None:
        activations += _kept(taught.to("meta", torch.bfloat16), embodiment, debug=True)
    memory = TrainingMemory(
        frozen=2 * (frozen - packed) + round(nf4_bytes(packed)),
        trained=4 * trained,
        gradients=4 * trained,
        moments=MOMENT_BYTES[training.optimiser] * trained,
        average=4 * trained if training.ema_decay else 0,
        teacher=2 * _numbers(taught),
        blind=4 * _numbers(unseeing),
        activations=activations,
        samples=training.batch_size // (gpus * training.accumulation),
    )
    return memory, adapters.summary(model)


def _frozen(config: CogVLAConfig | None, embodiment: Embodiment) -> CogVLA | None:
    """Build a policy as training loads it beside its own: without its token router."""
    if config is None:
        return None
    with torch.device("meta"):
        network = CogVLA(replace(config, routing=replace(config.routing, router=RouterConfig())), embodiment)
    return network.requires_grad_(False)


def _numbers(network: CogVLA | None) -> int:
    return 0 if network is None else sum(p.numel() for p in network.parameters())


def _kept(model: CogVLA, embodiment: Embodiment, debug: bool) -> int:
    """Return the bytes that autograd stores for one sample, without weights; `debug`: and intermediate results."""
    language = model.config.language
    model.decoder.llm.rotary_emb = _Rotations(language.width // language.heads)
    # All of these are alive: no activation takes the address of one.
    own = {_storage(p) for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor
        return tensor

    camera = embodiment.cameras[0]
    with torch.device("meta"):
        inputs = ModelInput(
            torch.zeros(1, len(embodiment.cameras), 3, camera.height, camera.width, dtype=torch.bfloat16),
            _words(language),
            torch.ones(1, WORDS, dtype=torch.bool),
            torch.zeros(1, embodiment.state_dim, dtype=torch.bfloat16),
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, _given):
            output = model(inputs, debug=debug)
    if debug:
        for tensor in _tensors(output.debug):
            keep(tensor)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


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
    for name, value, each in (("teacher", memory.teacher, gpus), ("policy without vision", memory.blind, 1)):
        lines += [f"{name:>24} {value / 1e9:8.1f} {value / each / 1e9:9.1f}"] if value else []
    activations = memory.activations * memory.samples
    lines.append(f"{f'activations, {memory.samples} samples':>24} {activations / 1e9:8.1f} {activations / 1e9:9.1f}")
    lines.append(f"{'total':>24} {memory.total() / 1e9:8.1f} {memory.total(gpus) / 1e9:9.1f}")
    return "\n".join(lines)
