"""Render images of a MuJoCo scene off screen, with one OpenGL context per thread and only the requested effects.

The environment variable `MUJOCO_GL` (egl, osmesa or glfw) chooses the backend. Without it, the backend is EGL, or else
OSMesa.

Shape legend: G geoms of the model.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections.abc import Collection
from typing import Any

import mujoco
import numpy as np

_HELP = (
    "Off-screen rendering needs EGL or OSMesa. On Debian or Ubuntu: `apt-get install libegl1 libgl1-mesa-dri` (EGL), "
    "or `apt-get install libosmesa6` and MUJOCO_GL=osmesa. Or build the environment with render=False."
)


def _egl_works() -> bool:
    """Return True if libEGL loads and has at least one device (a software device counts)."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    if not address:
        return False
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))(address)
    count = ctypes.c_int(0)
    return bool(query(0, None, ctypes.byref(count))) and count.value > 0


def _osmesa_works() -> bool:
    for name in ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def choose_backend(requested: str = "") -> str:
    """Return the backend for rendering: `egl`, `osmesa` or `glfw`.

    Args:
        requested: value of MUJOCO_GL; empty: the first backend that works.

    Raises:
        RuntimeError: no backend works, or rendering is switched off; the message names the packages to install.
    """
    requested = requested.lower().strip()
    if requested in ("egl", "osmesa", "glfw"):
        return requested
    if requested in ("disable", "disabled", "off", "false", "0"):
        raise RuntimeError(f"MUJOCO_GL={requested} switches rendering off. {_HELP}")
    if _egl_works():
        return "egl"
    if _osmesa_works():
        return "osmesa"
    raise RuntimeError(_HELP)


class _Contexts(threading.local):
    """The OpenGL contexts of a thread: one that is current in another thread, or comes from a fork, cannot be used."""

    def __init__(self) -> None:
        self.of_process: dict[int, Any] = {}


_contexts = _Contexts()


def _context() -> Any:
    """Return the OpenGL context of this thread and process."""
    found = _contexts.of_process
    process = os.getpid()
    if process not in found:
        found[process] = _new_context()
    return found[process]


def _new_context() -> Any:
    backend = choose_backend(os.environ.get("MUJOCO_GL", ""))
    try:
        if backend == "egl":
            from mujoco.egl import GLContext
        elif backend == "osmesa":
            from mujoco.osmesa import GLContext
        else:
            from mujoco.glfw import GLContext
        context = GLContext(256, 256)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise RuntimeError(f"rendering with {backend} failed ({error}). {_HELP}") from error
    atexit.register(context.free)  # later, the interpreter has already removed modules that freeing needs
    return context


EVERYTHING = ("shadow", "reflection", "skybox", "haze", "cull_face")
"""Effects that MuJoCo draws by default."""


class SceneRenderer:
    """Renderer for the cameras of one model. Images are uint8 [H,W,3], upright.

    Args:
        model: the model; its `vis` sets buffer sizes and multisampling.
        effects: names of MuJoCo's rendering flags to switch on; all others are off.
        hidden_groups: groups of geoms to hide, in addition to MuJoCo's defaults.
        sites: True draws the sites that are visible in the model.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        effects: Collection[str] = (),
        hidden_groups: Collection[int] = (),
        sites: bool = False,
    ) -> None:
        self._model = model
        self._process = os.getpid()
        self._gl = _context()
        self._gl.make_current()
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + (model.nsite if sites else 0) + 50)
        self._scene.flags[:] = 0
        for effect in effects:
            self._scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{effect.upper()}")] = 1
        self._shadows = "shadow" in effects
        self._options = mujoco.MjvOption()
        for group in hidden_groups:
            self._options.geomgroup[group] = 0
        if not sites:
            self._options.sitegroup[:] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._mujoco_context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)

    def show(self, shadows: bool = False, textures: Collection[int] = ()) -> None:
        """Draw shadows too, if the model's lights cast any; upload textures that have changed."""
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW.value] = shadows or self._shadows
        self._gl.make_current()
        for texture in textures:
            mujoco.mjr_uploadTexture(self._model, self._mujoco_context, texture)

    def bodies(self, data: mujoco.MjData, camera: str, height: int, width: int) -> np.ndarray:
        """Return the index of the body that each pixel shows, int64 [H,W]; -1 for pixels without a body."""
        flags = [mujoco.mjtRndFlag.mjRND_SEGMENT.value, mujoco.mjtRndFlag.mjRND_IDCOLOR.value]
        before = self._scene.flags.copy()
        self._scene.flags[flags] = 1
        try:
            colours_HW3 = self.render(data, camera, height, width).astype(np.int64)
        finally:
            self._scene.flags[:] = before
        number_HW = colours_HW3 @ np.array([1, 256, 65536]) - 1  # number of the drawn geom; black is the background
        drawn = self._scene.geoms[: self._scene.ngeom]
        body_G = [self._model.geom_bodyid[g.objid] if g.objtype == mujoco.mjtObj.mjOBJ_GEOM else -1 for g in drawn]
        number_G = [g.segid for g in drawn]
        table = np.full(max(number_G, default=-1) + 2, -1, np.int64)
        for number, body in zip(number_G, body_G, strict=True):
            table[number] = body
        return table[np.clip(number_HW, -1, len(table) - 2)]

    def render(self, data: mujoco.MjData, camera: str, height: int, width: int) -> np.ndarray:
        """Render one image uint8 [H,W,3]."""
        assert os.getpid() == self._process, "an environment was used in a forked process; build it there instead"
        self._gl.make_current()
        context = self._mujoco_context
        # Bind this model's buffer: after another renderer has drawn, MuJoCo would draw into that one's, and read old
        # pixels from this one's.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, context)
        if height > context.offHeight or width > context.offWidth:
            mujoco.mjr_resizeOffscreen(max(width, context.offWidth), max(height, context.offHeight), context)
        self._camera.fixedcamid = self._model.camera(camera).id
        mujoco.mjv_updateScene(
            self._model, data, self._options, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, self._scene, context)
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(pixels, None, viewport, context)
        return np.ascontiguousarray(pixels[::-1])

    def close(self) -> None:
        """Free the GPU memory of this model. The thread keeps its OpenGL context."""
        self._gl.make_current()
        self._mujoco_context.free()
