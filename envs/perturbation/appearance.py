"""Change how a MuJoCo model looks - its cameras, lights and surfaces - and restore it.

Everything is changed on the compiled model, so nothing is built again. Call `mj_forward` afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import mujoco
import numpy as np

from cogvla.envs.perturbation.perturbation import Values, direction, signed, within
from cogvla.envs.rotations import rotation_matrix

_FIELDS = (
    *("cam_pos", "cam_quat", "cam_fovy"),
    *("light_pos", "light_dir", "light_diffuse", "light_ambient", "light_specular", "light_castshadow"),
    *("geom_rgba", "geom_matid", "mat_rgba"),
)
_HEADLIGHT = ("ambient", "diffuse", "specular")
_LUMINANCE = np.array([0.299, 0.587, 0.114])
_LOWEST_LIGHT = 0.4
"""Sine of the lowest elevation of a light: below, a table is lit at a grazing angle and its things are in the dark."""
PATTERNS = ("stripes", "checks", "blotches")


class Appearance:
    """The cameras, lights and surfaces of one model.

    Args:
        model: the model, as it was built.

    Attributes:
        shadows: True if lights shall cast shadows that do not without a perturbation.
        repainted: textures whose pixels have changed since they were last uploaded; their reader empties it.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        self._nominal = {name: getattr(model, name).copy() for name in _FIELDS}
        self._headlight = {name: getattr(model.vis.headlight, name).copy() for name in _HEADLIGHT}
        self._pixels: dict[int, np.ndarray] = {}
        self.shadows = False
        self.repainted: set[int] = set()

    def restore(self) -> None:
        """Make everything look as the model was built."""
        for name, values in self._nominal.items():
            getattr(self._model, name)[:] = values
        for name, values in self._headlight.items():
            getattr(self._model.vis.headlight, name)[:] = values
        for texture, pixels in self._pixels.items():
            self._texture(texture)[:] = pixels
            self.repainted.add(texture)
        self._pixels.clear()
        self.shadows = False

    # --- cameras -----------------------------------------------------------------------------------------------------

    def orbit(
        self,
        camera: str,
        pivot: Sequence[float] | np.ndarray,
        *,
        azimuth: float = 0.0,
        elevation: float = 0.0,
        roll: float = 0.0,
        distance: float = 1.0,
        width: float = 1.0,
    ) -> None:
        """Move a camera of the world around a point, which stays where it is in the image.

        Args:
            camera: name of the camera.
            pivot: the point [3] in metres.
            azimuth: degrees about the vertical axis.
            elevation: degrees upwards.
            roll: degrees about the line of sight.
            distance: factor of the distance to the point.
            width: factor of the width that is seen at the point; the field of view follows.
        """
        camera_id = self._model.camera(camera).id
        pose = _matrix(self._nominal["cam_quat"][camera_id])
        turn = rotation_matrix(np.deg2rad(azimuth) * np.array([0.0, 0.0, 1.0]))
        turn = rotation_matrix(np.deg2rad(-elevation) * (turn @ pose[:, 0])) @ turn
        offset = turn @ (self._nominal["cam_pos"][camera_id] - np.asarray(pivot))
        pose = turn @ pose
        pose = rotation_matrix(np.deg2rad(roll) * pose[:, 2]) @ pose
        self._model.cam_pos[camera_id] = np.asarray(pivot) + distance * offset
        mujoco.mju_mat2Quat(self._model.cam_quat[camera_id], pose.reshape(9))
        half = np.tan(np.deg2rad(self._nominal["cam_fovy"][camera_id]) / 2)
        self._model.cam_fovy[camera_id] = 2 * np.rad2deg(np.arctan(half * width / distance))

    def jolt(self, camera: str, shift: np.ndarray, turn: np.ndarray) -> None:
        """Shift a camera by [3] metres and turn it by an axis-angle [3] in radians, in the frame of its body."""
        camera_id = self._model.camera(camera).id
        self._model.cam_pos[camera_id] = self._nominal["cam_pos"][camera_id] + shift
        pose = rotation_matrix(turn) @ _matrix(self._nominal["cam_quat"][camera_id])
        mujoco.mju_mat2Quat(self._model.cam_quat[camera_id], pose.reshape(9))

    # --- lights ------------------------------------------------------------------------------------------------------

    def light(
        self,
        pivot: Sequence[float] | np.ndarray,
        gain: float,
        angle: float,
        toward: float,
        tint: np.ndarray,
        shadows: bool,
    ) -> None:
        """Change all lights, and the headlight.

        Args:
            pivot: the point [3] that lights turn around.
            gain: factor of the brightness.
            angle: degrees that the light's direction turns.
            toward: direction of that turn, in radians about the vertical axis; the opposite one if this would put
                the light too low.
            tint: factor of each colour [3].
            shadows: True lets all lights cast shadows.
        """
        model, nominal = self._model, self._nominal
        for index in range(model.nlight):
            for side in (0.0, np.pi):
                axis = np.array([np.cos(toward + side), np.sin(toward + side), 0.0])
                turn = rotation_matrix(np.deg2rad(angle) * axis)
                falls = turn @ nominal["light_dir"][index]
                if falls[2] <= -_LOWEST_LIGHT:
                    break
            model.light_dir[index] = falls
            model.light_pos[index] = np.asarray(pivot) + turn @ (nominal["light_pos"][index] - np.asarray(pivot))
        factor = gain * tint
        for name in ("light_diffuse", "light_ambient", "light_specular"):
            getattr(model, name)[:] = np.clip(nominal[name] * factor, 0.0, None)
        for name, values in self._headlight.items():
            getattr(model.vis.headlight, name)[:] = values * factor
        if shadows:
            model.light_castshadow[:] = 1
            self.shadows = True

    # --- surfaces ----------------------------------------------------------------------------------------------------

    def colour(self, geoms: Collection[str], rgb: np.ndarray) -> None:
        """Give geoms a colour [3] in [0,1]."""
        for name in geoms:
            self._model.geom(name).rgba[:3] = rgb

    def cover(self, geoms: Collection[str], material: str, pixels: np.ndarray) -> None:
        """Cover geoms with a picture uint8 [S,S,3], through a spare material with a texture."""
        self.fill(material, pixels)
        for name in geoms:
            self._model.geom(name).matid[:] = self._model.material(material).id
            self._model.geom(name).rgba[:3] = 1.0

    def tint(self, material: str, factor: np.ndarray) -> None:
        """Multiply the pixels of a material's texture by a factor of each channel [3].

        The material's colour would not do: where lights are bright, colour times light is cut off at white before the
        texture multiplies it.
        """
        texture = self._texture_of(material)
        pixels = self._texture(texture).reshape(int(self._model.tex_height[texture]), -1, 3)
        self.paint(texture, np.clip(np.rint(pixels * factor), 0, 255).astype(np.uint8))

    def fill(self, material: str, pixels: np.ndarray) -> None:
        """Fill the texture of a material with a picture, see `paint`."""
        self.paint(self._texture_of(material), pixels)

    def _texture_of(self, material: str) -> int:
        return int(np.max(self._model.mat_texid[self._model.material(material).id]))

    def paint(self, texture: int, pixels: np.ndarray) -> None:
        """Fill a texture with a picture, uint8 [H,W,3], which is repeated or cut to its size."""
        stored, model = self._texture(texture), self._model
        self._pixels.setdefault(texture, stored.copy())
        height, width = int(model.tex_height[texture]), int(model.tex_width[texture])
        rows, columns = np.arange(height) % pixels.shape[0], np.arange(width) % pixels.shape[1]
        stored[:] = pixels[rows][:, columns].reshape(-1)
        self.repainted.add(texture)

    def _texture(self, texture: int) -> np.ndarray:
        model = self._model
        start = int(model.tex_adr[texture])
        size = int(model.tex_height[texture]) * int(model.tex_width[texture]) * int(model.tex_nchannel[texture])
        return model.tex_data[start : start + size]


