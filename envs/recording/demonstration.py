"""A recorded episode: save and load it as a file, and build it from what was seen.

Shape legend: T steps, H and W image size.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

IMAGE_PREFIX = "observation.images."
PNG_LEVEL = 1  # level 6, which lerobot uses, takes three times as long for files 10 % smaller
STATISTICS_FRAMES, STATISTICS_STRIDE = 16, 4
QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)


class PngFile(Sequence[bytes]):
    """PNG files one after the other in a file: of a long episode, they do not fit into memory.

    Args:
        path: the file, which is made anew.

    Attributes:
        lengths: sizes of the PNG files in bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("w+b")
        self._begins: list[int] = []
        self.lengths: list[int] = []

    def append(self, png: bytes) -> None:
        """Add a PNG file at the end."""
        self._file.write(png)
        self._begins.append(self._begins[-1] + self.lengths[-1] if self.lengths else 0)
        self.lengths.append(len(png))

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self._file.flush()
        return os.pread(self._file.fileno(), self.lengths[index], self._begins[index])

    def joined(self) -> np.ndarray:
        """Return the content of the file, which is read where it is used; it must not be empty."""
        self._file.flush()
        return np.memmap(self._path, np.uint8, "r")

    def delete(self) -> None:
        """Delete the file."""
        with suppress(OSError):  # what a full disk did not take
            self._file.close()
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Demonstration:
    """A successful episode.

    Attributes:
        instruction: instruction of the task.
        fps: control rate in Hz.
        arrays: feature name -> array [T,D]; tables are flattened, row by row, because lerobot's tools edit only flat
            features.
        images: camera -> T PNG files.
        image_statistics: camera -> statistic -> array [3], of pixel values in [0,255].
    """

    instruction: str
    fps: int
    arrays: dict[str, np.ndarray]
    images: Mapping[str, Sequence[bytes]] = field(repr=False)
    image_statistics: dict[str, dict[str, np.ndarray]] = field(repr=False)

    def __post_init__(self) -> None:
        flat = {name: array.reshape(len(array), -1) for name, array in self.arrays.items()}
        object.__setattr__(self, "arrays", flat)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def image_shape(self, camera: str) -> tuple[int, int, int]:
        """Return the shape (H, W, 3) of a camera's images."""
        with Image.open(io.BytesIO(self.images[camera][0])) as image:
            return image.height, image.width, 3

    def save(self, path: Path) -> None:
        """Write the file atomically: it exists completely or not at all."""
        content: dict[str, Any] = {"instruction": np.array(self.instruction), "fps": np.array(self.fps)}
        content |= {f"array/{name}": array for name, array in self.arrays.items()}
        for camera, files in self.images.items():
            if isinstance(files, PngFile):
                joined, lengths = files.joined(), files.lengths
            else:
                joined, lengths = np.frombuffer(b"".join(files), np.uint8), [len(file) for file in files]
            content[f"png/{camera}"], content[f"length/{camera}"] = joined, np.array(lengths)
            content |= {f"statistic/{camera}/{k}": v for k, v in self.image_statistics[camera].items()}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> Demonstration:
        """Read a file of `save`."""
        with np.load(path, allow_pickle=False) as content:
            keyed: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
            for key in content.files:
                kind, _, name = key.partition("/")
                keyed[kind][name] = content[key]
        statistics: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        for key, value in keyed["statistic"].items():
            camera, _, name = key.rpartition("/")
            statistics[camera][name] = value
        images = {}
        for camera, blob in keyed["png"].items():
            ends = np.cumsum(keyed["length"][camera])
            starts = ends - keyed["length"][camera]
            images[camera] = [blob[a:b].tobytes() for a, b in zip(starts, ends, strict=True)]
        instruction, fps = str(keyed["instruction"][""]), int(keyed["fps"][""])
        return cls(instruction, fps, keyed["array"], images, dict(statistics))

    @staticmethod
    def is_complete(path: Path) -> bool:
        """Return True if the file exists and its end is not cut off."""
        return path.is_file() and zipfile.is_zipfile(path)


def pack(instruction: str, fps: int, steps: dict[str, list[np.ndarray]]) -> Demonstration:
    """Build a demonstration from `steps`: feature name -> one value for each step; images are uint8 [H,W,3]."""
    cameras = [name for name in steps if name.startswith(IMAGE_PREFIX)]
    return pack_encoded(
        instruction,
        fps,
        {name: np.stack(values) for name, values in steps.items() if name not in cameras},
        {name: [encode_png(image_HWC) for image_HWC in steps[name]] for name in cameras},
    )


def pack_encoded(
    instruction: str, fps: int, arrays: dict[str, np.ndarray], images: Mapping[str, Sequence[bytes]]
) -> Demonstration:
    """Build a demonstration from arrays [T,...] and PNG files.

    For robots: minutes of camera images do not fit into memory as pixels.
    """
    return Demonstration(instruction, fps, arrays, images, {name: _statistics(files) for name, files in images.items()})


def encode_png(image_HWC: np.ndarray) -> bytes:
    """Encode an image uint8 [H,W,3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _statistics(files: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Compute statistics for each channel, over a few frames and every fourth pixel in each direction.

    Statistics of all pixels would take longer than the episode itself.
    """
    chosen = np.linspace(0, len(files) - 1, min(len(files), STATISTICS_FRAMES)).round().astype(int)
    pixels_P3 = np.concatenate(
        [np.asarray(Image.open(io.BytesIO(files[i])))[::STATISTICS_STRIDE, ::STATISTICS_STRIDE] for i in chosen]
    ).reshape(-1, 3)
    pixels_P3 = pixels_P3.astype(np.float64)
    statistics = {
        "min": pixels_P3.min(0),
        "max": pixels_P3.max(0),
        "mean": pixels_P3.mean(0),
        "std": pixels_P3.std(0),
        "count": np.array([len(chosen)]),
    }
    for quantile, values in zip(QUANTILES, np.quantile(pixels_P3, QUANTILES, axis=0), strict=True):
        statistics[f"q{round(100 * quantile):02d}"] = values
    return statistics
