"""Several models in one process: each renderer shows its own scene, also right after another one has drawn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cogvla.envs.suite import get_suite


def test_renderers_take_turns() -> None:
    envs = [get_suite(name).make(image_size=64) for name in ("tabletop_object", "tabletop_goal")]

    def first_images(env: int, state: int) -> np.ndarray:
        observation, _ = envs[env].reset(options={"task": 0, "initial_state": state})
        return np.stack([observation[name] for name in ("agentview", "wrist")])

    alone = {(env, state): first_images(env, state) for env in range(2) for state in range(3)}
    for state in range(3):
        for env in range(2):
            assert np.array_equal(first_images(env, state), alone[env, state])
    for each in envs:
        each.close()


def test_every_thread_has_a_context_of_its_own() -> None:
    """One that is current in a thread cannot be used by another, even if that thread has ended."""

    def first_image() -> np.ndarray:
        env = get_suite("tabletop_object").make(image_size=32)
        observation, _ = env.reset(options={"task": 0, "initial_state": 0})
        image = np.array(observation["agentview"])
        env.close()
        return image

    here = first_image()
    for _ in range(2):
        with ThreadPoolExecutor(1) as other:
            assert np.array_equal(other.submit(first_image).result(), here)
    assert np.array_equal(first_image(), here)
