"""A pretrained text encoder in place of word embeddings: words that no training data has then have a meaning, too.

The encoder is frozen and never a part of the network: it is neither trained, averaged nor saved. Its last hidden
states are computed once per instruction, and the network projects them (`policy.model.text_projection`). A checkpoint
holds its source and a fingerprint of its weights and tokenizer, which is compared when the checkpoint is loaded.

Shape legend: B batch, T text tokens, E width of the encoder.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from cogvla.policy.inputs.pretrained_source import load_pretrained
from cogvla.policy.inputs.tokenizer import TransformersTokenizer, check_not_empty
from cogvla.policy.interface import InstructionError
from cogvla.policy.model.config import CogVLAConfig

KEY = "policy.language.encoder"
PROBES = ("put the red cube in the tray", "open the top drawer, then push the 2nd plate left!")
MOST = 64
"""Instructions that are encoded at once."""
UNUSED = 0.1
"""Largest share of an embedding table without a token; tables are often padded to a round size."""


class TextEncoder(TransformersTokenizer):
    """Encodes instructions with a frozen language model of transformers and its own tokenizer, on the CPU in float32.

    Special tokens that the tokenizer adds are read by the model, but their states are left out.

    Args:
        source: hub id, folder or GGUF file.

    Attributes:
        source: as given.
        width: E.
        fingerprint: fingerprint of weights and tokenizer.

    Raises:
        ValueError: it cannot be loaded, lacks weights, its tokenizer belongs to another model, or it does not compute
            token states.
    """

    def __init__(self, source: str) -> None:
        try:
            super().__init__(source)
            model, found = load_pretrained(AutoModel, source, output_loading_info=True, dtype=torch.float32)
        except ValueError as error:
            raise ValueError(f"{KEY}: {error}") from error
        unused = ("pooler.", "decoder.") if getattr(model.config, "is_encoder_decoder", False) else ("pooler.",)
        if missing := sorted(key for key in found["missing_keys"] if not key.startswith(unused)):
            raise ValueError(f"{KEY}={source} lacks {', '.join(missing[:3])} ({len(missing)} tensors): get it again")
        self._network = _reader(model).eval().requires_grad_(False)
        for name, value in self._network.state_dict().items():
            if not value.isfinite().all():
                raise ValueError(f"{KEY}={source}: {name} has NaN or infinite numbers; get it again")
        self._check_tokenizer()
        self._limit = min(
            self._tokenizer.model_max_length, getattr(self._network.config, "max_position_embeddings", None) or 10**9
        )
        self.width = self._probed_width()
        self.fingerprint = self._fingerprint()

    def encode(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids int64 [B,T] and mask bool [B,T] of the tokens whose states `inputs` returns.

        Raises:
            InstructionError: an instruction has no words, or more tokens than the encoder reads.
        """
        rows = [[i for i, kept in zip(*self._row(text), strict=True) if kept] for text in instructions]
        return self._padded(rows)

    @torch.no_grad()
    def inputs(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return states float32 [B,T,E], 0 on padding, and mask bool [B,T], on the CPU.

        Raises:
            ValueError: see `encode`.
        """
        rows = [self._row(text) for text in instructions]
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, (ids, _) in enumerate(rows):
            by_length[len(ids)].append(index)
        states: dict[int, Tensor] = {}
        for same in by_length.values():  # without padding, which would change the last digits
            for start in range(0, len(same), MOST):
                some = same[start : start + MOST]
                states_BTE = self._states(torch.tensor([rows[index][0] for index in some]))
                states |= {
                    index: states_TE[torch.tensor(rows[index][1])]
                    for index, states_TE in zip(some, states_BTE, strict=True)
                }
        ordered = [states[index] for index in range(len(rows))]
        mask = [torch.ones(len(states_TE), dtype=torch.bool) for states_TE in ordered]
        return nn.utils.rnn.pad_sequence(ordered, batch_first=True), nn.utils.rnn.pad_sequence(mask, batch_first=True)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "encoder", "fingerprint": self.fingerprint}

    def _row(self, text: str) -> tuple[list[int], list[bool]]:
        """Return the ids that the model reads, and False for special tokens."""
        check_not_empty(text)
        found = self._tokenizer(" ".join(text.lower().split()), return_special_tokens_mask=True)
        kept = [not special for special in found["special_tokens_mask"]]
        if not any(kept):
            raise InstructionError(f"instruction {text!r} has no token of the text encoder; use other words")
        if len(kept) > self._limit:
            raise InstructionError(
                f"instruction {text[:40]!r}… has {len(kept)} tokens, but the text encoder reads at most {self._limit}: "
                "shorten it"
            )
        return list(found["input_ids"]), kept

    def _states(self, ids_BT: Tensor) -> Tensor:
        return self._network(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).last_hidden_state

    def _check_tokenizer(self) -> None:
        try:
            tokens, rows = len(self._tokenizer), self._network.get_input_embeddings().weight.shape[0]
        except NotImplementedError:  # not a text model, as the probe will say
            return
        if not (1 - UNUSED) * rows <= tokens <= rows:
            raise ValueError(
                f"{KEY}={self.source}: its tokenizer has {tokens} tokens and its model embeds {rows}: they belong to "
                "different models, get both from one source"
            )

    def _probed_width(self) -> int:
        ids_BT, problem = torch.tensor([self._row(PROBES[0])[0]]), ""
        try:
            with torch.no_grad():
                states_BTE = self._states(ids_BT)
            if states_BTE.shape[:2] != ids_BT.shape or states_BTE.ndim != 3:
                problem = f"its output has the shape {list(states_BTE.shape)} for {ids_BT.shape[1]} tokens"
        except Exception as error:  # a model of another kind asks for other inputs
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        if problem:
            raise ValueError(
                f"{KEY}={self.source} is a {type(self._network).__name__}, which gives no usable token states "
                f"({problem}); choose a text model such as BERT, T5 or Llama"
            )
        return states_BTE.shape[2]

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self._network.state_dict().items()):
            digest.update(name.encode())
            digest.update(memoryview(value.contiguous().flatten().numpy()).cast("B"))
        ids = [self._tokenizer(text).input_ids for text in PROBES]
        digest.update(json.dumps([sorted(self._tokenizer.get_vocab().items()), ids]).encode())
        return digest.hexdigest()[:16]


def open_encoder(source: str) -> TextEncoder:
    """Return the encoder of a source; it is loaded once per process, unless its files change.

    Raises:
        ValueError: see `TextEncoder`.
    """
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())
    stamp = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _opened(source, stamp)


@functools.lru_cache(maxsize=2)
def _opened(source: str, stamp: tuple[tuple[str, int, int], ...]) -> TextEncoder:
    return TextEncoder(source)


def encoder_shape(source: str) -> Any:
    """Return the network of an encoder on the meta device, to count its parameters and work.

    Raises:
        ValueError: the source has no configuration of a model, or its work cannot be counted.
    """
    try:
        config = load_pretrained(AutoConfig, source)
    except ValueError as error:
        raise ValueError(f"{KEY}: {error}") from error
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(getattr(config, name, None), int):
            raise ValueError(
                f"the work of {KEY}={source} cannot be counted: the configuration of its model ({config.model_type}) "
                f"has no {name}"
            )
    with torch.device("meta"):
        return _reader(AutoModel.from_config(config))


def with_encoder(config: CogVLAConfig) -> CogVLAConfig:
    """Return the configuration with the width of its text encoder, whose path becomes absolute; see `TextEncoder`.

    Raises:
        ValueError: the encoder cannot be used, or has another width than `language.encoder_width`.
    """
    source, width = config.language.encoder, config.language.encoder_width
    if source is None:
        return config
    found = open_encoder(source).width
    if width not in (None, found):
        raise ValueError(
            f"policy.language.encoder_width is {width}, but {KEY}={source} has states of width {found}: set "
            "encoder_width=null, or choose the encoder that you meant"
        )
    path = Path(source).expanduser()
    place = str(path.absolute()) if path.exists() else source
    return replace(config, language=replace(config.language, encoder=place, encoder_width=found))


def with_encoder_width(config: CogVLAConfig) -> CogVLAConfig:
    """Return the configuration with the width of its text encoder, without loading weights.

    Raises:
        ValueError: see `encoder_shape`.
    """
    language = config.language
    if language.encoder is None or language.encoder_width is not None:
        return config
    return replace(config, language=replace(language, encoder_width=encoder_shape(language.encoder).config.hidden_size))


def same_place(config: CogVLAConfig, other: CogVLAConfig) -> CogVLAConfig:
    """Return the configuration with the place of the other's text encoder, which is compared by its fingerprint."""
    if config.language.encoder is None or other.language.encoder is None:
        return config
    return replace(config, language=replace(config.language, encoder=other.language.encoder))


def _reader(model: Any) -> Any:
    """Return the part of a model that reads text: an encoder of two parts, and no pooling of sentences."""
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model
