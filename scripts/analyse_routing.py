"""`analyse_routing`: show which vision tokens a policy keeps, what they encode, and whether they are relevant.

    analyse_routing checkpoint=checkpoints/tabletop_object
    analyse_routing checkpoint=FOLDER router.name=cls_attention router.budget=0.25 tasks=[0,5]

Plays one episode of each task, and writes `routing.html`, a self-contained page with pictures, and `routing.json` with
its numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.envs.analysis.routing_findings import findings
from cogvla.envs.analysis.routing_pictures import film, strip
from cogvla.envs.analysis.routing_recording import WatchedEpisode, play
from cogvla.envs.evaluation.plots import lines
from cogvla.envs.evaluation.protocol import load_protocol
from cogvla.envs.evaluation.report import template
from cogvla.envs.suite import get_suite
from cogvla.files import write_atomic
from cogvla.policy.checkpoint import open_policy
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.hub.download import checkpoint_name, find_checkpoint
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.provenance import provenance
from cogvla.routing.router import RouterConfig
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, check_counts, import_modules, plain
from cogvla.scripts.policies import named_router

DATA, PAGE = "routing.json", "routing.html"


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("analyse_routing"))


def run(config: DictConfig, command: str) -> dict[str, Any]:
    """Play the episodes, measure, and write page and numbers; return the content of `routing.json`."""
    values = plain(config)
    import_modules(values["imports"])
    suite = get_suite(values["suite"], values)
    tasks = range(len(suite.tasks)) if values["tasks"] is None else suite.chosen_tasks(values["tasks"])
    check_counts(values, "pictures", "readings")
    if type(values["initial_state"]) is not int or values["initial_state"] < 0:
        raise ValueError(f"initial_state must be a whole number of at least 0, got {values['initial_state']!r}")
    router = None if named_router(values["router"]) is None else build(RouterConfig, values["router"], "router")
    folder = find_checkpoint(values["checkpoint"])
    policy, _ = open_policy(
        folder, values["device"], values["threads"], EngineConfig("plain"), router, statistics=values["statistics"]
    )
    named = checkpoint_name(folder.resolve()).replace("/", "_") + (
        "" if router is None else f"_{router.name}_{router.budget}"
    )
    output = Path(values["output"].replace("CHECKPOINT", named))
    episodes = play(policy, suite, load_protocol(suite.protocol), tasks, values["initial_state"])
    found = findings(policy, episodes, [task.instruction for task in suite.tasks], values["readings"])
    data = {"command": command, "policy": policy.describe(), "suite": suite.name, **found, **provenance()}
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / DATA, json.dumps(data, indent=2, default=str) + "\n")
    write_atomic(output / PAGE, page(policy, episodes, data, output, values["pictures"]))
    print(f"report: {output / PAGE}")
    return data


def page(
    policy: CogVLAPolicy, episodes: list[WatchedEpisode], data: dict[str, Any], folder: Path, pictures: int
) -> str:
    """Render the page; its videos are also saved in `folder`/videos."""
    grid, views = policy.model.vision.grid, policy.embodiment.camera_names
    shown = []
    for number, (episode, numbers) in enumerate(zip(episodes, data["episodes"], strict=True)):
        video = folder / "videos" / f"{number:02d}_{episode.name}.mp4"
        film(episode, grid, video, len(views))
        figures = {
            "share of the target that the kept tokens cover": lines(numbers["target_kept"], "call", "share", (0, 1)),
            "flicker: distance from the previous kept set": lines(
                numbers["flicker"], "call", "Jaccard distance", (0, 1)
            ),
        }
        sheet = strip(episode, grid, pictures, views)
        shown.append({"episode": episode, "sheet": sheet, "video": video.read_bytes(), "figures": figures})
        shown[-1]["fates"] = numbers["fates"]
    layers = [f"layer {n}" for n in range(data["information"]["layers"])]
    by_layer = {
        "entropy of the action tokens’ attention to vision tokens": (data["attention_entropy"], "nats"),
        "effective rank of the vision tokens after the layer": (
            {name.removeprefix("after "): value for name, value in data["effective_rank"].items()}, "directions",
        ),
        "information left in the vision tokens": (
            dict(zip(layers, data["information"]["information"], strict=True)), "1 − exp(−change of actions)",
        ),
        "points where the action tokens are most similar to vision tokens, on the target": (
            {name: values["high"] for name, values in data["read"].items()}, "share",
        ),
        "cosine of vision tokens with words": (
            {name: values["between"] for name, values in data["alignment"].items()}, "cosine",
        ),
        "neurons that vision tokens and words share": (
            {name: values["overlap"] for name, values in data["alignment"].items()}, "overlap",
        ),
    }  # fmt: skip
    more = {
        "information left, if a share of the tokens stays": (
            data["information"]["by_share"],
            "1 − exp(−change of actions)",
        ),
    }
    if data["injection"] is not None:
        entering = {"": data["injection"]}
        more["change of the actions if the tokens enter at a later layer"] = (entering, "normalised actions")
    if data["single_tokens"] is not None:
        single = {"share of tokens that tell something alone": data["single_tokens"]["telling"]}
        more["single tokens"] = (single, "share")
    charts = {
        name: lines({"": [values.get(layer) for layer in layers]}, "language layer", unit, start=0)
        for name, (values, unit) in by_layer.items()
    }
    charts |= {name: lines(series, "language layer", unit, start=0) for name, (series, unit) in more.items()}
    return template("routing.html.j2").render(data=data, episodes=shown, charts=charts)


if __name__ == "__main__":
    console.analyse_routing()