def _matrix(quat: np.ndarray) -> np.ndarray:
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, quat)
    return matrix.reshape(3, 3)


# --- draws ---------------------------------------------------------------------------------------------------------


def draw_camera(rng: np.random.Generator, values: Values) -> dict[str, float]:
    """Draw the arguments of `Appearance.orbit` from their ranges."""
    farther = bool(rng.random() < 0.5)
    distance = within(rng, values["distance"])
    return {
        "azimuth": signed(rng, values["azimuth"]),
        "elevation": signed(rng, values["elevation"]),
        "roll": signed(rng, values["roll"]),
        "distance": distance if farther else 1 / distance,
        "width": within(rng, values["width"]),
    }


def draw_jolt(rng: np.random.Generator, values: Values) -> tuple[np.ndarray, np.ndarray]:
    """Draw the shift [3] in metres and the turn [3] in radians of `Appearance.jolt`."""
    shift = direction(rng) * within(rng, values["wrist_mm"]) / 1000
    return shift, direction(rng) * np.deg2rad(within(rng, values["wrist_degrees"]))


def draw_light(rng: np.random.Generator, values: Values) -> dict[str, Any]:
    """Draw the arguments of `Appearance.light` from their ranges."""
    brighter = bool(rng.random() < 0.5)
    gains = within(rng, values["dark"]), within(rng, values["bright"])
    angle, toward = within(rng, values["degrees"]), float(rng.uniform(-np.pi, np.pi))
    strength, hue = within(rng, values["tint"]), float(rng.uniform(-np.pi, np.pi))
    tint = 1.0 + strength * np.cos(hue + np.array([0.0, 2.0, 4.0]) * np.pi / 3)
    return {
        "gain": gains[brighter],
        "angle": angle,
        "toward": toward,
        "tint": tint / (tint @ _LUMINANCE),
        "shadows": bool(values["shadows"]),
    }


