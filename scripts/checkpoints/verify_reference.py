"""`verify_reference`: compare the results of our model with those of the published code, stage by stage.

    verify_reference FOLDER
    verify_reference FOLDER tolerance=1e-3

`cogvla.policy.weights.reference` describes the folder. The error of a token is its largest deviation, relative to its
largest expected value; the error of a stage is that of its worst token. Exit status: 0 all stages are within the
tolerance, 1 a stage is not, 2 the folder cannot be read.

Shape legend: B batch (1), V views, M aggregation tokens per view, N = V*M, T text tokens, S sequence, D width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from cogvla.policy.weights.reference import Reference, load_reference, text_ids
from cogvla.routing.layout import TokenLayout
from cogvla.scripts.help import argument_parser

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Stage:
    """Result of one stage: its name, the maximum relative error, and a note."""

    case: int
    name: str
    error: float
    note: str = ""

    def line(self, tolerance: float) -> str:
        verdict = "ok" if self.error <= tolerance else "FAILED"  # NaN fails
        return f"case {self.case}  {self.name:28s} {self.error:9.2e}  {verdict}  {self.note}".rstrip()


def main(arguments: list[str] | None = None) -> None:
    """Run the command with these arguments; None: those of the command line."""
    parser = argument_parser("verify_reference", __doc__)
    parser.add_argument("folder", type=Path, help="folder with fixture.json, weights and cases.safetensors")
    parser.add_argument("tolerance", nargs="?", type=_tolerance, default=TOLERANCE, metavar="tolerance=1e-4")
    options = parser.parse_args(arguments)
    try:
        reference = load_reference(options.folder)
        stages = []
        for case in range(reference.count):
            for stage in compare(reference, case):
                print(stage.line(options.tolerance), flush=True)
                stages.append(stage)
    except ValueError as error:
        print(f"error: {error}")
        raise SystemExit(2) from error
    print(summary(stages, options.tolerance))
    if any(not stage.error <= options.tolerance for stage in stages):
        raise SystemExit(1)


def summary(stages: list[Stage], tolerance: float) -> str:
    """Return a line with the number of stages within the tolerance, the worst stage, and the first one above it."""
    failed = [stage for stage in stages if not stage.error <= tolerance]
    worst = max(stages, key=lambda stage: math.inf if math.isnan(stage.error) else stage.error)
    text = f"{len(stages) - len(failed)} of {len(stages)} stages within {tolerance:g}; "
    text += f"maximum relative error {worst.error:.2e} (case {worst.case}, {worst.name})"
    return text + (f"; first above: case {failed[0].case}, {failed[0].name}" if failed else "")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest deviation of a vector (last dimension) relative to its largest expected value; worst vector.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"expected values have shape {list(expected.shape)}, ours {list(actual.shape)}")
    deviation = (actual.double() - expected.double()).abs().amax(-1)
    return float((deviation / expected.double().abs().amax(-1).clamp_min(1e-12)).max())


@torch.inference_mode()
def compare(reference: Reference, case: int) -> Iterator[Stage]:
    """Compute one case and yield the result of each stage, in the order of computation.

    Raises:
        ValueError: expected values of a stage are missing or have another shape.
    """
    model = reference.model
    config, embodiment = model.config, model.embodiment
    views, towers = len(embodiment.cameras), [name for name, _ in model.vision.named_towers()]

    def expected(name: str) -> Tensor:
        if (key := f"{case}.{name}") not in reference.cases:
            raise ValueError(f"cases.safetensors has no {key}")
        return reference.cases[key]

    def stage(name: str, actual: Tensor, note: str = "") -> Stage:
        try:
            return Stage(case, name, relative_error(actual, expected(name)), note)
        except ValueError as error:
            raise ValueError(f"{case}.{name}: {error}") from error

    side = (embodiment.cameras[0].height, embodiment.cameras[0].width)
    pixels = expected("pixel_values")
    if tuple(pixels.shape) != (1, 6 * views, *side):
        raise ValueError(f"{case}.pixel_values must have shape {[1, 6 * views, *side]}, found {list(pixels.shape)}")
    length = expected("hidden.layer0").shape[1]
    ids_BT = text_ids(length, expected("input_ids"), model, views * config.vision.aggregation_tokens)
    text = model.encode_text(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))

    # The six channels of a camera are two pictures, one for each tower.
    channels = rearrange(pixels, "b (v t c) h w -> t b v c h w", v=views, t=2)
    streams = [model.vision.streams(channels[index], text.vision)[index] for index in range(len(towers))]
    for view in range(views):
        for name, stream in zip(towers, streams, strict=True):
            yield stage(f"vision.view{view}.{name}", stream.chunk(views, dim=1)[view])

    state_BS = expected("proprio").reshape(1, -1)
    if state_BS.shape[1] != embodiment.state_dim:
        raise ValueError(f"{case}.proprio has {state_BS.shape[1]} values, fixture.json says {embodiment.state_dim}")
    vision_BND = model.vision.fusion(streams, text.vision.weights_B2)
    output = model.decide(vision_BND, state_BS, text, debug=True)
    assert output.debug is not None, "asked for"
    for layer in range(config.language.layers):
        if layer in output.debug["kept"]:
            kept = _kept(output.debug["layout"], output.debug["kept"][layer][0].tolist())
            yield _selection(case, f"kept.layer{layer}", kept, expected(f"kept.layer{layer}"))
        elif f"{case}.kept.layer{layer}" in reference.cases:
            yield Stage(case, f"kept.layer{layer}", math.inf, "the reference routes this layer, our model does not")
        yield stage(f"hidden.layer{layer}", output.debug["hidden"][layer])
    yield stage("action_hidden", output.states)
    yield stage("normalized_actions", output.actions)
    # Again without a trace, as policies run: the last layer then computes only the rows that are read.
    actions_KA = reference.unnormalise.inverse(model.decide(vision_BND, state_BS, text).actions)[0]
    yield Stage(case, "actions", relative_error(actions_KA, expected("actions").reshape(actions_KA.shape)))


def _kept(layout: TokenLayout, visual: list[int]) -> set[int]:
    """Return the kept positions in the whole sequence: all tokens except the vision tokens that are left out."""
    return {0, *(layout.visual.start + index for index in visual), *range(layout.rest.start, layout.length)}


def _selection(case: int, name: str, kept: set[int], expected: Tensor) -> Stage:
    """Compare the kept tokens; the error is the number of different tokens relative to the expected number."""
    wanted = set(expected.flatten().tolist())
    different = kept ^ wanted
    note = f"{len(wanted)} tokens" + (f", different: {sorted(different)[:8]}" if different else "")
    return Stage(case, name, len(different) / max(len(wanted), 1), note)


def _tolerance(text: str) -> float:
    value = float(text.removeprefix("tolerance="))
    if not value > 0:
        raise argparse.ArgumentTypeError(f"tolerance must be positive, got {text}")
    return value


if __name__ == "__main__":
    main()
