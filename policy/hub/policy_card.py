"""A checkpoint as it is published: its files, and a card made of its provenance and of reports about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors

from cogvla.files import file_hash, read_object, visible
from cogvla.policy.checkpoint import (
    ANOTHER,
    CONFIG,
    ENCODER,
    EVERY,
    FLOAT8,
    FORECAST,
    STATISTICS,
    TRAINING,
    WEIGHTS,
    load_policy,
    weights_hash,
)
from cogvla.policy.hub.cards import card, check_license, cleaned, license_lines, table, without_paths
from cogvla.policy.hub.download import find_checkpoint
from cogvla.policy.hub.evaluations import on_robot, read_reports, section
from cogvla.policy.hub.upload import CARD, Change, Publication, to_hub
from cogvla.policy.inputs.tokenizer import TOKENIZER_FILES

PUBLISHED = (
    CONFIG, WEIGHTS, STATISTICS, FLOAT8, FORECAST, CARD, f"{ENCODER}/*", *TOKENIZER_FILES,
)  # fmt: skip
"""Files of a checkpoint folder that are published; all of this belongs to an upload."""
Body = Mapping[str, Any]


def policy_publication(
    folder: Path | str, reports: Sequence[Path | str], name: str, license: str | None = None
) -> Publication:
    """Return a checkpoint as it is published, after loading exactly that.

    Args:
        folder: checkpoint folder.
        reports: `report.json` and `SUITE_robustness.json` files of evaluations of these weights.
        name: USER/NAME or the folder, for the card.
        license: identifier of its licence on the hub; None: none is given.

    Raises:
        ValueError: the checkpoint is incomplete, damaged, or needs files that it does not hold; a report is not about
            it; or the licence is no identifier.
    """
    check_license(license)
    folder = find_checkpoint(folder)
    found = [path for path in visible(folder, "**/*") if path.is_file() and path.name != TRAINING]
    named = {path.relative_to(folder).as_posix(): path for path in found}
    files: dict[str, Path | bytes] = {n: path for n, path in named.items() if n != CARD and _is_published(n)}
    body = read_object(folder / CONFIG, ANOTHER)
    _check_portable(body, folder)
    for one, path in list(files.items()):
        if fnmatchcase(one, "*config.json") or one in (FLOAT8, FORECAST):
            files[one] = cleaned(Path(path).read_bytes()) if isinstance(path, Path) else path
    digest = weights_hash(folder)
    with TemporaryDirectory() as staged:
        for one, file in files.items():
            place = Path(staged) / one
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, bytes):
                place.write_bytes(file)
            else:
                place.symlink_to(file.resolve())
        policy = load_policy(staged, statistics=EVERY)
        measured, statistics = policy.calibration, policy.preprocessor.sets
    if measured is not None and measured.about.get("weights_sha256") != digest:
        raise ValueError(f"{folder / FLOAT8} was measured on other weights: delete it, or run `calibrate_policy` again")
    forecast = file_hash(folder / FORECAST) if (folder / FORECAST).is_file() else None
    evaluated = read_reports(reports, digest, forecast)
    facts = without_paths({**body, "parameters": _parameters(folder), "weights_sha256": digest, "sets": statistics})
    files[CARD] = policy_card(facts, evaluated, name, license).encode()
    left_out = [path.relative_to(folder).as_posix() for path in visible(folder, "**/*") if path.is_file()]
    return Publication("model", files, [one for one in left_out if one not in files], _is_published)


def save_to_hub(
    folder: Path | str,
    repo_id: str,
    reports: Sequence[Path | str] = (),
    license: str | None = None,
    private: bool = False,
    replace_card: bool = False,
) -> Change:
    """Upload a checkpoint with a card in one commit; see `policy_publication` and `to_hub`."""
    return to_hub(policy_publication(folder, reports, repo_id, license), repo_id, private, replace_card)


def _is_published(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in PUBLISHED)


def _check_portable(body: Body, folder: Path) -> None:
    """Check that a checkpoint does not need files elsewhere on this machine.

    Raises:
        ValueError: it does.
    """
    encoder = body["model"]["language"].get("encoder")
    if encoder is not None and without_paths(encoder) != encoder and not (folder / ENCODER).exists():
        raise ValueError(f"{folder} needs its text encoder, {encoder}: copy it to {folder / ENCODER}")
    for tower in ("dinov2", "siglip"):
        timm = body["model"]["vision"][tower].get("timm")
        if timm is not None and without_paths(timm) != timm:
            raise ValueError(f"{folder} needs the tower {timm}, a folder of this machine: it cannot be shared")


def _parameters(folder: Path) -> int:
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:  # type: ignore[attr-defined]
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def policy_card(body: Body, reports: Sequence[Body], name: str, license: str | None) -> str:
    """Return the card of a policy.

    Args:
        body: content of its `config.json` without paths of this machine, the number of its `parameters`, the
            `weights_sha256`, and the names of the data sets of which it has statistics (`sets`; empty: joint ones).
        reports: content of reports of its evaluations.
        name: USER/NAME, or its folder.
        license: identifier of its licence; None: none is given.
    """
    robot, about = body["embodiment"], body["description"]
    data = about.get("data_set", {})
    sets = list(data.get("sets", {"": data}).values()) if data else []
    owner, _, short = name.rpartition("/")
    front = {
        "license": license,
        "library_name": "cogvla",
        "pipeline_tag": "robotics",
        "tags": ["robotics", "vision-language-action", "cogvla", *dict.fromkeys(r["suite"] for r in reports)],
        "datasets": [one["name"] for one in sets if one.get("revision") and "/" in one["name"]],
    }
    parts = [
        f"# {short}",
        f"A policy for the robot `{robot['name']}`: it takes camera images, the robot's state and an instruction, and "
        f"answers with {robot['chunk']} actions. This card was made by `share_policy` from the checkpoint and from "
        "reports of its evaluations.",
        _use(name, body, [report["suite"] for report in reports if not on_robot(report)]),
        _interface(body),
        _training(body, sets),
        "## Results",
        *([section(report) for report in reports] or ["No report was given with this checkpoint."]),
        _limits(body, reports),
        license_lines(license, owner or "its owner"),
    ]
    return card(front, "\n\n".join(part.strip() for part in parts))


def _use(name: str, body: Body, suites: Sequence[str]) -> str:
    chosen = " statistics=NAME" if body["sets"] else ""
    lines = [f"eval_libero checkpoint={name} suite={suite}{chosen}" for suite in dict.fromkeys(suites)]
    lines += [f"policy_server checkpoint={name}{chosen}", f"train_policy base={name} ..."]
    return (
        "## Use\n\nWith the package `cogvla`:\n\n```bash\n"
        + "\n".join(lines)
        + "\n```\n\n"
        + (f"NAME is the data set whose robot it is: {', '.join(body['sets'])}. " if chosen else "")
        + (f"`{name}@REVISION` names a revision; reports name the commit that was used. " if "/" in name else "")
        + "On a robot, "
        f"check cameras, control rate ({body['embodiment']['control_hz']:g} Hz) and gripper first."
    )


def _interface(body: Body) -> str:
    robot, tokenizer = body["embodiment"], body["tokenizer"]
    cameras = ", ".join(f"`{c['name']}` {c['height']}x{c['width']}" for c in robot["cameras"])
    words = f"a vocabulary of {len(tokenizer['words'])} words" if tokenizer["kind"] == "words" else tokenizer["kind"]
    gripper = robot["gripper_index"]
    rows = [
        ("cameras (rows x columns)", cameras),
        ("state", f"{robot['state_dim']} numbers"),
        ("actions", f"{robot['chunk']} of {robot['action_dim']} numbers"),
        ("control rate", f"{robot['control_hz']:g} Hz"),
        ("gripper", None if gripper is None else f"number {gripper} of an action, open {robot['gripper_open']:g}, "
         f"closed {robot['gripper_close']:g}"),
        ("normalisation", f"state {robot['state_normalisation']}, action {robot['action_normalisation']}"),
        ("instructions", words),
        ("action head", body["model"]["head"].get("kind")),
    ]  # fmt: skip
    return "## Robot\n\n" + table(("", ""), [row for row in rows if row[1]])


def _training(body: Body, sets: Sequence[Body]) -> str:
    about = body["description"]
    rows: list[tuple[str, Any]] = [
        ("steps", about.get("step")),
        ("batch", about.get("batch_size")),
        ("seed", about.get("seed")),
        ("base", about.get("base")),
        ("parameters", f"{body['parameters']:,}"),
        ("SHA-256 of the weights", body["weights_sha256"]),
    ]
    text = "## Training\n\n" + table(("", ""), [row for row in rows if row[1] is not None])
    keys = ("name", "revision", "fingerprint", "episodes", "frames", "weight")
    if sets:
        text += "\n" + table(("data set", *keys[1:]), [[one.get(key) for key in keys] for one in sets])
    return text


def _limits(body: Body, reports: Sequence[Body]) -> str:
    """Return what the provenance and the reports say, and do not say, about where the policy may fail."""
    robot = body["embodiment"]
    found = [f"It knows the robot `{robot['name']}` with these cameras, this control rate and these units alone."]
    if body["tokenizer"]["kind"] == "words":
        found.append("Words that are not in its vocabulary are one unknown word to it.")
    if not reports:
        found.append("How often it succeeds was not reported.")
    elif not any(map(on_robot, reports)):
        found.append("All reports are from simulation; success on a real robot was not reported.")
    if not any("cells" in report or report["reproduce"].get("perturbation", "none") != "none" for report in reports):
        found.append("Robustness to changed scenes, cameras, light and wordings was not reported.")
    found += [
        f"{report['suite']}: {row['instruction']!r} has unknown words ({', '.join(row['unknown_words'])})."
        for report in reports
        for row in report.get("tasks", ())
        if row.get("unknown_words")
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in found)
