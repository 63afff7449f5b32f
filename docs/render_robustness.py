"""Renders `docs/images/robustness_SUITE.jpg`: one row per dimension, the first image without and at each level of it.

python docs/render_robustness.py tabletop_goal
python docs/render_robustness.py libero_goal libero.lean=true libero.robot_meshes=FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image, ImageDraw, ImageFont

from cogvla.envs.perturbation.perturbation import DIMENSIONS, LEVELS, SENSOR, WORDING, Perturbation
from cogvla.envs.perturbation.sensor import Sensor
from cogvla.envs.suite import get_suite

EPISODES = {"tabletop_goal": ((2, 2), (8, 0)), "libero_goal": ((1, 1), (6, 0))}
"""Suite -> tasks and initial states; the sensors have a fault of their own in each."""
SIZE, GAP, LEFT = 120, 3, 84


def views(env: Any, suite: str, dimension: str, task: int, state: int) -> list[Image.Image]:
    """Return `agentview` without a perturbation and at each level."""
    pictures = []
    for level in (0, *LEVELS):
        cell = Perturbation(dimension, level) if level else None
        env.perturbations = () if cell is None or dimension == SENSOR else (cell,)
        env.reset(options={"task": task, "initial_state": state})
        image = env.render_camera("agentview", SIZE, SIZE)
        if cell is not None and dimension == SENSOR:
            image = Sensor(level, cell.seed(suite, task, state), task + state)({"agentview": image}, 0)["agentview"]
        pictures.append(Image.fromarray(image))
    return pictures


def main(suite: str, *libero: str) -> None:
    """Write the picture of a suite; `libero`: settings of its simulation, as `eval_libero` takes them."""
    env = get_suite(suite, OmegaConf.to_container(OmegaConf.from_dotlist(list(libero)))).make(image_size=128).unwrapped
    shown = [name for name in DIMENSIONS if name != WORDING]
    columns = len(EPISODES[suite]) * (1 + len(LEVELS))
    sheet = Image.new("RGB", (LEFT + columns * (SIZE + GAP), 18 + len(shown) * (SIZE + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column in range(columns):
        level = column % (1 + len(LEVELS))
        draw.text((LEFT + column * (SIZE + GAP) + 4, 1), f"level {level}" if level else "clean", "black", font)
    for row, name in enumerate(shown):
        top = 18 + row * (SIZE + GAP)
        draw.text((2, top + SIZE // 2 - 8), name, "black", font)
        for column, image in enumerate(i for episode in EPISODES[suite] for i in views(env, suite, name, *episode)):
            sheet.paste(image, (LEFT + column * (SIZE + GAP), top))
    env.close()
    path = Path(__file__).parent / "images" / f"robustness_{suite}.jpg"
    sheet.save(path, quality=78, subsampling=0, optimize=True)
    print(f"{path} {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
