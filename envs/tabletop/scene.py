"""Build the MuJoCo model of the table and its items, and place and read the items.

One compiled model holds all items of a suite. A scene places some of them on the table and parks the others below it
(weightless, without contacts, out of sight). Free items are bodies with six degrees of freedom. Fixed items (tray,
plate, mat, zone, drawer, button) are mocap bodies, which a scene can place anywhere and which do not move afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from cogvla.envs.perturbation.appearance import Appearance
from cogvla.envs.tabletop.arm import (
    COLLIDE_OBJECT,
    COLLIDE_ROBOT,
    COLLIDE_STATIC,
    arm_actuators,
    arm_body,
)

FREE_KINDS = ("cube", "cylinder", "ball", "puck")
FIXED_KINDS = ("tray", "plate", "mat", "zone", "drawer", "button")

TIMESTEP = 0.005
SPARE, SPARE_SIZE = "spare", 256
"""Material that nothing has before a perturbation covers the table with it, and pixels per metre of its texture."""
TRAY_FLOOR = 0.004
TRAY_WALL = 0.004
PLATE_HEIGHT = 0.008
DRAWER_TRAVEL = 0.11
HANDLE_OFFSET = 0.082
"""Metres along x from the drawer's origin to its closed handle."""
HANDLE_HEIGHT = 0.035
BUTTON_HEIGHT = 0.034
BUTTON_TRAVEL = 0.010

# The damping stops a cylinder that was knocked over from rolling for ever; it is too small to matter otherwise.
_FREE_JOINT = '<joint type="free" damping="0.0003"/>'
_OBJECT = f'contype="{COLLIDE_OBJECT}" conaffinity="{COLLIDE_STATIC | COLLIDE_OBJECT | COLLIDE_ROBOT}"'
_STATIC = f'contype="{COLLIDE_STATIC}" conaffinity="0"'
_NONE = 'contype="0" conaffinity="0"'


@dataclass(frozen=True)
class Item:
    """An item that a scene may hold.

    Attributes:
        name: name of its body, unique in the suite.
        phrase: name in instructions, e.g. `red cube`.
        kind: one of `FREE_KINDS` or `FIXED_KINDS`.
        rgba: colour as MJCF text.
        half: half extents along x, y, z in metres; x is the radius of round items.
    """

    name: str
    phrase: str
    kind: str
    rgba: str
    half: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.kind not in FREE_KINDS + FIXED_KINDS:
            raise ValueError(f"item {self.name!r}: unknown kind {self.kind!r}")

    @property
    def free(self) -> bool:
        return self.kind in FREE_KINDS

    @property
    def rest_height(self) -> float:
        """The height in metres of the body's origin when the item stands on the table."""
        return self.half[2] if self.free else 0.0


@dataclass(frozen=True)
class Pose:
    """Pose of an item on the table: x, y in metres, yaw in radians, world frame."""

    x: float
    y: float
    yaw: float = 0.0


def _free_geoms(item: Item) -> str:
    x, y, z = item.half
    look = f'rgba="{item.rgba}"'
    if item.kind == "cube":
        return f'<geom name="{item.name}" type="box" size="{x} {y} {z}" {look} mass="0.08" friction="0.7" {_OBJECT}/>'
    # The puck is slippery, on the fingers' pads too, so that it slides along the fingers that push it.
    feel = 'mass="0.1" friction="0.3" priority="2"' if item.kind == "puck" else 'mass="0.08" friction="0.7"'
    body = f'name="{item.name}" type="cylinder" size="{x} {z}" {feel} {_OBJECT}'
    if item.kind == "ball":  # it looks like a ball but stands like a cylinder: a real ball would roll away
        return f'<geom {body} rgba="0 0 0 0"/><geom type="sphere" size="{x}" {look} mass="0" {_NONE}/>'
    return f"<geom {body} {look}/>"


