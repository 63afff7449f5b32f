"""Check a data set's conventions without simulation: gripper, statistics, versions, instructions, control rate.

Shape legend: N frames, T steps, A action, S state, D either.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cogvla.libero.conventions.recorded_episodes import RecordedEpisode, Recordings
from cogvla.libero.conventions.replayed_episodes import Gripper
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.interface import Embodiment
from cogvla.policy.training.data_checks import check_texts

Verdict = Literal["ok", "mismatch", "note", "not checked"]
SIMULATORS = ("mujoco", "robosuite", "hf-libero")
FINGERS = slice(6, 8)
LEVEL = 0.05
"""Fraction of the range: gripper commands closer than this to an end of the range count as that end."""
RESPONSE_STEPS = 4
QUANTILES = ("min", "q01", "q99", "max")
TAIL = 0.02
"""Fraction of the range: quantiles closer to the extremes than this cannot be told from them."""
EQUAL = 1e-3
"""Fraction of the range: numbers closer than this are equal."""
FAR = 0.1
"""Fraction of the range: statistics further away than this cannot be those of a part of the data."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: name of the check.
        verdict: `ok`, `mismatch`, `not checked`, or `note` for something that is good to know but no mistake.
        text: the result in words.
        advice: what the user can do about it.
        measured: the numbers that the verdict rests on.
    """

    check: str
    verdict: Verdict
    text: str
    advice: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)


def gripper(episodes: Sequence[RecordedEpisode], embodiment: Embodiment) -> tuple[Finding, Gripper | None]:
    """Find the recorded values that open and close the gripper, from the fingers' response to changes of the command.

    Returns:
        the finding, and the meaning of the values, or None if it is not clear.
    """
    if len(embodiment.grippers) != 1:
        return Finding("gripper", "not checked", f"the embodiment has {len(embodiment.grippers)} grippers"), None
    (index,) = embodiment.grippers
    values_N = np.concatenate([episode.actions_TA[:, index] for episode in episodes])
    low, high = float(values_N.min()), float(values_N.max())
    between = float(np.mean((values_N > low + LEVEL * (high - low)) & (values_N < high - LEVEL * (high - low))))
    measured: dict[str, Any] = {"low": low, "high": high, "between": between}
    answers = [answer for episode in episodes for answer in _answers(episode, index, (low + high) / 2)]
    if low == high or not answers:
        text = f"its command never changes while the fingers are observed (values {low:g} to {high:g})"
        return Finding("gripper", "not checked", text, measured=measured), None
    wider_when_high = float(np.median(answers))
    measured |= {"changes": len(answers), "width_change_when_high_m": wider_when_high}
    if abs(wider_when_high) < 1e-3:
        return Finding("gripper", "not checked", "the fingers do not follow its command", measured=measured), None
    opened, closed = (high, low) if wider_when_high > 0 else (low, high)
    expected = (embodiment.gripper_open, embodiment.gripper_close)
    meaning = Gripper(index, (opened, closed), expected)
    if np.allclose((opened, closed), expected, atol=0.02):
        return Finding("gripper", "ok", f"{opened:g} opens, {closed:g} closes", measured=measured), meaning
    wrong = []
    if (opened < closed) != (expected[0] < expected[1]):
        wrong.append("the sign is inverted")
    if not np.allclose(sorted((opened, closed)), sorted(expected), atol=0.02):
        wrong.append(f"the range is {low:g} to {high:g}")
    return Finding(
        "gripper",
        "mismatch",
        f"{' and '.join(wrong)}: in the data {opened:g} opens and {closed:g} closes, "
        f"in the simulator {expected[0]:g} opens and {expected[1]:g} closes",
        f"map it with data.gripper={{index: {index}, open: {opened:g}, close: {closed:g}}}",
        measured,
    ), meaning


def gripper_range(recordings: Recordings, embodiment: Embodiment) -> Finding:
    """Check that the recorded values of all grippers are in the declared range, without a simulator."""
    if not embodiment.grippers:
        return Finding("gripper", "not checked", "the embodiment has no gripper")
    if recordings.gripper_mistakes:
        return Finding("gripper", "mismatch", "; ".join(recordings.gripper_mistakes))
    return Finding("gripper", "ok", "values are in the declared range; which end opens was not checked")


def _answers(episode: RecordedEpisode, index: int, middle: float) -> list[float]:
    """Return the changes of the fingers' width (m) `RESPONSE_STEPS` after each change of the command.

    The sign is that of a change to the high level: changes after a change to the low level are negated.
    """
    if episode.states_TS is None:
        return []
    high_T = episode.actions_TA[:, index] > middle
    width_T = np.abs(episode.states_TS[:, FINGERS]).sum(axis=1)
    found = []
    for step in np.flatnonzero(np.diff(high_T)) + 1:
        end = step + RESPONSE_STEPS
        if end < len(width_T) and (high_T[step:end] == high_T[step]).all():
            found.append(float(width_T[end] - width_T[step]) * (1 if high_T[step] else -1))
    return found


def statistics(
    check: str,
    stored: Mapping[str, Mapping[str, Sequence[float]]],
    actual: Mapping[str, np.ndarray],
    embodiment: Embodiment,
) -> Finding:
    """Check that stored quantiles and extremes have the right names and belong to these data.

    Args:
        check: name of the finding.
        stored: feature (`action`, `state`) -> `min`, `max`, `q01`, `q99` -> numbers.
        actual: feature -> all frames [N,D].
        embodiment: the robot; says which dimensions are normalised, and how.
    """
    known = {
        name: {key: stored[name][key] for key in QUANTILES if key in stored[name]} for name in actual if name in stored
    }
    if not any(known.values()):
        return Finding(check, "not checked", "no quantiles or extremes are stored")
    wrong, measured = [], {}
    for name, given in known.items():
        values_ND = actual[name]
        other = {key for key, numbers in given.items() if np.size(numbers) != values_ND.shape[1]}
        if other:
            wrong.append(f"{name}: {', '.join(sorted(other))} of another size than the data's {values_ND.shape[1]}")
            continue
        mask = np.ones(values_ND.shape[1], bool)
        if name == "action":
            mask = np.array(embodiment.action_normalise_mask)
        found, numbers = _named_wrongly(given, values_ND, mask)
        measured[name] = numbers
        wrong += [f"{name}: {text}" for text in found]
    if wrong:
        return Finding(
            check,
            "mismatch",
            "; ".join(wrong),
            f"actions are normalised by {embodiment.action_normalisation}: compute the statistics of these data",
            measured,
        )
    return Finding(check, "ok", "quantiles and extremes are those of the data", measured=measured)


def _named_wrongly(
    stored: Mapping[str, Sequence[float]], values_ND: np.ndarray, mask: np.ndarray
) -> tuple[list[str], dict[str, Any]]:
    values_ND = values_ND[:, mask].astype(np.float64)
    actual = {name: np.array(numbers) for name, numbers in Statistics.of(values_ND).to_dict().items()}
    given = {name: np.asarray(numbers, np.float64).reshape(-1)[mask] for name, numbers in stored.items()}
    size = np.maximum(actual["max"] - actual["min"], 1e-6)
    # A dimension tells nothing if its quantiles are its extremes.
    apart = ((actual["max"] - actual["q99"]) > TAIL * size) & ((actual["q01"] - actual["min"]) > TAIL * size)

    def off(name: str, reference: str) -> float:
        if name not in given or not apart.any():
            return np.inf
        return float((np.abs(given[name] - actual[reference]) / size)[apart].max())

    wrong = []
    numbers = {name: {"stored": list(given[name]), "data": list(actual[name])} for name in given}
    if max(off("q01", "min"), off("q99", "max")) < EQUAL:
        wrong.append("the stored q01 and q99 are the minimum and maximum")
    elif max(off("min", "q01"), off("max", "q99")) < EQUAL:
        wrong.append("the stored minimum and maximum are q01 and q99")
    else:
        # lerobot averages the quantiles of episodes, so that beside extremes, quantiles need only lie between these.
        pairs = [pair for pair in (("min", "max"), ("q01", "q99")) if pair[0] in given and pair[1] in given]
        for pair in pairs:
            near = {name: actual[name] for name in pair}
            if pair != pairs[0]:
                near = {name: given[name].clip(actual["min"], actual["max"]) for name in pair}
            # NaN is not near anything
            if not all((np.abs(given[name] - near[name]) <= FAR * size).all() for name in pair):
                wrong.append(f"{' and '.join(pair)} are not those of the data")
    full = np.isclose(np.abs(values_ND), 1.0, atol=1e-6)
    if (full & (values_ND > 0)).any(0).all() and (full & (values_ND < 0)).any(0).all() and (actual["max"] <= 1).all():
        wrong.append("all dimensions range exactly from -1 to 1, as if they were normalised already")
    return wrong, numbers


def versions(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> Finding:
    """Check that the installed simulators have the versions that recorded the data set."""
    known = {name: str(recorded[name]) for name in SIMULATORS if name in recorded}
    installed = {name: str(here[name]) for name in SIMULATORS if name in here}
    measured = {"recorded": known, "installed": installed}
    if not known:
        text = f"the data set does not name the versions that recorded it; installed here: {_listed(installed)}"
        return Finding("versions", "not checked", text, measured=measured)
    other = {name: value for name, value in known.items() if installed.get(name) != value}
    if not other and recorded.get("assets", here.get("assets")) != here.get("assets"):
        text = f"{_listed(known)}; the images show other meshes or textures ({recorded['assets']})"
        return Finding("versions", "note", text, "evaluate with the assets of the recording", measured)
    if not other:
        return Finding("versions", "ok", _listed(known), measured=measured)
    different = ", ".join(f"{name} {value} (here {installed.get(name, 'none')})" for name, value in other.items())
    return Finding(
        "versions",
        "mismatch",
        f"recorded with {different}",
        "success rates depend on the simulator's version: install the recorded one, or make the data again",
        measured,
    )


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items())


def words(episodes: Sequence[RecordedEpisode]) -> Finding:
    """Check that all instructions have words, by which a policy can tell them apart."""
    named = {episode.instruction: episode.name for episode in reversed(episodes)}
    try:
        check_texts(WordTokenizer.from_instructions(named), sorted(named.items()))
    except ValueError as error:
        return Finding("instructions", "mismatch", str(error))
    return Finding(
        "instructions", "ok", f"{len(named)} different instructions", measured={"instructions": sorted(named)}
    )


def instructions(episodes: Sequence[RecordedEpisode], known: Sequence[str], elsewhere: Collection[str] = ()) -> Finding:
    """Check that the instructions are those of the suite's tasks (`known`), or of other suites (`elsewhere`)."""
    asked = {episode.instruction for episode in episodes}
    unknown = sorted(asked - set(known) - set(elsewhere))
    others = asked - set(known) - set(unknown)
    measured = {"unknown": unknown, "of other suites": sorted(others)}
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 1, 0.0)
        return Finding(
            "instructions",
            "mismatch",
            f"{len(unknown)} are not instructions of the suite, e.g. {unknown[0]!r}; the suite says {close[0]!r}",
            "evaluation uses the suite's instructions: rename the tasks, or choose the suite of the data",
            measured,
        )
    scenes = {number: repr(text) for number, text in enumerate(known)}
    wrong = [e for e in episodes if e.start is not None and scenes.get(e.start.task) != repr(e.instruction)]
    if wrong:
        task = wrong[0].start.task  # type: ignore[union-attr]
        return Finding(
            "instructions",
            "mismatch",
            f"{wrong[0].name} was recorded in the scene of {scenes.get(task, f'task {task}, which the suite lacks,')} "
            f"but its instruction is {wrong[0].instruction!r}",
            "the order of the tasks or their instructions were mixed up",
            {"episodes": [episode.name for episode in wrong]},
        )
    said = f"{len(asked & set(known))} of {len(known)} tasks"
    if others:
        text = f"{said}; {len(others)} are of other suites"
        return Finding("instructions", "note", text, "their episodes were not replayed: check each suite", measured)
    return Finding("instructions", "ok", said, measured=measured)


def control_rate(recordings: Recordings, embodiment: Embodiment) -> Finding:
    """Check that the data set's frames per second are the embodiment's control rate."""
    stored, expected = recordings.control_hz, embodiment.control_hz
    if stored is None:
        return Finding("control rate", "not checked", "the data set does not state its rate")
    if stored == expected:
        return Finding("control rate", "ok", f"{stored:g} Hz")
    text = f"the data set states {stored:g} Hz, but the robot is controlled at {expected:g} Hz"
    return Finding("control rate", "note", text, "nothing here uses the stated rate; see if the motion check is ok")
