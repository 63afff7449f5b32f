"""Launch the bridge, configured but inactive. `ros2 lifecycle set /cogvla_bridge activate` then starts the policy."""

from __future__ import annotations

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, RegisterEventHandler
from launch.event_handlers import OnProcessStart
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.events.lifecycle import ChangeState
from launch_ros.substitutions import FindPackageShare
from lifecycle_msgs.msg import Transition

from cogvla.real_robot.ros.network import profile_variables


def generate_launch_description() -> LaunchDescription:
    """Return the launch description. Arguments: `params`, a YAML file of parameters; `dry_run`, true or false."""
    default = PathJoinSubstitution([FindPackageShare("cogvla_bridge"), "config", "tabletop.yaml"])
    bridge = LifecycleNode(
        package="cogvla_bridge",
        executable="bridge",
        name="cogvla_bridge",
        namespace="",
        output="screen",
        additional_env=profile_variables(),
        parameters=[LaunchConfiguration("params"), {"dry_run": LaunchConfiguration("dry_run")}],
    )
    configure = EmitEvent(
        event=ChangeState(lifecycle_node_matcher=matches_action(bridge), transition_id=Transition.TRANSITION_CONFIGURE)
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument("params", default_value=default),
            DeclareLaunchArgument("dry_run", default_value="true"),
            bridge,
            RegisterEventHandler(OnProcessStart(target_action=bridge, on_start=[configure])),
        ]
    )
