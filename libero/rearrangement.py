"""Rearrange a LIBERO scene for the robustness benchmark: more things, moved things, and another start of the arm.

The things of a task are meshes, so that a compiled model cannot change their sizes. Fixtures stay where they are.

Shape legend: G collision geoms, E joint angles of the arm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mujoco
import numpy as np

from cogvla.envs.perturbation.perturbation import CrowdedSceneError, Values, within
from cogvla.libero.installation import Predicate
from cogvla.libero.simulation import LiberoScene
from cogvla.libero.spares import Spare

_PLACES = re.compile(r"\b(left|right|front|back|between|next to|center)\b|\bmiddle (?!drawer|layer)")
"""Words that say where on the table a thing is; the middle drawer is one of a stack."""
_REGION = np.array([[-0.30, -0.36], [0.24, 0.36]])
"""Where spares stand, in metres from the middle of the table along x and y."""
_TRIES = 60
_GAPS = ((0.04, 0.06, 0.10), (0.025, 0.03, 0.08), (0.015, 0.0, 0.06), (0.01, -0.03, 0.05))
"""Metres from a spare to the next thing, to the ways of the task, and to their ends: the first that leave room count.
A spare is lower than the hand that passes over it."""
_SPOTS = 200
_BEFORE_JOINTS = 0.10
"""Metres around all that a drawer, door or knob sweeps over."""
_KEPT = 0.03
"""Metres between a moved thing and the next one, or what was between them if that is less."""
_OUT_OF_THE_WAY = 0.15
"""Metres from the way of a task's thing to the middle of another one that does not disturb."""
_FARTHEST = 0.72
"""Metres from the arm's base to a moved thing."""
_FLAT = 0.4
"""Width in metres; a wider geom is something to stand on."""
_LEVEL = 0.01
_DRAWN = np.array([0, 1, 0, 0, 0, 0], np.uint8)
"""The group of geoms that are drawn."""
_LIMIT = 0.1
"""Radians between a joint's start and its stop."""
_HAND_ABOVE = 0.10
"""Metres from the table up to the hand at the start."""
Drawn = dict[str, Any]
Seen = Callable[[np.ndarray], bool]


# --- layout --------------------------------------------------------------------------------------------------------


