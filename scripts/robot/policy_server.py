"""`policy_server`: answers robots and simulators over a websocket; openpi's clients work unchanged.

    policy_server checkpoint=FOLDER
    COGVLA_API_KEY=... policy_server checkpoint=FOLDER host=0.0.0.0 tls.cert=cert.pem tls.key=key.pem
    policy_server checkpoint=random request_keys=by_name

Ctrl-C answers what was asked already and ends.
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
from collections.abc import Callable
from pathlib import Path

import hydra
from omegaconf import DictConfig

from cogvla.policy.interface import Embodiment, Policy
from cogvla.real_robot.serving.batching import BatchSettings
from cogvla.real_robot.serving.request import RequestKeys
from cogvla.real_robot.serving.server import PolicyServer, ServerSettings
from cogvla.real_robot.serving.server_metrics import ServerMetrics
from cogvla.scripts.command import import_modules, mistakes_in_one_line, plain

RANDOM = "random"


@hydra.main(version_base="1.3", config_path="pkg://cogvla.configs", config_name="policy_server")
def main(config: DictConfig) -> None:
    """Console entry point."""
    with mistakes_in_one_line():
        run(config)


def run(config: DictConfig) -> None:
    """Serve until SIGINT or SIGTERM."""
    import_modules(config.imports)
    settings = ServerSettings(
        host=config.host,
        port=config.port,
        api_key=None if config.api_key is None else str(config.api_key),
        certificate=None if config.tls.cert is None else Path(config.tls.cert),
        private_key=None if config.tls.key is None else Path(config.tls.key),
        max_message_mb=config.max_message_mb,
        max_clients=config.max_clients,
    )
    settings.tls()  # a wrong file is said before the policy is loaded
    batching = BatchSettings(config.max_batch, config.batch_wait_ms)
    keys = RequestKeys(**plain(config.request_keys))
    if not _loopback(settings.host) and (settings.api_key is None or settings.certificate is None):
        print("warning: the server is open to the network; give COGVLA_API_KEY, tls.cert and tls.key")
    policy, identity, gpu_bytes = _policy(config)
    server = PolicyServer(policy, settings, batching, keys, identity, ServerMetrics(gpu_bytes))
    asyncio.run(_serve(server, settings))
    print("stopped")


async def _serve(server: PolicyServer, settings: ServerSettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    scheme = "ws" if settings.certificate is None else "wss"

    def listening(port: int) -> None:
        print(f"{server.info.embodiment.name} at {scheme}://{settings.host}:{port}", flush=True)

    await server.run(stop, listening)


def _policy(config: DictConfig) -> tuple[Policy, dict[str, str], Callable[[], float] | None]:
    """The policy, what tells its weights from others, and what asks for its GPU memory."""
    if config.checkpoint == RANDOM:
        from cogvla.policy.baselines import RandomPolicy

        return RandomPolicy(Embodiment(**plain(config.embodiment))), {}, None

    if not Path(config.checkpoint).is_dir():  # said before torch is imported
        raise ValueError(f"no checkpoint folder at {config.checkpoint}; train one with `train_policy`, or give random")

    import torch

    from cogvla.policy.checkpoint import open_policy
    from cogvla.policy.engine.engine import EngineConfig

    engine = EngineConfig.from_dict(plain(config.engine))
    policy, identity = open_policy(config.checkpoint, config.device, config.threads, engine)
    device = policy.describe()["device"]
    gpu_bytes = (lambda: float(torch.cuda.memory_allocated(device))) if device.startswith("cuda") else None
    return policy, identity, gpu_bytes


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    main()
