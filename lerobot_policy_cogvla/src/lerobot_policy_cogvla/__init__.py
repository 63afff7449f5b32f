"""CogVLA as a plugin of lerobot: importing it registers the policy and the environments under the name `cogvla`.

lerobot imports every installed distribution whose name begins with `lerobot_policy_`, and from each configuration finds
the modules `modeling_cogvla` and `processor_cogvla` by their names. Only the configurations are imported here.
"""

import cogvla.lerobot_versions  # noqa: F401  refuses versions of lerobot that do not fit, in one line
from lerobot_policy_cogvla.configuration_cogvla import CogVLAConfig
from lerobot_policy_cogvla.environment_cogvla import CogVLAEnv

__all__ = ["CogVLAConfig", "CogVLAEnv"]
