"""The objective of `routing.schedule_search.search`: how little a keep schedule changes a policy.

    objective = schedule_objective(policy.model, inputs, RouterConfig("global_attention", layer_router="carried"))
    schedule, value = search(objective, layers=(1, 2), depth=3, budget=0.25)

Shape legend: B batch, J action tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from cogvla.policy.model.cogvla import CogVLA, ModelInput
from cogvla.routing.router import RouterConfig
from cogvla.routing.schedule_search import Schedule


def schedule_objective(model: CogVLA, inputs: ModelInput, router: RouterConfig) -> Callable[[Schedule], float]:
    """Return a function from a schedule to the mean cosine between the action tokens' states with and without it.

    Args:
        model: a trained policy's network; its weights are shared, not copied.
        inputs: recorded observations, 64 or more.
        router: router to use; its layers and budgets are set by the schedule.
    """
    plain = model.with_router(RouterConfig()).eval()
    with torch.inference_mode():
        whole_BJD = plain(inputs, decode=False).states

    @torch.inference_mode()
    def objective(schedule: Schedule) -> float:
        routed = model.with_router(schedule.applied(router)).eval()
        states_BJD = routed(inputs, decode=False).states
        return float(F.cosine_similarity(states_BJD.flatten(1), whole_BJD.flatten(1)).mean())

    return objective
