"""CogVLA as a plugin of lerobot: importing it registers the policy and the environments under the name `cogvla`.

lerobot imports every installed distribution whose name begins with `lerobot_policy_`, and from each configuration finds
the modules `modeling_cogvla` and `processor_cogvla` by their names. Only the configurations are imported here.
"""

from importlib.metadata import version

OLDEST, NEWEST = (0, 4, 4), (0, 6)
_found = tuple(int(part) for part in version("lerobot").split(".")[:3] if part.isdigit())
if _found < OLDEST or _found[:2] > NEWEST:
    raise ImportError(
        f"lerobot_policy_cogvla works with lerobot 0.4.4 to 0.6, not with {version('lerobot')}: "
        "`uv pip install 'lerobot>=0.4.4,<0.7'`"
    )

from lerobot_policy_cogvla.configuration_cogvla import CogVLAConfig  # noqa: E402
from lerobot_policy_cogvla.environment_cogvla import CogVLAEnv  # noqa: E402

__all__ = ["CogVLAConfig", "CogVLAEnv"]
