"""Instructions to states of a frozen encoder, and what is said about one that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, CLIPConfig, CLIPModel

from cogvla.policy.inputs.text_encoder import TextEncoder, encoder_shape, open_encoder
from cogvla.tests.support.text_encoders import WORDS, minilm, save_tokenizer, tiny_encoder

TEXTS = ["touch the red square", "touch the blue one", "put the red cube in the tray", "open"]
KINDS = ["bert", "llama", "t5"]


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_model_without_special_tokens(kind: str, tmp_path: Path) -> None:
    source = tiny_encoder(tmp_path, kind)
    encoder = TextEncoder(source)
    states_BTE, mask_BT = encoder.inputs(TEXTS)
    assert encoder.width == states_BTE.shape[2] == 24
    assert mask_BT.sum(1).tolist() == [4, 4, 7, 1]
    ids_BT, same_BT = encoder.encode(TEXTS)
    assert torch.equal(mask_BT, same_BT)
    assert ids_BT[0, :4].tolist() == [WORDS.index(word) for word in TEXTS[0].split()]
    assert not states_BTE[~mask_BT].any()
    model, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    for text, states_TE in zip(TEXTS, states_BTE, strict=True):
        with torch.no_grad():
            given = tokenizer(text, return_tensors="pt")
            reader = model.encoder if kind == "t5" else model
            expected = reader(input_ids=given.input_ids).last_hidden_state[0, 1:-1]
        torch.testing.assert_close(states_TE[: len(expected)], expected, rtol=0, atol=1e-5)
    assert not states_BTE.requires_grad


def test_case_and_spaces_make_no_difference(tmp_path: Path) -> None:
    encoder = TextEncoder(tiny_encoder(tmp_path))
    states_BTE, _ = encoder.inputs(["open the drawer", "  Open  THE drawer\n"])
    assert torch.equal(states_BTE[0], states_BTE[1])
    assert encoder.unknown_words("open the fridge") == ["fridge"]
    assert encoder.spelled(encoder.encode(["open the"])[0][0].tolist()) == ["open", "the"]


@pytest.mark.parametrize(("text", "said"), [(" ", "no words"), ("?!", "no words"), ("open " * 40, "at most 32")])
def test_instructions_that_it_cannot_read(text: str, said: str, tmp_path: Path) -> None:
    encoder = TextEncoder(tiny_encoder(tmp_path))
    for method in (encoder.encode, encoder.inputs):
        with pytest.raises(ValueError, match=said):
            method(["open the drawer", text])


def another_tokenizer(folder: Path) -> None:
    save_tokenizer(folder, [*WORDS, "more"])


def small_tokenizer(folder: Path) -> None:
    save_tokenizer(folder, WORDS[:12])


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def lacks_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][WORDS.index("square"), 0] = torch.nan  # no probe reads it
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def broken_links(folder: Path) -> None:
    """As a copy of the hub's cache without its blobs has them."""
    for file in folder.iterdir():
        file.unlink()
        file.symlink_to(folder / "blobs" / file.name)


def own_code(folder: Path) -> None:
    """A model that brings its own code, which would ask on the terminal whether to run it."""
    body = {"model_type": "another", "auto_map": {"AutoConfig": "c.C", "AutoModel": "m.M"}}
    (folder / "config.json").write_text(json.dumps(body))


def other_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))


def pictures_too(folder: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = {**sizes, "vocab_size": len(WORDS)}, {**sizes, "image_size": 16, "patch_size": 8}
    without_weights(folder)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (another_tokenizer, "its tokenizer has 26 tokens and its model embeds 25"),
        (small_tokenizer, "its tokenizer has 12 tokens and its model embeds 25"),
        (without_tokenizer, "cannot load|its tokenizer has 5 tokens"),
        (without_weights, "cannot load"),
        (without_config, "cannot load"),
        (lacks_a_tensor, r"lacks encoder\.layer\.1\.output\.dense\.weight \(1 tensors\)"),
        (truncated, "cannot load"),
        (not_a_number, r"embeddings\.word_embeddings\.weight has NaN or infinite"),
        (other_width, "cannot load"),
        (broken_links, "cannot load"),
        (own_code, "cannot load"),
        (pictures_too, "is a CLIPModel, which gives no usable token states"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_in_one_line(
    damage: Callable[[Path], None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_encoder(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=rf"policy\.language\.encoder.*{said}") as caught:
        open_encoder(source)
    assert "\n" not in str(caught.value)
    assert source in str(caught.value)
    assert "Do you wish to run" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", [pictures_too, without_config, own_code])
def test_work_that_cannot_be_counted(damage: Callable[[Path], None], tmp_path: Path) -> None:
    source = tiny_encoder(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=r"policy\.language\.encoder.*cannot (load|be counted)") as caught:
        encoder_shape(source)
    assert "\n" not in str(caught.value)


def test_an_encoder_decoder_without_its_decoder_is_enough(tmp_path: Path) -> None:
    whole = TextEncoder(tiny_encoder(tmp_path, "t5")).inputs(TEXTS)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith("decoder.")}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(TextEncoder(str(tmp_path)).inputs(TEXTS)[0], whole[0])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nobody/no-such-encoder", "no folder nobody/no-such-encoder, and no such model on the .*hf download"),
        ("./encoders/minilm", "no file or folder"),
        ("encoders/minilm/model", "no file or folder"),
        ("model.gguf", "no file or folder"),
        ("{tmp}/missing", "no file or folder"),
        ("{tmp}/notes.txt", "is a file; give the folder of the model"),
        ("{tmp}/two", r"has several \.gguf files, a\.gguf, b\.gguf"),
        ("{tmp}/two/a.gguf", "cannot load|needs the package gguf"),
        ("{tmp}", "cannot load"),
    ],
)
def test_a_source_that_is_none(source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.gguf").write_text("hello")
    with pytest.raises(ValueError, match=said) as caught:
        TextEncoder(source.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["nothing", "place", "weight", "words"])
def test_the_fingerprint_is_that_of_weights_and_tokenizer(change: str, tmp_path: Path) -> None:
    first = open_encoder(tiny_encoder(tmp_path / "a"))
    other = tmp_path / ("b" if change == "place" else "a")
    tiny_encoder(other, seed=1 if change == "weight" else 0)
    if change == "words":
        save_tokenizer(other, [*WORDS[:4], *reversed(WORDS[4:])])
    second = open_encoder(str(other))  # files that have changed are read again
    assert (second.fingerprint == first.fingerprint) == (change in ("nothing", "place"))


def test_synonyms_are_nearer_than_other_nouns() -> None:
    encoder = open_encoder(str(minilm()))
    assert encoder.width == 384

    def mean_of(noun: str) -> torch.Tensor:
        states_1TE, _ = encoder.inputs([f"put the red {noun} in the tray"])
        return states_1TE[0].mean(0)

    for noun, synonym, other in (
        ("cube", "block", "bowl"),
        ("cube", "block", "ball"),
        ("cup", "mug", "plate"),
        ("drawer", "cabinet", "mug"),
    ):
        near, far = (torch.cosine_similarity(mean_of(noun), mean_of(word), dim=0) for word in (synonym, other))
        assert near > far + 0.01, (noun, synonym, other)
    assert encoder.unknown_words("grab the crimson teapot") == []
