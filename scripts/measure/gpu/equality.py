"""Part `equality`: the actions of every engine and precision, against the plain network in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np

from cogvla.policy.cost.not_measured import NotMeasuredError
from cogvla.policy.cost.variants import INSTRUCTION, observe, random_policy
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.interface import Observation
from cogvla.policy.policy import CogVLAPolicy
from cogvla.scripts.measure.gpu.journal import Row
from cogvla.scripts.measure.gpu.networks import network
from cogvla.scripts.measure.gpu.runner import Task
from cogvla.scripts.measure.gpu.settings import Settings

COLUMNS = {
    "engine": "engine",
    "precision": "precision",
    "mean": "mean deviation",
    "largest": "largest deviation",
    "batch": "batch of 3 from single samples",
    "scale": "mean size of an action",
}
NETWORKS: dict[str, tuple[str, int | None]] = {
    "tiny": ("tiny", None),
    "cogvla_7b, 4 layers": ("cogvla_7b", 4),
    "small": ("small", None),
}
BATCH = 3


def tasks(settings: Settings) -> Mapping[str, Task]:
    """Return a task for each network, engine and precision; compiling comes last, because it takes minutes."""
    compiled = "eager" if settings.rehearse else "compile"
    ways = [
        ("eager", "float32"),
        (settings.graph, "float32"),
        (settings.graph, "bfloat16"),
        (settings.graph, "float8"),
        (compiled, "float32"),
        (compiled, "bfloat16"),
    ]
    return {
        f"{title}, {kind}, {precision}": partial(compare, settings, title, kind, precision)
        for kind, precision in dict.fromkeys(ways)
        for title in NETWORKS
        if not (settings.rehearse and title == "small")  # its stand-in is that of `tiny`
    }


def compare(settings: Settings, title: str, kind: str, precision: str) -> Iterable[Row]:
    """Yield the deviation of one engine and precision; all weights and observations are random."""
    name, layers = NETWORKS[title]
    config, robot, _ = network(settings, name, "bypass", layers)
    plain = random_policy(config, robot, settings.device, "float32")
    seen = observe(robot, BATCH)
    expected_BKA = plain.act(seen).actions
    policy = prepared(plain, kind, precision, seen, settings.smallest)
    for batch in (1, BATCH):
        policy.warm_up(batch, [INSTRUCTION])
    found_BKA = policy.act(seen).actions
    alone_BKA = np.concatenate([policy.act(part).actions for part in singles(seen)])
    difference_BKA = np.abs(found_BKA - expected_BKA)
    yield {
        "row": title,
        "engine": kind,
        "precision": precision,
        "mean": float(difference_BKA.mean()),
        "largest": float(difference_BKA.max()),
        "batch": float(np.abs(found_BKA - alone_BKA).max()),
        "scale": float(np.abs(expected_BKA).mean()),
    }


def prepared(plain: CogVLAPolicy, kind: str, precision: str, seen: Observation, smallest: int) -> CogVLAPolicy:
    """Return a policy with this engine and precision; it takes the weights of `plain`.

    Raises:
        NotMeasuredError: the machine or the model does not support 8 bits.
    """
    eight_bits = precision == "float8"
    policy = plain.with_engine(EngineConfig(kind, dtype="bfloat16" if eight_bits else precision), release=True)
    if eight_bits:
        try:
            policy.to_float8([seen], smallest)
        except ValueError as error:
            raise NotMeasuredError(str(error)) from error
    return policy


def singles(observation: Observation) -> list[Observation]:
    """Return the observations of a batch one by one."""
    return [
        Observation(
            {name: images[index : index + 1] for name, images in observation.images.items()},
            observation.state[index : index + 1],
            [text],
        )
        for index, text in enumerate(observation.instruction)
    ]
