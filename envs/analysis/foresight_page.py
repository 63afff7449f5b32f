"""Show what foresight predicts: real beside predicted pictures, some drawn by a seed and some of the worst.

Real frames are also drawn from their latents, so that what the principal components lose is not blamed on the
prediction. All error maps of a camera have one scale.

Shape legend: as in docs/architecture.md, with N patches of a view, D numbers of a latent, n chosen samples.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cogvla.envs.analysis.routing_pictures import BAND, GAP, SIDE
from cogvla.envs.evaluation.report import template
from cogvla.policy.foresight.measure import BATCH, copy_ratios
from cogvla.policy.foresight.model import Foresight
from cogvla.policy.foresight.windows import Window, Windows

LIMIT = 2048
"""Largest number of samples among which the worst are looked for."""
WORST = 0.05
LABEL = 118
BLANK, WRONG = np.array([244, 246, 250]), np.array([190, 24, 60])
"""Colours of patches without an error, and with the largest one."""


@torch.inference_mode()
def choose(model: Foresight, windows: Windows, count: int, seed: int) -> dict[str, Tensor]:
    """Choose `count` samples by a seed, and as many of the worst 5 %, evenly from the worst one on; first frames [n].

    The worst have the largest mean error over all patches: a ratio to copying says little where nothing moves.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = windows.rows[torch.randperm(len(windows), generator=generator)[:LIMIT]]
    errors = []
    for rows_B in rows.split(BATCH):
        window = windows.gather(rows_B)
        guess_BVND = model(model.encode(window.before_BVCHW), window.state_BS, window.chunk_BKA)
        errors.append((guess_BVND - model.encode(window.after_BVCHW)).square().mean((1, 2, 3)))
    worst = torch.cat(errors).argsort(descending=True)[: max(1, round(WORST * len(rows)))]
    places = torch.linspace(0, len(worst) - 1, min(count, len(worst))).long()
    return {"drawn by the seed": rows[:count], "of the worst 5 %": rows[worst[places]]}


@torch.inference_mode()
def sheets(model: Foresight, window: Window) -> dict[str, bytes]:
    """Draw a JPEG for each camera: a column for each sample, and the error as a share of that of copying below it."""
    z_BVND, later_BVND = model.encode(window.before_BVCHW), model.encode(window.after_BVCHW)
    guess_BVND = model(z_BVND, window.state_BS, window.chunk_BKA)
    ratio_BV = copy_ratios(model, window).tolist()
    missed_BVN, copied_BVN = ((x - later_BVND).square().mean(-1).sqrt() for x in (guess_BVND, z_BVND))
    rows = {
        "now": window.before_BVCHW / 255,
        "real, later": window.after_BVCHW / 255,
        "real, as latents": model.decode(later_BVND),
        "predicted": model.decode(guess_BVND),
        "copied": model.decode(z_BVND),
    }
    grid = (model.rows, missed_BVN.shape[-1] // model.rows)
    found = {}
    for view, name in enumerate(model.embodiment.camera_names):
        pictures = {row: [_picture(x_CHW) for x_CHW in x_BVCHW[:, view]] for row, x_BVCHW in rows.items()}
        largest = max(float(x_BVN[:, view].max()) for x_BVN in (missed_BVN, copied_BVN))
        for row, x_BVN in (("error", missed_BVN), ("error of copying", copied_BVN)):
            pictures[row] = [_map((x_N / max(largest, 1e-9)).reshape(grid).numpy()) for x_N in x_BVN[:, view]]
        found[name] = _sheet(pictures, ["-" if r[view] != r[view] else f"{r[view]:.2f}" for r in ratio_BV])
    return found


def _picture(x_CHW: Tensor) -> Image.Image:
    bytes_HWC = (x_CHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(bytes_HWC).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _map(share_HW: np.ndarray) -> Image.Image:
    colour_HW3 = BLANK + (WRONG - BLANK) * share_HW[..., None]
    return Image.fromarray(colour_HW3.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _sheet(pictures: Mapping[str, list[Image.Image]], ratios: list[str]) -> bytes:
    columns = len(ratios)
    sheet = Image.new("RGB", (LABEL + columns * (SIDE + GAP), len(pictures) * (SIDE + GAP) + BAND), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for row, (name, images) in enumerate(pictures.items()):
        draw.text((0, row * (SIDE + GAP) + 4), name, "#1c2333", font)
        for column, image in enumerate(images):
            sheet.paste(image, (LABEL + column * (SIDE + GAP), row * (SIDE + GAP)))
    bottom = len(pictures) * (SIDE + GAP)
    draw.text((0, bottom), "error / copying", "#1c2333", font)
    for column, ratio in enumerate(ratios):
        draw.text((LABEL + column * (SIDE + GAP), bottom), ratio, "#1c2333", font)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def page(model: Foresight, windows: Windows, chosen: Mapping[str, Tensor], data: Mapping[str, Any]) -> str:
    """Render the page.

    Args:
        model: the model.
        windows: the samples.
        chosen: result of `choose`.
        data: content of `predictions.json`.
    """
    shown = {name: sheets(model, windows.gather(rows_n)) for name, rows_n in chosen.items()}
    return template("foresight.html.j2").render(data=data, shown=shown)
