"""`check_conventions`: nothing is found in a data set that is right, and each of the classic mistakes is named.

The tabletop suites stand in for LIBERO, which needs assets; what differs there is tested below with LIBERO itself.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvla.envs.recording.dataset_writer import DatasetWriter
from cogvla.envs.recording.demonstration import Demonstration, pack
from cogvla.envs.recording.demonstrator import SEED_STRIDE, Demonstrator, DemonstratorSettings, randomised
from cogvla.envs.recording.recorder import record
from cogvla.envs.suite import FIRST_TRAINING_STATE, get_suite
from cogvla.envs.tabletop.expert import Expert
from cogvla.libero.conventions import declared as conventions
from cogvla.libero.conventions.declared import Finding
from cogvla.libero.conventions.recorded_episodes import open_recordings
from cogvla.policy.data.config import DataConfig
from cogvla.scripts import check_conventions as command
from cogvla.tests.support.point_suite import EMBODIMENT

SUITE = "tabletop_goal"
AGENTVIEW, WRIST = "observation.images.agentview", "observation.images.wrist"
ACTION, EXECUTED, STATE = "action", "label.executed_action", "observation.state"
Change = Callable[[Demonstration], Demonstration]


@pytest.fixture(scope="module")
def recorded() -> list[Demonstration]:
    suite = get_suite(SUITE)
    instructions = tuple(task.instruction for task in suite.tasks)
    player = Demonstrator(DemonstratorSettings(suite.make, Expert, instructions, suite.max_steps, 64, 1.0, seed=0))
    episodes = [player.record(slot)[0] for slot in (0, 3, 6)]
    player.close()
    return episodes


@pytest.fixture(scope="module")
def counterfactual() -> list[Demonstration]:
    suite = get_suite(SUITE)
    names = tuple(task.instruction for task in suite.tasks)
    settings = DemonstratorSettings(suite.make, Expert, names, suite.max_steps, 64, 1.0, seed=0, counterfactual=1.0)
    player = Demonstrator(settings)
    episodes = [player.record(slot)[0] for slot in (0, 3, 6)]
    player.close()
    return episodes


def write(root: Path, episodes: Sequence[Demonstration], mujoco: str | None = None, video: bool = False) -> Path:
    writer = DatasetWriter(root, f"cogvla/{SUITE}", episodes[0], "panda", video)
    for episode in episodes:
        writer.add(episode)
    writer.close()
    simulation = {"simulation": {"mujoco": mujoco}} if mujoco else {}
    (root / "meta" / "recording.json").write_text(json.dumps({"suite": SUITE, **simulation}))
    return root


def check(root: Path, *overrides: str) -> tuple[dict[str, Finding], int]:
    """The findings by name, and the exit status."""
    output = root.parent / "report.json"
    try:
        command.main([str(root), "embodiment=tabletop", "episodes=3", f"output={output}", *overrides])
    except SystemExit as stop:
        code = int(stop.code or 0)
    else:
        code = 0
    report = json.loads(output.read_text())
    return {values["check"]: Finding(**values) for values in report["findings"]}, code


def mismatches(findings: dict[str, Finding]) -> list[str]:
    return [name for name, finding in findings.items() if finding.verdict == "mismatch"]


def arrays(**changes: Callable[[np.ndarray], np.ndarray]) -> Change:
    names = {"action": ACTION, "executed": EXECUTED, "state": STATE}

    def change(episode: Demonstration) -> Demonstration:
        made = {names[key]: f(episode.arrays[names[key]]).astype(np.float32) for key, f in changes.items()}
        return replace(episode, arrays=episode.arrays | made)

    return change


def pictures(turn: Callable[[np.ndarray], np.ndarray], *cameras: str) -> Change:
    def change(episode: Demonstration) -> Demonstration:
        steps: dict[str, list[np.ndarray]] = defaultdict(list)
        for camera, files in episode.images.items():
            for file in files:
                image = np.asarray(Image.open(io.BytesIO(file)))
                steps[camera].append(np.ascontiguousarray(turn(image) if camera in cameras else image))
        made = pack(episode.instruction, episode.fps, steps)
        return replace(episode, images=made.images, image_statistics=made.image_statistics)

    return change


def exchanged(episode: Demonstration) -> Demonstration:
    swap = {AGENTVIEW: WRIST, WRIST: AGENTVIEW}
    return replace(
        episode,
        images={camera: episode.images[swap[camera]] for camera in episode.images},
        image_statistics={camera: episode.image_statistics[swap[camera]] for camera in episode.images},
    )


def gripper(f: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda action: np.column_stack([action[:, :6], f(action[:, 6])])


def rotation(f: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda state: np.column_stack([state[:, :3], f(state[:, 3:6]), state[:, 6:]])


def other_sign(vector_N3: np.ndarray) -> np.ndarray:
    angle = np.linalg.norm(vector_N3, axis=1, keepdims=True)
    return -vector_N3 / angle * (2 * np.pi - angle)


# --- a data set that is right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["recorded", "counterfactual"])
def test_nothing_is_found_in_what_was_recorded(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    findings, code = check(write(tmp_path / "data", request.getfixturevalue(which), mujoco="3.3.2"))
    assert (mismatches(findings), code) == ([], 0)
    assert {name for name, finding in findings.items() if finding.verdict == "ok"} == {
        "versions", "instructions", "gripper", "statistics", "control rate", "images of agentview", "images of wrist",
        "position", "rotation", "fingers", "time", "motion", "replay",
    }  # fmt: skip
    assert findings["replay"].text.startswith(
        "3 of 3 recorded episodes succeed again; position error 0 mm at the start"
    )
    assert findings["replay"].measured["position_error_m"]["100 %"]["max"] < 1e-6, "the simulator is deterministic"
    assert "no mismatch" in capsys.readouterr().out


# --- the classic mistakes --------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Change, list[str], str]] = {
    "agentview flipped": (
        pictures(lambda image: image[::-1], AGENTVIEW), ["images of agentview"], "they are flipped vertically",
    ),
    "both turned by 180 degrees": (
        pictures(lambda image: image[::-1, ::-1], AGENTVIEW, WRIST),
        ["images of agentview", "images of wrist"],
        "they are rotated 180",
    ),
    "wrist mirrored": (
        pictures(lambda image: image[:, ::-1], WRIST), ["images of wrist"], "they are flipped horizontally",
    ),
    "red and blue exchanged": (
        pictures(lambda image: image[..., ::-1], AGENTVIEW), ["images of agentview"], "red and blue are exchanged",
    ),
    "black images": (
        pictures(np.zeros_like, WRIST), ["images of wrist"], "they look like the simulator's in no orientation",
    ),
    "cameras exchanged": (
        exchanged, ["images of agentview", "images of wrist"], "they look like images of wrist",
    ),
    "gripper inverted": (
        arrays(action=gripper(np.negative), executed=gripper(np.negative)), ["gripper"],
        "the sign is inverted: in the data 1 opens and -1 closes",
    ),
    "gripper of the learned action only": (
        arrays(action=gripper(np.negative)), ["gripper"], "the sign is inverted",
    ),
    "gripper 0 to 1": (
        arrays(action=gripper(lambda g: (g + 1) / 2), executed=gripper(lambda g: (g + 1) / 2)), ["gripper"],
        "the range is 0 to 1: in the data 0 opens and 1 closes",
    ),
    "gripper as in RLDS": (
        arrays(action=gripper(lambda g: (1 - g) / 2), executed=gripper(lambda g: (1 - g) / 2)), ["gripper"],
        "the sign is inverted and the range is 0 to 1: in the data 1 opens and 0 closes",
    ),
    "other quaternion sign": (
        arrays(state=rotation(other_sign)), ["rotation"], "are of the other quaternion sign",
    ),
    "inverse rotation": (
        arrays(state=rotation(np.negative)), ["rotation"], "are of the inverse rotation",
    ),
    "fingers of opposite signs": (
        arrays(state=lambda state: state * [1, 1, 1, 1, 1, 1, 1, -1]), ["fingers"], "are of opposite signs",
    ),
    "position in another frame": (
        arrays(state=lambda state: state + np.array([0.3, 0, -0.9, 0, 0, 0, 0, 0])), ["position"],
        "off by (+0.300, +0.000, -0.900) m",
    ),
    "observations one step late": (
        arrays(state=lambda state: np.concatenate([state[1:], state[-1:]])), ["time"],
        "observations are 1 step(s) late",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_named_and_nothing_else(
    name: str, recorded: list[Demonstration], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected, text = MISTAKES[name]
    findings, code = check(write(tmp_path / "data", [change(episode) for episode in recorded]))
    assert (mismatches(findings), code) == (expected, 1)
    assert text in findings[expected[0]].text
    assert findings[expected[0]].advice
    printed = capsys.readouterr().out
    assert f"{len(expected)} mismatch(es): {', '.join(expected)}" in printed
    assert "MISMATCH" in printed


def test_the_advice_on_the_gripper_mends_it(recorded: list[Demonstration], tmp_path: Path) -> None:
    change = MISTAKES["gripper as in RLDS"][0]
    root = write(tmp_path / "data", [change(episode) for episode in recorded])
    findings, _ = check(root)
    assert "data.gripper={index: 6, open: 1, close: 0}" in findings["gripper"].advice
    findings, code = check(root, "data.gripper={index: 6, open: 1, close: 0}")
    assert (mismatches(findings), code) == ([], 0)


def test_changed_actions_do_not_lead_where_the_recording_went(recorded: list[Demonstration], tmp_path: Path) -> None:
    mirrored = arrays(
        action=lambda action: action * [1, -1, 1, 1, 1, 1, 1], executed=lambda action: action * [1, -1, 1, 1, 1, 1, 1]
    )
    findings, code = check(write(tmp_path / "mirrored", [mirrored(episode) for episode in recorded]))
    assert code == 1
    assert mismatches(findings) == ["motion", "replay"]
    assert "the recorded y goes the opposite way" in findings["motion"].text
    halved = arrays(action=lambda a: a * ([0.4] * 6 + [1]), executed=lambda a: a * ([0.4] * 6 + [1]))
    findings, _ = check(write(tmp_path / "halved", [halved(episode) for episode in recorded]))
    assert "motion" in mismatches(findings)
    assert "times as far" in findings["motion"].text
    assert findings["replay"].measured["position_error_m"]["100 %"]["max"] > 0.02


def test_another_simulator_is_named(recorded: list[Demonstration], tmp_path: Path) -> None:
    findings, code = check(write(tmp_path / "data", recorded, mujoco="2.3.7"))
    assert (mismatches(findings), code) == (["versions"], 1)
    assert findings["versions"].text == "recorded with mujoco 2.3.7 (here 3.3.2)"


def test_other_words_are_named(recorded: list[Demonstration], tmp_path: Path) -> None:
    worded = [replace(recorded[0], instruction=recorded[0].instruction.capitalize() + "!"), *recorded[1:]]
    findings, _ = check(write(tmp_path / "worded", worded))
    assert mismatches(findings) == ["instructions"]
    assert f"the suite says {recorded[0].instruction!r}" in findings["instructions"].text
    mixed = [replace(recorded[0], instruction=recorded[1].instruction), *recorded[1:]]
    findings, _ = check(write(tmp_path / "mixed", mixed))
    assert mismatches(findings) == ["instructions"]
    assert f"in the scene of {recorded[0].instruction!r}" in findings["instructions"].text


def test_tasks_that_the_suite_lacks_are_named(recorded: list[Demonstration], tmp_path: Path) -> None:
    def moved(episode: Demonstration) -> Demonstration:
        return replace(episode, arrays={**episode.arrays, "label.task": episode.arrays["label.task"] + 80})

    findings, code = check(write(tmp_path / "data", [moved(episode) for episode in recorded]))
    assert (mismatches(findings), code) == (["instructions"], 1)
    assert "in the scene of task 80, which the suite lacks," in findings["instructions"].text
    assert "no episode could be assigned" in findings["replay"].text


# --- statistics ------------------------------------------------------------------------------------------------------


def stored(root: Path, change: Callable[[dict, np.ndarray], None]) -> Path:
    """The data set with changed statistics of its actions."""
    path = root / "meta" / "stats.json"
    statistics = json.loads(path.read_text())
    change(statistics[ACTION], _column(root))
    path.write_text(json.dumps(statistics))
    return root


def _column(root: Path) -> np.ndarray:
    import pyarrow.parquet as pq

    (file,) = (root / "data").glob("*/*.parquet")
    return np.array(pq.read_table(file, columns=[ACTION]).column(ACTION).to_pylist())


def extremes_for_quantiles(statistics: dict, actions: np.ndarray) -> None:
    statistics["q01"], statistics["q99"] = actions.min(0).tolist(), actions.max(0).tolist()


def quantiles_for_extremes(statistics: dict, actions: np.ndarray) -> None:
    statistics["min"], statistics["max"] = (np.quantile(actions, q, axis=0).tolist() for q in (0.01, 0.99))


def of_other_data(statistics: dict, actions: np.ndarray) -> None:
    statistics["min"], statistics["max"] = (actions.min(0) - 0.5).tolist(), (actions.max(0) + 0.5).tolist()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (extremes_for_quantiles, "action: the stored q01 and q99 are the minimum and maximum"),
        (quantiles_for_extremes, "action: the stored minimum and maximum are q01 and q99"),
        (of_other_data, "action: min and max are not those of the data"),
    ],
)
def test_wrong_statistics_are_named(
    change: Callable[[dict, np.ndarray], None], text: str, recorded: list[Demonstration], tmp_path: Path
) -> None:
    findings, code = check(stored(write(tmp_path / "data", recorded), change))
    assert (mismatches(findings), code) == (["statistics"], 1)
    assert text in findings["statistics"].text


def test_actions_that_were_normalised_already_are_named() -> None:
    rng = np.random.default_rng(0)
    actions = np.clip(rng.normal(size=(500, 7)), -1, 1)
    found = conventions.statistics("statistics", {"action": exact(actions)}, {"action": actions}, EMBODIMENT)
    assert found.verdict == "mismatch"
    assert "as if they were normalised already" in found.text
    found = conventions.statistics(
        "statistics", {"action": exact(0.9 * actions)}, {"action": 0.9 * actions}, EMBODIMENT
    )
    assert found.verdict == "ok"


def test_statistics_of_another_robot_are_named() -> None:
    actions = np.random.default_rng(0).normal(size=(50, 7))
    found = conventions.statistics("statistics", {"action": exact(actions[:, :6])}, {"action": actions}, EMBODIMENT)
    assert (found.verdict, "max, min, q01, q99 of another size" in found.text) == ("mismatch", True)
    found = conventions.statistics("statistics", {"action": {"mean": [0.0] * 7}}, {"action": actions}, EMBODIMENT)
    assert found.verdict == "not checked"


def test_statistics_that_no_data_have_are_named() -> None:
    actions = np.random.default_rng(0).normal(size=(500, 7))
    for name, value in (("min", np.nan), ("q99", np.nan), ("q01", -100.0)):
        given = exact(actions)
        given[name][1] = value
        found = conventions.statistics("statistics", {"action": given}, {"action": actions}, EMBODIMENT)
        assert (found.verdict, name in found.text) == ("mismatch", True), (name, found.text)


def exact(values: np.ndarray) -> dict[str, list[float]]:
    return {
        name: np.quantile(values, q, axis=0).tolist()
        for name, q in {"min": 0, "q01": 0.01, "q99": 0.99, "max": 1}.items()
    }


def test_statistics_of_a_checkpoint(recorded: list[Demonstration], tmp_path: Path) -> None:
    root = write(tmp_path / "data", recorded)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    actions = _column(root)
    right = exact(actions)
    (checkpoint / "statistics.json").write_text(json.dumps({"action": right}))
    assert check(root, f"statistics={checkpoint}")[0]["checkpoint's statistics"].verdict == "ok"
    wrong = right | {"q01": right["min"], "q99": right["max"]}
    (checkpoint / "statistics.json").write_text(json.dumps({"action": wrong}))
    findings, code = check(root, f"statistics={checkpoint}")
    assert (mismatches(findings), code) == (["checkpoint's statistics"], 1)


# --- data sets that say less -----------------------------------------------------------------------------------------


def without_beginnings(episode: Demonstration) -> Demonstration:
    kept = {name: array for name, array in episode.arrays.items() if not name.startswith("label.")}
    return replace(episode, arrays=kept | {ACTION: episode.arrays[EXECUTED]})


def test_without_beginnings_the_rest_is_checked(recorded: list[Demonstration], tmp_path: Path) -> None:
    right = [without_beginnings(episode) for episode in recorded]
    root = write(tmp_path / "right", right)
    findings, _ = check(root)
    assert {name for name, found in findings.items() if found.verdict == "not checked"} == {
        "versions",
        "time",
        "replay",
    }
    assert "does not say how its episodes began" in findings["replay"].text
    change = MISTAKES["both turned by 180 degrees"][0]
    findings, _ = check(write(tmp_path / "turned", [change(episode) for episode in right]))
    assert {"images of agentview", "images of wrist"} <= set(mismatches(findings))


def test_without_a_suite_everything_but_the_replay_is_checked(
    recorded: list[Demonstration], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = write(tmp_path / "data", recorded)
    (root / "meta" / "recording.json").unlink()
    command.main([str(root)])
    said = " ".join(capsys.readouterr().out.split())
    assert "gripper ok values are in the declared range" in said
    assert "replay not checked no suite" in said
    assert {"instructions ok", "statistics ok", "control rate ok", "no mismatch"} == {
        word for word in ("instructions ok", "statistics ok", "control rate ok", "no mismatch") if word in said
    }
    with pytest.raises(SystemExit) as stop:
        command.main([str(root), "+data.gripper={index: 6, open: 0.08, close: 0}"])
    assert stop.value.code == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "gripper MISMATCH action 6 of the data, a gripper, has values from -1 to 1, but data.gripper says" in said


def test_changed_scenes_are_played_as_they_were_recorded(tmp_path: Path) -> None:
    assert all(randomised(["robot"], 3, task, FIRST_TRAINING_STATE + 3 * SEED_STRIDE) for task in (0, 3, 6))
    root = record(
        SUITE, 3, tmp_path / "changed", image_size=64, workers=0, tasks=[0, 3, 6], randomise=["robot"], seed=3
    )
    findings, code = check(root)
    assert (mismatches(findings), code) == ([], 0)
    assert findings["replay"].text.startswith("3 of 3")


# --- mistakes of the user --------------------------------------------------------------------------------------------


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        command.main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_mistakes_of_the_user_are_explained(
    recorded: list[Demonstration], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no LeRobotDataset in" in failure(capsys, str(tmp_path))
    root = write(tmp_path / "data", recorded)
    assert "episodes must be at least 1" in failure(capsys, str(root), "episodes=0")
    assert "statistics: there is no" in failure(capsys, str(root), f"statistics={tmp_path / 'no.json'}")
    (tmp_path / "odd.json").write_text('{"action": null}')
    assert "is damaged (action is no object" in failure(capsys, str(root), f"statistics={tmp_path / 'odd.json'}")
    assert "has no camera 'image'" in failure(capsys, str(root), "data=libero_openpi")
    assert "unknown suite 'moon'" in failure(capsys, str(root), "suite=moon")
    assert "speed" in failure(capsys, str(root), "speed=3")


@pytest.mark.parametrize("video", [False, True])
def test_single_frames_are_the_recorded_ones(video: bool, recorded: list[Demonstration], tmp_path: Path) -> None:
    root = write(tmp_path / "data", recorded, video=video)
    config = DataConfig({"agentview": AGENTVIEW, "wrist": WRIST}, root=str(root))
    recordings = open_recordings(str(root), config, EMBODIMENT)
    for index, episode in enumerate(recordings.episodes):
        assert episode.start is not None
        seen = recordings.images(episode, "wrist", [7, 0])
        for image, step in zip(seen, (7, 0), strict=True):
            original = np.asarray(Image.open(io.BytesIO(recorded[index].images[WRIST][step])), float)
            assert np.abs(image - original).mean() <= (12 if video else 0)
