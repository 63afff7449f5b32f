"""The weights in training: the trained ones, their optimiser and moving average, and the state to resume from.

Every process has all weights (DDP), or a part of them (FSDP, if accelerate is configured so).
"""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from cogvla.policy.engine.nf4 import Nf4Linear
from cogvla.policy.training import adapters
from cogvla.policy.training.adapters import FinetuneConfig
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.objective import Objective
from cogvla.policy.training.optimisation import ExponentialAverage, adamw

EVERYTHING = StateDictOptions(full_state_dict=True, cpu_offload=True)
TRAINED = replace(EVERYTHING, ignore_frozen_params=True)


class TrainedWeights:
    """The policy and its training heads with their optimiser, on the training devices.

    Attributes:
        objective: module for the forward and backward pass.
        raw: the same module without the wrappers of accelerate.
        trained: names and parameters of the trained weights.
        optimiser: optimiser of the trained weights.
        average: moving average of the trained weights.
        frozen: fingerprint of the frozen weights.
        sharded: True if weights are divided among processes (FSDP).

    Args:
        accelerator: accelerator of the run; with mixed precision, frozen matrices are converted to bfloat16.
        objective: policy and training heads; adapters are added and weights are frozen in place.
        config: settings of the training.

    Raises:
        ValueError: FSDP does not support the configuration; or see `adapters.prepare` and `optimisation.adamw`.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, config: TrainingConfig) -> None:
        self.accelerator, self.config = accelerator, config
        adapters.prepare(objective.model, config.finetune)
        if config.finetune != FinetuneConfig():
            accelerator.print(adapters.summary(objective))
        if accelerator.mixed_precision == "bf16":
            for parameter in objective.parameters():
                if not parameter.requires_grad and parameter.ndim > 1 and parameter.is_floating_point():
                    parameter.data = parameter.data.bfloat16()
            for module in objective.modules():
                if isinstance(module, Nf4Linear):
                    module.answer_in(torch.bfloat16)
        objective.model.recompute_blocks(config.gradient_checkpointing)
        self.frozen = adapters.fingerprint(objective)
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and (config.ema_decay or config.optimiser != "adamw"):
            raise ValueError("FSDP needs training.ema_decay=0 and training.optimiser=adamw")
        if self.sharded and config.finetune.bits is not None:
            raise ValueError("FSDP cannot divide weights in 4 bits: give finetune.bits=null")
        # Sharded modules cannot be copied: the first process gathers their weights in this copy.
        self.whole = copy.deepcopy(objective) if self.sharded and accelerator.is_main_process else None
        self.objective: Any
        self.optimiser: Any
        optimiser = adamw(objective, config.learning_rate, config.weight_decay, config.optimiser)
        self.objective, self.optimiser = accelerator.prepare(objective, optimiser)  # FSDP needs both in one call
        self.raw: Objective = accelerator.unwrap_model(self.objective)
        self.trained = {name: p for name, p in self.raw.named_parameters() if p.requires_grad}
        self.average = ExponentialAverage(self.trained, config.ema_decay)

    def update(self, learning_rate: float, step: int) -> Tensor:
        """Make optimiser step number `step` (from 1) and clear the gradients; return their norm before clipping."""
        parameters = self.objective.parameters() if self.sharded else self.trained.values()  # FSDP needs all of them
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update(self.trained, step)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).detach()

    def averaged(self) -> Objective:
        """Return a copy of the policy and its heads with averaged weights, in evaluation mode.

        It shares the frozen weights. With sharded weights, every process must call this, and only the result of the
        first process is valid.
        """
        if self.sharded:
            state = get_model_state_dict(self.objective, options=EVERYTHING)
            if self.whole is None:
                return self.raw
            self.whole.load_state_dict(state)
            return copy.deepcopy(self.whole).to(self.accelerator.device).eval()
        frozen = {id(p): p for p in self.raw.parameters() if not p.requires_grad}
        objective = copy.deepcopy(self.raw, frozen)
        objective.load_state_dict(self.average.average, strict=False)
        return objective.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from; every process must call this, and the first one gets the complete state."""
        objective, optimiser = get_state_dict(self.objective, self.optimiser.optimizer, options=TRAINED)
        return {
            "objective": objective,
            "optimiser": optimiser,
            "average": self.average.average if self.config.ema_decay else {},
            "finetune": asdict(self.config.finetune),
            "frozen": self.frozen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`; learning rate and weight decay stay those of the configuration.

        Raises:
            ValueError: the state is from another objective, fine-tuning or base; nothing is changed then.
        """
        was, now = asdict(FinetuneConfig()) | state.get("finetune", {}), asdict(self.config.finetune)
        frozen = {name for name, p in self.raw.named_parameters() if not p.requires_grad}
        same = state["objective"].keys() == self.raw.state_dict().keys() - frozen
        # names of parts that this policy lacks, as a later version may list, change nothing
        changed = [key for key in now if was[key] != now[key] and not (same and key in ("train", "adapt"))]
        if changed:
            raise ValueError("was trained with another finetune")
        if not same:
            raise ValueError("was trained with another objective")
        # in the least precision, since a run may go on in another one
        if not torch.equal(state.get("frozen", self.frozen).bfloat16(), self.frozen.bfloat16()):
            raise ValueError("was trained from another base: its frozen weights are not these")
        decay = [group["weight_decay"] for group in self.optimiser.param_groups]
        set_state_dict(
            self.objective,
            self.optimiser.optimizer,
            model_state_dict=state["objective"],
            optim_state_dict=state["optimiser"],
            options=TRAINED,
        )
        for group, value in zip(self.optimiser.param_groups, decay, strict=True):
            group["weight_decay"] = value
        for name, average in self.average.average.items() if self.config.ema_decay else ():
            average.copy_(state["average"].get(name, self.trained[name].detach()))
