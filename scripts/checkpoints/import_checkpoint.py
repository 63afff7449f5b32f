"""`import_checkpoint`: convert published weights to a checkpoint folder for evaluation, serving or training.

    import_checkpoint path/to/cogvla_release output=checkpoints/cogvla_libero dataset=libero_4_task_suites_no_noops
    import_checkpoint openvla/openvla-7b output=checkpoints/openvla_base routing=cogvla

All options are in configs/import_checkpoint.yaml. A CogVLA is imported completely. Of OpenVLA, the parts that our model
has in common are imported and the others are initialised randomly; such a checkpoint is a base to train from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from cogvla.configs.build import build
from cogvla.policy.checkpoint import save_checkpoint
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.tokenizer import PAPER_PROMPT, PretrainedTokenizer
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.empty_model import empty_model
from cogvla.policy.weights.import_cogvla import load_cogvla
from cogvla.policy.weights.pretrained import load_base
from cogvla.policy.weights.release import Release, open_release
from cogvla.scripts.command import compose, mistakes_in_one_line, plain
from cogvla.scripts.help import argument_parser
from cogvla.scripts.policies import named_router

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main(arguments: list[str] | None = None) -> None:
    """Run the command with these arguments; None: those of the command line."""
    parser = argument_parser("import_checkpoint", __doc__, config="import_checkpoint")
    parser.add_argument("source", help="folder or hub id of the published weights")
    parser.add_argument("options", nargs="*", metavar="output=FOLDER", help="see configs/import_checkpoint.yaml")
    given = parser.parse_args(arguments)
    with mistakes_in_one_line(HydraException, OmegaConfBaseException):
        config = compose("import_checkpoint", given.options)
        config.source = given.source
        for line in run(plain(config)):
            print(line)


def run(values: dict[str, Any]) -> list[str]:
    """Import and save a checkpoint; return lines for the user about the imported parts.

    Raises:
        ValueError: the precision is unknown, a text encoder is given, or the source cannot be imported, or only
            without the statistics of its head; see `open_release`, `load_cogvla` and `load_base`.
    """
    if values["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {values['dtype']!r}; one of {', '.join(DTYPES)}")
    dtype = DTYPES[values["dtype"]]
    release = open_release(values["source"], values["kind"], values["base"], values["merge_adapter"])
    config = release.configure(CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]}))
    named_router(values["routing"]["router"], "routing.router")
    if config.language.encoder is not None:
        raise ValueError(
            "published policies read words with their own language model: leave policy.language.encoder out, and give "
            "it to train_policy base=..., which trains its projection"
        )
    embodiment = build(Embodiment, values["embodiment"], "embodiment")
    embodiment, statistics, lacking = _statistics(release, embodiment, values["dataset"])
    tokenizer = PretrainedTokenizer(values["tokenizer"] or str(release.folder), PAPER_PROMPT, values["empty_token"])
    preprocessor = Preprocessor(embodiment, tokenizer, statistics, values["crop_area"], values["resize_kernel"])

    if release.kind == "cogvla":
        model = empty_model(config, embodiment)
        load_cogvla(model, release.weights, dtype)
        lines = [f"cogvla from {release.folder}: all of {sum(p.numel() for p in model.parameters()):,} parameters"]
        published_head = True
    else:
        model = _random_model(config, embodiment, dtype)
        loaded, lines = load_base(model, release)
        published_head = "head" in loaded  # OpenVLA-OFT's, if it fits
        if published_head and lacking is not None:
            raise ValueError(f"the action head fits, and its numbers mean nothing without statistics: {lacking}")
    if published_head and values["gripper"] == "openvla":
        _speak_the_embodiments_gripper(model, embodiment)
    lines += release.left_out(model)
    description = {"imported": str(values["source"]), "kind": release.kind, "dataset": values["dataset"]}
    save_checkpoint(values["output"], model.state_dict(), config, preprocessor, statistics, description)
    said = "statistics of the release" if lacking is None else "no statistics for this robot: training computes its own"
    return [*lines, said, f"saved to {values['output']}"]


def _statistics(
    release: Release, embodiment: Embodiment, dataset: str | None
) -> tuple[Embodiment, dict[str, Statistics], str | None]:
    """Return the embodiment with the release's normalisation mask, the statistics, and why there are none, or None.

    A base to train from may have no statistics of this robot. It then gets the range [-1, 1], which normalisation
    leaves unchanged, and training computes its own.

    Raises:
        ValueError: a whole CogVLA or the chosen data set has no statistics that fit the embodiment.
    """
    try:
        statistics, mask = release.statistics(dataset)
        for name, size in (("state", embodiment.state_dim), ("action", embodiment.action_dim)):
            if statistics[name].dim != size:
                raise ValueError(
                    f"the statistics of {name} have {statistics[name].dim} dimensions, {embodiment.name} has {size}; "
                    "choose another embodiment= or dataset="
                )
    except ValueError as error:
        if release.kind == "cogvla" or dataset is not None:
            raise
        plain = {
            name: Statistics((-1.0,) * n, (1.0,) * n, (-1.0,) * n, (1.0,) * n, (0.0,) * n, (1.0,) * n)
            for name, n in (("state", embodiment.state_dim), ("action", embodiment.action_dim))
        }
        return embodiment, plain, str(error)
    return replace(embodiment, action_normalise_mask=mask), statistics, None


def _random_model(config: CogVLAConfig, embodiment: Embodiment, dtype: torch.dtype) -> CogVLA:
    """Build a randomly initialised model with parameters of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return CogVLA(config, embodiment)
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _speak_the_embodiments_gripper(model: CogVLA, embodiment: Embodiment) -> None:
    """Change the last layer of the head so that it predicts the environment's gripper values instead of 1 and 0.

    Published policies predict 1 for open and 0 for close. The change is exact, because the head ends in a linear layer
    and the gripper is not normalised. Grippers that are normalised do not change.
    """
    plain = [index for index in embodiment.grippers if not embodiment.action_normalise_mask[index]]
    if not plain:
        return
    last = [module for module in model.head.modules() if isinstance(module, nn.Linear)][-1]
    span = embodiment.gripper_open - embodiment.gripper_close
    weight: Tensor = last.weight
    weight[plain] *= span
    last.bias[plain] = last.bias[plain] * span + embodiment.gripper_close


if __name__ == "__main__":
    main()
