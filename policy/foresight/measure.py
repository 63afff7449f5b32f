"""Measure predictions against copying the last frame, on the patches that change.

    copy ratio (M1)    squared error of the prediction / that of the copy, over changed patches
    shuffle gap (M2)   error with the actions of other samples / error - 1

Both in the space of the PCA, which no predictor can change. A patch changes if the mean squared difference of its
pixels is above `patch_pca.CHANGED`.

Shape legend: as in docs/architecture.md, with N patches of a view, D numbers of a latent, s sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cogvla.policy.foresight.model import Foresight
from cogvla.policy.foresight.windows import Window, Windows

BATCH = 64


@torch.inference_mode()
def measure(model: Foresight, windows: Windows, seed: int = 0, limit: int = 4096) -> dict[str, Any]:
    """Measure a model on samples that it was not trained on.

    Args:
        model: the model.
        windows: the samples.
        seed: seed of the choice of samples and of the shuffling.
        limit: largest number of samples.

    Returns:
        For each camera and for `all`: `changed` (share of patches), `copy_ratio`, `shuffled_ratio` (the copy ratio with
        the actions of other samples) and `shuffle_gap`; and the number of `samples`.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = windows.rows[torch.randperm(len(windows), generator=generator)[:limit]]
    others = rows[torch.randperm(len(rows), generator=generator)]
    total_Vs = torch.zeros(len(model.embodiment.cameras), 5, dtype=torch.float64)
    for rows_B, others_B in zip(rows.split(BATCH), others.split(BATCH), strict=True):
        window = windows.gather(rows_B)
        changed_BVN = model.pca.changed(window.before_BVCHW, window.after_BVCHW)
        z_BVND, later_BVND = model.encode(window.before_BVCHW), model.encode(window.after_BVCHW)
        for column, guess in enumerate(
            (
                model(z_BVND, window.state_BS, window.chunk_BKA),
                z_BVND,
                model(z_BVND, window.state_BS, windows.chunk(others_B)),
            )
        ):
            error_BVN = (guess - later_BVND).square().mean(-1)
            total_Vs[:, column] += (error_BVN * changed_BVN).sum(dim=(0, 2)).double()
        total_Vs[:, 3] += changed_BVN.sum(dim=(0, 2))
        total_Vs[:, 4] += changed_BVN[:, 0].numel()
    views = dict(zip(model.embodiment.camera_names, total_Vs, strict=True)) | {"all": total_Vs.sum(dim=0)}
    return {"samples": len(rows), **{name: _ratios(sums_s) for name, sums_s in views.items()}}


def _ratios(sums_s: Tensor) -> dict[str, float | None]:
    error, copy, shuffled, count, patches = sums_s.tolist()
    moves = copy > 0 and error > 0
    return {
        "changed": count / patches,
        "copy_ratio": error / copy if moves else None,
        "shuffled_ratio": shuffled / copy if moves else None,
        "shuffle_gap": shuffled / error - 1 if moves else None,
    }


def copy_ratios(model: Foresight, window: Window, guess: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return the copy ratio of each sample and view, float32 [B,V]; NaN where nothing changes.

    Args:
        model: the model.
        window: the samples.
        guess: function of the latents that is judged; None: the model's prediction.
    """
    z_BVND, later_BVND = model.encode(window.before_BVCHW), model.encode(window.after_BVCHW)
    guess_BVND = model(z_BVND, window.state_BS, window.chunk_BKA) if guess is None else guess(z_BVND)
    changed_BVN = model.pca.changed(window.before_BVCHW, window.after_BVCHW)
    error_BV = ((guess_BVND - later_BVND).square().mean(-1) * changed_BVN).sum(-1)
    copy_BV = ((z_BVND - later_BVND).square().mean(-1) * changed_BVN).sum(-1)
    return error_BV / copy_BV
