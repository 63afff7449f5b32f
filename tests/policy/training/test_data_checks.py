"""Before training: instructions that cannot be told apart are refused, dimensions that hardly ever move are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.inputs.tokenizer import PretrainedTokenizer, WordTokenizer
from cogvla.policy.training.data_checks import check_instructions, check_tokens, clipped_instructions, rare_dimensions
from cogvla.scripts.training.build import build_trainer
from cogvla.tests.support.small_data import (
    IMITATION,
    INSTRUCTIONS,
    ROBOT,
    settings,
    small_config,
    small_data,
    small_trainer,
)


@pytest.fixture
def pretrained(tmp_path: Path) -> PretrainedTokenizer:
    """A tokenizer that leaves out accents, and cuts texts at twelve tokens when it is asked to."""
    words = ["<unk>", "pick", "up", "the", "block", "resume", "do", "now"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.normalizer = BertNormalizer(strip_accents=True)
    inner.pre_tokenizer = Whitespace()
    inner.enable_truncation(12)
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", model_max_length=12).save_pretrained(tmp_path)
    return PretrainedTokenizer(str(tmp_path), "do {instruction} now")


def asked(*texts: str) -> DemonstrationData:
    """Data whose episodes 0, 1 and 2 are the first with these instructions."""
    return replace(small_data(), instructions=list(texts))


@pytest.mark.parametrize(
    "texts",
    [
        ("move by 0.5", "move by 0 5"),
        ("move left-right", "move left right"),
        ("the red_block", "the red block"),
        ("from 10-20", "from 10 20"),
        ("open 🏴\U000e0067\U000e007f", "open 🏴 . -"),
    ],
)
def test_words_that_a_tokenizer_would_make_equal(texts: tuple[str, str]) -> None:
    data = asked("touch", *texts)
    with pytest.raises(ValueError, match="the tokenizer gives both the same ids") as error:
        check_instructions(WordTokenizer.from_instructions(data.instructions), data)
    assert f"{texts[0]!r} (episode 1 of the data) from {texts[1]!r} (episode 2)" in str(error.value)


@pytest.mark.parametrize(
    "texts",
    [
        ("pick up the 红 block", "pick up the 蓝 block"),
        ("pick up the resume", "pick up the r\u00e9sum\u00e9"),
        ("pick up the cup", "pick up the plate"),
    ],
)
def test_instructions_that_a_pretrained_tokenizer_makes_equal(
    pretrained: PretrainedTokenizer, texts: tuple[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"cannot tell 'pick up the .*' .*episode 0.* from .*episode 2"):
        check_instructions(pretrained, asked(texts[0], "pick up", texts[1]))


def test_long_instructions_are_not_cut(pretrained: PretrainedTokenizer) -> None:
    long = "pick up the block " * 10
    check_instructions(pretrained, asked(long + "now", long + "up", long))


@pytest.mark.parametrize("empty", ["", "  \n", "...", "\u200b"])
def test_an_empty_instruction_is_refused_with_its_episode(pretrained: PretrainedTokenizer, empty: str) -> None:
    for tokenizer in (pretrained, WordTokenizer.from_instructions(INSTRUCTIONS)):
        with pytest.raises(ValueError, match=r"episode 1 of the data has the instruction .* which has no words"):
            check_instructions(tokenizer, asked("touch the red square", empty, "touch"))


def test_spellings_of_one_instruction_may_share_their_ids(pretrained: PretrainedTokenizer) -> None:
    data = asked("Pick up the block", "pick up  the block.", "拿起红色的方块")
    for tokenizer in (pretrained, WordTokenizer.from_instructions(data.instructions)):
        check_instructions(tokenizer, data)


def test_instructions_without_frames_do_not_matter() -> None:
    data = asked(*INSTRUCTIONS, "", "touch the red-square")
    check_instructions(WordTokenizer.from_instructions(data.instructions), data)


def test_training_starts_only_with_instructions_that_differ(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot tell 'go 0\.5' .* from 'go 0 5'"):
        small_trainer(tmp_path, data=asked("go 0.5", "stop", "go 0 5"))
    trainer = small_trainer(tmp_path, data=asked("go 红色", "stop", "go 蓝色"))
    assert trainer.preprocessor.tokenizer.encode(["go 红色"])[0].tolist() != [[2, 1, 1]]


def resting(frames: int = 1) -> DemonstrationData:
    """Data whose state 1 and action 0 leave their rest at 0.25 in a few frames only."""
    data = small_data(episodes=40)
    state_NS, action_NA = data.state_NS.clone(), data.action_NA.clone()
    state_NS[:, 1] = action_NA[:, 0] = 0.25
    state_NS[:frames, 1], action_NA[5 : 5 + frames, 0] = 0.95, -0.45
    return replace(data, state_NS=state_NS, action_NA=action_NA)


def test_dimensions_that_rest_nearly_always_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = small_trainer(tmp_path, data=resting())
    said = capsys.readouterr().out
    assert "state 1 rests near 0.25 in nearly all frames: it is normalised from 0.25 to 0.95, with its maximum" in said
    assert (
        "action 0 rests near 0.25 in nearly all frames: it is normalised from -0.45 to 0.25, with its minimum" in said
    )
    reached = trainer.preprocessor.actions(torch.full((1, 4, 4), -1.0))
    assert reached[..., 0].max().item() == pytest.approx(-0.45)


def test_only_dimensions_that_are_normalised_by_quantiles_are_named() -> None:
    assert not rare_dimensions(small_data(), ROBOT)
    assert not rare_dimensions(resting(frames=60), ROBOT)
    robot = replace(ROBOT, state_normalisation="min_max", action_normalise_mask=(False, True, True, False))
    assert not rare_dimensions(resting(), robot)
    assert [line[:8] for line in rare_dimensions(resting(), replace(ROBOT, state_normalisation="mean_std"))] == [
        "action 0"
    ]


def test_actions_that_only_one_task_needs_and_normalisation_clips_are_noted() -> None:
    data = small_data(episodes=40)
    assert not clipped_instructions(data, ROBOT)
    count = len(data) // 150
    action_NA, instruction_N = data.action_NA.clone(), data.instruction_N.clone()
    action_NA[:, 1] = torch.linspace(-0.1, 0.1, len(data))
    action_NA[:count, 1], instruction_N[: 2 * count] = -1.0, len(data.instructions)
    instructions = [*data.instructions, "turn it"]
    turned = replace(data, action_NA=action_NA, instruction_N=instruction_N, instructions=instructions)
    (line,) = clipped_instructions(turned, ROBOT)
    assert "clips what some instructions need: 'turn it': 50% of action 1; embodiment.action_norm" in line
    assert "(action 1: -0.0" in line or "(action 1: -0.1" in line
    for robot in (
        replace(ROBOT, action_normalisation="min_max"),
        replace(ROBOT, action_normalise_mask=(True, False, True, False)),
    ):
        assert not clipped_instructions(turned, robot)


def test_actions_beyond_the_tokens_of_the_discrete_head_are_refused(tmp_path: Path) -> None:
    data = small_data()
    check_tokens(data, ROBOT)
    check_tokens(data, replace(ROBOT, action_normalisation="identity"))  # they are within -1 to 1
    wide = replace(data, action_NA=data.action_NA * torch.tensor([1.0, 3.0, 1.0, 1.0]))
    check_tokens(wide, ROBOT)
    with pytest.raises(
        ValueError, match=r"action 1 is not normalised, and goes from -.* set embodiment\.action_normal"
    ):
        check_tokens(wide, replace(ROBOT, action_normalisation="identity"))
    opened = replace(data, action_NA=data.action_NA * torch.tensor([1.0, 1.0, 1.0, 50.0]))  # a gripper in percent
    config = small_config()
    config = replace(config, head=replace(config.head, kind="discrete"))
    with pytest.raises(ValueError, match="action 3 is not normalised, and goes from -50 to 50"):
        build_trainer(settings(), config, IMITATION, ROBOT, opened, tmp_path, lambda metrics, step: None)
