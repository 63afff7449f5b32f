"""Privileged state of a LIBERO scene for the scripted expert: hand, objects, regions, joints and obstacles.

Positions are in metres, in the world frame. Geometry is one box for each collision geom.

Shape legend: G collision geoms, P points.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from cogvla.libero.installation import Predicate
from cogvla.libero.simulation import LiberoScene

FINGER_OPEN = 0.04
"""Metres from the middle to each finger of the open hand."""
_CORNERS_83 = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
_WRIST_BACK, _WRIST_UP, _SHOULDER = 0.088, 0.204, 0.333
"""Geometry of a Panda in metres: from the fingertips back and up to the wrist, and from its base up to its shoulder."""
_FLOOR_LIKE = 0.4
"""Width in metres; a wider geom is something to stand on and no obstacle."""


@dataclass(frozen=True)
class Joint:
    """A drawer, door or knob.

    Attributes:
        name: name of the joint in the model.
        axis: axis in the world frame, unit vector [3].
        pivot: point on the axis in the world frame [3].
        out: the axis, signed towards the longer travel [3]: where a drawer opens to, or a knob turns on.
        travel: present fraction of that travel, 0 to 1.
    """

    name: str
    axis: np.ndarray
    pivot: np.ndarray
    out: np.ndarray
    travel: float


@dataclass(frozen=True)
class Obstacles:
    """Boxes to avoid: centres and half sizes [G,3], rotations [G,3,3], heights of their upper and lower ends [G]."""

    centre_G3: np.ndarray
    half_G3: np.ndarray
    rotation_G33: np.ndarray
    top_G: np.ndarray
    bottom_G: np.ndarray

    def near(self, point: np.ndarray, reach: float, margin: float) -> Obstacles:
        """Return the boxes that end above a point [3] and, with `margin` around them, can be within `reach` of it."""
        far_G = np.linalg.norm(self.half_G3 + margin, axis=1) + reach
        near_G = (self.top_G > point[2]) & (np.hypot(*(self.centre_G3[:, :2] - point[:2]).T) < far_G)
        parts = (self.centre_G3, self.half_G3, self.rotation_G33, self.top_G, self.bottom_G)
        return Obstacles(*(part_G[near_G] for part_G in parts))

    def under(self, spots_P2: np.ndarray, margin: float = 0.0) -> np.ndarray:
        """Return bool [P,G]: the point of the plane lies under or over the box, with `margin` metres around the box."""
        offset_PG2 = spots_P2[:, None] - self.centre_G3[:, :2]
        local_PG3 = np.einsum("pgi,gij->pgj", offset_PG2, self.rotation_G33[:, :2])
        return (np.abs(local_PG3) < self.half_G3 + margin).all(-1)


class SceneView:
    """Read access to one scene. Every answer is about the present state."""

    def __init__(self, scene: LiberoScene) -> None:
        self.scene = scene
        self._other: mujoco.MjData | None = None
        env, model = scene.env, scene.model
        (robot,) = env.robots
        self._site = robot.eef_site_id
        self._finger_positions = np.array(robot._ref_gripper_joint_pos_indexes)
        self._finger_velocities = np.array(robot._ref_gripper_joint_vel_indexes)
        collides_G = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
        self._geoms_G = np.flatnonzero(collides_G)
        centre_G3, half_G3 = model.geom_aabb[self._geoms_G, :3], model.geom_aabb[self._geoms_G, 3:]
        self._corners_G83 = centre_G3[:, None] + half_G3[:, None] * _CORNERS_83
        self._roots_G = model.body_rootid[model.geom_bodyid[self._geoms_G]]
        robot_root = model.body_rootid[model.site_bodyid[self._site]]
        names = [model.geom(i).name for i in range(model.ngeom)]
        self._fingers = [{i for i, n in enumerate(names) if f"finger{side}" in n and "collision" in n} for side in "12"]
        self._base = scene.data.xpos[model.body("robot0_base").id].copy()
        self._half_G3 = half_G3
        flat_G = (2 * half_G3[:, :2] > _FLOOR_LIKE).any(axis=1)
        self._obstacle_G = ~flat_G & (self._roots_G != robot_root) & (self._roots_G != 0)
        self._masks: dict[str, np.ndarray] = {}
        self._cached_at = -1.0

    def elsewhere(self, state: np.ndarray) -> SceneView:
        """Return a view of the same scene in another state, a row of `LiberoEnv.fixed_states`: its poses, no contacts.

        `holds` and `touching` do not work there. Things keep their present height: in fixed states, they are still to
        fall.
        """
        view, model = copy(self), self.scene.model
        view._other = data = mujoco.MjData(model)
        data.qpos[:] = state[1 : 1 + model.nq]
        heights = model.jnt_qposadr[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE] + 2
        data.qpos[heights] = self.scene.data.qpos[heights]
        mujoco.mj_kinematics(model, data)
        view._cached_at = -1.0
        return view

    @property
    def _data(self) -> mujoco.MjData:
        return self.scene.data if self._other is None else self._other

    # --- the robot ---------------------------------------------------------------------------------------------------

    @property
    def gripper(self) -> np.ndarray:
        """The point between the fingertips [3]."""
        return self._data.site_xpos[self._site].copy()

    @property
    def rotation(self) -> np.ndarray:
        """The hand's rotation [3,3]; columns: direction of the fingers' opening, the hand's side, where it points."""
        return self._data.site_xmat[self._site].reshape(3, 3).copy()

    @property
    def reach(self) -> np.ndarray:
        """The way from the shoulder to the wrist [3], for a hand that points more or less down."""
        way = self.gripper - _WRIST_UP * self.rotation[:, 2] - self._base
        along = way * (1.0, 1.0, 0.0)
        return way - _WRIST_BACK * along / max(float(np.linalg.norm(along)), 1e-6) - (0.0, 0.0, _SHOULDER)

    @property
    def opening(self) -> float:
        """Metres between the fingers."""
        return float(np.abs(self._data.qpos[self._finger_positions]).sum())

    @property
    def finger_speed(self) -> float:
        """The faster finger's speed in m/s."""
        return float(np.abs(self._data.qvel[self._finger_velocities]).max())

    def touching(self, thing: str) -> tuple[bool, bool]:
        """Return, for each of the two fingers, True if it touches a thing (or one body of a thing)."""
        geoms = set(self._geoms_of(thing))
        pairs = self._data.contact.geom
        touched = {(int(a) if int(b) in geoms else int(b)) for a, b in pairs if (int(a) in geoms) != (int(b) in geoms)}
        left, right = (bool(touched & finger) for finger in self._fingers)
        return left, right

    # --- things ------------------------------------------------------------------------------------------------------

    def holds(self, *predicates: Predicate) -> bool:
        """Return True if all these predicates hold now."""
        return self.scene.holds(predicates)

    def is_thing(self, name: str) -> bool:
        """Return True for an object or a fixture, False for a region."""
        return name in self.scene.env.obj_body_id

    def position(self, name: str) -> np.ndarray:
        """Return the origin of a thing's body, or the centre of a region [3]."""
        if self.is_thing(name):
            return self._data.xpos[self._body(name)].copy()
        return self._data.site(name).xpos.copy()

    def owner(self, region: str) -> str | None:
        """Return the thing that a region belongs to, or None for places on the table."""
        parent = self.scene.env.object_sites_dict[region].parent_name
        return parent if self.is_thing(parent) else None

    def region_half(self, region: str) -> np.ndarray:
        """Return half the size of a region along the world's axes [3]."""
        size = np.asarray(self.scene.env.object_sites_dict[region].size, float)
        return np.abs(self._data.site(region).xmat.reshape(3, 3) @ size)

    def region_frame(self, region: str) -> np.ndarray:
        """Return the axes of a region, as columns [3,3]."""
        return self._data.site(region).xmat.reshape(3, 3).copy()

    def joint(self, name: str) -> Joint | None:
        """Return the first joint of a region or fixture, or None if it has no joint."""
        env, data, model = self.scene.env, self._data, self.scene.model
        holder: Any = env.get_object(name) if self.is_thing(name) else env.object_sites_dict[name]
        if not holder.joints:
            return None
        joint = model.joint(holder.joints[0])
        axis = data.xaxis[joint.id].copy()
        low, high = joint.range
        position, furthest = float(data.qpos[joint.qposadr[0]]), high if high > -low else low
        out = axis if furthest > 0 else -axis
        return Joint(joint.name, axis, data.xanchor[joint.id].copy(), out, position / furthest)

    def joint_body(self, joint: Joint) -> str:
        """Return the name of the body that a joint moves."""
        model = self.scene.model
        return model.body(model.joint(joint.name).bodyid[0]).name

    def box(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and highest corner [3] of a thing or body, along the world's axes."""
        low_G3, high_G3 = self.boxes()
        chosen_G = self._mask(name)
        return low_G3[chosen_G].min(0), high_G3[chosen_G].max(0)

    def frame(self, thing: str) -> np.ndarray:
        """Return the axes of a thing's body, as columns [3,3]."""
        return self._data.xmat[self._body(thing)].reshape(3, 3).copy()

    def outermost(self, name: str, way: np.ndarray) -> np.ndarray:
        """Return the centre [3] of the box of a thing or body that lies furthest in a direction [3]."""
        self._refresh()
        centre_G3 = self._world_G83[self._mask(name)].mean(1)
        return centre_G3[(centre_G3 @ way).argmax()]

    def points_between(self, name: str, low: float, high: float) -> np.ndarray:
        """Return the corners [P,3] of the boxes of a thing that lie at least partly between two heights."""
        self._refresh()
        chosen_G = self._mask(name) & (self._low_G3[:, 2] < high) & (self._high_G3[:, 2] > low)
        return self._world_G83[chosen_G].reshape(-1, 3)

    def top_at(self, name: str, spot: np.ndarray) -> float:
        """Return the height of the highest box of a thing over a point [2], or of its lower end if no box is there."""
        low_G3, high_G3 = self.boxes()
        mask_G = self._mask(name)
        over_G = mask_G & (low_G3[:, :2] < spot).all(1) & (high_G3[:, :2] > spot).all(1)
        return float(high_G3[over_G, 2].max() if over_G.any() else low_G3[mask_G, 2].min())

    def room(self, name: str, start: np.ndarray, way: np.ndarray) -> float:
        """Return the metres from a point [3] along a unit vector [3] to the next box of a thing (along the axes).

        inf if nothing is there.
        """
        low_G3, high_G3 = (corner_G3[self._mask(name)] for corner_G3 in self.boxes())
        with np.errstate(divide="ignore", invalid="ignore"):
            one_G3, other_G3 = (low_G3 - start) / way, (high_G3 - start) / way
        inside_G3 = (low_G3 <= start) & (start <= high_G3)
        level = np.abs(way) < 1e-9
        near_G3 = np.where(level, np.where(inside_G3, -np.inf, np.inf), np.minimum(one_G3, other_G3))
        far_G3 = np.where(level, np.where(inside_G3, np.inf, -np.inf), np.maximum(one_G3, other_G3))
        near_G, far_G = near_G3.max(1), far_G3.min(1)
        return float(near_G[(near_G <= far_G) & (far_G > 0)].min(initial=np.inf))

    def points(self, name: str) -> np.ndarray:
        """Return the corners [P,3] of the boxes of a thing or body."""
        self._refresh()
        return self._world_G83[self._mask(name)].reshape(-1, 3)

    def boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and highest corners [G,3] of all collision geoms, along the world's axes."""
        self._refresh()
        return self._low_G3, self._high_G3

    def obstacles(self, *without: str) -> Obstacles:
        """Return everything that the hand can hit, except the robot, the ground, and the named things."""
        self._refresh()
        chosen_G = self._obstacle_G.copy()
        for name in without:
            chosen_G &= ~self._mask(name)
        rotation_G33 = self._data.geom_xmat[self._geoms_G[chosen_G]].reshape(-1, 3, 3)
        centre_G3 = self._world_G83[chosen_G].mean(1)
        return Obstacles(
            centre_G3, self._half_G3[chosen_G], rotation_G33, self._high_G3[chosen_G, 2], self._low_G3[chosen_G, 2]
        )

    @property
    def table(self) -> float:
        """Height of the table or floor."""
        return self.scene.surface_height

    def stretch(self, point: np.ndarray) -> float:
        """Return the metres from shoulder to wrist with the hand at a point [3], pointing down. The arm reaches 0.7."""
        way = point - self._base
        return float(np.hypot(np.hypot(way[0], way[1]) - _WRIST_BACK, way[2] + _WRIST_UP - _SHOULDER))

    def _refresh(self) -> None:
        data = self._data
        if data.time == self._cached_at:
            return
        self._cached_at = data.time
        rotation_G33 = data.geom_xmat[self._geoms_G].reshape(-1, 3, 3)
        self._world_G83 = self._corners_G83 @ rotation_G33.swapaxes(1, 2) + data.geom_xpos[self._geoms_G][:, None]
        self._low_G3, self._high_G3 = self._world_G83.min(1), self._world_G83.max(1)

    def _body(self, name: str) -> int:
        found = self.scene.env.obj_body_id.get(name)
        return int(self.scene.model.body(name).id if found is None else found)

    def _mask(self, name: str) -> np.ndarray:
        """Return bool [G]: the collision geom belongs to a thing or body, or to a child of its body."""
        if name not in self._masks:
            model, body = self.scene.model, self._body(name)
            below = np.zeros(model.nbody, bool)
            below[body] = True
            for child in range(body + 1, model.nbody):  # children have higher numbers
                below[child] = below[model.body_parentid[child]]
            self._masks[name] = below[model.geom_bodyid[self._geoms_G]]
        return self._masks[name]

    def _geoms_of(self, name: str) -> np.ndarray:
        return self._geoms_G[self._mask(name)]
