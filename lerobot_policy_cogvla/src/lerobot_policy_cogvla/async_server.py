"""`lerobot_policy_server`: lerobot's server of asynchronous inference, which then knows the policy `cogvla`.

    lerobot_policy_server --host=127.0.0.1 --port=8080

lerobot's own server loads no plugins. Its messages are pickled: use it in trusted networks only.
"""

from __future__ import annotations

from lerobot.async_inference import constants, policy_server

import lerobot_policy_cogvla  # noqa: F401  registers the policy


def register() -> None:
    """Add `cogvla` to the policies that the server accepts."""
    if "cogvla" not in constants.SUPPORTED_POLICIES:
        constants.SUPPORTED_POLICIES.append("cogvla")


def main() -> None:
    """Run lerobot's server with the options of the command line."""
    register()
    policy_server.serve()


if __name__ == "__main__":
    main()
