"""The configuration of the policy `cogvla` in lerobot's commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig

from cogvla.policy.training.optimisation import BETAS, LEARNING_RATE_FLOOR


@PreTrainedConfig.register_subclass("cogvla")
@dataclass
class CogVLAConfig(PreTrainedConfig):
    """Options `--policy.NAME=` of lerobot's commands. `cogvla` describes the network, as in a checkpoint of ours.

    Attributes:
        chunk_size: number of actions that one forward pass predicts.
        n_action_steps: number of them that `select_action` executes before it predicts again.
        preset: size of a new network, a file of `configs/policy`.
        routing: routing of a new network, a file of `configs/routing`.
        embodiment: the robot, a file of `configs/embodiment`; None: as the data set says, without a gripper.
        image_size: height and width in pixels to which images are resized if the data set says what the robot is.
        base: checkpoint folder (or published weights) whose weights and words a new network starts from. A checkpoint
            also says preset, routing, embodiment and image size; another one of these is an error.
        keep_statistics: keep the checkpoint's statistics although those of the data set differ.
        action_feature_names: names of the action's numbers in the data; lerobot-rollout commands a robot in this order.
        cogvla: content of `config.json` and `statistics.json` of a checkpoint; filled in when training begins.
    """

    chunk_size: int = 8
    n_action_steps: int = 8
    preset: str = "tiny"
    routing: str = "cogvla"
    embodiment: str | None = None
    image_size: int = 128
    base: str | None = None
    keep_statistics: bool = False
    optimizer_lr: float = 1e-3
    optimizer_weight_decay: float = 0.01
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 100
    scheduler_decay_steps: int = 4000
    action_feature_names: list[str] | None = None
    cogvla: dict[str, Any] = field(default_factory=dict)
    # Our own steps normalise: lerobot's quantiles have no mask for the gripper.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.IDENTITY,
            "ACTION": NormalizationMode.IDENTITY,
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}; it must be from 1 to chunk_size, which is {self.chunk_size}"
            )
        if self.n_obs_steps != 1:
            raise ValueError(f"n_obs_steps is {self.n_obs_steps}, but cogvla reads one observation: leave it at 1")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        """Return the optimiser of `train_policy`."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=BETAS,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        """Return the schedule of `train_policy`; lerobot shortens it to shorter runs."""
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
            peak_lr=self.optimizer_lr,
            decay_lr=LEARNING_RATE_FLOOR * self.optimizer_lr,
        )

    def validate_features(self) -> None:
        """Check the inputs that the network needs; ValueError if one is missing."""
        if not self.image_features or self.robot_state_feature is None or self.action_feature is None:
            found = ", ".join({**(self.input_features or {}), **(self.output_features or {})})
            raise ValueError(f"cogvla needs at least one camera, observation.state and action; there are {found}")
