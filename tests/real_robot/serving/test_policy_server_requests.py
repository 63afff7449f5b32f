"""Requests that are wrong in every way: refused in one line, and nobody else notices."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from cogvla.real_robot.serving.quiet_log import LINES
from cogvla.real_robot.serving.request import PolicyRequest, RequestFormat, RequestKeys
from cogvla.real_robot.serving.wire import FrameError, pack, unpack
from cogvla.tests.support.extras import NEEDS_TEST_GROUP
from cogvla.tests.support.image_files import jpeg_header, png
from cogvla.tests.support.policy_servers import LIBERO_KEYS, ROBOT, SumPolicy, libero_request, observation, serving

pytest.importorskip("openpi_client", reason=NEEDS_TEST_GROUP)

from openpi_client import msgpack_numpy

READER = RequestFormat(ROBOT, LIBERO_KEYS)
GOOD = msgpack_numpy.packb(libero_request())


def expected(seed: int = 0) -> np.ndarray:
    return SumPolicy().act(observation(seed)).actions[0]


@pytest.fixture(scope="module")
def toy() -> Iterator[str]:
    with serving(SumPolicy()) as (uri, _):
        yield uri


def nd(kind: bytes, dtype: Any) -> dict[str, Any]:
    """A request whose state is in the dialect of msgpack-numpy."""
    state = {b"nd": True, b"type": dtype, b"kind": kind, b"shape": [4], b"data": bytes(16)}
    return libero_request(**{"observation/state": {key: value for key, value in state.items() if value is not None}})


BAD: dict[str, tuple[Any, str]] = {
    "not msgpack": (b"\xc1", "not valid msgpack"),
    "cut short": (msgpack_numpy.packb(libero_request())[:-9], "not valid msgpack"),
    "text": ("hello", "text frame"),
    "a list": (msgpack_numpy.packb([1, 2]), "not a map"),
    "nested": (msgpack_numpy.packb({"a": {"b": {"c": {"d": 1}}}}), "nested more than 3 deep"),
    "deeply nested": (b"\x81\xa1a" * 900 + b"\xc0", "more than 256 lists and maps"),
    "very deeply nested": (b"\x91" * 100_000 + b"\xc0", "not valid msgpack|more than 256"),
    "many maps": (b"\xdc\x04\x00" + b"\x80" * 1024, "more than 256 lists and maps"),
    "long list": (b"\xdd\x7f\xff\xff\xff", "not valid msgpack"),
    "empty": (msgpack_numpy.packb({}), "has no"),
    "missing camera": (libero_request(**{"observation/wrist_image": None}), r"has no \['observation/wrist_image'\]"),
    "unknown key": (libero_request(observation_idd=1), "unknown key 'observation_idd'"),
    "bytes key": (msgpack_numpy.packb({b"state": 1}), "keys must be text"),
    "twice": (msgpack_numpy.packb({"observation": {"state": 1}, "observation/state": 2}), "twice"),
    "delay alone": (libero_request(delay=1), "delay without committed: send both, or neither"),
    "committed alone": (libero_request(committed=np.zeros((2, 3))), "committed without delay: send both, or neither"),
    "committed of another width": (
        libero_request(committed=np.zeros((2, 4)), delay=1),
        r"committed must have shape \[N,A=3\], one row for each action, got \[2, 4\]",
    ),
    "committed with NaN": (libero_request(committed=np.full((2, 3), np.nan), delay=1), "committed contains NaN"),
    "committed as list": (libero_request(committed=[0.0] * 3, delay=1), "committed must be an array of numbers"),
    "long delay": (libero_request(committed=np.zeros((9, 3)), delay=5), "a delay of 5 control steps is as long as"),
    "delay past the plan": (libero_request(committed=np.zeros((2, 3)), delay=3), "0 to 2, got 3"),
    "delay is true": (libero_request(committed=np.zeros((2, 3)), delay=np.bool_(True)), "whole number, got True"),
    "delay of half a step": (libero_request(committed=np.zeros((2, 3)), delay=0.5), "delay"),
    "wrong state": (libero_request(**{"observation/state": np.zeros(5)}), r"array of 4 numbers, got float64 \[5\]"),
    "state as list": (libero_request(**{"observation/state": [0.0] * 4}), "array of 4 numbers, got list"),
    "msgpack-numpy objects": (nd(b"O", "|O"), "objects or fields"),
    "msgpack-numpy fields": (nd(b"V", [["a", "<f4"]]), "objects or fields"),
    "msgpack-numpy objects without a kind": (nd(b"", "|O"), "only plain numbers"),
    "msgpack-numpy without a type": (nd(b"", None), "needs nd, type, kind"),
    "msgpack-numpy of another size": (nd(b"", "<f8"), "has 16 bytes"),
    "complex state": (
        libero_request(**{"observation/state": {b"__ndarray__": True, b"data": b"", b"dtype": "<c8", b"shape": [4]}}),
        "only plain numbers",
    ),
    "NaN": (libero_request(**{"observation/state": np.array([0, np.nan, 0, 0])}), "NaN or infinite"),
    "too large for float32": (libero_request(**{"observation/state": np.full(4, 1e300)}), "NaN or infinite"),
    "float image": (libero_request(**{"observation/image": np.zeros((8, 8, 3))}), "uint8 array .*got float64"),
    "channels first": (libero_request(**{"observation/image": np.zeros((3, 8, 8), np.uint8)}), r"\[H,W,3\]"),
    "image as other bytes": (libero_request(**{"observation/image": b"\xff\xd8"}), "neither a JPEG nor a PNG"),
    "image as text": (libero_request(**{"observation/image": "\xff\xd8"}), "uint8 array"),
    "image as numbers": (libero_request(**{"observation/image": np.zeros(64, np.uint8)}), "neither a JPEG nor a PNG"),
    "tall image": (libero_request(**{"observation/image": np.zeros((250, 1, 3), np.uint8)}), "250 rows and 1 columns"),
    "wide image": (libero_request(**{"observation/image": np.zeros((2, 9, 3), np.uint8)}), "2 rows and 9 columns"),
    "large image": (libero_request(**{"observation/image": np.zeros((257, 257, 3), np.uint8)}), "at most 32 times"),
    "huge JPEG": (libero_request(**{"observation/image": jpeg_header(60_000, 60_000)}), "60000 rows"),
    "tall JPEG": (libero_request(**{"observation/image": jpeg_header(65_000, 1)}), "65000 rows and 1 columns"),
    "huge PNG": (libero_request(**{"observation/image": png(2**31 - 1, 8)}), "2147483647 rows"),
    "control characters": (libero_request(prompt="pick\x1b[2Jup"), r"character '\\x1b'"),
    "zero character": (libero_request(prompt="pick\0up"), r"character '\\x00'"),
    "many bytes": (libero_request(prompt="\u62ff" * 900), "more than 2000 bytes"),
    "half of a surrogate pair": (GOOD.replace(b"pick up", b"pi\xed\xa0\xbdup"), "not valid msgpack"),
    "no UTF-8": (GOOD.replace(b"pick up", b"pick\xffup"), "not valid msgpack"),
    "invisible": (libero_request(prompt="\u200b\u200b"), "no words"),
    "many keys": (libero_request(**{f"other{i}": i for i in range(1000)}), "unknown key|entries"),
    "many keys in many maps": (
        msgpack_numpy.packb({f"a{j}": {f"b{i}": i for i in range(100)} for j in range(90)}),
        "more than 4096 entries",
    ),
    "prompt as number": (libero_request(prompt=3), "instruction as text"),
    "prompt as array": (libero_request(prompt=np.zeros(2)), "instruction as text"),
    "prompt too long": (libero_request(prompt="x" * 1001), "1 to 1000 characters"),
    "huge text": (libero_request(prompt="x" * 100_000), "not valid msgpack"),
    "no prompt": (libero_request(prompt=None), "instruction as text"),
    "deadline": (libero_request(deadline_ms=-1), "positive number of milliseconds"),
    "id": (libero_request(observation_id="a"), "whole number"),
}


def array(**changes: Any) -> dict[str, Any]:
    """A request whose state is described by hand."""
    state = {b"__ndarray__": True, b"data": bytes(16), b"dtype": "<f4", b"shape": [4]}
    state |= {key.encode(): value for key, value in changes.items()}
    return libero_request(**{"observation/state": {key: value for key, value in state.items() if value is not None}})


BAD |= {
    "object dtype": (array(dtype="|O"), "only plain numbers"),
    "structured dtype": (array(dtype="f4,f4"), "only plain numbers"),
    "huge dtype": (array(dtype="V999999999"), "only plain numbers"),
    "subarray dtype": (array(dtype="(99999,99999)f4"), "only plain numbers"),
    "dtype as bytes": (array(dtype=b"<f4"), "only plain numbers"),
    "lying shape": (array(shape=[5]), r"shape '\[5\]' has 16 bytes"),
    "overflowing shape": (array(shape=[2**62, 2**62, 4]), "has 16 bytes"),
    "negative shape": (array(shape=[-1]), "positive whole numbers"),
    "two negatives": (array(shape=[-2, -2]), "positive whole numbers"),
    "zero shape": (array(shape=[0, 2**63], data=b""), "positive whole numbers"),
    "shape of floats": (array(shape=[4.0]), "positive whole numbers"),
    "shape as number": (array(shape=4), "positive whole numbers"),
    "many dimensions": (array(shape=[1] * 60 + [4]), "61 dimensions"),
    "strides": (array(strides=[0]), "exactly"),
    "no data": (array(data=None), "exactly"),
    "data as text": (array(data="x" * 16), "of data"),
    "scalar of text": (
        libero_request(deadline_ms={b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}),
        "value '1'",
    ),
    "scalar out of range": (
        libero_request(observation_id={b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
        "value 300",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_one_line_and_code_1011(name: str, toy: str) -> None:
    request, match = BAD[name]
    with connect(toy, compression=None) as bystander, connect(toy, compression=None) as client:
        bystander.recv()
        client.recv()
        client.send(request if isinstance(request, bytes | str) else msgpack_numpy.packb(request))
        text = client.recv(10)
        assert isinstance(text, str)
        assert "\n" not in text
        assert len(text) < 600
        assert re.search(f"^invalid request: .*({match})", text), text
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1011
        bystander.send(msgpack_numpy.packb(libero_request(5)))
        np.testing.assert_array_equal(msgpack_numpy.unpackb(bystander.recv(10))["actions"], expected(5))


def test_invalid_requests_leave_no_traceback_and_a_short_log(caplog: pytest.LogCaptureFixture) -> None:
    with serving(SumPolicy()) as (uri, _):
        for prompt in ["\u200b", "a\x07", "x" * 1001] * 20:
            with connect(uri, compression=None) as client:
                client.recv()
                client.send(msgpack_numpy.packb(libero_request(prompt=prompt)))
                assert str(client.recv(10)).startswith("invalid request: ")
    lines = [record.getMessage() for record in caplog.records]
    assert 3 <= len(lines) <= LINES + 1
    assert all(line.startswith("invalid request from 127.0.0.1: ") for line in lines)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "prompt", ["\u62ff\u8d77\u7ea2\u8272\u65b9\u5757", "\U0001f44d \u05d0", "caf\xe9\n\ttray", "\u202eab"]
)
def test_text_in_any_script_reaches_the_policy(prompt: str, toy: str) -> None:
    with connect(toy, compression=None) as client:
        client.recv()
        client.send(msgpack_numpy.packb(libero_request(prompt=prompt)))
        actions = SumPolicy().act(observation(instruction=prompt)).actions[0]
        np.testing.assert_array_equal(msgpack_numpy.unpackb(client.recv(10))["actions"], actions)


def test_requests_of_msgpack_numpy_are_answered_in_its_dialect(toy: str) -> None:
    def packed(value: Any) -> dict[bytes, Any]:  # as msgpack_numpy.encode
        if isinstance(value, np.ndarray):
            return {
                b"nd": True,
                b"type": value.dtype.str,
                b"kind": b"",
                b"shape": value.shape,
                b"data": value.tobytes(),
            }
        return {b"nd": False, b"type": value.dtype.str, b"data": value.tobytes()}

    def unpacked(value: dict[Any, Any]) -> Any:  # as msgpack_numpy.decode
        return np.ndarray(value[b"shape"], value[b"type"], value[b"data"]) if value.get(b"nd") else value

    with connect(toy, compression=None) as client:
        client.recv()
        for request in (libero_request(4), libero_request(4, observation_id=7, deadline_ms=np.float64(9e6))):
            client.send(msgpack.packb(request, default=packed))
            answer = msgpack.unpackb(client.recv(10), object_hook=unpacked)
            np.testing.assert_array_equal(answer["actions"], expected(4))


def test_requests_survive_the_wire() -> None:
    reader = RequestFormat(ROBOT, LIBERO_KEYS)
    request = reader.read(reader.write(observation(3), observation_id=9, deadline_s=0.25))
    assert (request.observation_id, request.deadline_s) == (9, 0.25)
    assert request.observation.instruction == observation(3).instruction
    np.testing.assert_array_equal(request.observation.state, observation(3).state)
    for name in ROBOT.camera_names:
        np.testing.assert_array_equal(request.observation.images[name], observation(3).images[name])
    with pytest.raises(ValueError, match="names the cameras"):
        RequestFormat(ROBOT, RequestKeys(images={"front": "images/front"}))
    with pytest.raises(ValueError, match="twice"):
        RequestFormat(ROBOT, RequestKeys(images={"agentview": "state", "wrist": "images/wrist"}))


def outcome(frame: bytes | str) -> PolicyRequest | str:
    """What a frame is taken for: a request that a policy can be given, or the error text of one line."""
    try:
        request = READER.read(frame)
    except FrameError as error:
        text = str(error)
        assert text.isprintable()
        assert len(text) < 600
        return text
    request.observation.validate(ROBOT)
    assert request.observation.batch_size == 1
    assert request.observation.state.dtype == np.float32
    return request


def mutated(rng: random.Random) -> bytes:
    """A good frame with some bytes changed, removed, inserted or repeated."""
    frame = bytearray(GOOD)
    for _ in range(rng.randint(1, 3)):
        # most of a frame are pixels, and those may be anything: half of the changes are elsewhere
        at = rng.choice(HEADERS) % len(frame) if rng.random() < 0.5 else rng.randrange(len(frame))
        length = rng.randint(1, 8)
        match rng.randrange(6):
            case 0:
                frame[at] = rng.randrange(256)
            case 1:
                frame[at] ^= 1 << rng.randrange(8)
            case 2:
                del frame[at : at + length]
            case 3:
                frame[at:at] = rng.randbytes(length)
            case 4:
                frame[at:at] = frame[at : at + length]
            case _:
                frame[at] = rng.choice(MARKERS)
    return bytes(frame)


MARKERS = [*range(0x80, 0xA4), *range(0xC0, 0xE0)]
"""First bytes of msgpack's maps, lists, texts and numbers of every size."""
PIXELS = 190  # of each of the two images
HEADERS = [
    at for at in range(len(GOOD)) if not any(m.end() + 2 <= at < m.end() + PIXELS for m in re.finditer(b"data", GOOD))
]


