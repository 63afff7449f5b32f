"""Render `docs/images/rollout.gif`: the shipped checkpoint in three episodes, side by side.

python docs/render_rollout.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cogvla.envs.contract import Cameras, required
from cogvla.envs.evaluation.protocol import load_protocol
from cogvla.envs.rollout.video import annotate
from cogvla.envs.suite import get_suite
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.interface import Observation, Policy

ROOT = Path(__file__).resolve().parents[1]
SUITE = "tabletop_object"
EPISODES = ((3, 0, 3), (3, 0, 6), (9, 1, 9))
"""(task, initial state, task asked for): the first two are the same scene with two instructions."""
AFTER, HOLD_MS = 14, 1500
"""Steps that are shown after success, in which the arm draws back; how long the last frame stays."""
SIDE, GAP, COLOURS = 256, 6, 256
"""Side of a picture and gap between two, in pixels; number of colours in the file."""


def main() -> None:
    """Play the episodes and write the animation."""
    policy = load_policy(ROOT / "checkpoints" / SUITE)
    films = [film(policy, *episode) for episode in EPISODES]
    length = max(map(len, films))
    shown = [beside([frames[min(i, len(frames) - 1)] for frames in films]) for i in range(length)]
    # One palette for all frames: where nothing moves, nothing is stored. Maximum coverage keeps the colours of small
    # things, which instructions name.
    samples = np.concatenate([np.asarray(frame) for frame in shown[:: max(1, length // 6)]])
    palette = Image.fromarray(samples).quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in shown]
    durations = [round(1000 / policy.embodiment.control_hz)] * len(others) + [HOLD_MS]
    path = ROOT / "docs" / "images" / "rollout.gif"
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, optimize=True)
    print(f"{path} {length} frames, {path.stat().st_size / 1000:.0f} kB")


def film(policy: Policy, task: int, state: int, asked: int) -> list[Image.Image]:
    """Play an episode as the evaluation does, and on for `AFTER` steps; return a picture of each step."""
    suite = get_suite(SUITE)
    env = suite.make(image_size=policy.embodiment.cameras[0].height)
    camera = required(env, Cameras, "filming")
    execute = load_protocol(suite.protocol).execute_steps
    seen, info = env.reset(options={"task": task, "initial_state": state, "asked": asked})
    frames: list[Image.Image] = []
    success, left, step = False, suite.max_steps, 0

    def show() -> None:
        picture = camera.render_camera("agentview", SIDE, SIDE)
        caption = annotate(picture, info["instruction"], f"step {step}", "success" if success else "")
        frames.append(Image.fromarray(caption))

    show()
    while left:
        images = {name: seen[name][None] for name in policy.embodiment.camera_names}
        chunk = policy.act(Observation(images, seen["state"][None], [info["instruction"]]))
        for action in chunk.actions[0][:execute]:
            seen, _, terminated, _, info = env.step(action)
            if not success:
                step += 1
            if terminated and not success:
                success, left = True, AFTER + 1
            left -= 1
            show()
            if not left:
                break
    env.close()
    print(info["instruction"], "success" if success else "failure", step, "steps")
    return frames


def beside(pictures: list[Image.Image]) -> Image.Image:
    """Return pictures of one size side by side, on white."""
    width, height = pictures[0].size
    row = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), "white")
    for column, picture in enumerate(pictures):
        row.paste(picture, (column * (width + GAP), 0))
    return row


if __name__ == "__main__":
    main()
