"""OpenVLA as published, on the backbone of a preset: action tokens decoded one after the other, with a cache.

The paper's speed-up is against this. There is one view and no stage of CogVLA; transformers runs the layers operation
by operation. One pass over vision and text gives the first token and fills the cache of keys and values, and a pass
over a single token gives each of the others.

Shape legend: B batch, V views, H, W image, T text, S prompt, J action tokens, D language width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cogvla.policy.model.cogvla import CogVLA


class TokenDecoder(nn.Module):
    """Decodes action tokens greedily.

    Args:
        model: network without stages, see `flops.without_stages`; its vision and its language model are used.
    """

    def __init__(self, model: CogVLA) -> None:
        super().__init__()
        self.vision, self.llm = model.vision, model.decoder.llm
        self.bos, self.count = model.config.language.bos_token, model.embodiment.action_dim
        weight = self.llm.embed_tokens.weight
        self.vocabulary = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device).to(weight.dtype)

    def prompt(self, pixels_BVCHW: Tensor, text_ids_BT: Tensor) -> Tensor:
        """Return the embeddings [B,S,D] of bos, vision and text; all texts have T tokens."""
        text_BTD = self.llm.embed_tokens(text_ids_BT)
        bos_B1D = self.llm.embed_tokens(torch.full_like(text_ids_BT[:, :1], self.bos))
        vision_BND = self.vision(pixels_BVCHW, self.vision.condition(text_BTD.mean(1)))
        return torch.cat((bos_B1D, vision_BND.to(text_BTD), text_BTD), dim=1)

    @torch.inference_mode()
    def forward(self, pixels_BVCHW: Tensor, text_ids_BT: Tensor) -> Tensor:
        """Return the action tokens, int64 [B,J]."""
        cache = DynamicCache()
        states_BSD = self._states(cache, inputs_embeds=self.prompt(pixels_BVCHW, text_ids_BT))
        tokens = [self._next(states_BSD)]
        for _ in range(self.count - 1):
            tokens.append(self._next(self._states(cache, input_ids=tokens[-1][:, None])))
        return torch.stack(tokens, dim=1)

    def _states(self, cache: DynamicCache, **inputs: Tensor) -> Tensor:
        return self.llm(**inputs, past_key_values=cache, use_cache=True).last_hidden_state

    def _next(self, states_BSD: Tensor) -> Tensor:
        return self.vocabulary(states_BSD[:, -1]).argmax(-1)