def test_fuzz_of_changed_frames() -> None:
    rng = random.Random(0)
    outcomes = [outcome(mutated(rng)) for _ in range(80_000)]
    accepted = [each for each in outcomes if isinstance(each, PolicyRequest)]
    assert 1_000 < len(accepted) < 60_000, "changed pixels are fine, most other changes are not"
    assert len({re.sub(r"[^a-z ]+", "", text)[:25] for text in outcomes if isinstance(text, str)}) > 15


def test_fuzz_of_random_bytes() -> None:
    rng = random.Random(1)
    for _ in range(20_000):
        assert isinstance(outcome(rng.randbytes(rng.randrange(64))), str)


NUMPY = st.fixed_dictionaries(
    {
        b"__ndarray__": st.sampled_from([True, True, True, False, 1, None]),
        b"data": st.sampled_from([b"", bytes(4), bytes(16), bytes(192), "x", None]),
        b"dtype": st.sampled_from(["<f4", ">f4", "|u1", "<i8", "<f8", "|O", "V4", "<U2", "<M8[ns]", "", b"<f4", 3]),
        b"shape": st.lists(st.sampled_from([1, 3, 4, 8, 16, 0, -1, 2**63, 1.5, None, "4"]), max_size=4),
    }
)
TEXTS = st.text(max_size=9) | st.binary(max_size=9)
NUMBERS = st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats()
VALUES = st.recursive(
    st.none() | NUMBERS | TEXTS | NUMPY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=500, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.dictionaries(st.sampled_from([*libero_request(), "observation_id", "deadline_ms", "other"]), VALUES))
