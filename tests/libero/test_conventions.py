"""`check_conventions` on LIBERO's HDF5 files and on what `convert_libero` makes of them; needs the extra and assets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from cogvla.libero.conventions.declared import Finding
from cogvla.libero.conventions.recorded_episodes import open_recordings
from cogvla.libero.env import LiberoEnv
from cogvla.libero.hdf5.conversion import CONVERSION, INITIAL_STATES, Conversion, convert
from cogvla.libero.hdf5.reader import read
from cogvla.policy.data.config import DataConfig
from cogvla.policy.interface import Camera, Embodiment
from cogvla.scripts import check_conventions as command
from cogvla.scripts import convert_libero
from cogvla.scripts.command import compose
from cogvla.tests.support.extras import needs
from cogvla.tests.support.libero_assets import ASSETS, LEAN, MESHES, needs_assets

pytest.importorskip("h5py", reason=needs("libero"))

import h5py

from cogvla.tests.support.libero_files import Demo, write

pytestmark = needs_assets
STOVE, STEPS = "turn_on_the_stove", 45
VIEWS = {"agentview": "observation.images.agentview", "wrist": "observation.images.wrist"}
ROBOT = Embodiment(
    "libero", tuple(Camera(name, 32, 32) for name in VIEWS), 8, 7, chunk=8, control_hz=20, gripper_index=6
)


@pytest.fixture(scope="module")
def demos() -> list[Demo]:
    """The knob is turned from the start, so that the task is done; arm and gripper move about."""
    env = LiberoEnv("libero_goal", LEAN, image_size=64)
    task = [task.name for task in env.tasks].index(STOVE)
    found = []
    for number in range(2):
        rng = np.random.default_rng(number)
        actions = np.repeat(rng.uniform(-0.8, 0.8, (9, 7)), 5, axis=0)
        actions[:, 3:6] *= 0.3
        actions[:, 6] = np.where((np.arange(STEPS) // 15) % 2 == 1, 1, -1)
        actions[7, :6] = 0  # a no-op
        env.reset(options={"task": task, "initial_state": number})
        (knob,) = env.scene.env.get_object("flat_stove_1").joints
        env.scene.data.joint(knob).qpos = 1.5
        env.scene.model.body("wooden_cabinet_1_main").pos += [0.05, 0, 0]  # another place than in evaluations
        states, seen = [], []
        images: dict[str, list[np.ndarray]] = {"agentview": [], "eye_in_hand": []}
        for step, action in enumerate(actions):
            states.append(env.scene.env.sim.get_state().flatten())
            env.skip_images = step not in (0, 10)
            observation, *_ = env.step(action)
            seen.append(observation["state"])
            for camera, name in (("agentview", "agentview"), ("eye_in_hand", "wrist")):
                images[camera].append(observation[name][::-1, ::-1])  # as robosuite hands them out
        model = env.scene.env.sim.model.get_xml()
        found.append(
            Demo(actions, np.stack(states), np.stack(seen), {k: np.stack(v) for k, v in images.items()}, model)
        )
    env.close()
    return found


def save(folder: Path, demos: list[Demo], **attributes: str) -> Path:
    folder.mkdir(exist_ok=True)
    return write(folder / f"{STOVE}_demo.hdf5", demos, **attributes)


def check(source: Path, *overrides: str) -> tuple[dict[str, Finding], int]:
    output = source.parent / "report.json"
    settings = [f"libero.assets={ASSETS}", "libero.reflections=false", f"output={output}", "episodes=2"]
    settings += [f"libero.robot_meshes={MESHES}"] if MESHES else []
    try:
        command.main([str(source), *settings, *overrides])
    except SystemExit as stop:
        code = int(stop.code or 0)
    else:
        code = 0
    return {values["check"]: Finding(**values) for values in json.loads(output.read_text())["findings"]}, code


def mismatches(findings: dict[str, Finding]) -> list[str]:
    return [name for name, finding in findings.items() if finding.verdict == "mismatch"]


def test_the_original_files_are_right_as_they_are(demos: list[Demo], tmp_path: Path) -> None:
    findings, code = check(save(tmp_path / "right", demos))
    assert (mismatches(findings), code) == ([], 0)
    assert findings["images of agentview"].text.startswith("rotated 180, as in all files of this kind")
    assert findings["time"].text == "each row was observed after its action, as in all files of this kind"
    assert findings["replay"].text.startswith("2 of 2 recorded episodes succeed again")
    assert findings["replay"].measured["position_error_m"]["100 %"]["max"] < 0.003
    assert findings["motion"].measured.keys() >= {"x", "y", "z"}


def folded(seen: np.ndarray) -> np.ndarray:
    """The angle is about pi there: the published convention goes beyond, many others do not."""
    angle = np.linalg.norm(seen[:, 3:6], axis=1, keepdims=True)
    return np.where(angle > np.pi, seen[:, 3:6] * (1 - 2 * np.pi / angle), seen[:, 3:6])


MISTAKES: dict[str, tuple[Callable[[Demo], Demo], list[str], str]] = {
    "images turned already": (
        lambda demo: replace(demo, images={k: v[:, ::-1, ::-1] for k, v in demo.images.items()}),
        ["images of agentview", "images of wrist"],
        "they are oriented as in the simulator",
    ),
    "agentview flipped": (
        lambda demo: replace(demo, images={**demo.images, "agentview": demo.images["agentview"][:, ::-1]}),
        ["images of agentview"],
        "they are flipped horizontally",
    ),
    "quaternion sign": (
        lambda demo: replace(demo, seen=np.column_stack([demo.seen[:, :3], folded(demo.seen), demo.seen[:, 6:]])),
        ["rotation"],
        "folded into angles up to pi",
    ),
    "gripper as in RLDS": (
        lambda demo: replace(demo, actions=np.column_stack([demo.actions[:, :6], (1 - demo.actions[:, 6]) / 2])),
        ["gripper"],
        "1 opens and 0 closes",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_named(name: str, demos: list[Demo], tmp_path: Path) -> None:
    change, expected, text = MISTAKES[name]
    findings, code = check(save(tmp_path / "wrong", [change(demo) for demo in demos]))
    assert (mismatches(findings), code) == (expected, 1)
    assert text in findings[expected[0]].text


def test_fixtures_stand_where_they_were_recorded(demos: list[Demo], tmp_path: Path) -> None:
    recording = read(save(tmp_path / "right", demos), "demo_0")
    env = LiberoEnv("libero_goal", LEAN, image_size=32, render=False)
    places = []
    for fixtures in (None, recording.fixtures):
        env.restore(recording.states_TD[0], 7, fixtures)
        places.append(env.scene.data.body("wooden_cabinet_1_main").xpos.copy())
    assert places[1] - places[0] == pytest.approx([0.05, 0, 0], abs=0.03), "up to where evaluations have it"
    assert places[1] == pytest.approx(recording.fixtures["wooden_cabinet_1_main"][:3])
    with pytest.raises(ValueError, match="has a fixture washing_machine_1_main, this scene has not"):
        env.restore(recording.states_TD[0], 7, {"washing_machine_1_main": np.zeros(7)})
    assert sorted(env.scene.fixtures) == sorted(recording.fixtures)
    env.close()


def without(model: str, *names: str) -> str:
    """The model without some of its fixtures."""
    root = ElementTree.fromstring(model)
    world = root.find("worldbody")
    assert world is not None
    for body in [body for body in world if body.get("name") in names]:
        world.remove(body)
    return ElementTree.tostring(root, encoding="unicode")


STOOD = "flat_stove_1_main", "wine_rack_1_main", "wooden_cabinet_1_main"
MODELS: dict[str, tuple[Callable[[str], str | None], tuple[str, ...]]] = {
    "no model": (lambda _: None, STOOD),
    "an empty world": (lambda _: "<mujoco><worldbody/></mujoco>", STOOD),
    "one fixture is missing": (lambda model: without(model, "wooden_cabinet_1_main"), STOOD[2:]),
    "inside a frame": (
        lambda model: model.replace("<worldbody>", "<worldbody><frame>").replace(
            "</worldbody>", "</frame></worldbody>"
        ),
        STOOD,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_fixtures_that_are_not_recorded_are_named(
    name: str, demos: list[Demo], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, missing = MODELS[name]
    source = save(tmp_path / "source", [replace(demo, model=change(demo.model or "")) for demo in demos])
    findings, _ = check(source)
    assert findings["fixtures"].verdict == "note"
    assert f"2 of 2 replayed episodes do not say where {', '.join(missing)} stood" in findings["fixtures"].text

    settings = [f"libero.assets={ASSETS}", "libero=lean", "image_size=32", "workers=0"]
    settings += [f"libero.robot_meshes={MESHES}"] if MESHES else []
    root = tmp_path / "converted"
    for _ in range(2):  # the second time it is there already
        convert_libero.main(compose("convert_libero", [f"source={source}", f"output={root}", *settings]))
        said = capsys.readouterr().err
        assert f"warning: {source.name}: 2 demonstrations do not say where" in said
        assert all(fixture in said for fixture in missing)
    assert "2 demonstrations do not say where" in (root / "README.md").read_text()
    [warning] = json.loads((root / CONVERSION).read_text())["warnings"]
    findings, _ = check(root)
    assert findings["files"].text == warning
    assert findings["fixtures"].measured["fixtures"] == sorted(missing)


def test_actions_need_no_recorded_fixtures(demos: list[Demo], tmp_path: Path) -> None:
    source = save(tmp_path / "source", [replace(demo, model=None) for demo in demos])
    root = convert(Conversion.of(source, None, LEAN, replay="actions", image_size=32), tmp_path / "converted", 0)
    assert json.loads((root / CONVERSION).read_text())["warnings"] == []
    findings, _ = check(root)
    assert not {"files", "fixtures"} & findings.keys()


def test_initial_states_of_other_episodes_are_refused(demos: list[Demo], tmp_path: Path) -> None:
    source = save(tmp_path / "source", demos)
    root = convert(Conversion.of(source, None, LEAN, image_size=32), tmp_path / "converted", 0)
    path = root / INITIAL_STATES
    whole = json.loads(path.read_text())["episodes"]
    for episodes, said in (
        (whole[:1], "is not of these 2 episodes: the data set was edited"),
        (whole * 2, "is not of these 2 episodes"),
        ([{**whole[0], "state": "none"}, whole[1]], "episode 0 is damaged"),
        ([whole[0], {}], r"episode 1 is damaged \(KeyError: 'task'\)"),
    ):
        path.write_text(json.dumps({"episodes": episodes}))
        recordings = open_recordings(str(root), DataConfig(VIEWS, root=str(root)), ROBOT)
        with pytest.raises(ValueError, match=said):
            _ = recordings.episodes
    path.write_text("[")
    with pytest.raises(ValueError, match=r"initial_states\.json is damaged"):
        _ = open_recordings(str(root), DataConfig(VIEWS, root=str(root)), ROBOT).episodes


def test_other_keys_are_named(demos: list[Demo], tmp_path: Path) -> None:
    source = save(tmp_path / "source", demos)
    with h5py.File(source, "a") as file:
        for key in file["data"]:
            file["data"][key].move("obs/agentview_rgb", "obs/agentview_image")
            file["data"][key].move("obs/gripper_states", "obs/robot0_gripper_qpos")
    findings, code = check(source)
    assert (mismatches(findings), code) == ([], 0)
    assert findings["files"].text.startswith(
        f"{source.name} has no obs/agentview_rgb, obs/gripper_states, so these are"
    )
    assert "obs/agentview_image" in findings["files"].text
    assert "images of wrist" in findings
    assert "images of agentview" not in findings


def test_data_of_several_suites_are_checked_suite_by_suite(demos: list[Demo], tmp_path: Path) -> None:
    source = save(tmp_path / "several", demos)
    write(source.with_name("pick_up_the_milk_and_place_it_in_the_basket_demo.hdf5"), demos, suite="libero_object")
    findings, code = check(source.parent, "suite=libero_goal")
    assert (mismatches(findings), code) == ([], 0)
    assert findings["instructions"].text == "1 of 10 tasks; 1 are of other suites"
    assert findings["replay"].measured["episodes"] == 2


def test_another_version_is_named(demos: list[Demo], tmp_path: Path) -> None:
    findings, _ = check(save(tmp_path / "wrong", demos, mujoco_version="2.3.7"))
    assert mismatches(findings) == ["versions"]
    assert "recorded with mujoco 2.3.7" in findings["versions"].text


@pytest.mark.parametrize("by", ["states", "actions"])
def test_what_was_converted_is_right(by: str, demos: list[Demo], tmp_path: Path) -> None:
    source = save(tmp_path / "source", demos)
    conversion = Conversion.of(source, None, LEAN, replay=by, image_size=64)
    root = convert(conversion, tmp_path / "converted", workers=0)
    findings, code = check(root)
    assert (mismatches(findings), code) == ([], 0)
    assert findings["versions"].verdict == "ok"
    assert findings["replay"].text.startswith("2 of 2")
    drift = findings["replay"].measured["position_error_m"]["100 %"]["max"]
    assert drift < (0.03 if by == "states" else 1e-6), "one no-op is left out"
    if by == "states":  # what a data set without beginnings still tells
        (root / "meta" / "initial_states.json").unlink()
        findings, code = check(root)
        assert (mismatches(findings), code) == ([], 0)
        assert [name for name, f in findings.items() if f.verdict == "not checked"] == ["time", "replay"]
