"""The simulator's word for where an object is in a picture."""

from __future__ import annotations

import numpy as np

from cogvla.tests.support.tabletop import tabletop


def test_a_mask_is_where_the_target_is_drawn_and_drawing_it_changes_no_picture() -> None:
    env = tabletop("tabletop_object", image_size=96)
    seen, info = env.reset(seed=0, options={"task": 0, "initial_state": 0})
    assert info["instruction"] == "put the red cube in the tray"
    mask_HW = env.target_mask("agentview", 96, 96)
    red, green, blue = (seen["agentview"][..., channel][mask_HW].mean() for channel in range(3))
    assert red > 150
    assert max(green, blue) < 60
    u, v, depth = env.camera_projection("agentview") @ np.append(env.labels()["target"], 1.0)
    assert mask_HW[int(96 * v / depth), int(96 * u / depth)], "it covers the projected centre"
    np.testing.assert_array_equal(env.render_camera("agentview", 96, 96), seen["agentview"])
    env.close()
