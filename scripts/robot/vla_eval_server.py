"""`vla_eval_server`: serve a policy to the evaluation harness vla-eval (the extra `harness`).

    vla_eval_server checkpoint=FOLDER execute_steps=4
    vla_eval_server checkpoint=FOLDER evaluation=libero_spatial.yaml          (its benchmarks must fit the policy)
    vla_eval_server checkpoint=ws://127.0.0.1:8001                            (a policy_server's policy)

Then `vla-eval run --config FILE --server-url ws://127.0.0.1:8000` plays. Ctrl-C ends it.
"""

from __future__ import annotations

import asyncio
import inspect
import signal
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cogvla.configs.build import build, take
from cogvla.envs.rollout.rollout import RolloutSettings
from cogvla.real_robot.serving.batching import BatchSettings
from cogvla.real_robot.serving.server import ServerSettings
from cogvla.scripts import console
from cogvla.scripts.command import ending_signals, import_modules, plain
from cogvla.scripts.policies import open_any_policy
from cogvla.scripts.robot.policy_server import address, check_address, is_loopback

if TYPE_CHECKING:
    from cogvla.real_robot.harness.model_server import PolicyModelServer


def main(config: DictConfig) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP.

    Raises:
        ValueError: vla-eval is not installed, the policy cannot be opened, or it does not fit the benchmarks.
        OSError: the address cannot be bound.
    """
    try:
        from cogvla.real_robot.harness.model_server import PolicyModelServer
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: `uv sync --extra harness`") from error

    import_modules(config.imports)
    values = plain(config)
    batching = take(BatchSettings, values)
    execution = build(RolloutSettings, _some(values, "execute_steps", "temporal_ensemble"), "configuration")
    where = build(ServerSettings, _some(values, "host", "port"), "configuration")
    if not is_loopback(where.host):
        print("warning: the server is open to the network, and vla-eval's protocol has no passwords")
    check_address("ws", where.host, where.port)
    policy, _ = open_any_policy(
        str(config.checkpoint),
        embodiment=values["embodiment"],
        seed=values["seed"],
        api_key=values["api_key"],
        device=values["device"],
        threads=values["threads"],
        engine=values["engine"],
        statistics=values["statistics"],
    )
    server = PolicyModelServer(policy, batching, execution, values["cameras"])
    if values["evaluation"] is not None:
        check_benchmarks(str(values["evaluation"]), server)
    asyncio.run(_serve(server, where.host, where.port))
    print("stopped")


async def _serve(server: PolicyModelServer, host: str, port: int) -> None:
    from cogvla.real_robot.harness.model_server import serve

    stop = asyncio.Event()
    for number in (signal.SIGINT, *ending_signals()):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    name = server.embodiment.name
    try:
        await serve(
            server, host, port, stop, lambda bound: print(f"{name} at {address('ws', host, bound)}", flush=True)
        )
    except OSError as error:
        raise OSError(f"cannot serve at {address('ws', host, port)}: {error}") from error


def check_benchmarks(path: str, server: PolicyModelServer) -> None:
    """Check that a policy fits the benchmarks of a configuration of vla-eval, where vla-eval only warns.

    Args:
        path: the file that `vla-eval run --config` gets.
        server: the server of the policy.

    Raises:
        ValueError: it does not fit, or the file or a benchmark cannot be read here.
        OSError: there is no such file.
    """
    from vla_eval.cli.config_loader import load_config
    from vla_eval.registry import resolve_import_string

    from cogvla.envs.harness.specs import check_fit

    try:
        entries = load_config(path).get("benchmarks") or []
        named = [(str(entry["benchmark"]), dict(entry.get("params") or {})) for entry in entries]
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"evaluation={path} is no configuration of vla-eval: {_line(error)}") from error
    if not named:
        raise ValueError(f"evaluation={path} has no benchmarks")
    for name, params in named:
        try:
            kind = resolve_import_string(name)
            benchmark = kind(**_accepted(kind, server.get_observation_params()) | params)
            specs = benchmark.get_action_spec(), benchmark.get_observation_spec()
            benchmark.cleanup()
        except Exception as error:  # whatever its simulator raises where it is not installed
            raise ValueError(f"evaluation={path}: {name} cannot be asked what it needs: {_line(error)}") from error
        try:
            check_fit(server.embodiment, server.cameras, *specs)
        except ValueError as error:
            raise ValueError(f"evaluation={path}: {name}: {error}") from error


def _accepted(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that a benchmark takes as keywords, itself or in a class that it builds on."""
    names = {name for each in kind.__mro__[:-1] for name in inspect.signature(each).parameters}
    return {key: value for key, value in values.items() if key in names}


def _some(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    console.vla_eval_server()
