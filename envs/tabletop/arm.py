"""Build the MJCF model of a Franka Emika Panda with its parallel gripper, from primitive shapes.

Joint frames, joint limits and link masses are those of the real arm (Franka's published DH parameters and the
identified masses). The geometry is capsules and boxes, which render in a tenth of the time of the original meshes.
Only the fingers and the hand collide: inside the workspace, the links above never come near the table.

Frames: the base stands at the world's origin, the table top is z = 0, x points away from the robot. The site `tcp` is
the gripper centre, between the finger pads. At the nominal top-down grasp pose the hand's axes are x = world x, y =
-world y (the direction in which the fingers open), z = down.
"""

from __future__ import annotations

import numpy as np

ARM_JOINTS = tuple(f"joint{i}" for i in range(1, 8))
FINGER_JOINTS = ("finger_left", "finger_right")
FINGER_OPEN = 0.04
"""Travel of one finger in metres; 0 is closed."""
HOME = np.array([0.0, 0.1, 0.0, -2.2, 0.0, 2.3, 0.7854])
"""Joint angles in radians that inverse kinematics pulls the redundant elbow to; gripper at about (0.5, 0, 0.25)."""
NOMINAL_ROTATION = np.diag([1.0, -1.0, -1.0])
"""Rotation matrix of the site `tcp` at the top-down grasp pose."""

# Bits of contype/conaffinity. Pairs that can touch: objects with everything, fingers with everything but fingers.
COLLIDE_STATIC, COLLIDE_OBJECT, COLLIDE_ROBOT = 1, 2, 4

_LIMITS = (
    (-2.8973, 2.8973),
    (-1.7628, 1.7628),
    (-2.8973, 2.8973),
    (-3.0718, -0.0698),
    (-2.8973, 2.8973),
    (-0.0175, 3.7525),
    (-2.8973, 2.8973),
)
# (pos, quat, mass, centre of mass, capsules as (from-to, radius)) of links 1..7
_LINKS = (
    ("0 0 0.333", "1 0 0 0", 4.970684, "0.0039 0.0021 -0.0476", (("0 0 -0.19 0 0 0", 0.06),)),
    ("0 0 0", "1 -1 0 0", 0.646926, "-0.0031 -0.0287 0.0035", (("0 0 -0.06 0 0 0.06", 0.06),)),
    ("0 -0.316 0", "1 1 0 0", 3.228604, "0.0275 0.0392 -0.0665", (("0 0 -0.19 0 0 0", 0.055),)),
    ("0.0825 0 0", "1 1 0 0", 3.587895, "-0.0532 0.1044 0.0275", (("0 0 -0.05 0 0 0.05", 0.055),)),
    ("-0.0825 0.384 0", "1 -1 0 0", 1.225946, "-0.0119 0.0411 -0.0384", (("0 0.03 -0.28 0 0.06 -0.08", 0.035),)),
    ("0 0 0", "1 1 0 0", 1.666555, "0.0601 -0.0141 -0.0105", (("0 0 -0.03 0.04 0 0.0", 0.045),)),
    ("0.088 0 0", "1 1 0 0", 0.735522, "0.0105 -0.0043 0.0616", (("0 0 0.03 0 0 0.08", 0.035),)),
)
_WHITE, _GREY, _DARK = "0.86 0.87 0.9 1", "0.62 0.64 0.68 1", "0.3 0.33 0.38 1"


def _finger(side: str, y_sign: int) -> str:
    """Return the MJCF of one finger. With its joint at 0, the inner face of its pad is at y = 0 of the hand."""
    return f"""
<body name="{side}" pos="0 0 0.0584" gravcomp="1">
  <inertial pos="0 {0.006 * y_sign} 0.03" mass="0.05" diaginertia="2e-5 2e-5 1e-5"/>
  <joint name="{side}" type="slide" axis="0 {y_sign} 0" range="0 {FINGER_OPEN}" armature="0.15" damping="1"/>
  <geom name="{side}_pad" type="box" size="0.011 0.006 0.0225" pos="0 {0.006 * y_sign} 0.0315" rgba="{_DARK}"
    friction="1.6 0.02 0.001" condim="4" priority="1" solref="0.015 1" solimp="0.95 0.99 0.001"
    contype="{COLLIDE_ROBOT}" conaffinity="{COLLIDE_STATIC | COLLIDE_OBJECT}"/>
  <geom type="box" size="0.009 0.009 0.006" pos="0 {0.009 * y_sign} 0.004" rgba="{_GREY}" contype="0" conaffinity="0"/>
</body>"""


def arm_body() -> str:
    """Return the MJCF of the arm's kinematic tree, for `<worldbody>`."""
    opening, closing = [], []
    for i, (pos, quat, mass, com, capsules) in enumerate(_LINKS, start=1):
        low, high = _LIMITS[i - 1]
        shapes = "".join(
            f'<geom type="capsule" fromto="{ends}" size="{radius}" rgba="{_WHITE}" contype="0" conaffinity="0"/>'
            for ends, radius in capsules
        )
        opening.append(
            f'<body name="link{i}" pos="{pos}" quat="{quat}" gravcomp="1">'
            f'<inertial pos="{com}" mass="{mass}" diaginertia="0.02 0.02 0.02"/>'
            f'<joint name="joint{i}" axis="0 0 1" range="{low} {high}" armature="0.1" damping="1"/>{shapes}'
        )
        closing.append("</body>")
    hand = f"""
<body name="hand" pos="0 0 0.107" quat="0.9238795 0 0 -0.3826834" gravcomp="1">
  <inertial pos="0 0 0.03" mass="0.73" diaginertia="0.001 0.0025 0.0017"/>
  <geom type="box" size="0.024 0.085 0.026" pos="0 0 0.03" rgba="{_GREY}"
    contype="{COLLIDE_ROBOT}" conaffinity="{COLLIDE_STATIC | COLLIDE_OBJECT}"/>
  <site name="tcp" pos="0 0 0.1034" size="0.005" rgba="0 0 0 0"/>
  <camera name="wrist" pos="0.065 0 0.035" xyaxes="0 1 0 0.9396926 0 0.3420201" fovy="66"/>
  {_finger("finger_left", 1)}{_finger("finger_right", -1)}
</body>"""
    base = (
        f'<geom type="capsule" fromto="-0.03 0 0.06 0 0 0.14" size="0.06" rgba="{_WHITE}" contype="0" conaffinity="0"/>'
    )
    return f'<body name="link0" gravcomp="1">{base}{"".join(opening)}{hand}{"".join(closing)}</body>'


def arm_actuators() -> str:
    """Return the MJCF of the joints' motors, the fingers' position servos, and the coupling of the two fingers."""
    motors = "".join(f'<motor name="motor{i + 1}" joint="{joint}"/>' for i, joint in enumerate(ARM_JOINTS))
    fingers = "".join(f'<position name="servo_{joint}" joint="{joint}" kp="800" kv="20"/>' for joint in FINGER_JOINTS)
    left, right = FINGER_JOINTS
    coupling = f'<joint joint1="{left}" joint2="{right}" polycoef="0 1 0 0 0" solref="0.02 1"/>'
    return f"<actuator>{motors}{fingers}</actuator><equality>{coupling}</equality>"


def arm_only_xml() -> str:
    """Return the MJCF of the arm alone, a small model for inverse kinematics."""
    return f'<mujoco><compiler angle="radian"/><worldbody>{arm_body()}</worldbody></mujoco>'
