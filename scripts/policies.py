"""Open the policy that a command's key `checkpoint` names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogvla.configs.build import build
from cogvla.configs.schema import defaults
from cogvla.policy.checkpoint_folder import is_exported
from cogvla.policy.hub.download import find_checkpoint
from cogvla.policy.interface import Embodiment, Policy

RANDOM = "random"
REMOTE = ("ws://", "wss://")
LEROBOT = "lerobot:"


def open_any_policy(
    source: str,
    *,
    embodiment: Mapping[str, Any] | None = None,
    seed: int = 0,
    api_key: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    workers: int = 0,
    engine: Mapping[str, Any] | None = None,
    router: Mapping[str, Any] | None = None,
    statistics: str | None = None,
    cameras: Mapping[str, str] | None = None,
) -> tuple[Policy, dict[str, str]]:
    """Open the policy that `source` names.

    Args:
        source: a checkpoint folder or USER/NAME[@REVISION] of the hub, "random", the address of a policy server,
            ws://HOST:PORT, lerobot:PATH for a policy of lerobot, or the folder or a file of an exported policy.
        embodiment: robot of a random policy or a policy of lerobot, as in `configs/embodiment`.
        seed: seed of a random policy, or of a policy of lerobot that draws random numbers.
        api_key: key of a policy server.
        device: torch device of a checkpoint, see `open_policy`.
        threads: torch's threads for a checkpoint, see `open_policy`.
        workers: processes that run at the same time, see `beside` of `open_policy`.
        engine: engine of a checkpoint, as in `configs/engine`; None: the default.
        router: token router of a checkpoint, fields of `RouterConfig`; None, or without a name: as trained.
        statistics: name of the data set whose statistics a checkpoint uses, see `load_policy`.
        cameras: camera of the robot -> camera of a policy of lerobot, where their names differ.

    Returns:
        The policy, and for a checkpoint what identifies it, such as `weights_sha256`; otherwise an empty mapping.

    Raises:
        ValueError: there is no such folder, or the settings do not fit the policy.
        OSError: there is no policy server at the address.
    """
    plugged_in = None if router is None else named_router(router)
    exported = is_exported(source)
    own = source != RANDOM and not source.startswith((*REMOTE, LEROBOT)) and not exported
    engine = engine or {}
    kind = None if engine.get("kind") == "auto" else engine.get("kind")
    others = ("statistics", statistics), ("engine.kind", kind), ("engine.dtype", engine.get("dtype"))
    for key, value in (("router.name", plugged_in), *others):
        if value is not None and not own:
            raise ValueError(f"{key}={value} needs a checkpoint, not {source}")
    if cameras and not source.startswith(LEROBOT):
        raise ValueError(f"cameras={dict(cameras)} needs checkpoint={LEROBOT}PATH, not {source}")
    if source == RANDOM:
        from cogvla.policy.baselines import RandomPolicy

        return RandomPolicy(build(Embodiment, embodiment, "embodiment"), seed), {}
    if source.startswith(REMOTE):
        from cogvla.real_robot.serving.remote_policy import RemotePolicy

        return RemotePolicy(source, api_key=api_key), {}
    if source.startswith(LEROBOT):
        from cogvla.policy.lerobot.loading import open_lerobot_policy
        from cogvla.policy.threads import use_threads

        use_threads(threads, workers)
        robot = build(Embodiment, embodiment, "embodiment")
        return open_lerobot_policy(source.removeprefix(LEROBOT), robot, device, cameras, seed)
    if exported:
        from cogvla.policy.export.exported import open_exported

        return open_exported(source, device, threads)
    folder = find_checkpoint(source, "train one with `train_policy`, or give random")

    from cogvla.policy.checkpoint import open_policy
    from cogvla.policy.engine.engine import EngineConfig
    from cogvla.routing.router import RouterConfig

    how = build(EngineConfig, engine, "engine")
    config = None if plugged_in is None else build(RouterConfig, router, "router")
    policy, identity = open_policy(folder, device, threads, how, config, workers, statistics)
    if policy.choice is not None:
        print(policy.choice)
    return policy, identity


def named_router(router: Mapping[str, Any], path: str = "router") -> str | None:
    """Return the name of the token router that a command's keys configure, None for none.

    Raises:
        ValueError: there are keys, but no name, without which they change nothing.
    """
    usual = defaults("routing.router.RouterConfig")
    # routing=faithful has a position, which a router that is added gets
    given = [key for key, value in router.items() if key in usual and key != "position" and value != usual[key]]
    if router["name"] is None and given:
        raise ValueError(
            f"{path}.{given[0]}={router[given[0]]} changes nothing without {path}.name: give the name of a token "
            "router, or leave it out"
        )
    return router["name"]


def report_name(source: str) -> str:
    """Return a name for reports on a policy; lerobot calls the folder of every checkpoint `pretrained_model`."""
    path = Path(source.removeprefix(LEROBOT)).resolve()
    parts = [part for part in path.parts if part not in ("checkpoints", "pretrained_model")]
    return "_".join(parts[-2:]) if source.startswith(LEROBOT) else path.name
