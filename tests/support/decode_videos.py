"""Decode videos and print as JSON which library did it, and a hash of all frames and of every third frame of each."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from cogvla.policy.data.files import video

FPS = 10


def digest(path: Path, step: int) -> str:
    """Return a hash of every `step`th frame."""
    times_F = video.frame_times(path, FPS)
    found = hashlib.sha256()
    for _, frames_FHWC in video.frames(path, times_F, np.arange(0, len(times_F), step)):
        found.update(np.ascontiguousarray(frames_FHWC).tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]]
    frames = {path.stem: [digest(path, step) for step in (1, 3)] for path in paths}
    decoders = {path.stem: "PyAV" if video.by_torchcodec(path) is None else "torchcodec" for path in paths}
    print(json.dumps({"frames": frames, "decoders": decoders}))
