"""Images of every encoding, from a camera over ROS 2 and the lifecycle node to the policy; others are refused."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvla.policy.interface import ActionChunk, Observation
from cogvla.tests.support.extras import needs
from cogvla.tests.support.image_files import encoded
from cogvla.tests.support.policy_servers import serving

pytest.importorskip("rclpy", reason=needs("ros"))

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.real_robot.ros.topics import RosTopics
from cogvla.tests.support.circle_server import TABLETOP, CirclePolicy
from cogvla.tests.support.lifecycle_process import changed, domain_of, lifecycle_node
from cogvla.tests.support.robot_processes import Operator
from cogvla.tests.support.ros_images import CHANNELS, COLOURS, ORDERS, PATTERNS, fields_of, one_colour
from cogvla.tests.support.topic_robot import TopicRobot

DOMAIN = domain_of(151)
SIZE = 128
REFUSED = {"mono8": 1, "16UC1": 2, "32FC1": 4, "rgb16": 6, "bayer_rggb16": 2, "8UC1": 1, "nv21": 2, "": 3}
"""Encoding -> bytes of a pixel."""
OTHERS = {
    "grey": encoded(Image.fromarray(np.full((SIZE, SIZE), 99, np.uint8)), "JPEG"),
    "16 bits": encoded(Image.fromarray(np.full((SIZE, SIZE), 999, np.uint16)), "PNG"),
    "alpha": encoded(Image.fromarray(np.full((SIZE, SIZE, 4), 99, np.uint8)), "PNG"),
    "neither": b"depth" * 9,
}


class LooksPolicy(CirclePolicy):
    """Remembers the middle pixel of each camera's newest image."""

    def __init__(self) -> None:
        self.seen: dict[str, np.ndarray] = {}
        self.new = threading.Event()

    def act(self, observation: Observation) -> ActionChunk:
        middle = SIZE // 2
        self.seen = {name: images[-1, middle, middle].astype(int) for name, images in observation.images.items()}
        self.new.set()
        return super().act(observation)


def test_every_encoding_arrives_as_rgb_or_is_refused_by_name(tmp_path: Path) -> None:
    cameras = {"cameras": {"agentview": "/front", "wrist": "/wrist/compressed"}}
    topics = changed(tmp_path, "topics", "tabletop", cameras)
    policy = LooksPolicy()
    with (
        closing(Operator(DOMAIN)) as operator,
        serving(policy) as (uri, _),
        TopicRobot(build(RosTopics, load("topics", topics), "topics"), TABLETOP, DOMAIN) as robot,
        lifecycle_node(operator, tmp_path, server=uri, topics=topics, instruction="look") as node,
    ):
        robot.state[:3] = 0.58, 0.0, 0.25
        node.run()

        def looks(camera: str, colour: str) -> bool:
            policy.new.clear()
            policy.new.wait(1)
            return bool(np.abs(policy.seen[camera] - COLOURS[colour]).max() <= 6)

        for number, encoding in enumerate([*CHANNELS, *ORDERS, *PATTERNS]):
            colour = list(COLOURS)[number % 3]
            robot.images["agentview"] = fields_of(encoding, one_colour(encoding, colour, SIZE, SIZE), SIZE)
            operator.until(lambda colour=colour: looks("agentview", colour))
        for colour in ("red", "blue"):
            for kind in ("JPEG", "PNG"):
                picture = np.full((SIZE, SIZE, 3), COLOURS[colour], np.uint8)
                data = encoded(picture, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
                robot.images["wrist"] = {"format": f"rgb8; {kind}", "data": np.frombuffer(data, np.uint8)}
                operator.until(lambda colour=colour: looks("wrist", colour))

        good = robot.images["agentview"]
        for encoding, size in REFUSED.items():
            robot.images["agentview"] = fields_of(encoding, np.zeros((SIZE, SIZE * size), np.uint8), SIZE)
            operator.state("holding", f"encoding '{encoding}' is not supported")
        robot.images["agentview"] = {**good, "data": good["data"][:-1]}
        operator.state("holding", "has only")
        robot.images["agentview"] = good
        operator.state("running")
        for reason, data in OTHERS.items():
            robot.images["wrist"] = {"format": "x", "data": np.frombuffer(data, np.uint8)}
            operator.until(lambda reason=reason: reason in str(operator.diagnostics.get("last_refusal.wrist")))
        assert operator.diagnostics["fault"] is None
        assert node.process.end() == 0
