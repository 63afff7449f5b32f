"""A policy remembers what depends on the instruction only, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cogvla.policy.interface import Policy
from cogvla.tests.support.small_data import INSTRUCTIONS, small_policy


def test_keeps_the_contract() -> None:
    policy = small_policy()
    assert isinstance(policy, Policy)
    observation = replace(policy.embodiment.fake_observation(2), instruction=INSTRUCTIONS[:2])
    chunk = policy.act(observation)
    assert chunk.actions.shape == (2, policy.embodiment.chunk, policy.embodiment.action_dim)
    assert chunk.actions.dtype == np.float32
    assert set(chunk.timing) == {"preprocess_ms", "inference_ms"}


def test_another_instruction_is_heard_at_once() -> None:
    policy = small_policy()
    observation = policy.embodiment.fake_observation(1)
    asked = (INSTRUCTIONS[0], INSTRUCTIONS[1], INSTRUCTIONS[0])
    answers = [policy.act(replace(observation, instruction=[text])).actions for text in asked]
    assert np.array_equal(answers[0], answers[2])
    assert not np.allclose(answers[0], answers[1])
    policy.reset()
    assert np.array_equal(policy.act(replace(observation, instruction=[INSTRUCTIONS[1]])).actions, answers[1])


def test_remembers_no_image_and_no_state() -> None:
    policy = small_policy()
    first, second = (
        replace(policy.embodiment.fake_observation(1, seed), instruction=INSTRUCTIONS[:1]) for seed in (0, 1)
    )
    expected = small_policy().act(second).actions
    policy.act(first)
    assert np.array_equal(policy.act(second).actions, expected)
