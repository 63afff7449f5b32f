"""Names of the numbers in a demonstration's labels, which are flat because lerobot's tools cannot edit tables."""

from __future__ import annotations

AXES = ("x", "y", "z")
PROJECTION = "label.projection."


def label_names(feature: str, size: int) -> list[str] | None:
    """Return the names of a feature's `size` numbers, as lerobot's `names`; None if the feature is no such label.

    They also say the shape: `label.projection.CAMERA` holds the rows u, v and depth of a matrix [3,4],
    `label.alternatives` holds the tasks of a table [N,6].
    """
    places = [f"{point}_{axis}" for point in ("target", "goal") for axis in AXES]
    if feature.startswith(PROJECTION):
        names = [f"{row}_{column}" for row in ("u", "v", "depth") for column in (*AXES, "one")]
    elif feature in ("label.target", "label.goal"):
        names = list(AXES)
    elif feature == "label.alternatives":
        names = [f"task{task}_{place}" for task in range(size // len(places)) for place in places]
    elif feature == "label.possible":
        names = [f"task{task}" for task in range(size)]
    else:
        return None
    return names if len(names) == size else None
