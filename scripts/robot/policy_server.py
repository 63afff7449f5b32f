"""`policy_server`: serve a policy to robots and simulators over a websocket; openpi's clients work unchanged.

    policy_server checkpoint=FOLDER
    COGVLA_API_KEY=... policy_server checkpoint=FOLDER host=0.0.0.0 tls.cert=cert.pem tls.key=key.pem
    policy_server checkpoint=random request_keys=by_name
    policy_server checkpoint=lerobot:PATH                                    (ACT, diffusion, SmolVLA ... of lerobot)

Ctrl-C answers pending requests and ends.
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable

from omegaconf import DictConfig

from cogvla.configs.build import build, take
from cogvla.real_robot.serving.batching import BatchSettings
from cogvla.real_robot.serving.request import RequestKeys
from cogvla.real_robot.serving.server import PolicyServer, ServerSettings
from cogvla.real_robot.serving.server_metrics import ServerMetrics
from cogvla.scripts import console
from cogvla.scripts.command import ending_signals, import_modules, plain
from cogvla.scripts.policies import REMOTE, open_any_policy


def main(config: DictConfig) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP.

    Raises:
        ValueError: the checkpoint, a certificate or a setting cannot be used.
        OSError: the address cannot be bound.
    """
    import_modules(config.imports)
    values = plain(config)
    settings, batching = take(ServerSettings, values), take(BatchSettings, values)
    settings.tls.context()  # check the files before the policy is loaded
    keys = build(RequestKeys, values["request_keys"], "request_keys")
    if not is_loopback(settings.host) and (settings.api_key is None or settings.tls.cert is None):
        print("warning: the server is open to the network; set COGVLA_API_KEY, tls.cert and tls.key")
    if str(config.checkpoint).startswith(REMOTE):
        raise ValueError(f"checkpoint={config.checkpoint} is served already; give a folder, or random")
    check_address(_scheme(settings), settings.host, settings.port)
    policy, identity = open_any_policy(
        str(config.checkpoint),
        embodiment=values["embodiment"],
        device=config.device,
        threads=config.threads,
        engine=values["engine"],
        statistics=config.statistics,
        cameras=values["cameras"],
    )
    gpu_bytes = _gpu_bytes(policy.describe().get("device", ""))
    server = PolicyServer(policy, settings, batching, keys, identity, ServerMetrics(gpu_bytes))
    asyncio.run(_serve(server, settings))
    print("stopped")


async def _serve(server: PolicyServer, settings: ServerSettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, *ending_signals()):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    def listening(port: int) -> None:
        print(f"{server.info.embodiment.name} at {address(_scheme(settings), settings.host, port)}", flush=True)

    await server.run(stop, listening)


def _scheme(settings: ServerSettings) -> str:
    return "ws" if settings.tls.cert is None else "wss"


def _gpu_bytes(device: str) -> Callable[[], float] | None:
    """Return a function that reads the allocated GPU memory in bytes; None for a policy without a GPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return lambda: float(torch.cuda.memory_allocated(device))


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address(scheme: str, host: str, port: int) -> str:
    """Return the address of a server; the host of IPv6 gets brackets."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_address(scheme: str, host: str, port: int) -> None:
    """Check that a server can listen at an address, before a policy is loaded for it.

    Args:
        scheme: of the address, for the message.
        host: name or address of this machine.
        port: port; 0: any free one.

    Raises:
        OSError: it cannot be bound, for instance because another process listens there.
    """
    try:
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise OSError(f"cannot serve at {address(scheme, host, port)}: {error}") from error


if __name__ == "__main__":
    console.policy_server()
