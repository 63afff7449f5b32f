"""`run_trials`: run N trials of each instruction on a robot, judged by the operator or a simulator; write a report.

    run_trials server=ws://GPU:8000 transport=lerobot instructions='["pick up the cube"]' trials=10
    run_trials transport=rclpy robot=my_arm embodiment=my_arm topics=my_arm ros.discovery=SUBNET instructions=...
    run_trials transport=rclpy robot=tabletop embodiment=tabletop scene=simulated suite=tabletop_goal   with `sim_robot`

Every trial is saved when it ends. The same command resumes an interrupted run, and repeats trials that ended in an
error or a safety stop, which do not count as failures. `operator_scene` lists the keys; space is the emergency stop,
r releases it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

import gymnasium as gym
from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.envs.episodes import EpisodeResult, EpisodeSpec
from cogvla.envs.evaluation.episode_log import EpisodeLog
from cogvla.envs.evaluation.evaluate import write_report
from cogvla.envs.evaluation.protocol import EvaluationProtocol, load_protocol
from cogvla.envs.evaluation.report import ControlTiming, Report, build_report, check_played
from cogvla.envs.evaluation.statistics import latency, success_rate
from cogvla.envs.suite import Suite, Task, get_suite
from cogvla.policy.interface import Embodiment
from cogvla.policy.provenance import provenance
from cogvla.real_robot.bridge.bridge import Bridge, BridgeSettings
from cogvla.real_robot.bridge.keyboard import Keyboard
from cogvla.real_robot.control.measurements import Measurements, latency_table
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.trials.operator_scene import OperatorScene, SessionEndedError, listen
from cogvla.real_robot.trials.trial_log import ControlLog, Film
from cogvla.real_robot.trials.trials import STOPPED, SimulatedScene, TrialScene, play
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, check_counts, end_on_sigterm, import_modules, plain
from cogvla.scripts.robot.robots import open_front_end, open_policy_client

SCENES = ("operator", "simulated")
MARGIN_S = 20.0
"""Added to twice the time limit of a trial; a trial that takes longer is an error."""


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    end_on_sigterm()
    report = run(config, as_typed("run_trials"))
    if report is not None:
        check_played(report, Path(config.output))


def run(config: DictConfig, command: str, keyboard: int | None = None) -> Report | None:
    """Play the missing trials, print a summary and write the report.

    Args:
        config: configuration, see configs/run_trials.yaml.
        command: command line for the report.
        keyboard: file descriptor with keys; None: standard input.

    Returns:
        The report; None without any finished trial.
    """
    import_modules(config.imports)
    robot = build(RobotConfig, plain(config.robot), "robot")
    embodiment = build(Embodiment, plain(config.embodiment), "embodiment")
    suite, protocol = _trials(config, robot, embodiment)
    specs = protocol.episodes(suite, plain(config)["tasks"])
    output = Path(config.output)
    client, described = open_policy_client(config, embodiment)
    fingerprint = {
        "suite": suite.name,
        "instructions": [task.instruction for task in suite.tasks],
        "protocol": {k: v for k, v in asdict(protocol).items() if k not in ("name", "episodes_per_task")},
        "policy": dict(described),
        "robot": {"transport": config.transport, "scene": config.scene, **asdict(robot)},
    }
    session = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, **provenance()}
    with ExitStack() as stack:
        log = stack.enter_context(EpisodeLog(output, fingerprint, session, config.resume))
        control = ControlLog(output, config.resume)
        film = Film(output if config.video else None, embodiment.control_hz)
        front_end, node = open_front_end(config, embodiment, robot, stack)
        settings = BridgeSettings(dry_run=False)
        bridge = stack.enter_context(Bridge(robot, embodiment, client, front_end, settings, film.show))
        scene = _scene(config, suite, node, bridge, keyboard, stack)
        timeout_s = 2 * (protocol.for_suite(suite).rollout_settings().max_steps or 0) / embodiment.control_hz + MARGIN_S
        session_of_trials = Session(bridge, scene, log, control, film, int(config.attempts), timeout_s)
        try:
            session_of_trials.play([spec for spec in specs if (spec.task, spec.initial_state) not in log.results])
        except SessionEndedError:
            print("ended; the same command plays the missing trials", flush=True)
        results = [log.results[key] for spec in specs if (key := (spec.task, spec.initial_state)) in log.results]
        measured = control.measurements()
        if not results:
            return None
        report = _report(suite, protocol, results, measured, embodiment, fingerprint, log.sessions)
        write_report(report, suite, output)
    print(summary(suite, results))
    print(latency_table(measured, embodiment.control_hz))
    print(f"{len(results)} of {len(specs)} trials; report: {output / 'report.html'}")
    return report


class Session:
    """Plays trials one after the other; each is saved before the next one begins.

    Args:
        bridge: running bridge.
        scene: sets up trials and judges them.
        log: saves the results.
        control: saves the timing of the control loop.
        film: saves the videos.
        attempts: number of times that a trial is started if it ends in an error.
        timeout_s: longest time of a trial, see `play`.
    """

    def __init__(
        self,
        bridge: Bridge,
        scene: TrialScene,
        log: EpisodeLog,
        control: ControlLog,
        film: Film,
        attempts: int,
        timeout_s: float,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}")
        self._bridge, self._scene = bridge, scene
        self._log, self._control, self._film = log, control, film
        self._attempts, self._timeout_s = attempts, timeout_s

    def play(self, specs: Sequence[EpisodeSpec]) -> None:
        """Play these trials.

        Raises:
            SessionEndedError: the operator ended the session.
            Exception: the error that ended the bridge.
        """
        for number, spec in enumerate(specs, start=1):
            for attempt in range(1, self._attempts + 1):
                result = self._attempt(spec, attempt)
                outcome = result.error or ("success" if result.success else "failure")
                print(f"[{number}/{len(specs)}] {result.instruction}: {outcome}", flush=True)
                if result.error is None:
                    break
            self._log.append(result)

    def _attempt(self, spec: EpisodeSpec, attempt: int) -> EpisodeResult:
        def start(_: object) -> None:
            self._film.begin()
            self._control.begin(self._bridge)

        self._control.begin(self._bridge)  # also for a scene that cannot be set up
        result = None
        try:
            result = play(self._bridge, self._scene, spec, self._timeout_s, start)
        finally:
            video = self._film.end(result)
        result = replace(result, attempts=attempt, video=video)
        self._control.end(self._bridge, result)
        self._bridge.wait(0)  # raises the error that ended the bridge, e.g. a lost robot
        return result


def summary(suite: Suite, results: Sequence[EpisodeResult]) -> str:
    """Return a table: success rate with interval, trials, errors and safety stops of each instruction."""
    lines = [f"{'success':>8}  {'95 % interval':<17}{'trials':>7}{'errors':>8}{'stops':>7}  instruction"]
    tasks = sorted({r.task for r in results})
    for task in [*tasks, None] if len(tasks) > 1 else tasks:
        of = [r for r in results if task is None or r.task == task]
        rate = success_rate(r.success for r in of if r.error is None)
        errors = [r.error for r in of if r.error is not None]
        stops = sum(error.startswith(STOPPED) for error in errors)
        value = "-" if rate.value is None else f"{rate.value:.1%}"
        between = "" if rate.low is None or rate.high is None else f"{rate.low:.1%} to {rate.high:.1%}"
        name = "all" if task is None else suite.tasks[task].instruction
        lines.append(f"{value:>8}  {between:<17}{rate.trials:>7}{len(errors) - stops:>8}{stops:>7}  {name}")
    return "\n".join(lines)


def _trials(config: DictConfig, robot: RobotConfig, embodiment: Embodiment) -> tuple[Suite, EvaluationProtocol]:
    """Return the suite and protocol of the trials: a simulated suite, or the operator's instructions.

    Raises:
        ValueError: the scene, the instructions, the limit, the countdown or the numbers of trials are wrong.
    """
    values = plain(config)
    check_counts(values, "attempts")
    steps = robot.loop.execute_steps or embodiment.chunk
    if config.scene == "simulated":
        if config.transport == "lerobot":
            raise ValueError("scene=simulated needs transport=rclpy, by which a `sim_robot` is reached")
        suite = get_suite(config.suite)
        return suite, replace(load_protocol(suite.protocol, episodes_per_task=config.trials), execute_steps=steps)
    if config.scene != "operator":
        raise ValueError(f"scene must be one of {', '.join(SCENES)}, got {config.scene!r}")
    check_counts(values, "trials")
    if values["countdown_s"] is None or values["countdown_s"] < 0:
        raise ValueError(f"countdown_s must be a whole number of seconds, 0 or more, got {config.countdown_s}")
    listed = values["instructions"]
    instructions = [str(text).strip() for text in listed] if isinstance(listed, list) else []
    if not instructions or not all(instructions) or len(set(instructions)) < len(instructions):
        raise ValueError(f"instructions must be a list of different sentences, got {listed!r}")
    if values["limit_s"] is None or not 1 <= values["limit_s"] * embodiment.control_hz < inf:
        raise ValueError(f"limit_s must be a number of seconds, at least one control period, got {config.limit_s}")
    limit = round(values["limit_s"] * embodiment.control_hz)
    tasks = tuple(Task(f"instruction {number}", text) for number, text in enumerate(instructions))
    protocol = EvaluationProtocol("trials", int(config.trials), execute_steps=steps, max_steps=limit)
    name, count = f"trials on {robot.name}", protocol.episodes_per_task
    return Suite(name, tasks, limit, _no_simulation, count, "trials"), protocol


def _no_simulation(**_: Any) -> gym.Env:
    raise ValueError("trials on a real robot have no simulation")


def _scene(
    config: DictConfig, suite: Suite, node: Any, bridge: Bridge, keyboard: int | None, stack: ExitStack
) -> TrialScene:
    scene: TrialScene
    if config.scene == "simulated":
        assert node is not None, "a simulated scene has a node"
        scene, press = SimulatedScene(node), _ignore
    else:
        instructions = [task.instruction for task in suite.tasks]
        scene = OperatorScene(instructions, float(config.limit_s), int(config.countdown_s), _say)
        press = scene.press
        if node is not None:
            listen(node, scene)

    def on_key(key: str) -> None:
        if key == " ":
            _say(f"emergency stop {bridge.estop(True)[1]}; r releases it")
        elif key == "r":
            bridge.estop(False)
            _say(bridge.reset()[1])
        else:
            press(key)

    stack.enter_context(Keyboard(on_key, keyboard))
    return scene


def _ignore(key: str) -> None:
    """Ignore a key: with a simulator, the operator does not judge."""


def _say(line: str) -> None:
    print(line, flush=True)


def _report(
    suite: Suite,
    protocol: EvaluationProtocol,
    results: Sequence[EpisodeResult],
    measured: Measurements,
    embodiment: Embodiment,
    fingerprint: dict[str, Any],
    sessions: Sequence[dict[str, Any]],
) -> Report:
    session = sessions[-1]
    report = build_report(
        suite=suite,
        results=results,
        batch_1_ms=[],
        control_hz=embodiment.control_hz,
        reproduce={
            "protocol": asdict(protocol.for_suite(suite)),
            "asked": "own task",
            "policy": fingerprint["policy"],
            "simulation": fingerprint["robot"],
            "workers": 0,
            "run": {"episodes": len(results), "seconds": sum(r.wall_s for r in results)},
            **{key: session[key] for key in ("command", "started", "versions", "commit", "machine")},
            "sessions": len(sessions),
            "commits": sorted({str((s.get("commit") or {}).get("hash")) for s in sessions}),
        },
    )
    control = ControlTiming(latency(measured.jitter_ms), dict(sorted(measured.counts.items())))
    return replace(report, control=control)


if __name__ == "__main__":
    console.run_trials()
