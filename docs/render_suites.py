"""Renders `docs/images/SUITE.png`: what the policy sees at the start of an episode, enlarged, with its instruction.

python docs/render_suites.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from cogvla.envs import TABLETOP_SUITES
from cogvla.envs.rollout.video import annotate
from cogvla.envs.suite import Suite, get_suite
from cogvla.envs.tabletop.env import CAMERAS

SIZE = 288
SCENES = {"tabletop_object": (0, 3), "tabletop_spatial": (1, 9), "tabletop_goal": (4, 7), "tabletop_long": (6, 2)}
"""Tasks shown, in initial state 0."""
GAP = 6


def picture(suite: Suite, tasks: tuple[int, ...]) -> Image.Image:
    """Per task one column: the two camera images, with the instruction above."""
    env = suite.make(image_size=128)
    columns = []
    for task in tasks:
        _, info = env.reset(options={"task": task, "initial_state": 0})
        views = [env.unwrapped.render_camera(camera, SIZE, SIZE) for camera in CAMERAS]
        top = Image.fromarray(annotate(views[0], info["instruction"], " and ".join(CAMERAS)))
        column = Image.new("RGB", (SIZE, top.height + GAP + SIZE), "white")
        column.paste(top)
        column.paste(Image.fromarray(views[1]), (0, top.height + GAP))
        columns.append(column)
    env.close()
    sheet = Image.new("RGB", (len(columns) * (SIZE + GAP) - GAP, columns[0].height), "white")
    for index, column in enumerate(columns):
        sheet.paste(column, (index * (SIZE + GAP), 0))
    return sheet


def main() -> None:
    """Write one picture per suite."""
    for name in TABLETOP_SUITES:
        path = Path(__file__).parent / "images" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        picture(get_suite(name), SCENES[name]).quantize(128, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
        print(f"{path} {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