def _fixed_geoms(item: Item) -> str:
    x, y, z = item.half
    look = f'rgba="{item.rgba}"'
    if item.kind == "mat":
        return f'<geom type="box" size="{x} {y} 0.0006" pos="0 0 0.0006" {look} {_NONE}/>'
    if item.kind == "zone":
        return f'<geom type="cylinder" size="{x} 0.0006" pos="0 0 0.0006" {look} {_NONE}/>'
    if item.kind == "plate":
        half = PLATE_HEIGHT / 2
        return f'<geom name="{item.name}" type="cylinder" size="{x} {half}" pos="0 0 {half}" {look} {_STATIC}/>'
    if item.kind == "tray":
        floor, wall = TRAY_FLOOR / 2, TRAY_WALL / 2
        walls = [(x - wall, 0, wall, y), (wall - x, 0, wall, y), (0, y - wall, x, wall), (0, wall - y, x, wall)]
        return (
            f'<geom name="{item.name}" type="box" size="{x} {y} {floor}" pos="0 0 {floor}" {look} {_STATIC}/>'
            + "".join(
                f'<geom type="box" size="{sx} {sy} {z}" pos="{px} {py} {z}" {look} {_STATIC}/>'
                for px, py, sx, sy in walls
            )
        )
    if item.kind == "button":
        cap = f"""
<body name="{item.name}_cap" pos="0 0 {BUTTON_HEIGHT - 0.008}" gravcomp="1">
  <joint name="{item.name}" type="slide" axis="0 0 -1" range="0 {BUTTON_TRAVEL}"
    stiffness="120" damping="4" armature="0.02"/>
  <geom name="{item.name}" type="cylinder" size="{x} 0.008" mass="0.02" {look} {_OBJECT}/>
</body>"""
        ring = f'type="cylinder" size="{x + 0.008} 0.008" pos="0 0 0.008"'
        return f'<geom name="{item.name}_ring" {ring} rgba="0.3 0.3 0.33 1" {_STATIC}/>{cap}'
    # The drawer is a cabinet that is open towards +x, with a box in it that has an upright handle in front.
    top, side = 0.004, 0.005
    wood = f'rgba="{item.rgba}" {_STATIC}'
    return f"""
<geom type="box" size="{x} {y} {top}" pos="0 0 {2 * z - top}" {wood}/>
<geom type="box" size="{x} {side} {z}" pos="0 {y - side} {z}" {wood}/>
<geom type="box" size="{x} {side} {z}" pos="0 {side - y} {z}" {wood}/>
<geom type="box" size="{side} {y} {z}" pos="{side - x} 0 {z}" {wood}/>
<body name="{item.name}_box" pos="0 0 0" gravcomp="1">
  <joint name="{item.name}" type="slide" axis="1 0 0" range="0 {DRAWER_TRAVEL}"
    damping="4" frictionloss="1.5" armature="0.05"/>
  <geom type="box" size="{x - 0.008} {y - 0.012} 0.002" pos="0 0 0.006" rgba="0.95 0.85 0.6 1" mass="0.2" {_NONE}/>
  <geom type="box" size="0.004 {y} {z - 0.003}" pos="{x + 0.005} 0 {z}" rgba="0.95 0.85 0.6 1" mass="0.1" {_NONE}/>
  <geom type="box" size="{(HANDLE_OFFSET - x) / 2} 0.007 0.006" pos="{(x + HANDLE_OFFSET) / 2} 0 {HANDLE_HEIGHT}"
    rgba="0.8 0.1 0.6 1" mass="0.02" {_NONE}/>
  <geom name="{item.name}" type="box" size="0.010 0.012 0.024" pos="{HANDLE_OFFSET} 0 {HANDLE_HEIGHT}"
    rgba="0.8 0.1 0.6 1" mass="0.05" friction="1" {_OBJECT}/>
</body>"""


def build_model(items: Sequence[Item]) -> mujoco.MjModel:
    """Compile the model of the arm, the table, the cameras and these items."""
    bodies = []
    for i, item in enumerate(items):
        parked = f'pos="{0.2 * (i % 8) - 0.7} {0.2 * (i // 8)} -1"'
        if item.free:
            bodies.append(f'<body name="{item.name}" {parked} gravcomp="1">{_FREE_JOINT}{_free_geoms(item)}</body>')
        else:
            bodies.append(f'<body name="{item.name}" {parked} mocap="true">{_fixed_geoms(item)}</body>')
    return mujoco.MjModel.from_xml_string(f"""
<mujoco model="tabletop">
  <compiler angle="radian"/>
  <option timestep="{TIMESTEP}" integrator="Euler" cone="elliptic" impratio="10" iterations="20" tolerance="1e-8"/>
  <visual>
    <quality shadowsize="1024" offsamples="0" numslices="14" numstacks="7" numquads="1"/>
    <global offwidth="256" offheight="256"/>
    <map znear="0.01" zfar="5"/>
    <headlight ambient="0.5 0.5 0.5" diffuse="0.15 0.15 0.15" specular="0 0 0"/>
  </visual>
  <default><geom solref="0.01 1" condim="3"/></default>
  <asset>
    <texture name="{SPARE}" type="2d" builtin="flat" rgb1="1 1 1" width="{SPARE_SIZE}" height="{SPARE_SIZE}"/>
    <material name="{SPARE}" texture="{SPARE}" texuniform="true" specular="0"/>
  </asset>
  <worldbody>
    <light directional="true" pos="0.5 0 2" dir="0.35 0.25 -0.9" diffuse="0.5 0.5 0.5" specular="0 0 0"
      castshadow="false"/>
    <camera name="agentview" pos="1.4 0 1.579" xyaxes="0 1 0 -0.8660254 0 0.5" fovy="17.1"/>
    <geom name="table" type="plane" size="2 2 1" rgba="0.5 0.48 0.45 1" friction="0.7" {_STATIC}/>
    {arm_body()}
    {"".join(bodies)}
  </worldbody>
  {arm_actuators()}
</mujoco>""")


