"""Reports of evaluations as sections of a policy's card; every number is one of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvla.files import read_object
from cogvla.policy.hub.cards import table, without_paths

AGAIN = "evaluate again with `eval_libero checkpoint=... suite=...`"
Body = Mapping[str, Any]


def read_reports(
    paths: Sequence[Path | str], weights_sha256: str, forecast_sha256: str | None = None
) -> list[dict[str, Any]]:
    """Read `report.json` and `SUITE_robustness.json` files, and check that they are about these weights.

    Args:
        paths: the files.
        weights_sha256: hash of the checkpoint's weights.
        forecast_sha256: hash of its forecast, which changes what is played with a latency; None: it has none.

    Raises:
        ValueError: one is missing, damaged or no report, or is about another checkpoint.
    """
    found = []
    for path in map(Path, paths):
        body = read_object(path, AGAIN)
        try:
            body = without_paths(body)
            section(body)
            about = body["reproduce"]["policy"]
            theirs, forecast = about.get("weights_sha256"), about.get("forecast_sha256")
            rules = body["reproduce"]["protocol"]
            told = bool(rules.get("latency")) and rules.get("committed", True)
            if "total" in body:
                _check_sums(body)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise ValueError(f"{path} is no report of an evaluation, or damaged ({error!r}); {AGAIN}") from error
        if theirs is None:
            raise ValueError(f"{path} does not say which weights were evaluated; {AGAIN}")
        if theirs != weights_sha256:
            raise ValueError(
                f"{path} is about another checkpoint, {about.get('checkpoint')}: its weights have the SHA-256 "
                f"{str(theirs)[:12]}…, these {weights_sha256[:12]}…; {AGAIN}"
            )
        if told and forecast != forecast_sha256:
            raise ValueError(f"{path} was played late with another forecast.json than this checkpoint's; {AGAIN}")
        found.append(body)
    return found


def _check_sums(body: Body) -> None:
    played = [episode for episode in body["episodes"] if episode["error"] is None]
    rate = body["total"]["success"]
    trials, successes = len(played), sum(episode["success"] for episode in played)
    value = successes / trials if trials else None
    if (rate["trials"], rate["successes"], rate["value"]) != (trials, successes, value):
        raise ValueError("its success rate is not that of its episodes")


def on_robot(body: Body) -> bool:
    """Return whether a report is about trials on a robot."""
    return body.get("control") is not None


def section(body: Body) -> str:
    """Return the section of one report."""
    return _robustness(body) if "cells" in body else _evaluation(body)


def _evaluation(body: Body) -> str:
    about, total = body["reproduce"], body["total"]
    kind = [] if about["asked"] == "own task" else ["another task asked for than the scene's own"]
    kind += [] if about.get("perturbation", "none") == "none" else [f"perturbed: {about['perturbation']}"]
    kind += [f"chunks {late:g} ms late"] if (late := about["protocol"].get("latency")) else []
    kind += ["on a robot"] if on_robot(body) else []
    kind += _added(about["policy"])
    lines = [
        f"### {body['suite']}{', ' if kind else ''}{', '.join(kind)}",
        "",
        f"Success: **{_rate(total['success'])}**.",
    ]
    if total["scene_task"]["trials"]:
        lines.append(f"On the scene's own task: {_rate(total['scene_task'])}.")
    if total["errors"]:
        lines.append(f"{total['errors']} episodes ended in an error and are not in the rate.")
    rows = [(row["name"], row["instruction"], _rate(row["success"])) for row in body["tasks"]]
    lines += ["", table(("task", "instruction", "success"), rows)]
    rows = [
        (name, *(f"{values[key]:.1f} ms" for key in ("p50", "p95", "p99")), values["count"])
        for name, values in (
            ("inference, one observation", body["inference_batch_1"]),
            ("inference, as run", total["inference"]),
            ("control loop, as run", total["loop"]),
        )
        if values is not None
    ]
    if rows:
        lines += [f"Time; the executed part of a chunk lasts {body['chunk_ms']:.0f} ms:", ""]
        lines += [table(("", "p50", "p95", "p99", "samples"), rows)]
    return "\n".join([*lines, _how(about)])


def _robustness(body: Body) -> str:
    cells = {(c["perturbation"]["dimension"], c["perturbation"]["level"]): c["success"] for c in body["cells"]}
    names, levels = list(dict.fromkeys(name for name, _ in cells)), sorted({level for _, level in cells})
    rows = [
        (
            name,
            *(_rate(cells[name, level]) if (name, level) in cells else None for level in levels),
            _percent(body["dimensions"][name]),
        )
        for name in names
    ]
    rows.append(("mean", *(_percent(body["levels"][str(level)]) for level in levels), _percent(body["mean"])))
    return "\n".join(
        [
            ", ".join([f"### {body['suite']}: robustness", *_added(body["reproduce"]["policy"])]),
            "",
            f"Success without a change: **{_rate(body['clean'])}**; by dimension and level of the change:",
            "",
            table(("", *(f"level {level}" for level in levels), "mean"), rows),
            _how(body["reproduce"]),
        ]
    )


def _added(policy: Body) -> list[str]:
    """Return what acted beside the shared policy, which does not have it."""
    router = policy.get("router") or {}
    found = [f"with the token router {router.get('name')} in place of its own"] if router.get("plugged_in") else []
    return found + (["with a monitor that holds the arm"] if policy.get("monitor") else [])


def _how(about: Body) -> str:
    """Return protocol, policy, machine and software of a report."""
    policy, machine, versions = about["policy"], about["machine"], about["versions"]
    rules = {key: value for key, value in about["protocol"].items() if value is not None}
    router = policy.get("router")
    facts = [
        ("protocol", ", ".join(f"{key} {value}" for key, value in rules.items())),
        ("simulation", ", ".join(f"{key} {value}" for key, value in (about.get("simulation") or {}).items())),
        ("policy", f"{policy.get('checkpoint')}, step {policy.get('step')}"),
        ("statistics", policy.get("statistics")),
        ("run as", f"{policy.get('dtype')} on {policy.get('device')}, engine {policy.get('engine')}"),
        ("token router", None if not router else ", ".join(f"{k} {v}" for k, v in router.items() if v is not None)),
        ("machine", ", ".join(map(str, [machine["cpu"], f"{machine['cores']} cores", *machine["gpus"]]))),
        ("software", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("commit", (about.get("commit") or {}).get("hash")),
        ("begun", about.get("started")),
    ]
    rows = [fact for fact in facts if fact[1]]
    return "<details><summary>How it was measured</summary>\n\n" + table(("", ""), rows) + "\n</details>\n"


def _rate(rate: Body) -> str:
    if rate["value"] is None:
        return "no episode"
    return (
        f"{_percent(rate['value'])} [{_percent(rate['low'])}, {_percent(rate['high'])}], {rate['successes']} of "
        f"{rate['trials']} episodes"
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
