"""Compare recorded with simulated states of replayed episodes: representation, timing, motion and success.

Shape legend: N frames of all traces, T steps, S state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cogvla.envs.rotations import rotation_matrix, rotation_vector
from cogvla.libero.conventions.declared import Finding
from cogvla.libero.conventions.replayed_episodes import ReplayTrace
from cogvla.libero.env import axis_angle

AS_IT_IS = "as it is"
EARLY = {True: 20, False: 5}
"""`ReplayTrace.exact` -> number of steps whose states are compared."""
POSITION, ROTATION, FINGERS = slice(0, 3), slice(3, 6), slice(6, 8)
NEAR_M = {True: 0.01, False: 0.08}
WINDOW, MOVING = 5, 40
AXES = {"x": 0.003, "y": 0.003, "z": 0.003, "turn x": 0.03, "turn y": 0.03, "turn z": 0.03}
"""Axis -> least motion in a window (m or rad, root mean square) for a comparison of that axis."""
SUCCESS = 0.5
"""Least share of replays that succeed. Of LIBERO's own demonstrations the published regeneration could replay 1,693 of
2,000; the share was lowest in libero_10."""


def _turned_otherwise(vector_N3: np.ndarray) -> np.ndarray:
    """Return the same rotations for the other sign of the quaternion: 2 pi minus the angle, about the opposite axis."""
    angle_N1 = np.maximum(np.linalg.norm(vector_N3, axis=1, keepdims=True), 1e-9)
    return vector_N3 * (1 - 2 * np.pi / angle_N1)


def _folded(vector_N3: np.ndarray) -> np.ndarray:
    large_N1 = np.linalg.norm(vector_N3, axis=1, keepdims=True) > np.pi
    return np.where(large_N1, _turned_otherwise(vector_N3), vector_N3)


def _w_first(vector_N3: np.ndarray) -> np.ndarray:
    """Return axis times angle of quaternions w, x, y, z that were read as x, y, z, w."""
    angle_N1 = np.maximum(np.linalg.norm(vector_N3, axis=1, keepdims=True), 1e-9)
    quaternion_N4 = np.concatenate([np.cos(angle_N1 / 2), vector_N3 / angle_N1 * np.sin(angle_N1 / 2)], axis=1)
    return np.stack([axis_angle(quaternion) for quaternion in quaternion_N4])


def _euler(vector_N3: np.ndarray) -> np.ndarray:
    r = np.stack([rotation_matrix(vector) for vector in vector_N3])
    pitch = np.arcsin(np.clip(-r[:, 2, 0], -1, 1))
    return np.stack([np.arctan2(r[:, 2, 1], r[:, 2, 2]), pitch, np.arctan2(r[:, 1, 0], r[:, 0, 0])], axis=1)


ROTATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    AS_IT_IS: lambda vector_N3: vector_N3,
    "of the other quaternion sign (2 pi minus the angle, about the opposite axis)": _turned_otherwise,
    "folded into angles up to pi": _folded,
    "of the inverse rotation (all three negated)": lambda vector_N3: -vector_N3,
    "of a quaternion w, x, y, z that was read as x, y, z, w": _w_first,
    "Euler angles": _euler,
}
GRIPS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    AS_IT_IS: lambda finger_N2: finger_N2,
    "of equal signs": lambda finger_N2: np.abs(finger_N2),
    "of opposite signs": lambda finger_N2: np.abs(finger_N2) * [1, -1],
    "exchanged or negated": lambda finger_N2: finger_N2[:, ::-1],
    "each the width between them": lambda finger_N2: np.abs(finger_N2).sum(1, keepdims=True).repeat(2, 1),
}


def states(traces: Sequence[ReplayTrace], delay: int) -> list[Finding]:
    """Compare position, rotation and fingers of recorded and simulated states, early in the episodes."""
    exact = all(trace.exact for trace in traces)
    pairs = [_aligned(trace, delay, EARLY[trace.exact]) for trace in traces if trace.episode.states_TS is not None]
    if not pairs:
        return [Finding("state", "not checked", "no states are recorded")]
    recorded_NS, simulated_NS = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return [
        _position(np.stack([a[0, POSITION] - b[0, POSITION] for a, b in pairs]), exact),
        _representation("rotation", recorded_NS[:, ROTATION], simulated_NS[:, ROTATION], ROTATIONS, 0.05),
        _representation("fingers", recorded_NS[:, FINGERS], simulated_NS[:, FINGERS], GRIPS, 0.004),
    ]


def _aligned(trace: ReplayTrace, delay: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return recorded and simulated states [T,S] of the same moments."""
    recorded_TS = trace.episode.states_TS
    assert recorded_TS is not None, "callers filter episodes without states"
    first = max(0, -delay)
    count = min(steps, len(recorded_TS) - first, len(trace.states_TS) - first - delay)
    return recorded_TS[first : first + count], trace.states_TS[first + delay : first + delay + count]


