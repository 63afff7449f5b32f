"""Draw which image patches reach a policy: strips of an episode, and a video.

Kept patches are bright, others dark. If tokens are patches, a patch is either kept or not. Aggregation tokens look at
many patches; the brightness then shows how much the kept tokens see of each patch. The target object is outlined.

Shape legend: V views, P patches of all views, H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cogvla.envs.analysis.routing_recording import Moment, WatchedEpisode
from cogvla.envs.rollout.video import VideoWriter

CAMERA, ALL = "camera", "all tokens"
SIDE, GAP, BAND = 144, 4, 18
"""Sizes in pixels: side of a picture, gap between pictures, height of a line of text."""
DARK, OUTLINE = 0.22, (255, 60, 200)


def shown_stages(moment: Moment) -> list[str]:
    """Return the rows of a strip: the camera image, all tokens (unless tokens are patches), and each routing stage."""
    patches = moment.looks_NP.shape[0] == moment.looks_NP.shape[1]
    return [CAMERA, *([] if patches else [ALL]), *moment.kept]


def kept_map(moment: Moment, stage: str) -> Tensor:
    """Return the brightness of each patch [P], from 0 to 1."""
    kept_NP = moment.looks_NP if stage == ALL else moment.looks_NP[moment.kept[stage]]
    seen_P = kept_NP.sum(0)
    return seen_P / seen_P.max().clamp_min(1e-12) if len(kept_NP) else seen_P


def picture(moment: Moment, stage: str, view: int, grid: tuple[int, int]) -> Image.Image:
    """Draw one view at one stage, `SIDE` pixels wide."""
    image = Image.fromarray(moment.pictures_VHW3[view]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    count = grid[0] * grid[1]
    part = slice(view * count, (view + 1) * count)
    if stage != CAMERA:
        bright_HW = kept_map(moment, stage)[part].reshape(grid).cpu().numpy()
        mask = Image.fromarray((255 * bright_HW).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        light_HW1 = DARK + (1 - DARK) * np.asarray(mask, np.float32)[..., None] / 255
        image = Image.fromarray((np.asarray(image) * light_HW1).astype(np.uint8))
    if stage != CAMERA and moment.target_P is not None:
        _outline(image, moment.target_P[part].reshape(grid).cpu().numpy())
    return image


def _outline(image: Image.Image, marked_HW: np.ndarray) -> None:
    """Draw the border of the marked patches."""
    draw, (rows, columns) = ImageDraw.Draw(image), marked_HW.shape
    high, wide = SIDE / rows, SIDE / columns
    padded = np.pad(marked_HW, 1)
    for row, column in zip(*np.nonzero(marked_HW), strict=True):
        top, left, bottom, right = row * high, column * wide, (row + 1) * high - 1, (column + 1) * wide - 1
        sides = {
            (0, 1): (left, top, right, top), (2, 1): (left, bottom, right, bottom),
            (1, 0): (left, top, left, bottom), (1, 2): (right, top, right, bottom),
        }  # fmt: skip
        for (down, across), line in sides.items():
            if not padded[row + down, column + across]:
                draw.line(line, OUTLINE, 2)


def strip(episode: WatchedEpisode, grid: tuple[int, int], count: int, views: Sequence[str]) -> bytes:
    """Draw a PNG: a column for each chosen moment, a row for each view and stage."""
    total, label = len(episode.moments), 96
    chosen = sorted(set(np.linspace(0, total - 1, min(count, total)).astype(int).tolist()))
    stages = shown_stages(episode.moments[0])
    width = label + len(chosen) * (SIDE + GAP)
    height = BAND + len(views) * len(stages) * (SIDE + GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for column, index in enumerate(chosen):
        draw.text((label + column * (SIDE + GAP), 2), f"decision {index + 1} of {total}", "#3b4252", font)
        for row, (view, stage) in enumerate((v, s) for v in range(len(views)) for s in stages):
            top = BAND + row * (SIDE + GAP)
            sheet.paste(picture(episode.moments[index], stage, view, grid), (label + column * (SIDE + GAP), top))
            if column == 0:
                draw.text((0, top + 4), views[view], "#1c2333", font)
                draw.text((0, top + 20), stage, "#667085", font)
    buffer = io.BytesIO()
    sheet.quantize(192, Image.Quantize.MAXCOVERAGE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def film(episode: WatchedEpisode, grid: tuple[int, int], path: Path, views: int, per_second: float = 3.0) -> None:
    """Write an mp4 with one frame for each decision: a row for each view, a column for each stage."""
    stages = shown_stages(episode.moments[0])
    with VideoWriter(path, per_second) as video:
        for moment in episode.moments:
            frame = Image.new("RGB", (len(stages) * (SIDE + GAP), views * (SIDE + GAP)), "white")
            for view in range(views):
                for column, stage in enumerate(stages):
                    frame.paste(picture(moment, stage, view, grid), (column * (SIDE + GAP), view * (SIDE + GAP)))
            video.add(np.asarray(frame))
