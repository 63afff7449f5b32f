"""The weights in training: what is trained of them, their moving average, and both as a state to resume from.

Weights may be on every process (DDP) or divided among them (FSDP, as accelerate is configured).
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

from cogvla.policy.training import adapters
from cogvla.policy.training.adapters import FinetuneConfig
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.objective import Objective
from cogvla.policy.training.optimisation import ExponentialAverage, adamw

EVERYTHING = StateDictOptions(full_state_dict=True, cpu_offload=True)
TRAINED = replace(EVERYTHING, ignore_frozen_params=True)


class TrainedWeights:
    """The policy and its training heads with their optimiser, on the devices that they are trained on.

    Attributes:
        objective: to be called and differentiated.
        raw: the same without wrappers, with parameters as they are now.
        trained: names and parameters of what is trained.
        optimiser, average: of that.
        frozen: fingerprint of what is not.
        sharded: whether weights are divided among processes.

    Args:
        accelerator: its mixed precision decides what frozen matrices are kept in.
        objective: changed in place: adapters are put in, and weights are frozen.
        config: what is trained, and how.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, config: TrainingConfig) -> None:
        self.accelerator, self.config = accelerator, config
        adapters.prepare(objective.model, config.finetune)
        if config.finetune != FinetuneConfig():
            accelerator.print(adapters.summary(objective))
        if accelerator.mixed_precision == "bf16":
            for parameter in objective.parameters():
                if not parameter.requires_grad and parameter.ndim > 1:
                    parameter.data = parameter.data.bfloat16()
        objective.model.recompute_blocks(config.gradient_checkpointing)
        self.frozen = adapters.fingerprint(objective)
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and (config.ema_decay or config.optimiser != "adamw"):
            raise ValueError("FSDP goes with training.ema_decay=0 and training.optimiser=adamw only")
        # Sharded modules cannot be copied: the first process gathers their weights into this one.
        self.whole = copy.deepcopy(objective) if self.sharded and accelerator.is_main_process else None
        self.objective: Any
        self.optimiser: Any
        optimiser = adamw(objective, config.learning_rate, config.weight_decay, config.optimiser)
        self.objective, self.optimiser = accelerator.prepare(objective, optimiser)  # FSDP wants both at once
        self.raw: Objective = accelerator.unwrap_model(self.objective)
        self.trained = {name: p for name, p in self.raw.named_parameters() if p.requires_grad}
        self.average = ExponentialAverage(self.trained, config.ema_decay)

    def update(self, learning_rate: float, step: int) -> Tensor:
        """Step number `step` (from 1) with the gradients that are there, which are then gone; returns their norm."""
        parameters = self.objective.parameters() if self.sharded else self.trained.values()  # FSDP wants all of them
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update(self.trained, step)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).detach()

    def averaged(self) -> Objective:
        """Return a copy of the policy and its heads with averaged weights; frozen weights are shared.

        Where weights are sharded every process must call this; only the first one gets them.
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
        """Return the state of everything trained. Every process must call this; the first one gets the state."""
        objective, optimiser = get_state_dict(self.objective, self.optimiser.optimizer, options=TRAINED)
        return {
            "objective": objective,
            "optimiser": optimiser,
            "average": self.average.average if self.config.ema_decay else {},
            "finetune": asdict(self.config.finetune),
            "frozen": self.frozen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; learning rate and weight decay stay as the configuration says.

        Raises:
            ValueError: the state is of another objective, fine-tuning or base. Nothing has changed then.
        """
        if state.get("finetune", asdict(FinetuneConfig())) != asdict(self.config.finetune):
            raise ValueError("was trained with another finetune")
        frozen = {name for name, p in self.raw.named_parameters() if not p.requires_grad}
        if state["objective"].keys() != self.raw.state_dict().keys() - frozen:
            raise ValueError("was trained with another objective")
        if not torch.equal(state.get("frozen", self.frozen), self.frozen):
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
