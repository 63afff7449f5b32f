"""Exported policies: a folder with one file per text length, and `exported.json`, which says what is in them.

    exported.json     embodiment, tokenizer, statistics, inputs, files with their hashes, what was compared
    policy_8.onnx     the policy for instructions of up to 8 tokens (see `policy.export.formats` for other endings)
    policy_16.onnx    ... of up to 16

Shape legend: B batch, K chunk, A action, T text tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cogvla.configs.build import build
from cogvla.errors import first_line
from cogvla.files import file_hash, read_object
from cogvla.policy.checkpoint_folder import EXPORTED as MANIFEST
from cogvla.policy.export.formats import FORMATS, Runtime, device_of, open_file
from cogvla.policy.export.graph import IDS, MASK, STATE, image_names
from cogvla.policy.inputs.resize import KERNELS
from cogvla.policy.inputs.tokenizer import Tokenizer, tokenizer_from_dict
from cogvla.policy.interface import ActionChunk, Embodiment, InstructionError, Observation
from cogvla.policy.threads import use_threads

FORMAT = 1
AGAIN = "export it again with `export_policy`"
DESCRIBED = (
    "kind", "precision", "opset", "embodiment", "resize_kernel", "tokenizer", "description", "weights_sha256", "files",
    "checked", "versions",
)  # fmt: skip
"""Keys of every manifest."""


@dataclass(frozen=True)
class InputFormat:
    """Turns observations into the inputs of exported files.

    Attributes:
        embodiment: the robot, with cameras of the size that the files take.
        tokenizer: tokenizer of the instructions.
        lengths: text lengths in tokens for which there are files, increasing.
    """

    embodiment: Embodiment
    tokenizer: Tokenizer
    lengths: tuple[int, ...]

    def of(self, observation: Observation, row: int) -> tuple[int, dict[str, np.ndarray]]:
        """Return text length and inputs by name of one observation of a batch.

        Raises:
            InstructionError: the instruction is longer than all text lengths.
            ValueError: an image has another size than the files take.
        """
        text = observation.instruction[row]
        ids_1T, _ = self.tokenizer.encode([text])
        tokens = ids_1T.shape[1]
        length = next((length for length in self.lengths if length >= tokens), None)
        if length is None:
            raise InstructionError(
                f"instruction {text!r} has {tokens} tokens; this exported policy takes {self.lengths[-1]}: export it "
                "with longer text_tokens"
            )
        inputs: dict[str, np.ndarray] = {}
        for name, camera in zip(image_names(len(self.embodiment.cameras)), self.embodiment.cameras, strict=True):
            image_1HW3 = observation.images[camera.name][row : row + 1]
            if image_1HW3.shape[1:3] != (camera.height, camera.width):
                raise ValueError(
                    f"camera {camera.name!r} gives {image_1HW3.shape[1]}x{image_1HW3.shape[2]} pixels, this exported "
                    f"policy takes {camera.height}x{camera.width}: export it with camera_size=[HEIGHT,WIDTH]"
                )
            inputs[name] = np.ascontiguousarray(image_1HW3)
        inputs[STATE] = np.ascontiguousarray(observation.state[row : row + 1], dtype=np.float32)
        return length, {**inputs, **_padded(ids_1T.numpy(), length)}

    def fits(self, instruction: str) -> bool:
        """Return whether an instruction is not longer than all text lengths."""
        return self.tokenizer.encode([instruction])[0].shape[1] <= self.lengths[-1]

    def example(self, length: int) -> dict[str, np.ndarray]:
        """Return inputs by name of random values, for an instruction of one token padded to `length`."""
        seen, ids_11 = self.embodiment.fake_observation(), np.ones((1, 1), dtype=np.int64)
        images = [seen.images[name] for name in self.embodiment.camera_names]
        return {
            **dict(zip(image_names(len(images)), images, strict=True)),
            STATE: seen.state,
            **_padded(ids_11, length),
        }


def _padded(ids_1T: np.ndarray, length: int) -> dict[str, np.ndarray]:
    missing = ((0, 0), (0, length - ids_1T.shape[1]))
    return {IDS: np.pad(ids_1T, missing), MASK: np.pad(np.ones(ids_1T.shape, dtype=bool), missing)}


class ExportedPolicy:
    """Run the files of an exported policy. Observations of a batch run one after the other.

    Args:
        manifest: content of `exported.json`.
        inputs: what the files take.
        files: text length -> file that runs.
        device: where they run.
    """

    def __init__(
        self, manifest: Mapping[str, Any], inputs: InputFormat, files: Mapping[int, Runtime], device: str
    ) -> None:
        self._manifest, self._inputs, self._files, self._device = manifest, inputs, files, device
        self._said = False

    @property
    def embodiment(self) -> Embodiment:
        return self._inputs.embodiment

    @property
    def resize_kernel(self) -> str:
        """Kernel for images of other sizes, which a policy server tells its clients."""
        return str(self._manifest["resize_kernel"])

    def unknown_words(self, instruction: str) -> list[str]:
        """Return the words of an instruction that the tokenizer does not know."""
        return self._inputs.tokenizer.unknown_words(instruction)

    def describe(self) -> dict[str, Any]:
        """Return checkpoint, parameters, format and precision, for reports."""
        return {
            **{key: value for key, value in self._manifest["description"].items() if key != "committed"},
            "device": self._device,
            "engine": self._manifest["kind"],
            "dtype": self._manifest["precision"],
            "exported": {key: self._manifest[key] for key in ("opset", "checked", "versions")},
        }

    def reset(self) -> None:
        """Do nothing: an exported policy keeps nothing between calls."""

    def by_file(self) -> dict[int, ExportedPolicy]:
        """Return policies that run one of the files each, by its text length."""
        return {
            length: ExportedPolicy(
                self._manifest, replace(self._inputs, lengths=(length,)), {length: run}, self._device
            )
            for length, run in self._files.items()
        }

    def warm_up(self, batch: int, instructions: Any = ()) -> None:
        """Run each file, so that `act` answers without delay."""
        for length, run in self._files.items():
            for _ in range(2):
                found = run(self._inputs.example(length)).shape
            if found != (1, self.embodiment.chunk, self.embodiment.action_dim):
                raise ValueError(f"its actions have shape {list(found)}")

    def act(self, observation: Observation) -> ActionChunk:
        """Predict actions float32 [B,K,A] in physical units, with the time of each stage in ms."""
        start = time.perf_counter()
        observation.validate(self.embodiment)
        if observation.committed is not None and not self._said:
            print("note: an exported policy has no input for committed actions, and ignores them")
            self._said = True
        batch = [self._inputs.of(observation, row) for row in range(observation.batch_size)]
        ready = time.perf_counter()
        actions_BKA = np.concatenate([self._files[length](inputs) for length, inputs in batch])
        end = time.perf_counter()
        return ActionChunk(actions_BKA, {"preprocess_ms": 1e3 * (ready - start), "inference_ms": 1e3 * (end - ready)})


def open_exported(
    source: str, device: str | None = None, threads: int | None = None
) -> tuple[ExportedPolicy, dict[str, str]]:
    """Open an exported policy.

    Args:
        source: its folder, or one of its files.
        device: see `policy.export.formats.device_of`.
        threads: threads of the runtime; None: its default.

    Returns:
        The policy, and what identifies it: the hashes of the weights that were exported, and of `exported.json`.

    Raises:
        ValueError: files are missing, damaged or of another export; or see `policy.export.formats.open_file`.
    """
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{source} is no exported policy: there is no {MANIFEST} beside it; {AGAIN}")
    manifest = read_object(folder / MANIFEST, AGAIN)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder / MANIFEST} has format {manifest.get('format')}, this version reads {FORMAT}; {AGAIN}"
        )
    policy = open_files(manifest, folder, device, threads)
    named = [name for files in manifest["files"].values() for name in files]
    if folder != Path(source) and Path(source).name not in named:
        raise ValueError(f"{source} is none of the files of {folder / MANIFEST}: give one of {', '.join(named)}")
    return policy, {
        "weights_sha256": manifest["weights_sha256"],
        "exported_sha256": file_hash(folder / MANIFEST),
    }


def open_files(
    manifest: Mapping[str, Any], folder: Path, device: str | None = None, threads: int | None = None
) -> ExportedPolicy:
    """Open the files that a manifest describes, and check that they are those, and do what it says.

    Raises:
        ValueError: see `open_exported`.
    """
    if missing := [key for key in DESCRIBED if key not in manifest]:
        raise ValueError(f"{folder / MANIFEST} is incomplete (no {', '.join(missing)}); {AGAIN}")
    try:
        tokenizer_files = dict(manifest.get("tokenizer_files", {}))  # older exports have no hashes of them
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); {AGAIN}") from error
    _check_files(folder, tokenizer_files)
    try:
        embodiment = build(Embodiment, manifest["embodiment"], "embodiment")
        tokenizer = tokenizer_from_dict(manifest["tokenizer"], folder)
        kind = manifest["kind"]
        for key, known in (("kind", FORMATS), ("resize_kernel", KERNELS)):
            if manifest[key] not in known:
                raise ValueError(f"{key} is {manifest[key]!r}, not one of {', '.join(known)}")
        written = {int(length): dict(files) for length, files in manifest["files"].items()}
        unnamed = [length for length, files in written.items() if file_name(kind, length) not in files]
        if unnamed or not written:
            raise ValueError(f"files names no {FORMATS[kind]} file for text lengths {unnamed or 'of any kind'}")
        manifest["description"].items()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder / MANIFEST} is damaged ({problem}); {AGAIN}") from error
    use_threads(threads)
    runs, device = {}, device_of(kind, device)
    for length, hashes in sorted(written.items()):
        _check_files(folder, hashes)
        runs[length] = open_file(kind, folder / file_name(kind, length), device, threads)
    policy = ExportedPolicy(manifest, InputFormat(embodiment, tokenizer, tuple(runs)), runs, device)
    try:
        policy.warm_up(1)
    except Exception as error:  # each runtime has errors of its own, without a common class
        raise ValueError(f"{folder} does not take what its {MANIFEST} says ({first_line(error)}); {AGAIN}") from error
    return policy


def _check_files(folder: Path, hashes: Mapping[str, str]) -> None:
    """Check that the files of these names are those of the export."""
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; copy the whole folder, or {AGAIN}")
        if file_hash(folder / name) != expected:
            raise ValueError(f"{folder / name} is damaged or of another export; copy the whole folder, or {AGAIN}")


def file_name(kind: str, length: int) -> str:
    """Return the name of the file for instructions of up to `length` tokens."""
    return f"policy_{length}{FORMATS[kind]}"
