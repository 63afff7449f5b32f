"""Reports of evaluations on a card."""

from __future__ import annotations

from typing import Any

from cogvla.policy.hub.evaluations import section


def report(**policy: Any) -> dict[str, Any]:
    rate = {"trials": 2, "successes": 1, "value": 0.5, "low": 0.1, "high": 0.9}
    time = {"inference": None, "loop": None}
    return {
        "suite": "tabletop_goal",
        "total": {"success": rate, "scene_task": {"trials": 0}, "errors": 0, **time},
        "tasks": [{"name": "push", "instruction": "push the puck", "success": rate}],
        "inference_batch_1": None,
        "reproduce": {
            "asked": "own task",
            "protocol": {"execute_steps": 4},
            "policy": {"checkpoint": "policy", "step": 3, **policy},
            "machine": {"cpu": "x", "cores": 2, "gpus": []},
            "versions": {},
        },
    }


def test_the_heading_says_what_acted_beside_the_policy() -> None:
    assert section(report()).startswith("### tabletop_goal\n")
    assert section(report(router={"name": "own"})).startswith("### tabletop_goal\n"), "it was trained with it"
    found = section(report(router={"name": "random", "plugged_in": True}, monitor="ab12", statistics="kitchen"))
    assert found.startswith(
        "### tabletop_goal, with the token router random in place of its own, with a monitor that holds the arm\n"
    )
    assert "| statistics | kitchen |" in found
