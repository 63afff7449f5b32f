"""Control the tabletop arm: from actions to a commanded gripper pose, joint angles and torques.

An action moves the *commanded* pose, not the measured pose. The commanded pose is the running sum of all deltas, so a
chunk that is executed open loop ends at the sum of its deltas, in spite of the arm's small tracking error. The
commanded pose is never more than `LEASH` ahead of the measured pose, so that a blocked arm does not wind up, and it
stays inside `WORKSPACE`. Position and rotation deltas are in the world frame.

Within a control step the joint velocity changes linearly from that of the last delta to that of the new one. The arm
therefore follows half a step (25 ms) behind the commanded pose. Computed torque (inertia matrix times reference
acceleration, plus a spring and a damper on the error) keeps the arm within millimetres of that reference. The torque is
explicit on purpose: with stiff servos under implicit integration, the contact solver sees other accelerations than the
arm makes, and held objects creep out of the grip.
"""

from __future__ import annotations

from collections.abc import Callable

import mujoco
import numpy as np

from cogvla.envs.rotations import rotation_matrix, rotation_vector
from cogvla.envs.tabletop.arm import FINGER_OPEN, HOME, NOMINAL_ROTATION, arm_only_xml

CONTROL_HZ = 20.0
POSITION_SCALE = 0.05
"""Metres per control step of an action of 1.0 (1 m/s)."""
ROTATION_SCALE = 0.2
"""Radians per control step of an action of 1.0 (4 rad/s, axis-angle in the world frame)."""
FINGER_SPEED = 0.2
"""Speed of one finger in metres per second."""
WORKSPACE = np.array([[0.28, -0.30, 0.012], [0.74, 0.30, 0.40]])
"""Lowest and highest position of the gripper centre in metres. At the lowest z, fingertips are 3 mm above the table."""
MAX_TILT = 0.8
"""Largest rotation away from the nominal grasp pose, in radians."""
LEASH = 0.04
LEASH_ROTATION = 0.2
_DAMPING = 0.02
_STIFFNESS = 1600.0
_VISCOSITY = 80.0
_STEPS_PER_TICK = 2
"""Simulation steps between two evaluations of the torque (100 Hz)."""
_POSTURE_GAIN = 0.1


def clip_norm(vector: np.ndarray, limit: float = 1.0) -> np.ndarray:
    """Scale a longer vector down to length `limit`. Unlike clipping each number, this keeps the direction."""
    length = float(np.sqrt(vector @ vector))
    return vector if length <= limit else vector * (limit / length)