def _position(difference_N3: np.ndarray, exact: bool) -> Finding:
    offset_3, spread = np.median(difference_N3, axis=0), float(difference_N3.std(axis=0).max())
    distance = float(np.linalg.norm(offset_3))
    measured = {"offset_m": offset_3.tolist(), "spread_m": spread}
    if distance < NEAR_M[exact]:
        return Finding("position", "ok", f"as in the simulator, {1000 * distance:.0f} mm apart", measured=measured)
    where = ", ".join(f"{value:+.3f}" for value in offset_3)
    text = f"off by ({where}) m, spread {spread:.3f} m"
    advice = "a constant offset means another frame: positions must be in the simulator's world frame"
    return Finding("position", "mismatch", text, advice, measured)


def _representation(
    check: str,
    recorded: np.ndarray,
    simulated: np.ndarray,
    candidates: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    margin: float,
) -> Finding:
    """Find the representation of the simulator's numbers that agrees best with the recorded ones, and judge it."""
    errors = {
        name: float(np.linalg.norm(recorded - change(simulated), axis=1).mean()) for name, change in candidates.items()
    }
    best, plain = min(errors, key=lambda name: errors[name]), errors[AS_IT_IS]
    unit = "rad" if check == "rotation" else "m"
    if plain - errors[best] > margin and errors[best] < 0.5 * plain:
        text = f"the recorded numbers are {best} (error {errors[best]:.3f} {unit}; unconverted {plain:.3f} {unit})"
        advice = "evaluation shows policies the simulator's numbers: store those, see Conventions in docs/libero.md"
        return Finding(check, "mismatch", text, advice, {"errors": errors})
    if plain > 6 * margin:
        text = f"the recorded numbers agree with the simulator's in no known representation (error {plain:.3f} {unit})"
        return Finding(check, "mismatch", text, "see Conventions in docs/libero.md", {"errors": errors})
    return Finding(check, "ok", f"as in the simulator, error {plain:.3f} {unit}", measured={"errors": errors})


def timing(traces: Sequence[ReplayTrace], delay: int) -> tuple[Finding, int]:
    """Check by how many control steps the observations are late; return the finding and the best delay."""
    usable = [trace for trace in traces if trace.exact and trace.episode.states_TS is not None]
    if not usable:
        return Finding("time", "not checked", "needs episodes with states and a known initial state"), delay
    errors = {}
    for shift in range(-2, 3):
        pairs = [_aligned(trace, shift, MOVING) for trace in usable]
        errors[shift] = float(np.mean([np.linalg.norm((a - b)[:, POSITION], axis=1).mean() for a, b in pairs]))
    best = min(errors, key=lambda shift: errors[shift])
    measured = {"error_m": {str(shift): error for shift, error in errors.items()}}
    if best != delay and errors[best] < 0.6 * errors[delay] and errors[delay] - errors[best] > 1e-3:
        late = f"{abs(best - delay)} step(s) {'late' if best > delay else 'early'}"
        text = (
            f"observations are {late}: error {1000 * errors[delay]:.1f} mm, {1000 * errors[best]:.1f} mm when shifted"
        )
        return Finding("time", "mismatch", text, "each row must be observed before its action", measured), best
    text = "each row was observed " + (
        "before its action" if delay == 0 else "after its action, as in all files of this kind"
    )
    return Finding("time", "ok", text, measured=measured), delay


