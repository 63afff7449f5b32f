"""Foresight of one robot: what its cameras will show after the next chunk; saved as a folder of its own.

Shape legend: as in docs/architecture.md, with N patches of a view, D numbers of a latent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from cogvla.configs.build import build
from cogvla.files import read_object
from cogvla.policy.foresight.patch_pca import PatchPCA
from cogvla.policy.foresight.predictor import Prediction, Predictor
from cogvla.policy.foresight.turn import TurnEstimator
from cogvla.policy.inputs.normalise import Normaliser, Statistics
from cogvla.policy.interface import Embodiment

DESCRIPTION, WEIGHTS = "foresight.json", "foresight.safetensors"
FIT = "fit one with `fit_foresight`"


@dataclass(frozen=True)
class ForesightConfig:
    """Sizes of a foresight model.

    Attributes:
        patch: height and width of a patch in pixels.
        latent: numbers that are kept of a patch, its first principal components.
        channels: width of the predictor.
        actions: True: the predictor knows the executed actions; False: only pictures and state.
    """

    patch: int = 16
    latent: int = 32
    channels: int = 64
    actions: bool = True


class Foresight(nn.Module):
    """Latents of pictures, a prediction of those after the chunk, and an estimate of how far the cameras are turned.

    Args:
        config: its sizes.
        embodiment: the robot; the horizon is its chunk.
        statistics: statistics of `state` and of the executed `action`.

    Raises:
        ValueError: the cameras differ in size, or their size is no multiple of the patch.
    """

    def __init__(self, config: ForesightConfig, embodiment: Embodiment, statistics: Mapping[str, Statistics]) -> None:
        super().__init__()
        sizes = {(camera.height, camera.width) for camera in embodiment.cameras}
        if len(sizes) != 1 or any(side % config.patch for size in sizes for side in size):
            raise ValueError(
                f"foresight needs cameras of one size, a multiple of patch={config.patch}; those of "
                f"{embodiment.name!r} have {sorted(sizes)}"
            )
        self.config, self.embodiment, self.statistics = config, embodiment, dict(statistics)
        self.size = sizes.pop()
        grid = (self.size[0] // config.patch, self.size[1] // config.patch)
        self.rows = grid[0]
        self.pca = PatchPCA(config.patch, config.latent)
        actions = embodiment.chunk * embodiment.action_dim if config.actions else 0
        views = len(embodiment.cameras)
        self.predictor = Predictor(views, grid, config.latent, embodiment.state_dim, actions, config.channels)
        self.turn = TurnEstimator(views)
        self.normalise_state = Normaliser("mean_std", statistics["state"])
        self.normalise_action = Normaliser("mean_std", statistics["action"])

    def encode(self, pixels_BVCHW: Tensor) -> Tensor:
        """Return the latents [B,V,N,D] of pictures uint8 [B,V,3,H,W]."""
        return self.pca.encode(pixels_BVCHW.flatten(0, 1)).unflatten(0, pixels_BVCHW.shape[:2])

    def decode(self, z_BVND: Tensor) -> Tensor:
        """Draw latents: float32 [B,V,3,H,W], 0 to 1."""
        return self.pca.decode(z_BVND.flatten(0, 1), self.rows).unflatten(0, z_BVND.shape[:2])

    def forward(self, z_BVND: Tensor, state_BS: Tensor, chunk_BKA: Tensor) -> Tensor:
        """Predict the latents [B,V,N,D] after the chunk; state and executed actions are in physical units."""
        return self.predict(z_BVND, state_BS, chunk_BKA).latents_BVND

    def predict(self, z_BVND: Tensor, state_BS: Tensor, chunk_BKA: Tensor) -> Prediction:
        """Return the same, with the errors that are to be expected."""
        return self.predictor(z_BVND, self.normalise_state(state_BS), self.normalise_action(chunk_BKA))


def save_foresight(folder: Path, model: Foresight, about: Mapping[str, Any]) -> None:
    """Write the model and facts about it, both or neither; other files in the folder stay.

    Raises:
        OSError: see `atomic_folder`.
    """
    from cogvla.policy.checkpoint import atomic_folder  # imports much that a robot's monitor does not need

    body = {
        "model": asdict(model.config),
        "embodiment": asdict(model.embodiment),
        "statistics": {name: values.to_dict() for name, values in model.statistics.items()},
        "about": dict(about),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with atomic_folder(folder) as draft:
        if folder.exists():
            shutil.copytree(folder, draft, dirs_exist_ok=True)
        (draft / WEIGHTS).write_bytes(save(tensors))
        (draft / DESCRIPTION).write_text(json.dumps(body, indent=2, default=str) + "\n")


def load_foresight(folder: Path) -> tuple[Foresight, dict[str, Any]]:
    """Read a model, for inference, and the facts about it.

    Raises:
        ValueError: the folder holds none, or a damaged one.
    """
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(f"{folder} holds no foresight ({DESCRIPTION} is missing); {FIT}, and name its folder")
    body = read_object(folder / DESCRIPTION, FIT)
    try:
        statistics = {name: build(Statistics, values, name) for name, values in body["statistics"].items()}
        model = Foresight(
            build(ForesightConfig, body["model"], "model"),
            build(Embodiment, body["embodiment"], "embodiment"),
            statistics,
        )
        weights = load((folder / WEIGHTS).read_bytes())
        if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{bad[0]} has NaN or infinite numbers")
        model.load_state_dict(weights)
    except (AttributeError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"the foresight in {folder} is damaged ({said[:200]}); {FIT}") from error
    return model.eval().requires_grad_(False), body["about"]


def check_fits(model: Foresight, embodiment: Embodiment, folder: Path) -> None:
    """Check that a model is for this robot.

    Raises:
        ValueError: cameras, their sizes, state, action or chunk differ; the message names what.
    """
    sizes = [
        (name, getattr(model.embodiment, name), getattr(embodiment, name))
        for name in ("camera_names", "state_dim", "action_dim", "chunk", "control_hz")
    ]
    sizes += [
        (f"image size of {one.name}", (one.height, one.width), (other.height, other.width))
        for one, other in zip(model.embodiment.cameras, embodiment.cameras, strict=False)
    ]
    if wrong := [f"{name} is {mine}, the policy's {its}" for name, mine, its in sizes if mine != its]:
        raise ValueError(f"the foresight in {folder} is for another robot: its {'; '.join(wrong)}; {FIT} on its data")
