"""Renders `docs/images/rollout.png`: what a checkpoint does in a few episodes, one row per episode.

python docs/render_rollout.py
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image

from cogvla.envs.episodes import EpisodeSpec
from cogvla.envs.evaluation.protocol import load_protocol
from cogvla.envs.rollout.rollout import rollout
from cogvla.envs.rollout.video import contact_sheet
from cogvla.envs.suite import get_suite
from cogvla.policy.checkpoint import load_policy

ROOT = Path(__file__).resolve().parents[1]
SUITE = "tabletop_object"
EPISODES = ((3, 0, None), (3, 0, 6), (9, 1, None))
"""(task, initial state, task asked for): the first two are the same scene with two instructions."""
FRAMES, HEIGHT, GAP = 6, 170, 6


def main() -> None:
    """Play, film and write the picture."""
    policy, suite = load_policy(ROOT / "checkpoints" / SUITE), get_suite(SUITE)
    settings, sheets = load_protocol("tabletop").rollout_settings(), []
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder) / "episode.mp4"
        for task, state, asked in EPISODES:
            spec = EpisodeSpec(task, state, asked)
            (result,) = rollout(policy, suite, [spec], settings=settings, choose_video=lambda _: film)
            print(result.instruction, "success" if result.success else "failure", result.steps, "steps", result.error)
            sheets.append(Image.open(io.BytesIO(contact_sheet(film, FRAMES, HEIGHT))).convert("RGB"))
    picture = Image.new("RGB", (sheets[0].width, len(sheets) * (sheets[0].height + GAP) - GAP), "white")
    for row, sheet in enumerate(sheets):
        picture.paste(sheet, (0, row * (sheet.height + GAP)))
    path = ROOT / "docs" / "images" / "rollout.png"
    picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    print(f"{path} {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
