"""Streaming: the largest part of the disk that it takes, and what is read twice, while it is killed again and again.

python -m cogvla.tests.benchmarks.bench_streaming data.root=outputs/demonstrations/tabletop_object --files 40 --kills 5

A copy of the first episodes, with their pictures in more files, is served by a hub on this machine. `kill -9` comes at
random times. The first decoding, of the local copy, tells how long an undisturbed one takes; the result is compared.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cogvla.configs.build import build
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.interface import Embodiment
from cogvla.scripts.command import compose, plain
from cogvla.tests.support.stub_hub import REPO, stub_hub

MB = 1e6


def split(root: Path, target: Path, files: int, episodes: int) -> None:
    """Copy the first episodes of a data set with pictures in its data files, into as many files."""
    (target / "meta").mkdir(parents=True)
    (target / "data/chunk-000").mkdir(parents=True)
    shutil.copy(root / "meta/tasks.parquet", target / "meta")
    paths = sorted(root.glob("data/*/*.parquet"))
    tables = [pq.read_table(path, filters=[("episode_index", "<", episodes)]) for path in paths]
    whole = pa.concat_tables(tables)
    info = json.loads((root / "meta/info.json").read_text())
    (target / "meta/info.json").write_text(json.dumps(info | {"total_frames": len(whole), "total_episodes": episodes}))
    length = math.ceil(len(whole) / files)
    for number, start in enumerate(range(0, len(whole), length)):
        path = target / f"data/chunk-000/file-{number:03d}.parquet"
        pq.write_table(whole.slice(start, length), path, row_group_size=64)


def size_of(folder: Path) -> int:
    """Return what a folder takes on the disk, in bytes."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # deleted since
                total += 512 * os.stat(os.path.join(place, name)).st_blocks
    return total


def stream(config: DataConfig, embodiment: Embodiment) -> None:
    DemonstrationData.open(config, embodiment, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of train_policy")
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    options = parser.parse_intermixed_args()
    values = plain(compose("train_policy", options.overrides))
    embodiment = build(Embodiment, values["embodiment"], "embodiment")
    config = build(DataConfig, values["data"], "data")
    assert config.root is not None
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name), Path(name) / "cache"
        split(Path(config.root), folder / "source", options.files, options.episodes)
        started = time.perf_counter()
        local = replace(config, root=str(folder / "source"), cache=str(folder / "whole"))
        whole = DemonstrationData.open(local, embodiment, progress=False)
        took = time.perf_counter() - started
        cache.mkdir()
        done, peak = threading.Event(), 0

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, size_of(cache))

        watching = threading.Thread(target=watch)
        watching.start()
        streaming = replace(config, root=None, repo_id=REPO, streaming=True, cache=str(cache))
        with pytest.MonkeyPatch.context() as monkeypatch, stub_hub(folder / "source", monkeypatch) as hub:
            monkeypatch.setitem(os.environ, "HF_ENDPOINT", hub.address)
            monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "0")
            kills = 0
            while True:
                process = multiprocessing.get_context("spawn").Process(target=stream, args=(streaming, embodiment))
                process.start()
                process.join(random.uniform(5, 5 + took) if kills < options.kills else None)
                if process.exitcode is not None:
                    break
                process.kill()
                process.join()
                kills += 1
            assert process.exitcode == 0
            data = DemonstrationData.open(streaming, embodiment, progress=False)
        done.set()
        watching.join()
        served, sizes = size_of(folder / "source"), [p.stat().st_size for p in folder.glob("source/data/*/*")]
        print(
            f"{len(data)} time steps, {served / MB:.0f} MB in {len(sizes)} files of up to {max(sizes) / MB:.1f} MB; "
            f"killed {kills} times; on the disk at most {peak / MB:.0f} MB, at the end {size_of(cache) / MB:.0f} MB; "
            f"{hub.sent / MB:.0f} MB fetched"
        )
        rows = np.arange(len(data))
        same = all(np.array_equal(data.frames.take(r), whole.frames.take(r)) for r in np.array_split(rows, 100))
        print(f"the same as the local copy: {same and data.content() == whole.content()}")


if __name__ == "__main__":
    main()
