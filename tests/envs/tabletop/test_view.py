"""What the cameras show: framing, orientation, objects where the labels say."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cogvla.envs.rendering import choose_backend
from cogvla.envs.suite import get_suite
from cogvla.envs.tabletop.env import TabletopEnv
from cogvla.tests.support.tabletop import tabletop

SIZE = 128


@pytest.fixture(scope="module")
def env() -> Iterator[TabletopEnv]:
    built = tabletop("tabletop_object", image_size=SIZE)
    yield built
    built.close()


def project(env: TabletopEnv, camera: str, point: np.ndarray) -> np.ndarray:
    """Pixel (column, row) of a world point."""
    data, model = env.scene.data, env.scene.model
    index = model.camera(camera).id
    local = data.cam_xmat[index].reshape(3, 3).T @ (point - data.cam_xpos[index])
    focal = SIZE / 2 / np.tan(np.radians(model.cam_fovy[index]) / 2)
    return np.array([SIZE / 2 + focal * local[0] / -local[2], SIZE / 2 - focal * local[1] / -local[2]])


def is_red(image: np.ndarray) -> np.ndarray:
    pixels = image.astype(int)
    return (pixels[..., 0] > 100) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)


def alone(env: TabletopEnv, x: float, y: float) -> np.ndarray:
    """The agentview with nothing but the red cube on the table and the arm out of the way."""
    env.reset(options={"task": 0, "initial_state": 0})
    for name in env.scene.placed - {"red_cube"}:
        env.scene.move(name, (0, 0, -1))
    env.scene.move("red_cube", (x, y, 0.023))
    for _ in range(15):
        observation, *_ = env.step(np.array([-1, 0, 1, 0, 0, 0, -1.0]))
    return observation["agentview"]


@pytest.mark.parametrize(("x", "y"), [(0.36, -0.21), (0.36, 0.21), (0.66, -0.21), (0.66, 0.21), (0.51, 0.0)])
def test_objects_are_ten_pixels_wide_everywhere_and_inside_the_image(env: TabletopEnv, x: float, y: float) -> None:
    red = is_red(alone(env, x, y))
    columns, rows = np.flatnonzero(red.any(axis=0)), np.flatnonzero(red.any(axis=1))
    assert np.ptp(columns) + 1 >= 10
    assert min(columns[0], rows[0]) > 0
    assert max(columns[-1], rows[-1]) < SIZE - 1
    centre = project(env, "agentview", np.array([x, y, 0.023]))
    assert np.allclose([columns.mean(), rows.mean()], centre, atol=2.0)


def test_image_is_the_right_way_up(env: TabletopEnv) -> None:
    far, near = is_red(alone(env, 0.40, 0.0)), is_red(alone(env, 0.62, 0.0))
    assert np.nonzero(far)[0].mean() < np.nonzero(near)[0].mean()  # the robot's side is at the top
    left, right = is_red(alone(env, 0.5, -0.15)), is_red(alone(env, 0.5, 0.15))
    assert np.nonzero(left)[1].mean() < np.nonzero(right)[1].mean()
    # A standing object shows its lit top above its darker side.
    image = alone(env, 0.5, 0.0)
    rows = np.nonzero(is_red(image))[0]
    column = int(np.nonzero(is_red(image))[1].mean())
    assert image[rows.min() + 1, column, 0] > image[rows.max() - 1, column, 0]


def test_wrist_camera_sees_what_is_below_the_gripper(env: TabletopEnv) -> None:
    env.reset(options={"task": 0, "initial_state": 0})
    gripper = env.gripper_position
    env.scene.move("red_cube", (gripper[0], gripper[1], 0.023))
    observation, *_ = env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    red = is_red(observation["wrist"])
    assert red.sum() > 100
    centre = project(env, "wrist", env.scene.position("red_cube"))
    assert np.allclose(np.argwhere(red).mean(axis=0)[::-1], centre, atol=6.0)


def test_objects_of_a_scene_are_visible_where_they_are(env: TabletopEnv) -> None:
    clear = 0
    for state in range(12):
        observation, _ = env.reset(options={"task": 0, "initial_state": state})
        column, row = project(env, "agentview", env.labels()["target"].astype(float)).round().astype(int)
        clear += bool(is_red(observation["agentview"])[row - 1 : row + 2, column - 1 : column + 2].any())
    assert clear >= 9  # the arm may hide a few


def test_render_camera_at_any_size_and_black_without_rendering(env: TabletopEnv) -> None:
    env.reset(options={"task": 0, "initial_state": 0})
    assert env.render_camera("agentview", 300, 400).shape == (300, 400, 3)
    blind = get_suite("tabletop_object").make(image_size=SIZE, render=False)
    observation, _ = blind.reset(options={"task": 0, "initial_state": 0})
    assert not observation["agentview"].any()


def test_backend_choice() -> None:
    assert choose_backend("OSMesa ") == "osmesa"
    with pytest.raises(RuntimeError, match="libegl1"):
        choose_backend("off")
