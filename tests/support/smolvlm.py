"""A vision-language model of SmolVLM's kind with a few thousand weights, and its processor, in a folder."""

from __future__ import annotations

from pathlib import Path

WORDS = ("<unk>", "<pad>", "<image>", "<fake>", "<global-img>", "<end>", "<video>", "put", "the", "red", "cube", "tray")
SPECIAL = {
    "image_token": "<image>",
    "fake_image_token": "<fake>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end>",
    "video_token": "<video>",
}


def write_smolvlm(folder: Path) -> Path:
    """Write configuration and processor, without weights; needs num2words, as SmolVLA does."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", extra_special_tokens=SPECIAL
    )
    SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor()).save_pretrained(folder)
    shared = {"num_attention_heads": 2, "intermediate_size": 16}
    text = {"model_type": "llama", "hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2, "num_key_value_heads": 1}
    vision = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "num_hidden_layers": 1}
    SmolVLMConfig(
        text_config=shared | text | {"vocab_size": len(WORDS), "pad_token_id": 1},
        vision_config=shared | vision,
        image_token_id=2,
        pad_token_id=1,
        scale_factor=2,
    ).save_pretrained(folder)
    return folder
