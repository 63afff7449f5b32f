"""The DDS node: what other ROS 2 nodes see of it, and that messages, services and latched values arrive."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cogvla.tests.support.extras import needs
from cogvla.tests.support.waiting import until

pytest.importorskip("cyclonedds", reason=needs("dds"))
pytest.importorskip("rosbags", reason=needs("dds"))

from cyclonedds.builtin import BuiltinDataReader, BuiltinTopicDcpsPublication
from cyclonedds.core import Policy
from cyclonedds.domain import DomainParticipant

from cogvla.real_robot.ros.dds import DISCOVERY_INFO, DdsNode, _configured
from cogvla.real_robot.ros.dds_settings import DdsSettings
from cogvla.real_robot.ros.messages import diagnostics_fields, diagnostics_of, image_fields, trajectory_fields
from cogvla.real_robot.ros.node import ARRAY, IMAGE, SET_BOOL, STRING, TRAJECTORY, TRIGGER, Delivery
from cogvla.real_robot.ros.types import DISTROS, RosTypes

DOMAIN = 100 + os.getpid() % 30


@pytest.fixture
def nodes() -> Iterator[tuple[DdsNode, DdsNode]]:
    with DdsNode("/robot", DdsSettings(DOMAIN)) as robot, DdsNode("/lab/operator", DdsSettings(DOMAIN)) as operator:
        yield robot, operator


# --- types ----------------------------------------------------------------------------------------------------------


def test_a_message_has_the_bytes_that_ros_2_writes() -> None:
    """XCDR1, little endian: header, then an aligned string with its length and a zero at its end."""
    cdr = RosTypes("humble").to_cdr(STRING, {"data": "hello"})
    assert cdr == bytes([0, 1, 0, 0, 6, 0, 0, 0]) + b"hello\0"


def test_type_hashes_are_those_of_ros_2() -> None:
    """As `ros2 topic info -v` shows it from Iron on."""
    expected = "RIHS01_d31d41a9a4c4bc8eae9be757b0beed306564f7526c88ea6a4588fb9582527d47"
    assert {RosTypes(distro).type_hash(IMAGE) for distro in DISTROS} == {expected}


@pytest.mark.parametrize(("distro", "size"), [("humble", 24), ("jazzy", 16)])
def test_ids_have_the_size_of_the_distribution(distro: str, size: int) -> None:
    assert RosTypes(distro).gid_size == size


def test_missing_fields_are_zero_and_unknown_ones_are_refused() -> None:
    types = RosTypes("humble")
    message = types.build(TRAJECTORY, trajectory_fields(np.array([1.0, 2.0]), ["a", "b"], 0.05))
    assert message.header.stamp.sec == message.header.stamp.nanosec == 0
    assert message.header.frame_id == ""
    assert len(message.points[0].velocities) == 0
    np.testing.assert_array_equal(message.points[0].positions, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"has no field \['text'\]; it has data"):
        types.build(STRING, {"text": "hello"})
    with pytest.raises(ValueError, match="distro must be one of humble, iron, jazzy, got 'foxy'"):
        RosTypes("foxy")


def test_diagnostics_come_back_as_they_were() -> None:
    types = RosTypes("humble")
    values = {"state": "holding", "fault": None, "stale": "wrist: old", "last_failure": None, "ages_s": {"wrist": 0.5}}
    name = "diagnostic_msgs/msg/DiagnosticArray"
    message = types.from_cdr(name, types.to_cdr(name, diagnostics_fields(values, "/bridge", 1.0)))
    assert (message.status[0].level, message.status[0].message) == (1, "holding: wrist: old")
    assert diagnostics_of(message) == {
        "state": "holding", "fault": None, "stale": "wrist: old", "last_failure": None, "ages_s.wrist": 0.5,
    }  # fmt: skip


# --- the node -------------------------------------------------------------------------------------------------------


def test_images_arrive_as_they_were_sent(nodes: tuple[DdsNode, DdsNode]) -> None:
    robot, operator = nodes
    got: list[Any] = []
    operator.subscribe("/camera/image_raw", IMAGE, Delivery.SENSOR, got.append)
    publish = robot.advertise("camera/image_raw", IMAGE, Delivery.SENSOR)
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)

    def sent() -> bool:
        publish(image_fields(image, 5.0, "camera"))
        time.sleep(0.02)
        return bool(got)

    until(sent)
    np.testing.assert_array_equal(got[0].data.reshape(image.shape), image)
    assert (got[0].encoding, got[0].step, got[0].header.frame_id) == ("rgb8", 1920, "camera")


def test_a_latched_value_reaches_those_who_come_later(nodes: tuple[DdsNode, DdsNode]) -> None:
    robot, operator = nodes
    robot.advertise("/instruction", STRING, Delivery.LATCHED)({"data": "stack the cubes"})
    got: list[str] = []
    operator.subscribe("/instruction", STRING, Delivery.LATCHED, lambda message: got.append(message.data))
    until(lambda: got == ["stack the cubes"])


def test_services_answer_the_one_who_asked(nodes: tuple[DdsNode, DdsNode]) -> None:
    robot, operator = nodes
    asked: list[bool] = []

    def estop(data: bool) -> tuple[bool, str]:
        asked.append(data)
        return data, f"was {data}"

    robot.serve("~/estop", SET_BOOL, estop)
    robot.serve("~/reset", TRIGGER, lambda _: (False, "not now"))
    with DdsNode("/another", DdsSettings(DOMAIN)) as another:
        assert operator.call("/robot/estop", SET_BOOL, False) == (False, "was False")
        assert another.call("/robot/estop", SET_BOOL, True) == (True, "was True")
        assert operator.call("/robot/reset", TRIGGER) == (False, "not now")
        assert asked == [False, True]
        with pytest.raises(TimeoutError, match="/nobody/reset did not answer within"):
            another.call("/nobody/reset", TRIGGER, timeout_s=0.2)


def test_ros_2_sees_the_node_and_its_topics(nodes: tuple[DdsNode, DdsNode]) -> None:
    robot, operator = nodes
    seen: list[Any] = []
    operator._reader("ros_discovery_info", DISCOVERY_INFO, Delivery.LATCHED, seen.append)
    robot.advertise("/commands", ARRAY, Delivery.COMMAND)

    def entry() -> Any:
        mine = [e for m in seen for e in m.node_entities_info_seq if e.node_name == "robot" and len(e.writer_gid_seq)]
        return mine[-1] if mine else None

    until(entry)
    assert entry().node_namespace == "/"
    writer = bytes(entry().writer_gid_seq[0].data)
    assert len(writer) == 24
    with _configured(DdsSettings(DOMAIN).configuration()):
        participant = DomainParticipant(DOMAIN)
    publications = BuiltinDataReader(participant, BuiltinTopicDcpsPublication)
    found: dict[str, Any] = {}

    def commands() -> bool:
        found.update({each.topic_name: each for each in publications.read(100)})
        return "rt/commands" in found

    until(commands)
    endpoint = found["rt/commands"]
    assert endpoint.type_name == "std_msgs::msg::dds_::Float64MultiArray_"
    assert endpoint.key.bytes == writer[:16], "the id in the node's list is the id on the wire"
    policies = dict(endpoint.qos.asdict().items())
    assert "typehash=RIHS01_" in str(policies.get("Userdata")) or Policy.Userdata(
        f"typehash={robot.types.type_hash(ARRAY)};".encode()
    ) in list(endpoint.qos)


def test_text_that_is_no_text_is_left_out(nodes: tuple[DdsNode, DdsNode], caplog: pytest.LogCaptureFixture) -> None:
    robot, operator = nodes
    got: list[str] = []
    operator.subscribe("/text", STRING, Delivery.EVENTS, lambda message: got.append(message.data))
    raw = robot.advertise_raw("/text", STRING, Delivery.EVENTS)
    good = robot.types.to_cdr(STRING, {"data": "good"})

    def sent() -> bool:
        raw(bytes([0, 1, 0, 0, 3, 0, 0, 0, 0xFF, 0xFE, 0, 0]))
        raw(good)
        time.sleep(0.02)
        return bool(got)

    with caplog.at_level(logging.WARNING):
        until(sent)
    assert set(got) == {"good"}
    assert "a message on rt/text is no std_msgs/msg/String" in caplog.text
    assert operator.failure is None


def test_a_callback_that_breaks_is_known(nodes: tuple[DdsNode, DdsNode]) -> None:
    robot, operator = nodes

    def breaks(_: Any) -> None:
        raise ZeroDivisionError("a mistake")

    operator.subscribe("/text", STRING, Delivery.LATCHED, breaks)
    robot.advertise("/text", STRING, Delivery.LATCHED)({"data": "x"})
    until(lambda: isinstance(operator.failure, ZeroDivisionError))


def test_nothing_leaves_this_machine_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CYCLONEDDS_URI", "<mine/>")
    configuration = DdsSettings().configuration()
    assert configuration is not None
    assert 'NetworkInterface name="lo" multicast="false"' in configuration
    assert "<AllowMulticast>false</AllowMulticast>" in configuration
    with _configured(configuration):
        assert os.environ["CYCLONEDDS_URI"] == configuration
    assert os.environ["CYCLONEDDS_URI"] == "<mine/>"
    network = DdsSettings(interface="eth0").configuration()
    assert network is not None
    assert "localhost" not in network
    assert DdsSettings(interface=None).configuration() is None
    with pytest.raises(ValueError, match="domain must be from 0 to 232"):
        DdsSettings(domain=300)
