"""Validation on held-out samples: action error, also by phase and with a wrong instruction, and position errors.

Shape legend: G = 6 (target xyz, goal xyz).
"""

from __future__ import annotations

from typing import Any

import torch

from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.training.batches import BatchBuilder
from cogvla.policy.training.objective import Objective, masked_l1

SAMPLES, BATCH = 512, 64


@torch.inference_mode()
def validate(objective: Objective, held_out: DemonstrationData, builder: BatchBuilder) -> dict[str, float]:
    """Compute the validation metrics over at most 512 held-out samples, which are the same in every call.

    Returns:
        Metrics with the prefix `validation/`: `action_l1` in normalised units; `phase{i}_l1`, the same by the expert's
        phase; `held_out_wording_error`, the same with wordings of the instructions that training never uses, of all
        levels of `reword`; `wrong_instruction_l1`, the same with another instruction that is possible in the scene;
        `target_cm` and `goal_cm`, position errors of the grounding head; and `read_target_cm`, the position error of
        the reading head at the first action token. With a mixture, each data set has the same number of samples, and
        `NAME/action_l1` is the error on those of one.
    """
    held_out = held_out.evenly()
    count = min(SAMPLES, len(held_out.taught_rows))
    batches = TrainingBatches(held_out, min(BATCH, count), 0, objective.model.history)
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}

    def add(name: str, value: float, weight: float = 1) -> None:
        sums[name] = sums.get(name, 0.0) + value * weight
        counts[name] = counts.get(name, 0.0) + weight

    generator = torch.Generator().manual_seed(0)
    for step in range(count // batches.batch_size):
        rows = batches.rows(step)
        samples: dict[str, Any] = batches.gather(rows)
        batch = builder.evaluation(samples)
        expert_BKA, weight_BK = batch.actions_BKA, batch.weight_BK
        output = objective.model(batch.inputs)
        add("action_l1", masked_l1(output.actions, expert_BKA, weight_BK).item())
        groups = {f"{part.name}/action_l1": held_out.part_of(rows) == i for i, part in enumerate(held_out.parts)}
        if "phase" in samples["labels"]:
            phase_B = samples["labels"]["phase"].flatten()
            groups |= {f"phase{phase}_l1": phase_B == phase for phase in phase_B.unique().tolist()}
        for name, chosen_B in groups.items():
            if chosen_B.any():
                error = masked_l1(output.actions[chosen_B], expert_BKA[chosen_B], weight_BK[chosen_B])
                add(name, error.item(), int(chosen_B.sum()))
        reworded = objective.model(builder.evaluation(samples, held_out_wording=True).inputs)
        add("held_out_wording_error", masked_l1(reworded.actions, expert_BKA, weight_BK).item())
        if objective.grounding is not None and batch.positions_BG is not None:
            scale = builder.position_std.to(batch.positions_BG)
            error_BG = (objective.grounding(output.vision) - batch.positions_BG)[:, : len(scale)] * scale
            add("target_cm", 100 * error_BG[:, :3].norm(dim=-1).mean().item())
            add("goal_cm", 100 * error_BG[:, 3:].norm(dim=-1).mean().item())
        if objective.reading is not None and batch.positions_BG is not None:
            found_BG = objective.reading(output.states[:, 0])
            error_B3 = (found_BG - batch.positions_BG)[:, :3] * builder.position_std[:3].to(found_BG)
            add("read_target_cm", 100 * error_B3.norm(dim=-1).mean().item())
        if builder.has_alternatives:
            task_B, allowed_B = builder.alternatives(samples, generator)
            wrong_B = torch.where(allowed_B, builder.instruction_of_task[task_B], samples["instruction_id"])
            wrong = objective.model(builder.evaluation(samples, wrong_B).inputs)
            add("wrong_instruction_l1", masked_l1(wrong.actions, expert_BKA, weight_BK).item())
    return {f"validation/{name}": sums[name] / counts[name] for name in sorted(sums)}