def test_fuzz_of_values(changes: dict[str, Any]) -> None:
    outcome(msgpack_numpy.packb({**libero_request(), **changes}))


def test_fuzz_over_the_wire(toy: str) -> None:
    rng = random.Random(2)
    for _ in range(400):
        frame = mutated(rng) if rng.random() < 0.8 else rng.randbytes(rng.randrange(64))
        taken = outcome(frame)
        with connect(toy, compression=None) as client:
            client.recv(30)
            client.send(frame)
            answer = client.recv(30)
            if isinstance(taken, PolicyRequest):
                actions = SumPolicy().act(taken.observation).actions[0]
                np.testing.assert_array_equal(msgpack_numpy.unpackb(answer)["actions"], actions)
            else:
                assert answer == f"invalid request: {taken}"
    with connect(toy, compression=None) as client:
        client.recv(30)
        client.send(GOOD)
        np.testing.assert_array_equal(msgpack_numpy.unpackb(client.recv(30))["actions"], expected())


@pytest.mark.parametrize("dtype", ["?", "i1", "<i2", ">i4", "<u8", "<f2", "<f4", ">f8"])
def test_arrays_and_scalars_are_openpis(dtype: str) -> None:
    value = {"array": np.arange(6).astype(dtype).reshape(2, 3), "scalar": np.dtype(dtype).type(1), "text": "a"}
    assert pack(value) == msgpack_numpy.packb(value)
    back = unpack(pack(value))
    np.testing.assert_array_equal(back["array"], value["array"])
    assert back["array"].dtype == value["array"].dtype
    assert not back["array"].flags.writeable
    assert back["scalar"] == value["scalar"]


@pytest.mark.parametrize("value", [np.array([object()]), np.zeros(2, complex), np.array(["a"]), {1}])
def test_nothing_but_numbers_is_sent(value: Any) -> None:
    with pytest.raises(ValueError, match="cannot send"):
        pack({"value": value})


def test_numbers_of_numpy_are_numbers() -> None:
    numbers = {"observation_id": np.int32(4), "deadline_ms": np.float32(40), "delay": np.int64(1)}
    request = READER.read(msgpack_numpy.packb(libero_request(committed=np.zeros((2, 3)), **numbers)))
    assert (request.observation_id, request.deadline_s) == (4, 0.04)
    assert [each.delay for each in request.observation.committed or () if each is not None] == [1]
