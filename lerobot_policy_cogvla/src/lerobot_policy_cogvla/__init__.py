"""CogVLA as a plugin of lerobot: importing it registers policy and environments `cogvla`, and a simulated robot.

lerobot imports every installed distribution whose name begins with `lerobot_policy_`, and from each configuration finds
the modules `modeling_cogvla` and `processor_cogvla` by their names. Only the configurations are imported here, and the
robot, which lerobot looks for beside its configuration.
"""

import cogvla.lerobot_versions  # noqa: F401  refuses versions of lerobot that do not fit, in one line
from lerobot_policy_cogvla.configuration_cogvla import CogVLAConfig
from lerobot_policy_cogvla.environment_cogvla import CogVLAEnv
from lerobot_policy_cogvla.robot_cogvla import TabletopArm, TabletopArmConfig

__all__ = ["CogVLAConfig", "CogVLAEnv", "TabletopArm", "TabletopArmConfig"]
