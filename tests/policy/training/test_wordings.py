"""Other wordings of instructions in training: shares, exact resume, ids of tasks, the user's own sentences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.training.batches import BatchBuilder
from cogvla.policy.training.trainer import Trainer
from cogvla.policy.training.validation import validate
from cogvla.policy.training.wordings import InstructionAugmentation, Wordings, training_wordings
from cogvla.scripts.training.build import build_trainer
from cogvla.tests.support.small_data import LABELLED, MODEL, ROBOT, settings, small_data

TASKS = ["put the red cube in the tray", "put the green cube in the tray", "open the drawer"]
HALF = InstructionAugmentation(share=0.5)


def known(paraphrases: dict[str, tuple[str, ...]] | None = None) -> DemonstrationData:
    """Data with instructions of the grammar."""
    return replace(small_data(), instructions=list(TASKS), paraphrases=paraphrases or {})


def tokenizer(data: DemonstrationData, config: InstructionAugmentation = HALF) -> WordTokenizer:
    texts = training_wordings(data, config).values()
    return WordTokenizer.from_instructions(text for some in texts for text in some)


def builder(
    config: InstructionAugmentation = HALF, data: DemonstrationData | None = None, **objective: Any
) -> BatchBuilder:
    data = data or known()
    preprocessor = Preprocessor(ROBOT, tokenizer(data, config), data.statistics())
    return BatchBuilder(data, preprocessor, replace(LABELLED, **objective), instructions=config)


def trainer(
    output: Path, config: InstructionAugmentation = HALF, data: DemonstrationData | None = None, **more: Any
) -> Trainer:
    language = {**MODEL["language"], "vocab_size": 200, "bos_token": 198, "stop_token": 199}
    model = CogVLAConfig.from_dict({**MODEL, "language": language, "routing": {"film_init": 1.0}})
    run = settings(wordings=config, **more)
    return build_trainer(run, model, LABELLED, ROBOT, data or known(), output, lambda metrics, step: None)


def rows_of(build: BatchBuilder, instruction_B: torch.Tensor, seed: int = 0) -> list[list[str]]:
    wording_B, unknown_BT = build.wordings.draw(instruction_B, torch.Generator().manual_seed(seed))
    ids_BT, mask_BT = build.wordings.text(instruction_B, wording_B, unknown_BT)
    words = build.preprocessor.tokenizer.spelled
    return [words(ids_T[mask_T].tolist()) for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]


def test_shares_of_wordings_and_unknown_words() -> None:
    build = builder(replace(HALF, unknown=0.1))
    own = [text.split() for text in TASKS]
    asked = torch.arange(3000) % 3
    spoken = rows_of(build, asked)
    kept = [words == own[i % 3] for i, words in enumerate(spoken)]
    assert 0.45 < sum(kept) / 3000 < 0.55
    others = [words for words, same in zip(spoken, kept, strict=True) if not same]
    unknown = sum(words.count("<unk>") for words in others) / sum(map(len, others))
    assert 0.08 < unknown < 0.12
    assert len({tuple(words) for words in others}) > 150
    assert not any("<unk>" in words for words in rows_of(builder(replace(HALF, unknown=0.0)), asked))


def test_without_a_share_nothing_changes() -> None:
    data, off = known(), InstructionAugmentation()
    samples = TrainingBatches(data, 8, 0).gather(torch.arange(8))
    with_it, without = (
        BatchBuilder(data, Preprocessor(ROBOT, tokenizer(data), data.statistics()), LABELLED, instructions=config)
        for config in (HALF, off)
    )
    first, second = (b.training(samples, torch.Generator().manual_seed(3)) for b in (with_it, without))
    assert torch.equal(first.inputs.pixels, second.inputs.pixels)
    assert first.noise_BRKA is not None
    assert second.noise_BRKA is not None
    assert torch.equal(first.noise_BRKA, second.noise_BRKA), "other draws stay"
    assert second.instruction_B is not None
    ids_BT, mask_BT = without.preprocessor.text([TASKS[i] for i in second.instruction_B.tolist()])
    assert torch.equal(second.inputs.text_ids, ids_BT)
    assert torch.equal(second.inputs.text_mask, mask_BT)
    assert not torch.equal(first.inputs.text_ids[:, :1], second.inputs.text_ids[:, :1])


def test_counterfactual_instructions_are_reworded_too() -> None:
    build = builder(replace(HALF, share=0.7, unknown=0.0), counterfactual=0.9)
    samples = TrainingBatches(known(), 64, 0).gather(torch.arange(64))
    choices = build.choose(samples, torch.Generator().manual_seed(0))
    swapped_B = choices.instruction_B != samples["instruction_id"]
    assert choices.wording_B is not None
    of_row = [i for i, some in enumerate(build.wordings.texts) for _ in some]
    assert [of_row[row] for row in choices.wording_B.tolist()] == choices.instruction_B.tolist()
    usual_B = torch.tensor([row in (0, len(build.wordings.texts[0])) for row in choices.wording_B.tolist()])
    assert (swapped_B & ~usual_B).sum() > 10


@pytest.mark.parametrize("parts", [{"accumulation": 2}, {"cpu_parts": 2}, {"accumulation": 4}])
def test_parts_of_a_step_have_the_same_wordings(tmp_path: Path, parts: dict[str, Any]) -> None:
    whole, divided = (trainer(tmp_path / str(n), **more) for n, more in enumerate(({}, parts)))
    for run in (whole, divided):
        next(run._batches(3, 0))
    first, second = whole.chosen, divided.chosen
    assert first is not None
    assert second is not None
    assert torch.equal(first[2].wording_B, second[2].wording_B)  # type: ignore[arg-type]
    assert torch.equal(first[2].unknown_BT, second[2].unknown_BT)  # type: ignore[arg-type]


def test_a_resumed_run_is_exact_and_other_wordings_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "whole").run()
    stopped = trainer(tmp_path / "parts")
    stopped.log = lambda metrics, step: setattr(stopped.interruption, "requested", True)  # after step 4
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    trainer(tmp_path / "parts").run()
    last = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("whole", "parts")]
    assert last[0] == last[1]
    for other in (replace(HALF, share=0.4), replace(HALF, unknown=0.2), InstructionAugmentation()):
        with pytest.raises(ValueError, match=r"was trained with another setting: .*training.wordings|vocabulary"):
            trainer(tmp_path / "parts", other).run()
    with pytest.raises(ValueError, match="wordings of the instructions differs"):
        trainer(tmp_path / "parts", data=known({TASKS[2]: ("please open the drawer now",)})).run()


def test_held_out_wordings_are_measured_and_are_always_the_same(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    first, second = (validate(run.weights.averaged(), run.held_out, run.builder) for _ in range(2))
    assert first == second
    assert first["validation/held_out_wording_error"] != first["validation/action_l1"]
    wordings = run.builder.wordings
    ids_BT, mask_BT = wordings.held_out(torch.arange(12) % 3)
    trained = {tuple(wordings.tokenizer.encode([text])[0][0].tolist()) for some in wordings.texts for text in some}
    assert not trained & {tuple(i[m].tolist()) for i, m in zip(ids_BT, mask_BT, strict=True)}


def test_the_users_sentences_get_half_of_the_draws() -> None:
    mine = {TASKS[0]: ("cube into tray", "red one away"), TASKS[2]: ("drawer",)}
    build = builder(replace(HALF, unknown=0.0), known(mine))
    for task, own in enumerate(TASKS):
        spoken = [" ".join(words) for words in rows_of(build, torch.full((2000,), task))]
        others = [text for text in spoken if text != own]
        share = sum(text in mine.get(own, ()) for text in others) / len(others)
        assert 0.4 < share < 0.62 if own in mine else share == 0
    only = builder(replace(HALF, count=0, unknown=0.0), known(mine))
    assert {" ".join(words) for words in rows_of(only, torch.zeros(500, dtype=torch.long))} == {
        TASKS[0],
        *mine[TASKS[0]],
    }
    assert {" ".join(words) for words in rows_of(only, torch.ones(500, dtype=torch.long))} == {TASKS[1]}


@pytest.mark.parametrize(
    "wrong", ["put the green cube into the tray", "please, put the green cube in the tray", "open the drawer"]
)
def test_a_sentence_that_is_another_tasks_is_refused(wrong: str) -> None:
    other = {
        TASKS[0]: (wrong,),
        TASKS[1]: ("put the green cube into the tray", "please put the green cube in the tray"),
    }
    with pytest.raises(
        ValueError, match=r"data.paraphrases: the policy cannot tell .* the tokenizer gives both the same"
    ):
        builder(HALF, known(other))


def test_wordings_of_different_tasks_never_have_equal_ids() -> None:
    blind = WordTokenizer.from_instructions(["put the cube in the tray", "open drawer"])  # knows no colours
    data = known()
    wordings = Wordings(data, blind, HALF)
    ids = [{tuple(blind.encode([text])[0][0].tolist()) for text in some[1:]} for some in wordings.texts]
    assert not ids[0] & ids[1]
    assert len(wordings.texts[1]) < len(wordings.texts[0]), "what could be about the red cube is left out"
    assert ids[2]


def test_equal_instructions_share_their_number_and_sentences_stay_with_them() -> None:
    data = replace(small_data(), instructions=["open the drawer", "Open the drawer.", "close it all"])
    wordings = Wordings(data, tokenizer(data), HALF)
    assert wordings.group_I.tolist() == [0, 0, 2]
    assert len(wordings.texts[0]) > 10 < len(wordings.texts[1])
    assert wordings.texts[2] == ["close it all"]


def test_sentences_that_nothing_uses_and_a_vocabulary_without_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"data.paraphrases needs wordings.share above 0: choose"):
        trainer(tmp_path, InstructionAugmentation(), known({TASKS[0]: ("tray",)}))
    with pytest.raises(ValueError, match=r"the data has 2\d\d words with other wordings, .* or choose wordings=none"):
        trainer(tmp_path, HALF, known({TASKS[0]: tuple(f"tray {number}" for number in range(180))}))
    trainer(tmp_path, HALF, replace(known(), instructions=[*TASKS[:2], "wipe the floor"]))
    assert "1 of 3 instructions have no other wordings, for example 'wipe the floor'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.8}, r"wordings.share must be in \[0,0.7\], got 0.8"),
        ({"count": -1}, "wordings.count must be at least 0, got -1"),
        ({"unknown": 0.9}, r"wordings.unknown must be in \[0,0.5\], got 0.9"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstructionAugmentation(**values)
