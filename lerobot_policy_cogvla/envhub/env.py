"""Suites of cogvla for lerobot's EnvHub: upload this file as `env.py` of a repository, with any `SUITE`.

    hf upload USER/NAME lerobot_policy_cogvla/envhub/env.py env.py

It needs the packages cogvla and lerobot_policy_cogvla where it is run.
"""

from __future__ import annotations

from typing import Any

from lerobot_policy_cogvla.environment_cogvla import CogVLAEnv

SUITE = "tabletop_object"
"""The suite that is played if `lerobot-eval` does not say another one by `--env.task`."""


def make_env(n_envs: int = 1, use_async_envs: bool = False, cfg: Any = None) -> dict[str, dict[int, Any]]:
    """Return `{suite: {task: environments}}`.

    Args:
        n_envs: number of environments of each task.
        use_async_envs: run them in processes.
        cfg: configuration of the command, `--env.type=cogvla`; None: `SUITE`.

    Raises:
        ValueError: the configuration is that of another type of environment, or names no suite or task.
    """
    if cfg is not None and not isinstance(cfg, CogVLAEnv):
        raise ValueError(f"these environments need --env.type=cogvla, got {type(cfg).__name__}")
    return (CogVLAEnv(task=SUITE) if cfg is None else cfg).create_envs(n_envs, use_async_envs)
