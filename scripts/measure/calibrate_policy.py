"""`calibrate_policy`: measure the input ranges that a checkpoint needs for float8, and the error that float8 adds.

    calibrate_policy checkpoint=checkpoints/FOLDER suite=tabletop_object
    calibrate_policy checkpoint=FOLDER data=libero suite=libero_goal observations=512
    eval_libero checkpoint=FOLDER engine.dtype=float8

Adds `float8.json` to the checkpoint: the largest input of each large layer on recorded frames, and the change of the
actions on other frames. `engine.dtype=float8` reads this file and needs no data set.

Shape legend: N frames, B of them at once, K chunk, A action.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from cogvla.policy.checkpoint import load_policy, save_calibration, weights_hash
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.engine.float8 import Calibration
from cogvla.policy.hub.download import hub_source
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.provenance import provenance
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, plain
from cogvla.scripts.measure.recorded import batches, check_data, draw_frames, start


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("calibrate_policy"))


@torch.inference_mode()
def run(config: DictConfig, command: str) -> Calibration:
    """Measure and save the calibration, and print the change of the actions; return the calibration.

    Raises:
        ValueError: a number of frames is too small or too large, or the checkpoint does not support float8.
    """
    values = plain(config)
    if not Path(values["checkpoint"]).is_dir() and (hub := hub_source(values["checkpoint"])):
        raise ValueError(
            f"the calibration is written into the checkpoint: `hf download {hub[0]} --local-dir FOLDER`, then give "
            "checkpoint=FOLDER"
        )
    folder, device = start(values, "observations", "checked")
    check_data(values)
    policy = load_policy(folder, device, statistics=values["statistics"])
    data, rows = draw_frames(policy, values, observations=values["observations"], checked=values["checked"])
    seen, checked = rows[: values["observations"]], rows[values["observations"] :]

    as_saved = _actions(policy, data, checked, "as saved")
    policy = policy.with_engine(EngineConfig("eager", dtype="bfloat16"), release=True)
    assert policy.engine is not None
    in_bfloat16 = _actions(policy, data, checked, "bfloat16")
    observations = (batch.inputs for batch in batches(policy, data, seen, "ranges"))
    calibration = policy.engine.calibrate(observations, values["smallest"])
    policy.engine.to_float8(calibration)
    in_float8 = _actions(policy, data, checked, "float8")

    expert_BKA = torch.cat([batch.actions_BKA.cpu() for batch in batches(policy, data, checked)])
    about = {
        "command": command,
        "weights_sha256": weights_hash(folder),
        "data_set": data.describe(),
        "observations": len(seen),
        "checked": len(checked),
        "layers": len(calibration.largest_inputs),
        "from_bfloat16": _distance(in_float8, in_bfloat16),
        "bfloat16_from_saved": _distance(in_bfloat16, as_saved),
        "action_l1": {
            name: _distance(actions, expert_BKA)["mean"]
            for name, actions in {"saved": as_saved, "bfloat16": in_bfloat16, "float8": in_float8}.items()
        },
        **provenance(),
    }
    calibration = Calibration(calibration.largest_inputs, about)
    save_calibration(folder, calibration)
    print(_summary(folder, about))
    return calibration


def _actions(policy: CogVLAPolicy, data: DemonstrationData, rows_N: Tensor, name: str) -> Tensor:
    """Compute the policy's normalised actions [N,K,A] for these frames."""
    seen = batches(policy, data, rows_N, name)
    return torch.cat([policy.normalised_actions(batch.inputs).float().cpu() for batch in seen])


def _distance(one: Tensor, other: Tensor) -> dict[str, float]:
    difference = (one - other).abs()
    return {"mean": float(difference.mean()), "max": float(difference.max())}


def _summary(folder: Path, about: dict[str, Any]) -> str:
    moved, error = about["from_bfloat16"], about["action_l1"]
    return (
        f"{about['layers']} layers in 8 bits, measured on {about['observations']} frames. On {about['checked']} other "
        f"frames, in normalised actions:\n"
        f"  float8 from bfloat16: mean {moved['mean']:.2g}, max {moved['max']:.2g}\n"
        f"  from the expert (mean): as saved {error['saved']:.4f}, bfloat16 {error['bfloat16']:.4f}, "
        f"float8 {error['float8']:.4f}\n"
        f"{folder} now supports engine.dtype=float8"
    )


if __name__ == "__main__":
    console.calibrate_policy()
