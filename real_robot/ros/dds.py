"""ROS 2 node without an installation of ROS 2, over Eclipse Cyclone DDS. ROS 2 nodes see it as one of their own.

    topic /x          rt/x, package::msg::dds_::Type_, XCDR1
    service /x        rq/xRequest and rr/xReply, where each sample starts with the client's id and a sequence number;
                      rmw_cyclonedds_cpp uses this format, other middlewares do not
    node list         ros_discovery_info lists the readers and writers of each node

The node communicates only within this machine unless `DdsSettings.interface` names a network.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Self

from cyclonedds.core import GuardCondition, InstanceState, Policy, Qos, ReadCondition, SampleState, ViewState, WaitSet
from cyclonedds.domain import DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration
from rosbags.serde import SerdeError

from cogvla.real_robot.ros.dds_settings import DdsSettings
from cogvla.real_robot.ros.node import TRIGGER, Answer, Delivery, Fields, resolve
from cogvla.real_robot.ros.types import RosTypes, Sample

_log = logging.getLogger(__name__)
DISCOVERY_INFO = "rmw_dds_common/msg/ParticipantEntitiesInfo"
_TAKEN = 64
"""Number of samples taken from a reader at once."""
_BLOCKING = duration(milliseconds=10)
"""Longest time that a reliable writer waits for a slow reader; short, because the control loop waits with it."""


def _qos(delivery: Delivery, type_hash: str | None = None) -> Qos:
    reliable = Policy.Reliability.Reliable(_BLOCKING)
    latched = delivery is Delivery.LATCHED
    depth = {Delivery.SENSOR: 5, Delivery.EVENTS: 10}.get(delivery, 1)
    user_data = [] if type_hash is None else [Policy.Userdata(f"typehash={type_hash};".encode())]
    return Qos(
        Policy.Reliability.BestEffort if delivery is Delivery.SENSOR else reliable,
        Policy.Durability.TransientLocal if latched else Policy.Durability.Volatile,
        Policy.History.KeepLast(depth),
        Policy.DataRepresentation(use_cdrv0_representation=True),
        Policy.WriterDataLifecycle(autodispose=False),
        *user_data,
    )


class DdsNode:
    """`RosNode` over Cyclone DDS. All callbacks run in one thread, which `start` starts.

    Args:
        name: fully qualified name, such as `/cogvla_bridge`.
        settings: network and ROS 2 distribution; None for the defaults.

    Attributes:
        failure: exception of a callback, after which there are no more callbacks; else None.
    """

    def __init__(self, name: str, settings: DdsSettings | None = None) -> None:
        settings = settings or DdsSettings()
        self.name = name
        self.types = RosTypes(settings.distro)
        self._lock = threading.RLock()
        self._listening: list[tuple[DataReader[Any], Callable[[bytes, float], None]]] = []
        self._writers: list[DataWriter[Any]] = []
        with _configured(settings.configuration()):
            self._participant = DomainParticipant(settings.domain, Qos(Policy.Userdata(b"enclave=/;")))
        self._waiting = WaitSet(self._participant)
        self._wake = GuardCondition(self._participant)
        self._waiting.attach(self._wake)
        self._closed = threading.Event()
        self._client_id = random.getrandbits(63)
        self._calls: dict[int, Future[Answer]] = {}
        self._sequence = 0
        self._callers: dict[str, DataWriter[Any]] = {}
        self._discovery: DataWriter[Any] | None = None
        self._discovery = self._writer("ros_discovery_info", DISCOVERY_INFO, Delivery.LATCHED)
        self._thread = threading.Thread(target=self._spin, name=f"dds {name}", daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> Self:
        """Announce the node to others and start the callbacks."""
        self._announce()
        self._thread.start()
        return self

    def close(self) -> None:
        """End the callbacks and leave the network."""
        self._closed.set()
        self._wake.set(True)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._listening.clear()
        self._writers.clear()
        self._callers.clear()
        self._discovery = None
        del self._waiting, self._wake, self._participant  # entities leave the network with their last reference

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- RosNode ------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return time.time()

    def subscribe(self, topic: str, kind: str, delivery: Delivery, callback: Callable[[Any], None]) -> None:
        self._reader("rt" + resolve(topic, self.name), kind, delivery, callback)

    def advertise(self, topic: str, kind: str, delivery: Delivery) -> Callable[[Fields], None]:
        raw = self.advertise_raw(topic, kind, delivery)
        return lambda fields: raw(self.types.to_cdr(kind, fields))

    def serve(self, service: str, kind: str, callback: Callable[[bool], Answer]) -> None:
        name = resolve(service, self.name)
        reply = self._writer(f"rr{name}Reply", f"{kind}_Response", Delivery.EVENTS, hashed=False)

        def answer(request: Any) -> None:
            success, message = callback(True if kind == TRIGGER else request.data)
            header = {"client": request.client, "sequence": request.sequence}
            fields = {**header, "success": success, "message": message}
            self._write(reply, self.types.to_cdr(f"{kind}_Response", fields))

        self._reader(f"rq{name}Request", f"{kind}_Request", Delivery.EVENTS, answer, hashed=False)

    # --- further methods for operators and tests ----------------------------------------------------------------------

    def advertise_raw(self, topic: str, kind: str, delivery: Delivery) -> Callable[[bytes], None]:
        """Return a function that publishes serialised messages, such as those of a bag."""
        writer = self._writer("rt" + resolve(topic, self.name), kind, delivery)
        return lambda cdr: self._write(writer, cdr)

    def subscribe_raw(
        self, topic: str, kind: str, delivery: Delivery, callback: Callable[[bytes, float], None]
    ) -> None:
        """Subscribe to serialised messages; the callback also gets the time of sending, in seconds as `now`."""
        self._add("rt" + resolve(topic, self.name), kind, delivery, callback)

    def call(self, service: str, kind: str, data: bool = True, timeout_s: float = 5.0) -> Answer:
        """Call a `SET_BOOL` or `TRIGGER` service of another node; TimeoutError if none answers in time."""
        name = resolve(service, self.name)
        deadline = time.monotonic() + timeout_s
        with self._lock:
            if name not in self._callers:
                self._reader(f"rr{name}Reply", f"{kind}_Response", Delivery.EVENTS, self._answered, hashed=False)
                self._callers[name] = self._writer(f"rq{name}Request", f"{kind}_Request", Delivery.EVENTS, hashed=False)
            writer = self._callers[name]
            self._sequence += 1
            sequence, answer = self._sequence, Future[Answer]()
            self._calls[sequence] = answer
        fields = {"client": self._client_id, "sequence": sequence} | ({} if kind == TRIGGER else {"data": data})
        try:
            while not writer.get_matched_subscriptions() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.02 if sequence == 1 else 0)  # discovery of the reply topic takes longer
            self._write(writer, self.types.to_cdr(f"{kind}_Request", fields))
            return answer.result(max(deadline - time.monotonic(), 0))
        except TimeoutError:
            raise TimeoutError(f"{name} did not answer within {timeout_s:g} s") from None
        finally:
            with self._lock:
                del self._calls[sequence]

    # --- internals ----------------------------------------------------------------------------------------------------

    def _answered(self, response: Any) -> None:
        with self._lock:
            call = self._calls.get(response.sequence) if response.client == self._client_id else None
        if call is not None and not call.done():
            call.set_result((response.success, response.message))

    def _topic(self, name: str, kind: str) -> Topic[Any]:
        return Topic(self._participant, name, self.types.sample_type(kind))

    def _hash(self, kind: str, hashed: bool) -> str | None:
        return self.types.type_hash(kind) if hashed else None

    def _writer(self, topic: str, kind: str, delivery: Delivery, hashed: bool = True) -> DataWriter[Any]:
        qos = _qos(delivery, self._hash(kind, hashed))
        with self._lock:
            writer: DataWriter[Any] = DataWriter(self._participant, self._topic(topic, kind), qos)
            if self._discovery is not None:
                self._writers.append(writer)
                self._announce()
        return writer

    @staticmethod
    def _write(writer: DataWriter[Any], cdr: bytes) -> None:
        writer.write(writer.data_type(cdr))

    def _reader(
        self,
        topic: str,
        kind: str,
        delivery: Delivery,
        callback: Callable[[Any], None],
        hashed: bool = True,
    ) -> None:
        def deliver(cdr: bytes, _: float) -> None:
            try:
                message = self.types.from_cdr(kind, cdr)
            except (SerdeError, ValueError) as error:  # Cyclone DDS has checked the layout, but no text
                _log.warning("a message on %s is no %s: %s", topic, kind, error)
                return
            callback(message)

        self._add(topic, kind, delivery, deliver, hashed)

    def _add(
        self,
        topic: str,
        kind: str,
        delivery: Delivery,
        deliver: Callable[[bytes, float], None],
        hashed: bool = True,
    ) -> None:
        qos = _qos(delivery, self._hash(kind, hashed))
        with self._lock:
            reader: DataReader[Any] = DataReader(self._participant, self._topic(topic, kind), qos)
            self._listening.append((reader, deliver))
            self._waiting.attach(ReadCondition(reader, ViewState.Any | InstanceState.Any | SampleState.NotRead))
            self._announce()
        self._wake.set(True)

    def _announce(self) -> None:
        """Publish the node with its readers and writers, for `ros2 node list` and `ros2 node info`."""
        assert self._discovery is not None, "the writer of discovery information is created first"
        namespace, _, name = self.name.rpartition("/")
        with self._lock:
            node = {
                "node_namespace": namespace or "/",
                "node_name": name,
                "reader_gid_seq": [self._gid(reader) for reader, _ in self._listening],
                "writer_gid_seq": [self._gid(writer) for writer in self._writers],
            }
            fields = {"gid": self._gid(self._participant), "node_entities_info_seq": [node]}
            self._write(self._discovery, self.types.to_cdr(DISCOVERY_INFO, fields))

    def _gid(self, entity: Any) -> Fields:
        return {"data": list(entity.guid.bytes.ljust(self.types.gid_size, b"\0"))}

    def _spin(self) -> None:
        try:
            while not self._closed.is_set():
                self._waiting.wait(duration(seconds=1))
                self._wake.set(False)
                with self._lock:
                    listening = list(self._listening)
                for reader, deliver in listening:
                    for sample in reader.take(_TAKEN):
                        if isinstance(sample, Sample) and sample.cdr:  # without data, a writer has left
                            info: Any = sample.sample_info  # type: ignore[attr-defined]
                            deliver(sample.cdr, info.source_timestamp * 1e-9)
        except BaseException as error:  # the owner of the node raises it
            self.failure = error


_CONFIGURING = threading.Lock()


@contextmanager
def _configured(configuration: str | None) -> Iterator[None]:
    """Set CYCLONEDDS_URI while a participant is created, because Cyclone DDS reads it then; None changes nothing."""
    if configuration is None:
        yield
        return
    with _CONFIGURING:
        before = os.environ.get("CYCLONEDDS_URI")
        os.environ["CYCLONEDDS_URI"] = configuration
        try:
            yield
        finally:
            del os.environ["CYCLONEDDS_URI"]
            if before is not None:
                os.environ["CYCLONEDDS_URI"] = before
