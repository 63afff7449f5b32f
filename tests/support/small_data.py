"""Demonstrations made in memory, and a model that learns from them in milliseconds per step.

Three coloured squares lie at three places of the picture; the instruction names a colour, and the arm moves towards the
square of that colour. Two of the three tasks are possible in every scene.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.frames import ArrayFrames
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.interface import Camera, Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.objective import ObjectiveConfig
from cogvla.policy.training.trainer import Trainer
from cogvla.scripts.training.build import build_trainer

SIZE, CHUNK = 32, 4
ROBOT = Embodiment(
    "small",
    (Camera("front", SIZE, SIZE), Camera("wrist", SIZE, SIZE)),
    state_dim=3,
    action_dim=4,
    chunk=CHUNK,
    control_hz=10.0,
    action_normalise_mask=(True, True, True, False),
    gripper_index=3,
)
INSTRUCTIONS = ["touch the red square", "touch the green square", "touch the blue one"]
TOWER = {"patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_ratio": 1.0}
MODEL: dict[str, Any] = {
    "vision": {"dinov2": TOWER, "siglip": TOWER, "aggregation_tokens": 2},
    "language": {
        "vocab_size": 16,
        "width": 16,
        "intermediate": 16,
        "layers": 2,
        "heads": 2,
        "bos_token": 14,
        "stop_token": 15,
        "init_std": 0.15,
        "embedding_std": 1.0,
    },
}
LABELLED = ObjectiveConfig(grounding=1.0, counterfactual=0.25, gripper_state=(), phase_weights=())
IMITATION = replace(LABELLED, grounding=0.0, reading=0.0, pointing=0.0, counterfactual=0.0, state_dropout=0.0)


def small_data(episodes: int = 8, labels: bool = True, seed: int = 0) -> DemonstrationData:
    """Episodes of 7 to 10 frames."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [7 + episode % 4 for episode in range(episodes)]
    frames = sum(lengths)
    episode_N = torch.repeat_interleave(torch.arange(episodes), torch.tensor(lengths))
    task_N = episode_N % 3
    places_ET3 = torch.rand(episodes, 3, 3, generator=generator)
    places_NT3 = places_ET3[episode_N]
    target_N3 = places_NT3[torch.arange(frames), task_N]
    state_N3 = torch.rand(frames, 3, generator=generator)
    action_N4 = torch.cat([target_N3 - state_N3, (task_N[:, None] == 0).float() * 2 - 1], dim=1)
    pixels = torch.randint(0, 60, (frames, 2, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    for frame in range(frames):
        for colour in range(3):
            column, row = (places_NT3[frame, colour, :2] * (SIZE - 6)).int().tolist()
            pixels[frame, :, colour, row : row + 6, column : column + 6] = 255
    goal_NT3 = places_NT3.flip(-1)
    possible_NT = torch.ones(frames, 3, dtype=torch.bool)
    possible_NT[torch.arange(frames), (task_N + 1) % 3] = False
    projection_N34 = torch.eye(3, 4).expand(frames, 3, 4).clone()
    projection_N34[:, 2] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    return DemonstrationData(
        frames=ArrayFrames(pixels.numpy()),
        state_NS=state_N3,
        action_NA=action_N4,
        episode_N=episode_N,
        instruction_N=task_N,
        instructions=list(INSTRUCTIONS),
        frame_labels={
            "target": target_N3,
            "goal": goal_NT3[torch.arange(frames), task_N],
            "phase": (torch.arange(frames) % 3),
            "task": task_N,
            "alternatives": torch.cat([places_NT3, goal_NT3], dim=-1),
            "possible": possible_NT,
            "projection_front": projection_N34,
            "projection_wrist": projection_N34,
        }
        if labels
        else {},
        chunk=CHUNK,
        provenance={"name": "small", "episodes": episodes},
    )


def small_config(**routing: Any) -> CogVLAConfig:
    return CogVLAConfig.from_dict({**MODEL, "routing": {"film_init": 1.0, **routing}})


def small_preprocessor(data: DemonstrationData | None = None) -> Preprocessor:
    return Preprocessor(ROBOT, WordTokenizer.from_instructions(INSTRUCTIONS), (data or small_data()).statistics())


def small_policy(seed: int = 0, **routing: Any) -> CogVLAPolicy:
    torch.manual_seed(seed)
    return CogVLAPolicy(CogVLA(small_config(**routing), ROBOT), small_preprocessor())


def settings(**changes: Any) -> TrainingConfig:
    """Ten steps on eight samples, a validation and a checkpoint every four."""
    default = TrainingConfig(
        steps=10,
        batch_size=8,
        cpu_parts=1,
        learning_rate=3e-3,
        warmup_steps=2,
        ema_decay=0.5,
        precision="float32",
        validation_fraction=0.2,
        validate_every=4,
        checkpoint_every=4,
    )
    return replace(default, **changes)


def small_trainer(
    output: Path,
    config: TrainingConfig | None = None,
    objective: ObjectiveConfig = LABELLED,
    data: DemonstrationData | None = None,
    base: str | None = None,
    robot: Embodiment = ROBOT,
    **routing: Any,
) -> Trainer:
    """What `train_policy` builds, for the data above."""
    data = small_data() if data is None else data
    return build_trainer(
        config or settings(), small_config(**routing), objective, robot, data, output, lambda metrics, step: None, base
    )