class ArmController:
    """Controller of the arm. The model's first seven actuators must be the arm's motors; the fingers' servos follow.

    Attributes:
        position: commanded position of the site `tcp` [3] in metres, world frame.
        rotation: commanded rotation of the site `tcp` [3,3].
        joints: joint angles [7] in radians for the commanded pose.
        finger: commanded position of each finger in metres.
        substeps: number of simulation steps in a control step.
        timestep: duration of a simulation step in seconds.
    """

    def __init__(self, timestep: float) -> None:
        self._model = mujoco.MjModel.from_xml_string(arm_only_xml())
        self._data = mujoco.MjData(self._model)
        self._site = self._model.site("tcp").id
        self._limits = self._model.jnt_range[:7].T.copy()
        self._jacobian = np.zeros((6, self._model.nv))
        self._regulariser = _DAMPING**2 * np.eye(6)
        self.substeps = round(1.0 / (CONTROL_HZ * timestep))
        self.timestep = timestep
        self.joints = HOME.copy()
        self.position = np.zeros(3)
        self.rotation = NOMINAL_ROTATION.copy()
        self.finger = FINGER_OPEN
        self._previous_joints = HOME.copy()
        self._previous_finger = FINGER_OPEN
        self._reference = HOME.copy()
        self._velocity = np.zeros(7)
        self._inertia = np.zeros((self._model.nv, self._model.nv))

    def stand(self, position: np.ndarray) -> None:
        """Take the base of the arm to be at `position` [3] in metres."""
        self._model.body("link0").pos[:] = position

    def _solve(self, iterations: int) -> None:
        """Move `joints` towards the commanded pose by damped least squares; the redundant joint is pulled to `HOME`."""
        data, jacobian, error = self._data, self._jacobian[:, :7], np.empty(6)
        low, high = self._limits
        for _ in range(iterations):
            data.qpos[:7] = self.joints
            mujoco.mj_kinematics(self._model, data)
            mujoco.mj_comPos(self._model, data)
            mujoco.mj_jacSite(self._model, data, self._jacobian[:3], self._jacobian[3:], self._site)
            error[:3] = self.position - data.site_xpos[self._site]
            error[3:] = rotation_vector(self.rotation @ data.site_xmat[self._site].reshape(3, 3).T)
            posture = _POSTURE_GAIN * (HOME - self.joints)
            damped = jacobian @ jacobian.T + self._regulariser
            change = posture + jacobian.T @ np.linalg.solve(damped, error - jacobian @ posture)
            self.joints = np.minimum(np.maximum(self.joints + change, low), high)

    def reset(self, position: np.ndarray, rotation_offset: np.ndarray) -> np.ndarray:
        """Start at a pose and return its joint angles [7].

        Args:
            position: gripper centre [3] in metres, world frame.
            rotation_offset: axis-angle [3] from the nominal grasp pose, world frame.
        """
        self.position = np.clip(position, *WORKSPACE)
        self.rotation = rotation_matrix(rotation_offset) @ NOMINAL_ROTATION
        self.joints = HOME.copy()
        self._solve(12)
        self._previous_joints = self.joints.copy()
        self._reference, self._velocity = self.joints.copy(), np.zeros(7)
        self.finger = self._previous_finger = FINGER_OPEN
        return self.joints

    def command(
        self, action: np.ndarray, measured_position: np.ndarray, measured_rotation: np.ndarray, measured_finger: float
    ) -> None:
        """Move the commanded pose by one action [7] in [-1,1], and solve for the joints."""
        lead = clip_norm(self.position - measured_position, LEASH)
        self.position = np.clip(measured_position + lead + POSITION_SCALE * action[:3], *WORKSPACE)
        lead = clip_norm(rotation_vector(self.rotation @ measured_rotation.T), LEASH_ROTATION)
        rotation = rotation_matrix(ROTATION_SCALE * action[3:6]) @ rotation_matrix(lead) @ measured_rotation
        offset = clip_norm(rotation_vector(rotation @ NOMINAL_ROTATION.T), MAX_TILT)
        self.rotation = rotation_matrix(offset) @ NOMINAL_ROTATION
        self._previous_joints = self.joints
        self._solve(1)
        travel = FINGER_SPEED / CONTROL_HZ
        if action[6] > 0:
            self._previous_finger = self.finger
            self.finger = max(self.finger - travel, 0.0)
        else:  # from the measured fingers: the target of a firm grip is far inside, and opening must not wait for it
            self._previous_finger = max(self.finger, measured_finger)
            self.finger = min(self._previous_finger + travel, FINGER_OPEN)

    def run(self, model: mujoco.MjModel, data: mujoco.MjData, watch: Callable[[], None] | None = None) -> None:
        """Simulate one control step; call `watch` after each evaluation of the torque (100 Hz)."""
        ticks, tick = self.substeps // _STEPS_PER_TICK, _STEPS_PER_TICK * self.timestep
        velocity = (self.joints - self._previous_joints) * CONTROL_HZ
        acceleration = (velocity - self._velocity) * CONTROL_HZ  # constant in the step: jerks shake objects loose
        inertia = self._inertia_matrix()
        position, speed = self._reference, self._velocity
        joints, speeds, control = data.qpos[:7], data.qvel[:7], data.ctrl  # views into the simulator's memory
        for k in range(1, ticks + 1):
            correction = _STIFFNESS * (position - joints) + _VISCOSITY * (speed - speeds)
            control[:7] = inertia @ (acceleration + correction)
            control[7:9] = self._previous_finger + k / ticks * (self.finger - self._previous_finger)
            mujoco.mj_step(model, data, _STEPS_PER_TICK)
            position = position + (speed + 0.5 * tick * acceleration) * tick
            speed = speed + acceleration * tick
            if watch is not None:
                watch()
        self._reference, self._velocity = position, velocity

    def _inertia_matrix(self) -> np.ndarray:
        """Return the arm's joint-space inertia [7,7]. The model compensates gravity."""
        mujoco.mj_crb(self._model, self._data)
        mujoco.mj_fullM(self._model, self._inertia, self._data.qM)
        return self._inertia[:7, :7]