class _Surroundings:
    """Where the collision geoms of a scene are. They are taken as boxes along the world's axes.

    Args:
        scene: the scene.
        absent: bodies that do not stand anywhere yet.
    """

    def __init__(self, scene: LiberoScene, absent: Iterable[int] = ()) -> None:
        self.scene = scene
        self.model, self.data = scene.model, scene.data
        model = self.model
        self.robot = model.body_rootid[model.body("robot0_base").id]
        roots_G = model.body_rootid[model.geom_bodyid]
        collides_G = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
        flat_G = (2 * model.geom_aabb[:, 3:5] > _FLAT).any(axis=1) | (model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE)
        self._geoms_G = np.flatnonzero(collides_G & ~flat_G & (roots_G != self.robot) & (roots_G != 0))
        self._roots_G = roots_G[self._geoms_G]
        self.absent = list(absent)

    def boxes(self, root: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower and upper corners [G,3] of all things, or of the one whose body is `root`."""
        geoms_G = self._geoms_G if root is None else self._geoms_G[self._roots_G == root]
        turn_G33 = self.data.geom_xmat[geoms_G].reshape(-1, 3, 3)
        aabb_G6 = self.model.geom_aabb[geoms_G]
        centre_G3 = self.data.geom_xpos[geoms_G] + np.einsum("gij,gj->gi", turn_G33, aabb_G6[:, :3])
        half_G3 = np.einsum("gij,gj->gi", np.abs(turn_G33), aabb_G6[:, 3:])
        return centre_G3 - half_G3, centre_G3 + half_G3

    def gap(self, root: int) -> float:
        """Return the metres from a thing to the next one, seen from above; negative if one is over the other."""
        low_G3, high_G3 = self.boxes()
        own_G, others_G = self._roots_G == root, ~np.isin(self._roots_G, [root, *self.absent])
        apart = [
            np.maximum(low_G3[others_G, :2] - high, low - high_G3[others_G, :2]).max(axis=1)
            for low, high in zip(low_G3[own_G, :2], high_G3[own_G, :2], strict=True)
        ]
        return float(np.min(apart)) if np.size(apart) else np.inf

    def room(self, spot: np.ndarray) -> float:
        """Return the metres from a point [2] to the next thing, seen from above."""
        low_G3, high_G3 = self.boxes()
        others_G = ~np.isin(self._roots_G, self.absent)
        off_G2 = np.maximum(np.maximum(low_G3[others_G, :2] - spot, spot - high_G3[others_G, :2]), 0.0)
        return float(np.linalg.norm(off_G2, axis=1).min()) if len(off_G2) else np.inf

    def ground(self, spot: np.ndarray) -> float:
        """Return the height of what cannot move below a point [2], in metres; free things do not count."""
        model, point, hit = self.model, np.array([*spot, self.scene.surface_height + 1.0]), np.array([-1], np.int32)
        while True:
            far = mujoco.mj_ray(model, self.data, point, np.array([0.0, 0.0, -1.0]), None, 1, -1, hit)
            if far < 0:
                return -np.inf
            point[2] -= far
            body = model.geom_bodyid[hit[0]]
            collides = bool(model.geom_contype[hit[0]] or model.geom_conaffinity[hit[0]])
            if collides and model.body_weldid[body] == 0 and model.body_rootid[body] != self.robot:
                return float(point[2])
            point[2] -= 0.001

    def in_sight(self, point: np.ndarray) -> bool:
        """Return True if nothing but the arm, which moves, is between a point [3] and the policy's outer camera."""
        eye = self.data.camera("agentview").xpos
        way, hit = point - eye, np.array([-1], np.int32)
        start = eye.copy()
        while (far := mujoco.mj_ray(self.model, self.data, start, way, _DRAWN, 1, -1, hit)) >= 0:
            start += far * way
            if (point - start) @ way <= 0:
                return True
            if self.model.body_rootid[self.model.geom_bodyid[hit[0]]] != self.robot:
                return False
            start += 0.001 * way
        return True

    def is_level(self, spot: np.ndarray, radius: float, height: float) -> bool:
        """Return True if the ground around a point [2] is at this height."""
        around = radius * np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
        return all(abs(self.ground(spot + off) - height) < _LEVEL for off in around)

    def swept(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the lower and upper corners [2] of what each drawer, door and knob sweeps over."""
        model, found = self.model, []
        for joint in range(model.njnt):
            body = model.jnt_bodyid[joint]
            if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE or model.body_rootid[body] == self.robot:
                continue
            below = {int(body)}
            for child in range(body + 1, model.nbody):  # children have higher numbers
                if int(model.body_parentid[child]) in below:
                    below.add(child)
            mine_G = np.isin(model.geom_bodyid[self._geoms_G], list(below))
            if not mine_G.any():
                continue
            address, corners = model.jnt_qposadr[joint], []
            before = self.data.qpos[address]
            low, high = model.jnt_range[joint]
            for value in (before, *np.linspace(low, high, 5)):
                self.data.qpos[address] = value
                mujoco.mj_kinematics(model, self.data)
                low_G3, high_G3 = self.boxes()
                corners += [low_G3[mine_G, :2].min(0), high_G3[mine_G, :2].max(0)]
            self.data.qpos[address] = before
            mujoco.mj_kinematics(model, self.data)
            found.append((np.min(corners, axis=0) - _BEFORE_JOINTS, np.max(corners, axis=0) + _BEFORE_JOINTS))
        return found


def says_where(instruction: str) -> bool:
    """Return True if an instruction says where on the table a thing is."""
    return bool(_PLACES.search(instruction))


def rearrange(
    scene: LiberoScene,
    rng: np.random.Generator,
    values: Values,
    first: Values,
    spares: Sequence[Spare],
    goal: Sequence[Predicate],
    forbidden: Sequence[Predicate],
    instruction: str,
    seen: Seen,
) -> Drawn:
    """Move the things on the table, and put the spares on it; return what was drawn.

    Args:
        scene: the scene, in its initial state.
        rng: source of the draws.
        values: magnitudes of the level.
        first: magnitudes of level 1, for instructions that say where a thing is.
        spares: the spares in the scene.
        goal: predicates of the task; spares stand beside the ways of their things.
        forbidden: predicates that must not become true, of all tasks in this scene.
        instruction: what the policy is told.
        seen: function of a point [3]: True if it is well inside of the policy's image.

    Raises:
        CrowdedSceneError: there is no room for a spare.
    """
    model, data = scene.model, scene.data
    around = _Surroundings(scene, [model.body(spare.name).id for spare in spares])
    limits = first if says_where(instruction) else values
    loose = {name: int(model.body_rootid[scene.env.obj_body_id[name]]) for name in scene.loose}
    heights = [around.ground(scene.position(name)[:2]) for name in loose]
    ground = float(np.median(heights)) if heights else scene.surface_height
    moved = [_moved(around, rng, limits, name, root, ground, goal, forbidden, seen) for name, root in loose.items()]
    ways = _ways(scene, goal)
    swept = around.swept()
    for spare in spares:
        spot, angle = _free_spot(around, rng, spare, ground, ways, swept, seen), rng.uniform(-np.pi, np.pi)
        pose = data.joint(f"{spare.name}_joint").qpos
        pose[:3] = [*spot, ground + spare.size[-1] + 0.002]
        pose[3:] = [np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)]
        mujoco.mj_forward(model, data)
        around.absent.remove(model.body(spare.name).id)
    return {
        "distractors": [spare.name.removeprefix("spare_") for spare in spares],
        "moved_mm": [1000 * far for far, _ in moved],
        "turned_degrees": [float(np.rad2deg(angle)) for _, angle in moved],
    }


def _moved(
    around: _Surroundings,
    rng: np.random.Generator,
    values: Values,
    name: str,
    root: int,
    ground: float,
    goal: Sequence[Predicate],
    forbidden: Sequence[Predicate],
    seen: Seen,
) -> tuple[float, float]:
    """Move a thing where nothing is in its way; return by how many metres and radians, 0 if there is no such place."""
    scene, data, model = around.scene, around.data, around.model
    pose = data.joint(scene.env.get_object(name).joints[-1]).qpos
    start, before, gap = pose.copy(), scene.position(name), around.gap(root)
    clear = _clearances(scene, goal)
    forbidden = [predicate for predicate in forbidden if not scene.holds([predicate])]
    base = data.xpos[model.body("robot0_base").id][:2]
    low_G3, high_G3 = around.boxes(root)
    radius = float((high_G3.max(0) - low_G3.min(0))[:2].max()) / 2
    far, angle = within(rng, values["moved_mm"]) / 1000, np.deg2rad(within(rng, values["turned_degrees"]))
    farthest = max(_FARTHEST, float(np.linalg.norm(before[:2] - base)))
    for way, side in zip(rng.uniform(-np.pi, np.pi, _TRIES), rng.choice([-1.0, 1.0], _TRIES), strict=True):
        pose[:2] = start[:2] + far * np.array([np.cos(way), np.sin(way)])
        turn = np.array([np.cos(angle / 2), 0.0, 0.0, side * np.sin(angle / 2)])
        mujoco.mju_mulQuat(pose[3:], turn, start[3:])
        mujoco.mj_forward(model, data)
        now = scene.position(name)
        if (
            around.gap(root) >= min(gap, _KEPT)
            and np.linalg.norm(now[:2] - base) <= farthest
            and around.is_level(now[:2], radius, ground)
            and (seen(now) or not seen(before))
            and (_clearances(scene, goal) >= clear).all()
            and not any(scene.holds([predicate]) for predicate in forbidden)
        ):
            return far, side * angle
    pose[:] = start
    mujoco.mj_forward(model, data)
    return 0.0, 0.0


def _ways(scene: LiberoScene, goal: Sequence[Predicate]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the ends [2] of the ways that things of these predicates go."""
    return [(scene.position(predicate[1])[:2], scene.position(predicate[-1])[:2]) for predicate in goal]


def _clearances(scene: LiberoScene, goal: Sequence[Predicate]) -> np.ndarray:
    """Return the metres from each other thing to the ways of a goal, cut off where it is out of the way."""
    things = [name for name in scene.loose if all(name not in predicate for predicate in goal)]
    near = [min(_from_way(scene.position(name)[:2], *way) for way in _ways(scene, goal)) for name in things]
    return np.minimum(near, _OUT_OF_THE_WAY)


def _free_spot(
    around: _Surroundings,
    rng: np.random.Generator,
    spare: Spare,
    ground: float,
    ways: Sequence[tuple[np.ndarray, np.ndarray]],
    swept: Sequence[tuple[np.ndarray, np.ndarray]],
    seen: Seen,
) -> np.ndarray:
    """Return a place [2] for a spare, in view and behind nothing, beside all things and ways."""
    centre = np.asarray(around.scene.env.workspace_offset[:2])
    for gap, beside, around_end in _GAPS:
        for _ in range(_SPOTS):
            spot = centre + rng.uniform(*_REGION)
            if (
                all(_from_way(spot, *way) > spare.radius + beside for way in ways)
                and all(np.linalg.norm(spot - end) > spare.radius + around_end for way in ways for end in way)
                and not any(((low < spot) & (spot < high)).all() for low, high in swept)
                and around.room(spot) > spare.radius + gap
                and around.is_level(spot, spare.radius + 0.01, ground)
                and seen(np.array([*spot, ground]))
                and around.in_sight(np.array([*spot, ground + 2 * spare.size[-1]]))
            ):
                return spot
    raise CrowdedSceneError(f"no room for {spare.name}")


def _from_way(spot: np.ndarray, one: np.ndarray, other: np.ndarray) -> float:
    """Return the distance of a point [2] from the way between two others."""
    way = other - one
    share = float(np.clip((spot - one) @ way / max(float(way @ way), 1e-9), 0.0, 1.0))
    return float(np.linalg.norm(spot - one - share * way))


# --- the arm -------------------------------------------------------------------------------------------------------


def move_start(scene: LiberoScene, rng: np.random.Generator, values: Values) -> Drawn:
    """Move the arm's base, and start with other joint angles, without contact; return what was drawn.

    State and actions stay in world coordinates, and the posture that the controller prefers stays the nominal one.
    """
    model, data = scene.model, scene.data
    known = _contacts(scene)
    around, far = rng.uniform(-np.pi, np.pi), within(rng, values["base_mm"]) / 1000
    model.body_pos[model.body("robot0_base").id] += far * np.array([np.cos(around), np.sin(around), 0.0])
    (robot,) = scene.env.robots
    joints_E = np.array(robot._ref_joint_pos_indexes)
    low_E, high_E = model.jnt_range[np.array(robot._ref_joint_indexes)].T
    nominal_E = data.qpos[joints_E].copy()
    size = within(rng, values["joints"])
    for share in (1.0, 0.5, 0.0):
        for way_E in rng.normal(size=(_TRIES, len(joints_E))):
            data.qpos[joints_E] = nominal_E + share * size * way_E / np.linalg.norm(way_E)
            mujoco.mj_forward(model, data)
            angles_E, high = data.qpos[joints_E], data.site_xpos[robot.eef_site_id][2] - scene.surface_height
            inside = (low_E + _LIMIT < angles_E) & (angles_E < high_E - _LIMIT)
            if share == 0.0 or (inside.all() and high > _HAND_ABOVE and _contacts(scene) <= known):
                robot.controller.update(force=True)
                robot.controller.reset_goal()  # or the hand would turn back before the first action
                return {"joints": share * size, "base_mm": 1000 * far}
    raise AssertionError("a share of 0 always fits")


def _contacts(scene: LiberoScene) -> set[tuple[int, int]]:
    """Return the pairs of geoms in contact of which one is the robot's."""
    model = scene.model
    robot = model.body_rootid[model.body("robot0_base").id]
    pairs = {(int(one), int(other)) for one, other in scene.data.contact.geom}
    return {pair for pair in pairs if any(model.body_rootid[model.geom_bodyid[geom]] == robot for geom in pair)}