class Scene:
    """A compiled model with its data: it places and parks items, and reads their poses."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = {item.name: item for item in items}
        self.model = build_model(items)
        self.data = mujoco.MjData(self.model)
        self._body = {name: self.model.body(name).id for name in self.items}
        self._qpos: dict[str, int] = {}
        self._mocap: dict[str, int] = {}
        self._joint: dict[str, int] = {}
        for name, item in self.items.items():
            if item.free:
                self._qpos[name] = int(self.model.jnt_qposadr[self.model.body_jntadr[self._body[name]]])
            else:
                self._mocap[name] = int(self.model.body_mocapid[self._body[name]])
            if item.kind in ("drawer", "button"):
                self._joint[name] = int(self.model.joint(name).qposadr[0])
        self.appearance = Appearance(self.model)
        self._contype, self._conaffinity = self.model.geom_contype.copy(), self.model.geom_conaffinity.copy()
        self.placed: frozenset[str] = frozenset()
        self.latched: set[str] = set()
        """Names of the buttons that were pressed in this episode; a pressed button stays lit."""

    def place(self, poses: dict[str, Pose]) -> None:
        """Reset, also the looks; put these items on the table at rest; park all others. `mj_forward` must follow."""
        model, data = self.model, self.data
        mujoco.mj_resetData(model, data)  # parks all items, weightless
        self.appearance.restore()
        self.latched.clear()
        self.placed = frozenset(poses)
        for name, body in self._body.items():
            if not self.items[name].free:
                continue
            model.body_gravcomp[body] = 0.0 if name in poses else 1.0
            geoms = model.geom_bodyid == body  # the table is a half-space: items parked below it must not collide
            model.geom_contype[geoms] = self._contype[geoms] * (name in poses)
            model.geom_conaffinity[geoms] = self._conaffinity[geoms] * (name in poses)
        for name, pose in poses.items():
            self.move(name, (pose.x, pose.y, self.items[name].rest_height), pose.yaw)

    def stand(self, position: np.ndarray) -> None:
        """Put the base of the arm at `position` [3] in metres."""
        self.model.body("link0").pos[:] = position

    def move(self, name: str, position: Sequence[float] | np.ndarray, yaw: float = 0.0) -> None:
        """Put the origin of an item at `position` [3], upright, with a yaw in radians."""
        quat = (np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2))
        if name in self._qpos:
            start = self._qpos[name]
            self.data.qpos[start : start + 3] = position
            self.data.qpos[start + 3 : start + 7] = quat
            velocity = int(self.model.body_dofadr[self._body[name]])
            self.data.qvel[velocity : velocity + 6] = 0.0
        else:
            self.data.mocap_pos[self._mocap[name]] = position
            self.data.mocap_quat[self._mocap[name]] = quat

    def position(self, name: str) -> np.ndarray:
        """Return the origin of an item [3]: the centre of a free item, a point on the table for a fixed item."""
        return self.data.xpos[self._body[name]].copy()

    def bodies(self, name: str) -> list[int]:
        """Return the indices of an item's bodies: its own, and the bodies that move in it."""
        parents, found = self.model.body_parentid, [self._body[name]]
        for body in range(found[0] + 1, self.model.nbody):  # children come after their parents
            if parents[body] in found:
                found.append(body)
        return found

    def contact_point(self, name: str) -> np.ndarray:
        """Return the point [3] that the gripper goes to: a free item's centre, a drawer's handle, a button's top."""
        item = self.items[name]
        if item.free:
            return self.position(name)
        if item.kind == "drawer":
            return self.position(name) + np.array([HANDLE_OFFSET + self.travel(name), 0.0, HANDLE_HEIGHT])
        if item.kind == "button":
            return self.position(name) + np.array([0.0, 0.0, BUTTON_HEIGHT - self.travel(name)])
        return self.position(name)

    def travel(self, name: str) -> float:
        """Return how far a drawer is open or a button is pressed, in metres."""
        return float(self.data.qpos[self._joint[name]])

    def set_travel(self, name: str, value: float) -> None:
        """Set how far a drawer is open or a button is pressed, in metres."""
        self.data.qpos[self._joint[name]] = value

    def latch_buttons(self) -> None:
        """Remember the buttons that are pressed now, and light their rings."""
        for name, item in self.items.items():
            if item.kind == "button" and name not in self.latched and self.travel(name) > 0.6 * BUTTON_TRAVEL:
                self.latched.add(name)
                self.model.geom(f"{name}_ring").rgba[:] = (0.2, 1.0, 0.2, 1.0)
