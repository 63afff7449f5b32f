"""All pictures of a data set at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cogvla.policy.data.demonstrations import DemonstrationData


def pixels_of(data: DemonstrationData) -> Tensor:
    """Return the pictures of all frames, uint8 [N,V,3,H,W]."""
    return torch.from_numpy(data.frames.take(np.arange(len(data.frames))))
