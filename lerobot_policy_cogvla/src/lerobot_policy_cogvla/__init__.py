"""CogVLA as a plugin of lerobot: importing it registers policy and environments `cogvla`, and a simulated robot.

lerobot imports every installed distribution whose name begins with `lerobot_policy_`, and from each configuration finds
the modules `modeling_cogvla` and `processor_cogvla` by their names. Only the configurations are imported here, and the
robot, which lerobot looks for beside its configuration.
"""

import atexit
import sys

try:
    import cogvla.lerobot_versions  # noqa: F401  refuses versions of lerobot that do not fit, in one line
except ValueError as error:
    # lerobot logs this, and goes on to a page of its options, which lack ours: let the reason be the last line.
    atexit.register(print, f"lerobot_policy_cogvla was not loaded: {error}", file=sys.stderr)
    raise

from lerobot_policy_cogvla.configuration_cogvla import CogVLAConfig
from lerobot_policy_cogvla.environment_cogvla import CogVLAEnv
from lerobot_policy_cogvla.robot_cogvla import TabletopArm, TabletopArmConfig

__all__ = ["CogVLAConfig", "CogVLAEnv", "TabletopArm", "TabletopArmConfig"]
