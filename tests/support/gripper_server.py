"""A gripper as a process: the action server named in the first argument; it writes each goal, or refuses above 1 m.

python gripper_server.py /gripper_controller/gripper_cmd
"""

from __future__ import annotations

import sys
from typing import Any

import rclpy
from rclpy.action import ActionServer, CancelResponse, GoalResponse

from cogvla.real_robot.ros.node import GRIPPER_COMMAND
from cogvla.real_robot.ros.rclpy_node import ros_type


def main() -> None:
    rclpy.init()
    node, kind = rclpy.create_node("gripper"), ros_type(GRIPPER_COMMAND)

    def judge(goal: Any) -> Any:
        print(f"goal {goal.command.position:.4f} {goal.command.max_effort:.1f}", flush=True)
        return GoalResponse.ACCEPT if goal.command.position < 1 else GoalResponse.REJECT

    def move(handle: Any) -> Any:
        handle.succeed()
        return kind.Result(position=handle.request.command.position, reached_goal=True)

    server = ActionServer(
        node, kind, sys.argv[1], move, goal_callback=judge, cancel_callback=lambda _: CancelResponse.ACCEPT
    )
    print("ready", flush=True)
    rclpy.spin(node)
    server.destroy()


if __name__ == "__main__":
    main()
