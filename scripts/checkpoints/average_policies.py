"""`average_policies`: write the mean of the weights of policies, of which each was trained further from the one before.

    average_policies outputs/first/policy outputs/second/policy output=outputs/mean

Trainings that start from the same weights (`base=`) and see other data forget different things. Their mean often keeps
what each has learned (model soups, arXiv:2203.05482), at the cost of one policy. It has the statistics, and thereby the
range of actions, of the last policy. Evaluate it: far from each other, weights have a mean that can do nothing.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cogvla.files import read_object
from cogvla.policy.checkpoint import ANOTHER, EVERY, STATISTICS, load_policy, read_config, save_checkpoint, weights_hash
from cogvla.policy.hub.download import checkpoint_name, find_checkpoint
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.provenance import provenance
from cogvla.policy.weights.base import load_own
from cogvla.scripts.command import mistakes_in_one_line
from cogvla.scripts.help import argument_parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command with these arguments; None: those of the command line."""
    parser = argument_parser("average_policies", __doc__)
    parser.add_argument("policies", nargs="+", metavar="POLICY", help="checkpoint folders or hub ids, two or more")
    parser.add_argument("output", metavar="output=FOLDER", help="folder of the new checkpoint")
    options = parser.parse_args(arguments)
    with mistakes_in_one_line():
        if not options.output.startswith("output="):
            raise ValueError("the last argument must be output=FOLDER")
        command = shlex.join(["average_policies", *options.policies, options.output])
        average(options.policies, Path(options.output.removeprefix("output=")), command)
        print(f"the mean of {len(options.policies)} policies: {options.output.removeprefix('output=')}")


def average(sources: Sequence[str], output: Path, command: str) -> None:
    """Write the mean of the weights of policies as a checkpoint, with the statistics of the last one.

    Args:
        sources: checkpoint folders or hub ids.
        output: folder of the new checkpoint; it must not exist.
        command: command line, for the provenance.

    Raises:
        ValueError: there are less than two policies, `output` exists, or the policies do not belong together: they
            differ in network, words or robot, or in statistics that their head cannot take over.
    """
    if len(sources) < 2:
        raise ValueError("give two policies or more")
    if output.exists():
        raise ValueError(f"{output} exists; give another output, or delete it")
    folders = [find_checkpoint(source) for source in sources]
    policies = [load_policy(folder, statistics=EVERY) for folder in folders]
    last = policies[-1]
    weights = {name: value.double() for name, value in last.model.state_dict().items()}
    for folder, policy in zip(folders[:-1], policies, strict=False):
        _check_alike(policy, last, folder, folders[-1])
        model = copy.deepcopy(last.model)
        load_own(model, folder, last.preprocessor)  # in the units of the last one
        for name, value in model.state_dict().items():
            weights[name] += value.double()
    dtypes = {name: value.dtype for name, value in last.model.state_dict().items()}
    mean = {name: (value / len(policies)).to(dtypes[name]) for name, value in weights.items()}
    if bad := [name for name, value in mean.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ValueError(f"the mean of {bad[0]} is not finite in {dtypes[bad[0]]}")
    body = read_config(folders[-1])
    averaged = [{"name": checkpoint_name(folder), "weights_sha256": weights_hash(folder)} for folder in folders]
    save_checkpoint(
        output,
        mean,
        CogVLAConfig.from_dict(body["model"]),
        last.preprocessor,
        read_object(folders[-1] / STATISTICS, ANOTHER),
        {**body["description"], "average": {"policies": averaged, "command": command, **provenance()}},
    )


def _check_alike(policy: CogVLAPolicy, last: CogVLAPolicy, folder: Path, of_last: Path) -> None:
    """Raise a ValueError if the mean of the weights of two policies would mean nothing."""
    pairs: dict[str, tuple[Any, Any]] = {
        "another network": (policy.model.config, last.model.config),
        "other words": (policy.preprocessor.tokenizer.to_dict(), last.preprocessor.tokenizer.to_dict()),
        "another robot": (_robot(policy), _robot(last)),
        "another crop of its pictures": (policy.preprocessor.crop_area, last.preprocessor.crop_area),
    }
    for difference, (one, other) in pairs.items():
        if one != other:
            raise ValueError(f"{folder} has {difference} than {of_last}: average policies trained one from another")
    kinds = ("state_normalisation", "action_normalisation", "action_normalise_mask")
    same = all(getattr(policy.embodiment, kind) == getattr(last.embodiment, kind) for kind in kinds)
    same = same and read_object(folder / STATISTICS, ANOTHER) == read_object(of_last / STATISTICS, ANOTHER)
    if not same and (last.model.config.head.kind != "l1" or policy.preprocessor.sets or last.preprocessor.sets):
        raise ValueError(
            f"{folder} has other statistics than {of_last}, which only an L1 head with those of one data set can take "
            "over: average policies of the same data"
        )


def _robot(policy: CogVLAPolicy) -> dict[str, Any]:
    """Return the robot without its normalisation, which weights are changed to."""
    return {name: value for name, value in asdict(policy.embodiment).items() if "normalis" not in name}


if __name__ == "__main__":
    main()
