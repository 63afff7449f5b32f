"""Trials on a robot: what counts as a failure and what does not, what is on disk when, and the operator's part."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from cogvla.envs.contract import SuiteEnv
from cogvla.envs.episodes import EpisodeResult, EpisodeSpec
from cogvla.envs.evaluation.episode_log import EPISODES, EpisodeLog
from cogvla.envs.rollout.video import VideoWriter
from cogvla.envs.suite import Suite, Task
from cogvla.policy.interface import ActionChunk, Observation
from cogvla.real_robot.bridge.bridge import Bridge, BridgeSettings
from cogvla.real_robot.control.measurements import Measurements
from cogvla.real_robot.lerobot.robot import LeRobotFrontEnd, connected
from cogvla.real_robot.serving.async_client import UnavailableError
from cogvla.real_robot.serving.local_policy import LocalPolicy
from cogvla.real_robot.serving.request import RequestKeys
from cogvla.real_robot.simulated.simulated_arm import SceneStatus
from cogvla.real_robot.trials.operator_scene import OperatorScene, SessionEndedError, listen
from cogvla.real_robot.trials.trial_log import CONTROL, ControlLog, Film
from cogvla.real_robot.trials.trials import EpisodeAbortedError, SimulatedScene, play
from cogvla.scripts.command import compose
from cogvla.scripts.robot import robot_demo, run_trials
from cogvla.scripts.robot.run_trials import Session, run, summary
from cogvla.tests.support.planearm import LIMITS, PLANE, SETTINGS, PlaneArm, PlaneArmConfig, configured
from cogvla.tests.support.policy_servers import serving
from cogvla.tests.support.waiting import until

INSTRUCTIONS = ("sweep to the left", "sweep to the right")


def no_environment(**_: object) -> SuiteEnv:
    raise AssertionError("a robot has no environment")


SUITE = Suite("trials", tuple(Task(text, text) for text in INSTRUCTIONS), 100, make=no_environment)


class Still:
    """Stays where it is."""

    embodiment = PLANE

    def describe(self) -> dict[str, Any]:
        return {"preset": "still", "parameters": 0}

    def reset(self) -> None:
        """Nothing to forget."""

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        """Nothing to prepare."""

    def act(self, observation: Observation) -> ActionChunk:
        return ActionChunk(observation.state[:, None].repeat(PLANE.chunk, axis=1), {"infer_ms": 0.1})


class Away:
    """A policy server that nobody reaches."""

    async def infer(self, observation: Observation, **_: Any) -> Any:
        raise UnavailableError("nobody is there")

    async def close(self) -> None:
        """Nothing is open."""


class Script:
    """A scene that goes as written: for each attempt, in order, one of success, failure, abort, estop, kill."""

    def __init__(self, *lines: str) -> None:
        self.lines = iter(lines)
        self.bridge: Bridge | None = None
        self.number = 0

    def set_up(self, spec: EpisodeSpec) -> SceneStatus:
        assert self.bridge is not None
        self.line = next(self.lines)
        self.bridge.estop(False)
        self.bridge.reset()
        self.number += 1
        self.enough = self.bridge.measurements.counts["action"] + 3
        if self.line == "never":
            raise TimeoutError("the scene was not set up")
        return SceneStatus(self.number, INSTRUCTIONS[spec.task])

    def status(self) -> SceneStatus:
        assert self.bridge is not None
        now = SceneStatus(self.number, "", 0)
        if self.bridge.measurements.counts["action"] < self.enough:
            return now
        if self.line == "abort":
            raise EpisodeAbortedError("discarded by the operator")
        if self.line == "kill":
            raise KeyboardInterrupt
        if self.line == "estop":
            self.bridge.estop(True)
            return now
        return SceneStatus(self.number, "", success=self.line == "success", over=True)


@contextmanager
def bridged(client: Any = None, on_tick: Any = None) -> Iterator[Bridge]:
    with connected(PlaneArm(PlaneArmConfig(id="test"))) as robot:
        front_end = LeRobotFrontEnd(robot, SETTINGS, PLANE, LIMITS.limits)
        client = client or LocalPolicy(Still(), PLANE)
        with Bridge(LIMITS, PLANE, client, front_end, BridgeSettings(dry_run=False), on_tick) as bridge:
            yield bridge


def session(folder: Path, trials: int, script: Script, attempts: int = 2) -> tuple[EpisodeLog, ControlLog]:
    """Play what is missing of so many trials of both instructions."""
    film = Film(folder, PLANE.control_hz)
    with EpisodeLog(folder, {"a": 1}, {}) as log, bridged(on_tick=film.show) as bridge:
        control = ControlLog(folder)
        script.bridge = bridge
        specs = [EpisodeSpec(task, trial) for trial in range(trials) for task in range(2)]
        missing = [spec for spec in specs if (spec.task, spec.initial_state) not in log.results]
        Session(bridge, script, log, control, film, attempts, timeout_s=60.0).play(missing)
    return log, control


def test_errors_and_safety_stops_are_no_failures_and_are_tried_again(tmp_path: Path) -> None:
    script = Script("success", "estop", "success", "failure", "abort", "never")
    log, control = session(tmp_path, 2, script)
    results = log.results
    assert {key: (r.success, r.error, r.attempts) for key, r in results.items()} == {
        (0, 0): (True, None, 1),
        (1, 0): (True, None, 2),
        (0, 1): (False, None, 1),
        (1, 1): (False, "the scene was not set up", 2),
    }
    errors = [attempt.error for attempt in control.attempts]
    assert errors == [None, "stopped: emergency stop", None, None, "discarded by the operator", errors[-1]]
    measured = control.measurements()
    assert measured.counts["safety_stops"] == 1
    assert measured.counts["action"] >= 9
    assert len(measured.jitter_ms) >= 9
    assert results[0, 1].steps >= 3, "who judges does not count steps; the bridge does"
    assert len(results[0, 0].loop_ms) >= 1
    films = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert films == [
        "task00_trial00_success.mp4",
        "task00_trial01_failure.mp4",
        "task01_trial00_error.mp4",
        "task01_trial00_success.mp4",
        "task01_trial01_error.mp4",
    ]
    text = summary(SUITE, list(results.values())).splitlines()
    assert " ".join(text[1].split()) == "50.0% 9.5% to 90.5% 2 0 0 sweep to the left"  # Wilson, 1 of 2
    assert " ".join(text[2].split()) == "100.0% 20.7% to 100.0% 1 1 0 sweep to the right"  # 1 of 1, and an error
    assert text[3].endswith("all")


def test_a_trial_counts_although_its_video_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(VideoWriter, "add", full)
    log, _ = session(tmp_path, 1, Script("success", "failure"))
    assert {key: (r.success, r.error, r.video) for key, r in log.results.items()} == {
        (0, 0): (True, None, None),
        (1, 0): (False, None, None),
    }


def test_a_scene_that_is_not_set_up_adds_nothing_to_what_was_measured(tmp_path: Path) -> None:
    _, control = session(tmp_path, 1, Script("success", "never", "never"))
    assert [attempt.counts.get("action", 0) > 0 for attempt in control.attempts] == [True, False, False]


def test_counters_that_are_new_while_an_attempt_is_saved_do_no_harm(tmp_path: Path) -> None:
    class Counting(Counter[str]):
        """The control thread counts something for the first time whenever somebody looks."""

        def copy(self) -> Any:
            return Counter(dict(self))

        def items(self) -> Any:
            for item in super().items():
                yield item
                self["old_epoch_chunks"] += 1

    measured = Measurements()
    measured.counts = Counting(action=5)
    bridge: Any = SimpleNamespace(measurements=measured)
    control = ControlLog(tmp_path)
    control.end(bridge, EpisodeResult(0, 0, 0))
    assert control.attempts[0].counts == {"action": 5}


def test_what_was_interrupted_goes_on_and_tries_errors_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        session(tmp_path, 2, Script("success", "abort", "kill"), attempts=1)
    for name in (CONTROL, EPISODES):  # the process was killed while it wrote
        with (tmp_path / name).open("a") as file:
            file.write('{"task": 0, "initial_st')
    log, control = session(tmp_path, 2, Script("failure", "success", "success"), attempts=1)
    assert {key: r.success for key, r in log.results.items()} == {
        (0, 0): True,
        (1, 0): False,
        (0, 1): True,
        (1, 1): True,
    }
    assert [attempt.error for attempt in control.attempts] == [None, "discarded by the operator", None, None, None]
    for line in (tmp_path / CONTROL).read_text().splitlines():
        json.loads(line)
    assert not list((tmp_path / "videos").glob(".*")), "the film of the interrupted trial is left"


def test_a_policy_that_is_away_is_no_failure_of_the_policy() -> None:
    class Impatient(Script):
        last: float

        def status(self) -> SceneStatus:
            return SceneStatus(self.number, "", over=time.monotonic() > self.last)

    with bridged(Away()) as bridge:
        scene = Impatient("-")
        scene.bridge, scene.last = bridge, time.monotonic() + 1.0
        result = play(bridge, scene, EpisodeSpec(0, 0), timeout_s=60.0)
    assert result.error == "the robot was never commanded: nobody is there"
    assert not result.success


@pytest.mark.parametrize(
    ("meddle", "error"),
    [
        (lambda bridge: bridge.reset(), "deactivated or reset during the trial"),
        (lambda bridge: bridge.activate(False), "deactivated or reset during the trial"),
        (lambda bridge: bridge.instruct("dance"), "the instruction was changed to 'dance' during the trial"),
    ],
)
def test_a_trial_with_which_somebody_meddles_is_no_failure(meddle: Callable[[Bridge], Any], error: str) -> None:
    class Meddled(Script):
        seen = 0

        def status(self) -> SceneStatus:
            now = super().status()
            if now.over:
                assert self.bridge is not None
                meddle(self.bridge)
                self.seen += 1
            return replace(now, over=self.seen > 1)

    with bridged() as bridge:
        scene = Meddled("failure")
        scene.bridge = bridge
        assert play(bridge, scene, EpisodeSpec(0, 0), timeout_s=60.0).error == error


def test_a_bridge_that_fails_between_two_episodes_ends_the_trials() -> None:
    class Breaks(Script):
        def set_up(self, spec: EpisodeSpec) -> SceneStatus:
            status = super().set_up(spec)
            assert self.bridge is not None
            self.bridge.fail(ConnectionError("ROS 2: no way to the arm"))
            return status

    with bridged() as bridge:
        scene = Breaks("success")
        scene.bridge = bridge
        with pytest.raises(ConnectionError, match="no way to the arm"):
            play(bridge, scene, EpisodeSpec(0, 0), timeout_s=60.0)


def press_later(scene: OperatorScene, *keys: str) -> None:
    def operate() -> None:
        for key in keys:
            time.sleep(0.1)
            scene.press(key)

    threading.Thread(target=operate, daemon=True).start()


def test_the_operator_says_when_and_what() -> None:
    said: list[str] = []
    scene = OperatorScene(INSTRUCTIONS, 60.0, countdown_s=0, say=said.append)
    press_later(scene, "y", "?", "g")  # only g begins
    status = scene.set_up(EpisodeSpec(1, 4))
    assert (status.number, status.instruction, status.over) == (1, INSTRUCTIONS[1], False)
    assert "'sweep to the right', trial 5" in said[0]
    assert not scene.status().over
    scene.press("g")
    assert not scene.status().over, "it runs already"
    scene.press("y")
    assert scene.status() == SceneStatus(1, INSTRUCTIONS[1], success=True, over=True)

    press_later(scene, "g")
    assert scene.set_up(EpisodeSpec(0, 0)).number == 2
    scene.press("n")
    assert scene.status() == SceneStatus(2, INSTRUCTIONS[0], success=False, over=True)

    press_later(scene, "g")
    scene.set_up(EpisodeSpec(0, 0))
    scene.press("x")
    with pytest.raises(EpisodeAbortedError):
        scene.status()
    scene.press("q")
    with pytest.raises(SessionEndedError):
        scene.set_up(EpisodeSpec(0, 0))


def test_a_countdown_can_be_put_off_and_keys_do_not_shorten_it() -> None:
    said: list[str] = []
    scene = OperatorScene(INSTRUCTIONS, 60.0, countdown_s=1, say=said.append)
    began = time.monotonic()
    press_later(scene, "g", "x", "g", "y")
    scene.set_up(EpisodeSpec(0, 0))
    assert said.count("1 ...") == 2
    assert "stopped; press g when the scene is ready" in said
    assert time.monotonic() - began > 1.2
    assert not scene.status().over, "what was pressed before the trial does not judge it"


def test_a_trial_without_a_word_is_a_failure_when_its_time_is_up() -> None:
    scene = OperatorScene(INSTRUCTIONS, 1.0, countdown_s=0)
    press_later(scene, "g")
    scene.set_up(EpisodeSpec(0, 0))
    assert not scene.status().over
    time.sleep(1.05)
    assert scene.status().over
    assert not scene.status().success


def test_services_and_topic_of_a_node_do_what_keys_do() -> None:
    served: dict[str, Any] = {}

    class Node:
        def serve(self, name: str, kind: str, callback: Any) -> None:
            served[name] = callback

        def subscribe(self, topic: str, kind: str, delivery: object, callback: Any) -> None:
            served[topic] = callback

    class Message:
        data = "success"

    scene = OperatorScene(INSTRUCTIONS, 60.0, countdown_s=0)
    listen(Node(), scene)
    assert set(served) == {"~/trial", *(f"~/trial/{w}" for w in ("go", "success", "failure", "abort", "quit"))}
    threading.Timer(0.1, lambda: served["~/trial/go"](True)).start()
    scene.set_up(EpisodeSpec(0, 0))
    served["~/trial"](Message())
    assert scene.status().success


def test_a_simulated_scene_of_an_earlier_session_is_no_answer() -> None:
    """`sim_robot` goes on between two sessions, and its latched status tells of the first scene of the one before."""
    shown = SceneStatus(1, "put it there", 40, success=True, scene_task_success=True, over=True)

    class Node:
        def subscribe(self, topic: str, kind: str, delivery: object, callback: Any) -> None:
            self.callback = callback
            self.show(shown)

        def advertise(self, topic: str, kind: str, delivery: object) -> Any:
            return lambda fields: self.show(SceneStatus(json.loads(fields["data"])["number"], "push it"))

        def show(self, status: SceneStatus) -> None:
            self.callback(SimpleNamespace(data=json.dumps(asdict(status))))

    scene = SimulatedScene(Node())  # type: ignore[arg-type]
    status = scene.set_up(EpisodeSpec(0, 0))
    assert (status.instruction, status.over) == ("push it", False)


def command(uri: str, output: Path, *overrides: str) -> DictConfig:
    """`run_trials` for the plane arm."""
    config = compose("run_trials", [f"server={uri}", f"output={output}", "countdown_s=0", *overrides])
    config.instructions = list(INSTRUCTIONS)
    return configured(config)


@contextmanager
def operator(monkeypatch: pytest.MonkeyPatch, *judgements: str) -> Iterator[int]:
    """Sets up the scenes, judges each trial when the arm has been commanded for a while, and goes home."""
    read, write = os.pipe()
    said: queue.Queue[str] = queue.Queue()
    sent: list[dict[str, float]] = []
    say, send_action = run_trials._say, PlaneArm.send_action

    def hear(line: str) -> None:
        say(line)
        said.put(line)

    def send(arm: PlaneArm, action: dict[str, float]) -> dict[str, float]:
        sent.append(action)
        return send_action(arm, action)

    def operate() -> None:
        for judgement in (*judgements, "q"):
            while "set up the scene" not in said.get(timeout=300):
                pass
            if judgement == "q":
                os.write(write, b"q")
                return
            os.write(write, b"g")
            before = len(sent)
            until(lambda before=before: len(sent) > before + 5)  # type: ignore[misc]
            os.write(write, judgement.encode())

    monkeypatch.setattr(run_trials, "_say", hear)
    monkeypatch.setattr(PlaneArm, "send_action", send)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(operate)
        yield read
        said.put("set up the scene")  # where no trial is left, nobody asks for one
        done.result()
    monkeypatch.undo()
    os.close(write)
    os.close(read)


def test_run_trials_from_the_first_key_to_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Still(), keys=RequestKeys()) as (uri, _):
        with operator(monkeypatch, "y") as keyboard:
            first = run(command(uri, tmp_path, "trials=1"), "run_trials ...", keyboard)
        assert first is not None
        assert first.total.success.trials == 1
        assert "the same command plays the missing trials" in capsys.readouterr().out
        with operator(monkeypatch, "n", "n", "n") as keyboard:
            report = run(command(uri, tmp_path, "trials=2"), "run_trials ...", keyboard)
        assert report is not None
        assert [row.success.trials for row in report.tasks] == [2, 2]
        assert report.total.success.successes == 1
        assert report.reproduce["sessions"] == 2
        assert report.control is not None
        assert report.control.jitter is not None
        assert report.total.loop is not None
        said = capsys.readouterr().out
        assert "sweep to the left" in said
        assert "tick jitter (20 Hz)" in said
        assert "4 of 4 trials" in said
        page = (tmp_path / "report.html").read_text()
        assert "sweep to the right" in page
        assert "<video" in page
        with pytest.raises(ValueError, match="results of another configuration"):
            run(command(uri, tmp_path, "limit_s=5"), "")


@pytest.mark.parametrize("script", [run_trials, robot_demo])
def test_kill_ends_it_as_ctrl_c_does(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def killed(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(10)
        finally:
            closed.append("bridge, processes, terminal")

    monkeypatch.setattr(script, "run", killed)
    monkeypatch.setattr(script, "as_typed", str)
    before = signal.signal(signal.SIGTERM, lambda *_: closed.append("nothing"))
    try:
        with pytest.raises(KeyboardInterrupt):
            script.main(OmegaConf.create())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert closed == ["bridge, processes, terminal"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scene=weather"], "scene must be one of operator, simulated"),
        (["scene=simulated"], "scene=simulated needs transport=rclpy"),
        (["limit_s=0"], "limit_s must be a number of seconds, at least one control period, got 0"),
        (["limit_s=null"], "limit_s must be a number of seconds, .* got None"),
        (["limit_s=nan"], "limit_s must be a number of seconds, .* got nan"),
        (["limit_s=inf"], "limit_s must be a number of seconds, .* got inf"),
        (["trials=0"], "trials must be a whole number, at least 1, got 0"),
        (["trials=null"], "trials must be a whole number, at least 1, got None"),
        (["attempts=null"], "attempts must be a whole number, at least 1, got None"),
        (["attempts=0"], "attempts must be a whole number, at least 1, got 0"),
        (["countdown_s=-1"], "countdown_s must be a whole number of seconds, 0 or more, got -1"),
        (["countdown_s=null"], "countdown_s must be a whole number of seconds, .* got None"),
    ],
)
def test_run_trials_refuses_what_cannot_be_before_anything_is_connected(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(command("ws://127.0.0.1:1", tmp_path, *overrides), "")


def test_instructions_are_different_sentences(tmp_path: Path) -> None:
    config = command("ws://127.0.0.1:1", tmp_path)
    for wrong in ([], ["a", "a"], [" "], "push"):
        config.instructions = wrong
        with pytest.raises(ValueError, match="list of different sentences"):
            run(config, "")
