"""Run an exported policy with onnxruntime and numpy only, as on a device without torch and without this package.

    uv run export_policy checkpoint=checkpoints/tabletop_object output=outputs/exported
    python examples/run_exported.py outputs/exported "put the red cube in the tray"

Prints the first action of the chunk for random images. Your robot's program gives the camera images and the state. It
is for policies with a vocabulary of words (`"kind": "words"` in exported.json).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(folder: Path, instruction: str) -> None:
    about = json.loads((folder / "exported.json").read_text())
    robot, vocabulary = about["embodiment"], about["tokenizer"]["words"]
    words = re.findall(r"[a-z0-9']+", instruction.lower())  # enough for plain English
    ids = [vocabulary.index(word) if word in vocabulary else 1 for word in words]
    length = min(int(length) for length in about["files"] if int(length) >= len(ids))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / f"policy_{length}.onnx"), options)

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (1, c["height"], c["width"], 3), dtype=np.uint8) for c in robot["cameras"]]
    inputs: dict[str, np.ndarray] = {
        f"image_{index}": image for index, image in enumerate(images)
    }  # RGB, upright, in the order of cameras
    inputs["state"] = np.zeros((1, robot["state_dim"]), dtype=np.float32)  # in physical units
    inputs["text_ids"] = np.array([ids + [0] * (length - len(ids))], dtype=np.int64)
    inputs["text_mask"] = np.arange(length)[None] < len(ids)
    (actions,) = session.run(["actions"], inputs)  # [1, chunk, action_dim], in physical units
    print(f"{actions.shape[1]} actions of {actions.shape[2]} numbers; the first one: {actions[0, 0].round(4).tolist()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