def draw_pattern(rng: np.random.Generator, size: int, first: np.ndarray, second: np.ndarray) -> tuple[str, np.ndarray]:
    """Draw a pattern of two colours [3] in [0,1]; return its name and its pixels uint8 [S,S,3]. It tiles."""
    kind = PATTERNS[int(rng.integers(len(PATTERNS)))]
    along, across = int(rng.integers(4, 10)), int(rng.integers(0, 4))
    noise = rng.normal(size=(size, size))
    x, y = np.meshgrid(*(2 * np.pi * np.arange(size) / size,) * 2)
    wave, other = np.sin(along * x + across * y), np.sin(along * y - across * x)
    if kind == "blotches":
        distance = np.fft.fftfreq(size)[:, None] ** 2 + np.fft.fftfreq(size)[None] ** 2
        smooth = np.fft.ifft2(np.fft.fft2(noise) * np.exp(-distance * (size / along) ** 2)).real
        wave = smooth / np.abs(smooth).max() * 2
    elif kind == "checks":
        wave = wave * other
    share = np.clip(0.5 + 2 * wave, 0.0, 1.0)[..., None]
    return kind, np.rint(255 * ((1 - share) * first + share * second)).astype(np.uint8)


def draw_pale(rng: np.random.Generator, saturation: Sequence[float], luminance: float) -> np.ndarray:
    """Draw a colour [3] in [0,1] of some saturation (largest difference of two of its channels) and of a luminance."""
    hue = rng.uniform(-np.pi, np.pi)
    offset = np.cos(hue + np.array([0.0, 2.0, 4.0]) * np.pi / 3)
    rgb = offset / np.ptp(offset) * within(rng, saturation)
    return np.clip(rgb - rgb @ _LUMINANCE + luminance, 0.0, 1.0)


def far_from(rgb: np.ndarray, others: Sequence[np.ndarray]) -> float:
    """Return the smallest distance of a colour [3] from any other."""
    return min((float(np.linalg.norm(rgb - other)) for other in others), default=np.inf)
