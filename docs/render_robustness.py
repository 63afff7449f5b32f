"""Renders `docs/images/robustness.jpg`: one row per dimension, the first image without and at each level of it.

python docs/render_robustness.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from cogvla.envs.perturbation.perturbation import DIMENSIONS, LEVELS, SENSOR, WORDING, Perturbation
from cogvla.envs.perturbation.sensor import Sensor
from cogvla.envs.suite import get_suite

SUITE = "tabletop_goal"
EPISODES = ((2, 2), (8, 0))
"""Tasks and initial states; the sensors have a fault of their own in each."""
SIZE, GAP, LEFT = 120, 3, 84


def views(env: Any, dimension: str, task: int, state: int) -> list[Image.Image]:
    """Return `agentview` without a perturbation and at each level."""
    pictures = []
    for level in (0, *LEVELS):
        cell = Perturbation(dimension, level) if level else None
        env.perturbations = () if cell is None or dimension == SENSOR else (cell,)
        env.reset(options={"task": task, "initial_state": state})
        image = env.render_camera("agentview", SIZE, SIZE)
        if cell is not None and dimension == SENSOR:
            image = Sensor(level, cell.seed(SUITE, task, state), task + state)({"agentview": image}, 0)["agentview"]
        pictures.append(Image.fromarray(image))
    return pictures


def main() -> None:
    """Write the picture."""
    env = get_suite(SUITE).make(image_size=128).unwrapped
    shown = [name for name in DIMENSIONS if name != WORDING]
    columns = len(EPISODES) * (1 + len(LEVELS))
    sheet = Image.new("RGB", (LEFT + columns * (SIZE + GAP), 18 + len(shown) * (SIZE + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column in range(columns):
        level = column % (1 + len(LEVELS))
        draw.text((LEFT + column * (SIZE + GAP) + 4, 1), f"level {level}" if level else "clean", "black", font)
    for row, name in enumerate(shown):
        top = 18 + row * (SIZE + GAP)
        draw.text((2, top + SIZE // 2 - 8), name, "black", font)
        for column, image in enumerate(image for episode in EPISODES for image in views(env, name, *episode)):
            sheet.paste(image, (LEFT + column * (SIZE + GAP), top))
    env.close()
    path = Path(__file__).parent / "images" / "robustness.jpg"
    sheet.save(path, quality=78, subsampling=0, optimize=True)
    print(f"{path} {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
