"""A whole policy as one function of tensors with fixed shapes, as a file for another runtime can hold it.

    images, state in physical units, text ids and mask  ->  actions in physical units

Resizing, crop, normalisation, the encoding of the instruction and the network are all inside.

Shape legend: B = 1 observation, H, W camera's image, h, w policy's image, S state, T text tokens, K chunk, A action.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvla.policy.engine.network import FusedNetwork, not_fusible
from cogvla.policy.engine.recording import NoValues
from cogvla.policy.inputs.augmentation import centre, change
from cogvla.policy.inputs.resize import lanczos3
from cogvla.policy.inputs.text_encoder import TextEncoder
from cogvla.policy.policy import CogVLAPolicy

STATE, IDS, MASK, ACTIONS = "state", "text_ids", "text_mask", "actions"


def image_names(cameras: int) -> list[str]:
    """Return the names of the image inputs, in the policy's order of cameras."""
    return [f"image_{index}" for index in range(cameras)]


class PolicyGraph(nn.Module):
    """Compute the actions of one observation.

    Args:
        policy: the policy, in float32 on the CPU; its model is kept.
        camera_size: (height, width) of the images; None: the cameras of the policy's embodiment.

    Raises:
        ValueError: a part of the policy cannot be in such a file; the message says which, and what works.
    """

    def __init__(self, policy: CogVLAPolicy, camera_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        preprocessor, model = policy.preprocessor, policy.model
        if isinstance(preprocessor.tokenizer, TextEncoder):
            raise ValueError(
                "a policy with a text encoder cannot be exported, because its instructions go through a model of their "
                "own; run it with `policy_server`, or train one with policy.language.encoder=null"
            )
        if reason := not_fusible(model):
            raise ValueError(f"this policy cannot be exported: {reason}")
        if model.router is not None and model.router.memory is not None:
            raise ValueError(
                f"router {model.router.remembering!r} remembers earlier decisions, and an exported policy sees each "
                "moment alone: export a policy with another router"
            )
        self.model, self.network = model, FusedNetwork(model)
        self.state, self.action = preprocessor.state_normaliser, preprocessor.action_normaliser
        self.crop_area, self.size = preprocessor.crop_area, preprocessor.image_size
        self.sizes = [camera_size or (camera.height, camera.width) for camera in policy.embodiment.cameras]
        for index, (height, width) in enumerate(self.sizes):
            if (height, width) != self.size:
                kernel = preprocessor.resize_kernel
                self.register_buffer(f"rows{index}", _weights(height, self.size[0], kernel), persistent=False)
                self.register_buffer(f"columns{index}", _weights(width, self.size[1], kernel), persistent=False)

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in the order of `forward`."""
        return [*image_names(len(self.sizes)), STATE, IDS, MASK]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute actions float32 [1,K,A] from the `inputs`: images uint8 [1,H,W,3], state float32 [1,S], ids and mask.

        Ids are int64 [1,T], and the mask is bool [1,T], False on padding.
        """
        *images, state_1S, ids_1T, mask_1T = inputs
        pixels_1V3hw = torch.stack([self._resized(index, image) for index, image in enumerate(images)], dim=1)
        pixels_1V3hw = change(pixels_1V3hw, self.crop_area, centre(self.crop_area, *pixels_1V3hw.shape[:2]))
        text = self.network.prepare(self.model.encode_text(ids_1T, mask_1T))
        state_1S = self.state(state_1S)
        return self.action.inverse(self.network({"pixels": pixels_1V3hw, "state": state_1S, **text}).float())

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Check that no value of a tensor decides in Python what is computed.

        Raises:
            ValueError: one does; a file would hold the decision of these inputs for all others.
        """
        try:
            with NoValues():
                self(*inputs)
        except RuntimeError as error:
            router = self.network.router
            name = "its router" if router is None else f"its router {router.config.name!r}"
            raise ValueError(
                f"this policy cannot be exported: {name} decides in Python by values of tensors ({error}); routers "
                "with a fixed number of tokens can, see docs/routers.md"
            ) from error

    def _resized(self, index: int, image_1HW3: Tensor) -> Tensor:
        view_13HW = rearrange(image_1HW3, "b h w c -> b c h w")
        if self.sizes[index] == self.size:
            return view_13HW
        rows_hH, columns_wW = (getattr(self, f"{name}{index}") for name in ("rows", "columns"))
        return (rows_hH @ view_13HW.float() @ columns_wW.mT).round().clamp(0, 255).to(torch.uint8)


def _weights(inputs: int, outputs: int, kernel: str) -> Tensor:
    """Return the weights [outputs,inputs] of `policy.inputs.resize`, which is linear before it rounds."""
    if kernel == "lanczos3":
        return lanczos3(inputs, outputs, torch.device("cpu"))
    return F.interpolate(torch.eye(inputs)[None, None], (outputs, inputs), mode="bilinear", antialias=True)[0, 0]
