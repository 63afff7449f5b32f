r"""`gpu_report`: measure everything that needs a GPU, in at most 20 minutes, into one folder.

    gpu_report --output outputs/gpu                       all parts, the most valuable first
    gpu_report --output outputs/gpu --parts latency       one part; the same command goes on where it stopped
    gpu_report --pack DATASET demonstrations.safetensors  for the part `learning`, where the data set is
    gpu_report --output outputs/gpu --demonstrations demonstrations.safetensors
    gpu_report --output outputs/rehearsal --rehearse      all of it on a CPU, with small networks, in two minutes

It needs torch, transformers, timm, einops, safetensors, numpy, peft, accelerate, pyyaml and matplotlib, but no
installation of this package:

    mkdir -p .cache/types && ln -sfn ../.. .cache/types/cogvla
    PYTHONPATH=.cache/types python -m cogvla.scripts.measure.gpu_report --output outputs/gpu

docs/gpu.md explains the parts and their results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.files import write_atomic
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.packed import pack
from cogvla.policy.interface import Embodiment
from cogvla.scripts.help import argument_parser
from cogvla.scripts.measure.gpu.journal import Journal
from cogvla.scripts.measure.gpu.markdown import markdown
from cogvla.scripts.measure.gpu.parts import PARTS
from cogvla.scripts.measure.gpu.plots import draw
from cogvla.scripts.measure.gpu.runner import Part, Worker, run_part
from cogvla.scripts.measure.gpu.settings import Settings

MARKDOWN = "gpu_report.md"
PACKED_BYTES = 40_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments; None: those of the command line."""
    options = _parser().parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error


def run(options: argparse.Namespace) -> None:
    """Run the chosen parts that are not finished, and write the report after each.

    Raises:
        ValueError: there is no GPU, or the folder holds another report.
        OSError: a file cannot be read or written.
    """
    if options.pack is not None:
        folder, file = options.pack
        return pack_folder(folder, file, options.data, options.embodiment)
    if not (options.rehearse or torch.cuda.is_available()):
        raise ValueError("there is no GPU here; --rehearse does everything on the CPU, with small networks")
    limits = dict(_limit(text) for text in options.limits)
    settings = Settings(
        output=str(options.output),
        device="cpu" if options.rehearse else "cuda",
        rehearse=options.rehearse,
        demonstrations=None if options.demonstrations is None else str(options.demonstrations),
        threads=1 if options.rehearse else len(os.sched_getaffinity(0)),
        limits=tuple(limits.items()),
    )
    if options.demonstrations is not None and not options.demonstrations.is_file():
        raise ValueError(f"there is no file {options.demonstrations}; make one with --pack")
    if not report([PARTS[name] for name in PARTS if name in options.parts], settings, options.fresh):
        raise SystemExit(1)
    return None


def pack_folder(folder: str, file: str, data: str, embodiment: str) -> None:
    """Pack as many episodes of a LeRobotDataset as fit into 40 MB; labels that it does not have are left out.

    Raises:
        ValueError: the data set does not exist, or does not fit the configurations.
        OSError: a file cannot be read or written.
    """
    info = Path(folder) / "meta" / "info.json"
    features = json.loads(info.read_text())["features"] if info.is_file() else {}
    values = {**load("data", data), "root": folder, "repo_id": None}
    values["labels"] = {name: key for name, key in values.get("labels", {}).items() if key in features}
    robot = build(Embodiment, load("embodiment", embodiment), "embodiment")
    demonstrations = DemonstrationData.open(build(DataConfig, values, "data"), robot)
    episodes, size = pack(demonstrations, robot, Path(file), PACKED_BYTES)
    print(f"written: {file}, {episodes} episodes, {size / 1e6:.1f} MB")


def report(parts: Sequence[Part], settings: Settings, fresh: bool = False) -> bool:
    """Run parts that are not finished; write results, tables and plots after each.

    Returns:
        True if all of them are finished without a failed row.

    Raises:
        ValueError: the folder holds another report.
        OSError: a file cannot be written.
    """
    folder = Path(settings.output)
    journal = Journal(folder, settings.rehearse, fresh)
    known, driver = {**PARTS, **{part.name: part for part in parts}}, _driver()
    with Worker() as worker:
        for part in parts:
            if journal.complete(part.name):
                print(f"{part.name}: finished before")
            else:
                run_part(part, settings, journal, worker)
            write_atomic(folder / MARKDOWN, markdown(journal, known, driver))
            draw(journal, folder)
    print((folder / MARKDOWN).read_text())
    print(f"written: {folder / MARKDOWN}")
    return all(journal.succeeded(part.name) for part in parts)


def _limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in PARTS or not seconds.replace(".", "", 1).isdigit():
        raise ValueError(f"--limits takes PART=SECONDS with a part of {', '.join(PARTS)}, got {text!r}")
    return name, float(seconds)


def _driver() -> str:
    """Return the version of NVIDIA's driver; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser("gpu_report", __doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("outputs/gpu"), help="folder of the report; its finished parts are kept")
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--demonstrations", type=Path, metavar="FILE", help="what the part `learning` learns from, made with --pack")
    add("--pack", nargs=2, metavar=("DATASET", "FILE"), help="only pack the data set in a folder into a file")
    add("--data", default="tabletop", help="with --pack: a file of configs/data")
    add("--embodiment", default="tabletop", help="with --pack: a file of configs/embodiment")
    add("--limits", nargs="+", default=[], metavar="PART=SECONDS", help="other limits than those of docs/gpu.md")
    add("--fresh", action="store_true", help="forget the results in the folder")
    add("--rehearse", action="store_true", help="on the CPU, with small networks and few calls")
    return parser


if __name__ == "__main__":
    main()
