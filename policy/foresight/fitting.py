"""Fit foresight on demonstrations: principal components first, then the predictor on their latents.

Its own run, before the policy or beside it: the latents stay frozen. A stopped run resumes at the last saved step with
the same samples, since those depend only on seed and step.

Shape legend: as in docs/architecture.md.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from cogvla.files import write_atomic
from cogvla.policy.foresight.model import Foresight
from cogvla.policy.foresight.windows import Window, Windows
from cogvla.policy.training.identity import differences

TRAINING = "training.pt"
PCA_FRAMES = 512
"""Frames, with all views, whose patches give the principal components."""
TURNED = 32
"""Samples of a batch whose pictures are moved, for the estimate of a camera's turn."""
SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class FittingConfig:
    """How foresight is fitted.

    Attributes:
        steps: number of steps of the predictor.
        batch_size: samples in a step.
        learning_rate: its peak; it rises over the first 5 % of the steps, and falls to 0 as a cosine.
        validation_fraction: share of episodes that are not trained on, and measure the model.
        save_every: steps between two saved states of the run.
        seed: seed of the split, the weights and the samples.
    """

    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 2e-3
    validation_fraction: float = 0.2
    save_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "save_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must be above 0 and below 1, got {self.validation_fraction}: the model is "
                "measured on held-out episodes"
            )


def fit(
    model: Foresight,
    windows: Windows,
    config: FittingConfig,
    folder: Path,
    identity: Mapping[str, Any],
    resume: bool = True,
    progress: bool = True,
) -> list[float]:
    """Fit a model in place; return the loss of each step.

    Args:
        model: untrained model; its weights are drawn again from the seed.
        windows: the samples.
        config: how.
        folder: where the state of the run is saved.
        identity: what must be the same when a run resumes, as plain data.
        resume: continue the run that is saved there; False: begin anew.
        progress: show a bar.

    Raises:
        ValueError: the saved run is another one, or damaged; or a loss is not finite.
        OSError: the state cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, same = folder / TRAINING, {**identity, "fitting": asdict(config), "model": asdict(model.config)}
    optimiser = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=0.01)
    losses: list[float] = []
    if resume and path.exists():
        losses = _restore(path, model, optimiser, same)
    else:
        _begin(model, windows, config.seed)
    bar = tqdm(range(len(losses), config.steps), initial=len(losses), total=config.steps, disable=not progress)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        drawn = config.seed * SEED_STRIDE + step
        window = windows.gather(windows.draw(config.batch_size, drawn))
        loss, surprise = prediction_losses(model, window)
        turn = model.turn.loss(window.before_BVCHW[:TURNED], drawn)
        total = loss + surprise + turn
        if not total.isfinite():
            raise ValueError(f"the loss of step {step + 1} is {float(total.detach())}: give a smaller learning_rate")
        optimiser.zero_grad()
        total.backward()
        for part in (model.predictor, model.turn):
            torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "losses": losses}
            buffer = io.BytesIO()
            torch.save({**state, "identity": same}, buffer)
            write_atomic(path, buffer.getvalue())
    return losses


def prediction_losses(model: Foresight, window: Window) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of the predicted latents, and the surprise at it; the targets get no gradient."""
    with torch.no_grad():
        z_BVND, later_BVND = model.encode(window.before_BVCHW), model.encode(window.after_BVCHW)
    prediction = model.predict(z_BVND, window.state_BS, window.chunk_BKA)
    return F.mse_loss(prediction.latents_BVND, later_BVND), prediction.surprise(later_BVND)


def _begin(model: Foresight, windows: Windows, seed: int) -> None:
    """Draw the weights, and compute the principal components."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Foresight(model.config, model.embodiment, model.statistics)
    model.load_state_dict(fresh.state_dict())
    model.pca.fit(windows.gather(windows.draw(PCA_FRAMES, seed)).before_BVCHW.flatten(0, 1))


def _restore(path: Path, model: Foresight, optimiser: torch.optim.Optimizer, same: Mapping[str, Any]) -> list[float]:
    try:
        saved = torch.load(path, weights_only=True)
        other = differences(saved["identity"], same)
        if not other:
            model.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
    except Exception as error:  # torch raises many kinds for damaged files
        raise ValueError(f"{path} is damaged ({type(error).__name__}); give resume=false to begin anew") from error
    if other:
        raise ValueError(f"{path} is of another run ({'; '.join(other)}); give another output, or resume=false")
    return list(saved["losses"])


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))))