def motion(traces: Sequence[ReplayTrace], delay: int, turns: bool = True) -> Finding:
    """Compare distance and direction of the arm's motion, recorded and simulated, for the same actions.

    `turns`: compare rotations too; False if the representation of the recorded rotations is unknown.
    """
    pairs = [_aligned(trace, delay, MOVING) for trace in traces if trace.episode.states_TS is not None]
    if not pairs:
        return Finding("motion", "not checked", "needs recorded states")
    a_N6, b_N6 = (np.concatenate([_moves(states) for states in part]) for part in zip(*pairs, strict=True))
    wrong, measured = [], {}
    for axis, (name, least) in enumerate(list(AXES.items())[: 6 if turns else 3]):
        a, b = a_N6[:, axis], b_N6[:, axis]
        if not len(b) or np.sqrt(np.mean(b * b)) < least:
            continue  # moves too little to tell anything
        ratio, alike = float(a @ b / (b @ b)), float(a @ b / np.sqrt((a @ a) * (b @ b) + 1e-12))
        measured[name] = {"ratio": ratio, "likeness": alike}
        if alike < -0.5:
            wrong.append(f"{name} goes the opposite way")
        elif alike > 0.8 and not 0.7 < ratio < 1.4:
            wrong.append(f"{name} goes {ratio:.2f} times as far")
        elif alike < 0.3:
            wrong.append(f"{name} does not follow the simulator's")
    if wrong:
        advice = "actions must be deltas in [-1, 1] for the controller, in the world frame: not normalised, not metres"
        return Finding("motion", "mismatch", f"for the same actions the recorded {', '.join(wrong)}", advice, measured)
    return Finding("motion", "ok", f"as in the simulator ({', '.join(measured) or 'hardly any'})", measured=measured)


def _moves(state_TS: np.ndarray) -> np.ndarray:
    """Return displacement (m) and rotation vector (rad) over windows of `WINDOW` steps, [n,6]."""
    pairs = [(state_TS[t], state_TS[t + WINDOW]) for t in range(0, len(state_TS) - WINDOW, WINDOW)]
    rows = []
    for before, after in pairs:
        turn = rotation_matrix(after[ROTATION].astype(float)) @ rotation_matrix(before[ROTATION].astype(float)).T
        rows.append(np.concatenate([after[POSITION] - before[POSITION], rotation_vector(turn)]))
    return np.array(rows).reshape(-1, 6)


def fixtures(traces: Sequence[ReplayTrace]) -> list[Finding]:
    """Note the fixtures whose recorded poses are unknown; no finding if all are known."""
    unknown = [trace for trace in traces if trace.unplaced]
    if not unknown:
        return []
    names = sorted({name for trace in unknown for name in trace.unplaced})
    text = (
        f"{len(unknown)} of {len(traces)} replayed episodes do not say where {', '.join(names)} stood, because their "
        "files have no model_file with them: they stand where this simulator puts them"
    )
    advice = "images, success and drift may differ for this reason; convert_libero replay=actions needs no models"
    return [Finding("fixtures", "note", text, advice, {"fixtures": names, "episodes": len(unknown)})]


def replays(traces: Sequence[ReplayTrace], delay: int) -> Finding:
    """Count the replayed episodes that succeed again, and measure the drift from the recorded states."""
    exact = [trace for trace in traces if trace.exact]
    if not exact:
        text = "the data set does not say how its episodes began, so they cannot be replayed exactly"
        return Finding("replay", "not checked", text, "data sets that this package records have initial states")
    succeeded = sum(trace.success for trace in exact)
    drift = {f"{part} %": _drift(exact, delay, part / 100) for part in (0, 25, 50, 75, 100)}
    measured = {"episodes": len(exact), "succeeded": succeeded, "position_error_m": drift}
    text = f"{succeeded} of {len(exact)} recorded episodes succeed again"
    first, last = drift["0 %"], drift["100 %"]
    if first is not None and last is not None:
        text += f"; position error {1000 * first['median']:.0f} mm at the start, {1000 * last['median']:.0f} at the end"
    if succeeded < SUCCESS * len(exact):
        advice = "if no other check fails: other versions of the physics, another controller, or changed actions"
        return Finding("replay", "mismatch", text, advice, measured)
    return Finding("replay", "ok", text, measured=measured)


def _drift(traces: Sequence[ReplayTrace], delay: int, part: float) -> dict[str, float] | None:
    errors = []
    for trace in traces:
        if trace.episode.states_TS is not None:
            a, b = _aligned(trace, delay, len(trace.states_TS))
            at = round(part * (len(a) - 1))
            errors.append(float(np.linalg.norm((a - b)[at, POSITION])))
    return {"median": float(np.median(errors)), "max": max(errors)} if errors else None
