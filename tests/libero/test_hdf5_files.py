"""HDF5 files that are not LIBERO's, are damaged, or contradict themselves: one line with file, demonstration and part.

They need the extra `libero`, but no assets.
"""

from __future__ import annotations

import fcntl
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvla.libero.conventions.recorded_episodes import Hdf5Recordings
from cogvla.libero.hdf5.reader import demonstrations, is_hdf5, lacks, read, read_images
from cogvla.tests.support.extras import needs
from cogvla.tests.support.libero_assets import needs_libero

pytest.importorskip("h5py", reason=needs("libero"))

import h5py

from cogvla.tests.support.libero_files import made_up, write

pytestmark = needs_libero
TASK = "turn_on_the_stove"
NAME = f"{TASK}_demo.hdf5"
STEPS = 4
NUMBERS = np.zeros((STEPS, 20))
BAD_NUMBERS = np.where(np.arange(STEPS)[:, None] == 2, np.inf, NUMBERS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A right file with two demonstrations."""
    actions = np.zeros((STEPS, 7))
    return write(tmp_path / NAME, [made_up(actions), made_up(actions, seed=1)])


def everything(path: Path) -> None:
    """Read all that is in a file."""
    for file in demonstrations(path):
        for key in file.keys:
            read(file.path, key)
            for camera in ("agentview", "wrist"):
                read_images(file.path, key, camera, [0, 1])


def complaint(path: Path) -> str:
    with pytest.raises(ValueError, match=NAME) as error:
        everything(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- no HDF5 file ----------------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 12345\n"
NO_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "LFS": (lambda _: LFS, r"is a Git LFS pointer, not the data: run `git lfs pull`"),
    "HTML": (lambda _: b"\n<!doctype html><html>Please log in</html>", "is a web page"),
    "XML": (lambda _: b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
    "zip": (lambda whole: b"PK\x03\x04" + whole, "is a ZIP archive"),
    "AppleDouble": (lambda _: b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "is a hidden file of macOS"),
    "gzip": (gzip.compress, "is compressed by gzip"),
    "nothing": (lambda _: b"", "is empty"),
    "text": (lambda _: b"hello" * 100, "is no HDF5 file"),
    "half": (lambda whole: whole[: len(whole) // 2], "is cut off"),
    "all but the end": (lambda whole: whole[:-1], "is cut off"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_hdf5_file(kind: str, path: Path) -> None:
    made, said = NO_FILES[kind]
    path.write_bytes(made(path.read_bytes()))
    assert said in complaint(path)


def test_a_file_that_another_process_writes(path: Path) -> None:
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is locked, because another process writes it" in complaint(path)
    everything(path)


def test_missing_files_and_folders_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing_demo\.hdf5 does not exist"):
        read(tmp_path / "nothing_demo.hdf5", "demo_0")
    (tmp_path / NAME).mkdir()
    with pytest.raises(ValueError, match=f"{NAME} cannot be read"):
        demonstrations(tmp_path)


def test_damaged_data_inside_a_whole_file(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["data/demo_1/states"]
        rows = np.random.default_rng(0).normal(size=(STEPS, 20))
        file.create_dataset("data/demo_1/states", data=rows, compression="gzip", chunks=(STEPS, 20))
        place = file["data/demo_1/states"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    assert "is damaged" in complaint(path)


def test_hidden_files_are_not_data(path: Path) -> None:
    """As macOS writes them on other file systems, and other programs into their own folders."""
    for name in (f"._{NAME}", ".DS_Store", f".{NAME}.part", f".trash/{NAME}"):
        hidden = path.with_name(name) if "/" not in name else path.parent / name
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(b"\x00\x05\x16\x07")
    assert [file.path for file in demonstrations(path.parent)] == [path]
    path.unlink()
    assert not is_hdf5(path.parent)
    with pytest.raises(ValueError, match="there are no LIBERO demonstrations"):
        demonstrations(path.parent)


# --- what is in it ---------------------------------------------------------------------------------------------------


def put(name: str, values: Any) -> Callable[[Any], None]:
    """Replace a data set of demo_1."""

    def change(data: Any) -> None:
        if name in data["demo_1"]:
            del data["demo_1"][name]
        data["demo_1"][name] = values

    return change


def renamed(data: Any) -> None:
    for number in (0, 1):
        data.move(f"demo_{number}", f"episode_{number}")


def a_group(data: Any) -> None:
    del data["demo_1"]["states"]
    data["demo_1"]["states/x"] = NUMBERS


def drop(name: str) -> Callable[[Any], None]:
    return lambda data: data.__delitem__(name)


def say(name: str, value: Any, demo: bool = False) -> Callable[[Any], None]:
    """Set an attribute of the data, or of demo_1."""
    return lambda data: (data["demo_1"] if demo else data).attrs.__setitem__(name, value)


def robomimic(data: Any) -> None:
    names = {"agentview_rgb": "agentview_image", "eye_in_hand_rgb": "robot0_eye_in_hand_image"}
    names |= {"ee_pos": "robot0_eef_pos", "gripper_states": "robot0_gripper_qpos"}
    for key in ("demo_0", "demo_1"):
        for old, new in names.items():
            data[key].move(f"obs/{old}", f"obs/{new}")


def environment(**settings: Any) -> Callable[[Any], None]:
    return say("env_args", json.dumps({"env_kwargs": settings}))


def model(body: str) -> Callable[[Any], None]:
    return say("model_file", f"<mujoco><worldbody>{body}</worldbody></mujoco>", demo=True)


CONTRADICTIONS: dict[str, tuple[Callable[[Any], None], str]] = {
    # keys
    "no states": (drop("demo_1/states"), "demo_1 has no data set 'states'; it has actions, dones"),
    "no actions": (drop("demo_1/actions"), "demo_1 has no data set 'actions'; it has dones"),
    "a group of that name": (a_group, "demo_1 has no data set 'states'"),
    "robomimic's names": (
        robomimic,
        "no images 'obs/agentview_rgb' of agentview; it has actions, dones, obs/agent",
    ),
    "no demonstrations": (lambda data: data.clear(), "its data has nothing"),
    "other names": (renamed, "its data has episode_0, episode_1"),
    "something beside": (lambda data: data.copy("demo_0", "demo_0_copy"), "data has demo_0_copy beside"),
    # shapes, types, values
    "actions [T,6]": (put("actions", np.zeros((STEPS, 6))), "demo_1: actions must have shape [T,7], it has (4, 6)"),
    "actions [T]": (put("actions", np.zeros(STEPS)), "actions must have shape [T,7], it has (4,)"),
    "actions of text": (put("actions", [b"up"] * STEPS), "actions must hold numbers of shape [T,7]"),
    "states [T,D,1]": (put("states", NUMBERS[..., None]), "states must have shape [T,D], it has (4, 20, 1)"),
    "an empty demonstration": (put("actions", np.zeros((0, 7))), "demo_1: actions is empty"),
    "NaN actions": (
        put("actions", np.full((STEPS, 7), np.nan)),
        "actions holds NaN or infinite values, first in row",
    ),
    "infinite states": (put("states", BAD_NUMBERS), "demo_1: states holds NaN or infinite values, first in row 2"),
    "NaN positions": (put("obs/ee_pos", np.full((STEPS, 3), np.nan)), "obs/ee_pos holds NaN"),
    "fingers [T,1]": (put("obs/gripper_states", np.zeros((STEPS, 1))), "obs/gripper_states must have shape [T,2]"),
    "float images": (
        put("obs/agentview_rgb", np.zeros((STEPS, 8, 8, 3))),
        "obs/agentview_rgb must hold images uint8 [T,H,W,3], it holds float64 (4, 8, 8, 3)",
    ),
    "channels first": (put("obs/eye_in_hand_rgb", np.zeros((STEPS, 3, 8, 8), np.uint8)), "it holds uint8 (4, 3, 8, 8)"),
    # lengths
    "more states": (put("states", np.zeros((STEPS + 1, 20))), "demo_1 has 4 actions, but 5 states"),
    "fewer images": (put("obs/agentview_rgb", np.zeros((3, 8, 8, 3), np.uint8)), "4 actions, but 3 obs/agentview_rgb"),
    "fewer rewards": (put("rewards", np.zeros(2)), "4 actions, but 2 rewards"),
    "another num_samples": (say("num_samples", 9, demo=True), "4 actions, but 9 num_samples"),
    "two poses": (put("obs/ee_states", np.ones((STEPS, 6))), "obs/ee_states is not obs/ee_pos with obs/ee_ori"),
    # attributes
    "more num_demos": (say("num_demos", 50), "num_demos is 50, the file has 2 demonstrations"),
    "fewer num_demos": (say("num_demos", 1), "num_demos is 1, the file has 2"),
    "num_demos of text": (say("num_demos", "many"), "num_demos must be a whole number"),
    "no JSON": (say("problem_info", "turn it on"), "problem_info is no JSON"),
    "a list": (say("problem_info", "[1]"), "problem_info must be a JSON object"),
    "no language": (say("problem_info", '{"problem_name": "x"}'), "problem_info has no language_instruction"),
    "empty language": (
        say("problem_info", '{"language_instruction": " "}'),
        "problem_info has no language_instruction",
    ),
    "env_args": (say("env_args", "{"), "env_args is no JSON"),
    "another task": (
        say("bddl_file_name", "/home/me/bddl_files/libero_goal/put_the_bowl_on_the_stove.bddl"),
        "is of the task put_the_bowl_on_the_stove",
    ),
    "another rate": (environment(control_freq=10), "env_args has control_freq 10, LIBERO's is 20"),
    "another controller": (environment(controller_configs={"type": "JOINT_POSITION"}), "controller_configs JOINT_POS"),
    "absolute actions": (
        environment(controller_configs={"type": "OSC_POSE", "control_delta": False}),
        "env_args has controller_configs.control_delta False, LIBERO's is True: its actions have another meaning",
    ),
    "larger steps": (environment(controller_configs={"output_max": [0.1] * 6}), "controller_configs.output_max [0.1"),
    "another robot": (environment(robots=["Sawyer"]), "robots ['Sawyer'], LIBERO's is Panda"),
    # models
    "no XML": (say("model_file", "<mujoco><worldbody>", demo=True), "demo_1: the attribute model_file is no XML"),
    "a path": (say("model_file", "/home/me/model.xml", demo=True), "model_file is no XML"),
    "a number": (say("model_file", 3, demo=True), "model_file must be text"),
    "no position": (
        model('<body name="stove_main" pos="here"/>'),
        "quat of the fixture stove_main are no pose",
    ),
    "two numbers": (model('<body name="stove_main" pos="1 2"/>'), "quat of the fixture stove_main are no pose"),
    "no direction": (model('<body name="stove_main" quat="0 0 0 0"/>'), "of the fixture stove_main are no pose"),
    "Euler angles": (model('<body name="stove_main" euler="0 0 1"/>'), "turns the fixture stove_main by euler"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_is_wrong_is_named(name: str, path: Path) -> None:
    change, said = CONTRADICTIONS[name]
    with h5py.File(path, "a") as file:
        change(file["data"])
    assert said in complaint(path)


def test_a_file_of_something_else(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["weights/layer_0"] = np.ones(3)
    assert "has no group 'data', so it is no file of LIBERO demonstrations; it has weights/layer_0" in complaint(path)


OSC_POSE = {
    "type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5], "kp": 150, "damping_ratio": 1, "impedance_mode": "fixed",
    "control_delta": True, "interpolation": None, "ramp_ratio": 0.2,
}  # fmt: skip
FINE: dict[str, Callable[[Any], Any]] = {
    "assets of another machine": say(
        "model_file",
        '<mujoco><asset><mesh file="/home/me/stove.obj"/></asset><worldbody><body name="a_main"/></worldbody></mujoco>',
        demo=True,
    ),
    "attributes of bytes": say("bddl_file_name", np.bytes_(f"bddl_files/libero_goal/{TASK}.bddl")),
    "a list of words": say("problem_info", json.dumps({"language_instruction": ["turn", "on", "the", "stove"]})),
    "names from before publication": say("bddl_file_name", "chiliocosm/bddl_files/libero_100/turn_the_stove_on.bddl"),
    "no names": lambda data: [data.attrs.__delitem__(name) for name in ("bddl_file_name", "env_args", "problem_info")],
    "a path of Windows": say("bddl_file_name", rf"C:\bddl_files\libero_goal\{TASK}.bddl"),
    "whole numbers": put("actions", np.zeros((STEPS, 7), np.int32)),
    "gaps in the numbers": lambda data: data.move("demo_0", "demo_7"),
    "LIBERO's settings": environment(control_freq=20, controller_configs=OSC_POSE, robots=["MountedPanda"]),
    "images of another size": put("obs/agentview_rgb", np.zeros((STEPS, 9, 7, 3), np.uint8)),
    "a number beside the rows": put("seed", 3),
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_fine(name: str, path: Path) -> None:
    with h5py.File(path, "a") as file:
        FINE[name](file["data"])
    everything(path)
    [found] = demonstrations(path)
    assert (found.task, found.suite) == (TASK, "libero_goal")


def test_the_pose_is_read_from_one_data_set_or_from_two(path: Path) -> None:
    both = read(path, "demo_0").observed_TS
    assert both is not None
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/ee_pos"]
    joined = read(path, "demo_0").observed_TS
    assert joined is not None
    np.testing.assert_array_equal(joined, both)
    assert lacks(path, "demo_0")[0] == []
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/ee_states"]
        del file["data/demo_0/obs/agentview_rgb"]
    assert read(path, "demo_0").observed_TS is None
    missing, there = lacks(path, "demo_0")
    assert missing == ["obs/agentview_rgb", "obs/ee_pos"]
    assert there.startswith("actions, dones, obs/ee_ori")


# --- several files ---------------------------------------------------------------------------------------------------


def test_all_files_say_their_version(path: Path) -> None:
    actions = np.zeros((STEPS, 7))
    write(path.parent / "open_the_middle_drawer_of_the_cabinet_demo.hdf5", [made_up(actions)], mujoco_version="3.3.2")
    write(path, [made_up(actions)], mujoco_version="2.3.7")
    assert Hdf5Recordings(path.parent).simulation["mujoco"] == "2.3.7 and 3.3.2"


def test_files_of_two_kinds_are_not_checked_as_one(path: Path) -> None:
    other = write(path.parent / "open_the_middle_drawer_of_the_cabinet_demo.hdf5", [made_up(np.zeros((STEPS, 7)))])
    with h5py.File(other, "a") as file:
        del file["data"].attrs["problem_info"]
    with pytest.raises(ValueError, match=r"two kinds.*open_the_middle.* is of the published regeneration, turn_on"):
        Hdf5Recordings(path.parent)
