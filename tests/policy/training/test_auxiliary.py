"""The objectives of `policy/training/auxiliary` by answers computed by hand, and what their gradients reach."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogvla.policy.checkpoint import save_checkpoint
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.training.auxiliary.blind_weights import BlindWeights, relative_weight
from cogvla.policy.training.auxiliary.concepts import Concepts, sparsemax
from cogvla.policy.training.auxiliary.contrast import contrast_loss
from cogvla.policy.training.auxiliary.distillation import attention_match
from cogvla.policy.training.auxiliary.diversity import AttentionDiversity, row_similarity
from cogvla.policy.training.auxiliary.frozen_policy import load_frozen
from cogvla.policy.training.auxiliary.masking import TokenMask, hide, hungarian
from cogvla.policy.training.auxiliary.matching import Matching, negatives
from cogvla.policy.training.auxiliary.pointing import Pointer, patch_weights
from cogvla.policy.training.batches import BatchBuilder
from cogvla.policy.training.objective import Objective, ObjectiveConfig
from cogvla.tests.support.extras import needs
from cogvla.tests.support.small_data import (
    IMITATION,
    INSTRUCTIONS,
    ROBOT,
    small_config,
    small_data,
    small_preprocessor,
)
from cogvla.tests.support.tiny_model import tiny_input, tiny_model

PATCHES: dict[str, Any] = {"efa": False, "lfp": False}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_of(seed: int = 0, **routing: Any) -> CogVLA:
    torch.manual_seed(seed)
    return CogVLA(small_config(**routing), ROBOT)


def saved(folder: Path, seed: int = 0, preprocessor: Preprocessor | None = None, **routing: Any) -> str:
    """A checkpoint of an untrained policy."""
    model, data = model_of(seed, **routing), small_data()
    preprocessor = preprocessor or small_preprocessor(data)
    save_checkpoint(folder, model.state_dict(), model.config, preprocessor, data.statistics(), {})
    return str(folder)


# --- contrastive alignment ---


def contrast(pictures_BD: Tensor, ids_BT: list[list[int]], mask_BT: list[list[int]] | None = None) -> float:
    """Of pictures whose tokens are all one, and of words that are unit vectors, numbered by their ids."""
    ids = torch.tensor(ids_BT)
    mask = torch.ones_like(ids) if mask_BT is None else torch.tensor(mask_BT)
    words_BTD = torch.eye(pictures_BD.shape[1])[ids]
    written = torch.where(mask.bool(), ids, -1).unique(dim=0, return_inverse=True)[1]
    return contrast_loss(pictures_BD[:, None].expand(-1, 3, -1), words_BTD, mask.bool(), written).item()


def test_contrast_of_pictures_like_their_words() -> None:
    # similarity 1 to the own word and 0 to the other one, by a temperature of 0.1
    assert contrast(torch.eye(8)[[2, 5]], [[2], [5]]) == pytest.approx(math.log(1 + math.exp(-10)), abs=1e-5)
    assert contrast(torch.eye(8)[[5, 2]], [[2], [5]]) == pytest.approx(10 + math.log(1 + math.exp(-10)), abs=1e-5)


def test_contrast_of_pictures_like_no_word_is_the_logarithm_of_the_number_of_instructions() -> None:
    nothing = torch.eye(8)[[7] * 4]
    assert contrast(nothing, [[0], [1], [2], [3]]) == pytest.approx(math.log(4))
    assert contrast(nothing, [[0], [0], [1], [1]]) == pytest.approx(math.log(2)), "equal instructions are positives"
    assert contrast(nothing, [[3]] * 4) == pytest.approx(0), "one instruction has no negatives"


def test_contrast_is_the_mean_over_words_and_does_not_see_padding() -> None:
    # mean similarity 1/2 to two words, one of them its own picture's
    two_words = contrast(torch.eye(8)[[0, 2]], [[0, 1], [2, 3]])
    assert two_words == pytest.approx(math.log(1 + math.exp(-5)), rel=1e-3)
    padded = contrast(torch.eye(8)[[0, 2]], [[0, 1, 6], [2, 3, 6]], [[1, 1, 0], [1, 1, 0]])
    assert padded == pytest.approx(two_words)
    same = contrast(torch.eye(8)[[7, 7]], [[0, 1], [0, 4]], [[1, 0], [1, 0]])
    assert same == pytest.approx(0), "what differs is padding"


def test_contrast_moves_pictures_and_not_words() -> None:
    vision = torch.randn(4, 3, 8, generator=seeded(), requires_grad=True)
    words = torch.randn(4, 2, 8, generator=seeded(1), requires_grad=True)
    contrast_loss(vision, words, torch.ones(4, 2).bool(), torch.arange(4)).backward()
    assert vision.grad is not None
    assert vision.grad.norm() > 0
    assert words.grad is None


# --- matching and concepts ---


def test_negatives_are_drawn_by_similarity_among_other_instructions() -> None:
    close = torch.tensor([[5.0, 4.0, 0.0]]).expand(4000, -1)
    other = torch.tensor([[False, True, True]]).expand(4000, -1)
    draw = torch.randint(2**62, (4000, 2), generator=seeded())
    drawn = [negatives(close, other, draw, which) for which in (0, 1)]
    for found in drawn:
        assert torch.bincount(found, minlength=3).div(4000).tolist() == pytest.approx([0, 0.982, 0.018], abs=0.01)
    assert not torch.equal(*drawn)
    assert (negatives(close, other, None, 0) == 1).all(), "the hardest, without seeds"


def test_a_batch_of_one_instruction_has_nothing_to_match() -> None:
    torch.manual_seed(0)
    head, vision, words = Matching(8), torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 2, 8)
    mask, draw = torch.ones(3, 2).bool(), torch.arange(6).view(3, 2)
    assert head(vision, words, mask, torch.tensor([4, 4, 4]), draw).item() == 0
    two = head(vision, words, mask, torch.tensor([4, 5, 5]), draw)
    right = head.match(vision, words, mask)
    assert two.item() > 0
    two.backward()
    assert vision.grad is not None
    assert all(p.grad is not None for p in head.parameters())
    padded = torch.tensor([[True, True, False, False]]).expand(3, -1)
    torch.testing.assert_close(right, head.match(vision, torch.cat((words, 9 + words), 1), padded))


def test_matching_is_the_mean_over_one_match_and_two_that_are_none() -> None:
    torch.manual_seed(0)
    head, vision, words = Matching(8), torch.randn(2, 4, 8), torch.randn(2, 2, 8)
    mask = torch.ones(2, 2).bool()
    loss = head(vision, words, mask, torch.tensor([1, 2]), None)
    right, wrong = (head.match(vision, w, mask).log_softmax(-1) for w in (words, words.flip(0)))
    # each of the two wrong pairs is met twice: from its picture and from its text
    torch.testing.assert_close(loss, -(right[:, 1].sum() + 2 * wrong[:, 0].sum()) / 6)


def test_sparsemax() -> None:
    torch.testing.assert_close(sparsemax(torch.tensor([[1.0, 0.8, 0.0]])), torch.tensor([[0.6, 0.4, 0.0]]))
    x = torch.randn(50, 7, generator=seeded()) * 3
    share = sparsemax(x)
    torch.testing.assert_close(share.sum(1), torch.ones(50))
    assert (share == 0).any()
    torch.testing.assert_close(sparsemax(x + 5), share)
    nearest = torch.tensor([[0.2, 0.3, 0.5]])
    torch.testing.assert_close(sparsemax(nearest), nearest), "probabilities stay"


def test_sparsemax_of_large_numbers_and_of_none() -> None:
    assert sparsemax(torch.tensor([[1e9, 1e9], [0, 1e9]])).tolist() == [[0.5, 0.5], [0, 1]]
    found = sparsemax(torch.tensor([[math.nan, 0.0], [1.0, 0.0]]))
    assert found[0].isnan().all(), "the training says that the loss is not finite"
    assert found[1].tolist() == [1, 0]


def test_concepts_of_a_picture_made_of_words() -> None:
    torch.manual_seed(0)
    concepts, words = Concepts(8, 32), torch.randn(4, 3, 8)
    concepts.picture.load_state_dict(concepts.text.state_dict())
    mask = torch.tensor([[True, True, False]]).expand(4, -1)
    number = torch.arange(4)
    own = concepts(words[:, :2], words, mask, number)
    other = concepts(words[[1, 2, 3, 0], :2], words, mask, number)
    assert own < other
    share = concepts.share(concepts.text(words), mask)
    changed = words.clone()
    changed[:, 2] += 1
    assert torch.equal(concepts.share(concepts.text(changed), mask), share), "padding is not seen"
    own.backward()
    assert all(p.grad is not None and p.grad.any() for p in concepts.parameters() if p.ndim == 2)


# --- attention diversity ---


def test_rows_that_look_at_one_token_are_alike() -> None:
    # n = 4, threshold 1/2: the mean row keeps its first entry (2.733 / 4), three rows keep theirs there, one elsewhere
    row, other = [0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3], [0.1 / 3, 0.1 / 3, 0.1 / 3, 0.9]
    assert row_similarity(torch.tensor([[row, row, row, other]])).item() == pytest.approx(0.75)


def test_both_rows_and_their_mean_are_cut_off_at_twice_even_attention() -> None:
    # n = 8, threshold 1/4: the mean (.4, .45, .15) becomes (.4, .45, 0), the rows stay (.4, .3, .3) and (.4, .6, 0)
    rows = torch.zeros(1, 2, 8)
    rows[0, 0, :3], rows[0, 1, :2] = torch.tensor([0.4, 0.3, 0.3]), torch.tensor([0.4, 0.6])
    expected = [(0.16 + 0.135) / (0.3625 * 0.34) ** 0.5, (0.16 + 0.27) / (0.3625 * 0.52) ** 0.5]
    assert row_similarity(rows).item() == pytest.approx(sum(expected) / 2)


def test_even_attention_costs_nothing_and_has_finite_gradients() -> None:
    logits = torch.zeros(2, 5, 5, requires_grad=True)
    loss = row_similarity(logits.softmax(-1))
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("routing", [{}, PATCHES])
def test_diversity_is_asked_of_every_block_of_both_towers(routing: dict[str, Any]) -> None:
    model, shown, inputs = model_of(**routing), [], batch_of(IMITATION).inputs
    diversity = AttentionDiversity()

    def observer(tower: Any, index: int, x: Tensor) -> None:
        shown.append((tower, index, x))
        diversity(tower, index, x)

    model(inputs, decode=False, observer=observer)
    towers = [tower for _, tower in model.vision.named_towers()]
    assert [(tower, index) for tower, index, _ in shown] == [(t, i) for t in towers for i in range(t.computed)]
    expected = []
    for tower, index, x in shown:
        block = tower.vit.blocks[index]
        heads, width = block.attn.num_heads, x.shape[-1]
        q, k, _ = block.attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, heads, width // heads).unbind(2)
        attention = (torch.einsum("xqhc,xkhc->xhqk", q, k) * (width // heads) ** -0.5).softmax(-1).mean(1)
        read = tower.aggregation is not None and index == tower.computed - 1
        expected.append(row_similarity(attention[:, -2:] if read else attention))
    torch.testing.assert_close(diversity.loss(), torch.stack(expected).mean())


def test_diversity_of_a_tower_that_does_not_show_its_attention() -> None:
    model = model_of()
    model.vision.named_towers()[1][1].vit.blocks[0].attn = nn.Identity()
    with pytest.raises(ValueError, match=r"objective\.diversity cannot read .* siglip, which is a Identity"):
        Objective(model, replace(IMITATION, diversity=1.0))


# --- pointing at patches ---


def pointing(logits_N: list[float], kept: list[int] | None, weight: list[float], monkeypatch: Any) -> float:
    """At patch (1, 2) of a grid of 2 x 3 in the first of two views, and at the border between two of the second."""
    pointer = Pointer(8, (2, 3))
    monkeypatch.setattr(pointer, "logits", lambda states, vision: torch.tensor(logits_N).expand(1, 2, -1))
    points = torch.tensor([[[[2.5 / 3, 0.75]] * 2, [[1 / 3, 0.25]] * 2]])
    kept_BN = None if kept is None else torch.tensor([kept])
    nothing = torch.zeros(1, 1, 8)
    return pointer(nothing, nothing, kept_BN, points, torch.tensor([[[w, w] for w in weight]])).item()


def test_patches_have_a_point_by_their_distance() -> None:
    weights = patch_weights(torch.tensor([[[2.5 / 3, 0.75], [1 / 3, 0.25]]]), 2, 3)
    expected = torch.tensor([[[0, 0, 0, 0, 0, 1.0], [0.5, 0.5, 0, 0, 0, 0]]])
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)


def test_pointing_tokens_look_at_the_patches_of_all_views_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    even = [0.0] * 12
    assert pointing(even, None, [1.0, 1.0], monkeypatch) == pytest.approx(math.log(12))
    # of the first view's point half of the loss, of the second view's a quarter for each patch
    logits = [0.0] * 5 + [2.0, 1.0] + [0.0] * 5
    total = math.log(10 + math.exp(2) + math.exp(1))
    expected = 0.5 * (total - 2) + 0.25 * (total - 1) + 0.25 * total
    assert pointing(logits, None, [1.0, 1.0], monkeypatch) == pytest.approx(expected)
    assert pointing(logits, None, [1.0, 0.0], monkeypatch) == pytest.approx(total - 2), "out of the second picture"
    # a router left patch 5 of the first view, two others, and a token that is new
    left = math.log(math.exp(3) + 3)
    assert pointing([0.0, 3.0, 0.0, 0.0], [4, 5, 9, -1], [1.0, 1.0], monkeypatch) == pytest.approx(left - 3)
    assert pointing(even[:3], [0, 1, 9], [1.0, 1.0], monkeypatch) == 0, "no patch is left that has the point"


def test_patches_are_pointed_at_where_there_are_patches() -> None:
    with pytest.raises(
        ValueError, match=r"objective\.pointer points at patches.* use objective\.pointing, or routing=p"
    ):
        Objective(model_of(), replace(IMITATION, pointer=0.1))


# --- masking and hiding ---


def test_masked_tokens_are_the_nearest_of_the_pool_and_the_others_stay() -> None:
    mask = TokenMask(0.5, 2, 2)
    with torch.no_grad():
        mask.pool_PD.copy_(torch.tensor([[10.0, 0.0], [0.0, 1.0]]))
    vision = torch.tensor([6.0, 0.5]).expand(3, 6, 2).contiguous()
    vision[:, ::2] = torch.tensor([4.0, 0.5])  # nearer to (0, 1), although its direction is that of (10, 0)
    found = mask(vision, torch.arange(3))
    masked = (found != vision).any(-1)
    assert masked.sum(1).tolist() == [3, 3, 3], "the share is exact"
    nearest = torch.tensor([[0.0, 1.0], [10.0, 0.0]] * 3).expand(3, 6, 2)
    assert torch.equal(found, torch.where(masked[..., None], nearest, vision))


def test_the_hungarian_matching_gives_each_token_another_entry_with_the_least_sum() -> None:
    pytest.importorskip("scipy", reason=needs("search"))
    distance = torch.rand(3, 4, 6, generator=seeded())
    found = hungarian(distance)
    for row, entries in zip(distance, found.tolist(), strict=True):
        cheapest = min(
            itertools.permutations(range(6), 4), key=lambda p: sum(row[i, e].item() for i, e in enumerate(p))
        )
        assert entries == list(cheapest)
    mask, vision = TokenMask(0.5, 3, 4, "hungarian"), torch.randn(2, 6, 4, generator=seeded())
    replaced = mask(vision, torch.arange(2))
    for row, before in zip(replaced, vision, strict=True):
        taken = row[(row != before).any(-1)]
        assert sorted(taken.tolist()) == sorted(mask.pool_PD.tolist()), "all three entries, each once"
    with pytest.raises(ValueError, match=r"gives 4 masked tokens different entries, but the pool has 3: .*at least 4"):
        mask(torch.zeros(1, 8, 4), torch.arange(1))
    with pytest.raises(ValueError, match="unknown matching 'optimal'; one of nearest, hungarian"):
        TokenMask(0.5, 3, 4, "optimal")


def test_the_hungarian_matching_leaves_numbers_that_are_none_to_the_loss() -> None:
    pytest.importorskip("scipy", reason=needs("search"))
    assert hungarian(torch.tensor([[[math.nan, math.nan], [2.0, 1.0]]])).tolist() == [[0, 1]]


def test_without_scipy_the_hungarian_matching_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs scipy: install the extra `search`.*or use mask_matching=nearest"):
        TokenMask(0.5, 3, 4, "hungarian")


def test_a_sample_is_masked_alike_alone_and_in_a_batch_and_by_its_seed_only() -> None:
    mask, vision = TokenMask(0.5, 4, 8), torch.randn(3, 10, 8, generator=seeded())
    draw = torch.tensor([5, 6, 7])
    together = mask(vision, draw)
    for i in range(3):
        assert torch.equal(mask(vision[i : i + 1], draw[i : i + 1])[0], together[i])
    assert not torch.equal(mask(vision, draw + 1), together)


def test_masking_teaches_the_entries_that_were_taken_and_no_masked_token() -> None:
    mask, vision = TokenMask(0.5, 3, 4), torch.randn(2, 6, 4, generator=seeded(), requires_grad=True)
    with torch.no_grad():
        mask.pool_PD[2] = 1e6  # nearest to nothing
    found = mask(vision, torch.arange(2))
    found.sum().backward()
    masked = (found != vision).any(-1)
    assert vision.grad is not None
    assert mask.pool_PD.grad is not None
    assert torch.equal(vision.grad, (~masked)[..., None].float().expand_as(vision))
    assert mask.pool_PD.grad[:2].sum().item() == 2 * 3 * 4
    assert not mask.pool_PD.grad[2].any()


def test_everything_can_be_masked_or_hidden() -> None:
    vision = torch.randn(400, 3, 4, generator=seeded())
    mask = TokenMask(1.0, 1, 4)
    assert torch.equal(mask(vision, torch.arange(400)), mask.pool_PD.expand(400, 3, 4))
    assert not hide(vision, 1.0, torch.arange(400)).any()
    assert torch.equal(hide(vision, 0.0, torch.arange(400)), vision)
    hidden = (hide(vision, 0.3, torch.arange(400)) == 0).all(-1)
    assert torch.equal(hidden.any(1), hidden.all(1)), "all tokens of a sample or none"
    assert 0.2 < hidden.float().mean() < 0.4


def test_evaluation_masks_and_hides_nothing() -> None:
    config = replace(IMITATION, masking=0.5, vision_dropout=0.5)
    objective = Objective(model_of(), config)
    batch = batch_of(config)
    shown = replace(batch, inputs=replace(batch.inputs, draw=None))
    plain = Objective(objective.model, IMITATION)
    assert torch.equal(objective(shown)["loss"], plain(batch)["loss"])
    assert not torch.equal(objective(batch)["loss"], plain(batch)["loss"])


# --- distillation ---


def inside(attention: list[list[float]], present: list[list[int]] | None = None, **more: Any) -> dict[str, Any]:
    """What is inside of a policy with one layer."""
    return {
        "attention": {0: torch.tensor(attention)},
        "present": {0: None if present is None else torch.tensor(present)},
        "new": {0: None},
        **more,
    }


TEACHER = inside([[0.3, 0.5, 0.1, 0.1]], layout=SimpleNamespace(vision=4))
EXPECTED = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
"""Of kept tokens 0 and 2: the teacher's shares are 3/4 and 1/4, the student's one half each."""


@pytest.mark.parametrize(
    ("index", "attention", "present"),
    [
        ([[0, 2]], [[0.2, 0.2]], None),  # routed before the language model
        ([[0, 1, 2]], [[0.2, 0.2]], [[0, 2]]),  # and once more in it
        (None, [[0.2, 0.2]], [[0, 2]]),  # only there
        ([[0, -1, 2]], [[0.2, 0.5, 0.2]], None),  # one token is nowhere in the teacher
        ([[0, 1, 2]], [[0.2, 0.0, 0.2]], None),  # one is hidden
    ],
)
def test_attention_is_matched_on_the_tokens_that_both_have(
    index: list[list[int]] | None, attention: list[list[float]], present: list[list[int]] | None
) -> None:
    more = {} if index is None else {"routed": SimpleNamespace(index_Bn=torch.tensor(index))}
    assert attention_match(inside(attention, present, **more), TEACHER).item() == pytest.approx(EXPECTED, rel=1e-5)


def test_a_teacher_that_drops_tokens_gives_them_no_attention() -> None:
    teacher = inside([[0.6, 0.2]], [[0, 2]], layout=SimpleNamespace(vision=4))
    student = inside([[0.2, 0.2, 0.2, 0.2]])
    expected = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.25)
    assert attention_match(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_nothing_is_matched_where_all_tokens_are_new() -> None:
    student = inside([[0.2, 0.2]], routed=SimpleNamespace(index_Bn=torch.tensor([[-1, -1]])))
    assert attention_match(student, TEACHER).item() == 0


def test_tokens_that_a_layer_made_are_not_matched_with_those_at_their_places() -> None:
    student = inside([[0.2, 0.5, 0.2]], [[0, 1, 2]], new={0: torch.tensor([[False, True, False]])})
    assert attention_match(student, TEACHER).item() == pytest.approx(EXPECTED, rel=1e-5)
    new = tiny_model(**PATCHES, router={"name": "team_merge", "stage": "llm_layer", "layers": [1], "budget": 4})
    with torch.no_grad():
        traces = [model.eval()(tiny_input(), debug=True).debug for model in (new, tiny_model(**PATCHES))]
    student, teacher = (trace or {} for trace in traces)
    assert student["new"][0] is None
    assert all(student["new"][layer].all() for layer in (1, 2, 3))
    before = [{**trace, "attention": {0: trace["attention"][0]}} for trace in (student, teacher)]
    torch.testing.assert_close(attention_match(student, teacher), attention_match(*before) / 4)


def distilled(tmp_path: Path, seed: int, **routing: Any) -> Objective:
    folder = saved(tmp_path / "teacher", seed=1, **PATCHES)
    teacher = load_frozen(folder, "teacher", small_preprocessor(), INSTRUCTIONS)
    config = replace(IMITATION, distillation=2.0, teacher=folder)
    return Objective(model_of(seed, **PATCHES, **routing), config, teacher)


def test_a_policy_that_is_its_teacher_has_nothing_to_learn_from_it(tmp_path: Path) -> None:
    losses = distilled(tmp_path, seed=1)(batch_of(IMITATION))
    assert losses["teacher_kl"].item() == pytest.approx(0, abs=1e-6)
    assert losses["teacher_l1"].item() == pytest.approx(0, abs=1e-6)


def test_distillation_teaches_the_student_and_not_the_teacher(tmp_path: Path) -> None:
    objective = distilled(tmp_path, seed=2, router={"name": "random", "budget": 4})
    batch = batch_of(IMITATION)
    losses = objective.train()(batch)
    assert losses["teacher_kl"].item() > 0
    expected = losses["action_l1"] + 2 * (losses["teacher_kl"] + losses["teacher_l1"])
    torch.testing.assert_close(losses["loss"].detach(), expected)
    assert objective.distillation is not None
    taught, _ = objective.distillation(batch.inputs)
    student = objective.model(batch.inputs).actions.detach()
    torch.testing.assert_close(losses["teacher_l1"], (student - taught).abs().mean())
    (2 * losses["loss"]).backward()
    assert all(parameter.grad is None for parameter in objective.distillation.parameters())
    assert not any(module.training for module in objective.distillation.modules())
    assert all(p.grad is not None for p in objective.model.decoder.llm.layers[0].self_attn.parameters())


def test_a_teacher_of_another_shape_is_explained(tmp_path: Path) -> None:
    teacher = load_frozen(saved(tmp_path / "efa"), "teacher", small_preprocessor(), INSTRUCTIONS)
    config = replace(IMITATION, distillation=1.0, teacher="efa")
    with pytest.raises(
        ValueError, match=r"it has 4 vision tokens and 2 language layers, the policy 32 and 2; train it"
    ):
        Objective(model_of(**PATCHES), config, teacher)


def test_the_teacher_has_no_token_router(tmp_path: Path) -> None:
    folder = saved(tmp_path / "routed", **PATCHES, router={"name": "learned_pruner", "budget": 4})
    assert load_frozen(folder, "teacher", small_preprocessor(), INSTRUCTIONS).vision_tokens == 32


# --- weighting by a blind policy ---


def test_weights_are_the_error_over_its_mean_between_a_half_and_two() -> None:
    error, ones = torch.tensor([[1.0, 3.0, 2.0, 2.0]]), torch.ones(1, 4)
    torch.testing.assert_close(relative_weight(error, ones), torch.tensor([[0.5, 1.5, 1.0, 1.0]]))
    error = torch.tensor([[0.0, 9.0, 1.5, 1.5]])
    torch.testing.assert_close(relative_weight(error, ones), torch.tensor([[0.5, 2.0, 0.5, 0.5]]))
    # what is not imitated is not in the mean
    error, weight = torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    torch.testing.assert_close(relative_weight(error, weight)[:, :2], torch.tensor([[0.5, 1.5]]))


def batch_of(config: ObjectiveConfig, count: int = 8, seed: int = 0) -> Any:
    data = small_data()
    rows = TrainingBatches(data, count, seed=0).gather(torch.arange(count) * 9 % len(data))  # of several episodes
    return BatchBuilder(data, small_preprocessor(data), config).training(rows, seeded(seed))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_actions_count_by_what_a_policy_without_pictures_gets_wrong(tmp_path: Path, strength: float) -> None:
    folder = saved(tmp_path / "blind", seed=3)
    config = replace(IMITATION, state_dropout=0.5)
    plain = batch_of(config, 24)
    weighted = batch_of(replace(config, prior=strength, blind=folder), 24)
    assert torch.equal(plain.inputs.state, weighted.inputs.state), "nothing else changes"
    assert weighted.noise_BRKA is not None
    assert plain.noise_BRKA is not None
    assert torch.equal(plain.noise_BRKA, weighted.noise_BRKA)

    blind = model_of(3)
    text = blind.encode_text(plain.inputs.text_ids, plain.inputs.text_mask)
    actions = blind.decide(torch.zeros(24, 4, 16), plain.inputs.state, text).actions.detach()
    error = (actions - plain.actions_BKA).abs().mean(-1)
    mean = (error * plain.weight_BK).sum() / plain.weight_BK.sum()
    expected = plain.weight_BK * (1 + strength * ((error / mean).clamp(0.5, 2) - 1))
    torch.testing.assert_close(weighted.weight_BK, expected / expected.mean())
    assert weighted.weight_BK.mean().item() == pytest.approx(1)
    assert weighted.weight_BK.std() > plain.weight_BK.std()


def test_a_blind_policy_is_not_asked_about_pictures(tmp_path: Path) -> None:
    blind = BlindWeights(saved(tmp_path / "blind"), 1.0, small_preprocessor(), INSTRUCTIONS)
    blind.model.vision.towers = nn.ModuleDict()  # would fail if it were
    blind.model.vision.condition = lambda summary: None  # type: ignore[method-assign, assignment, return-value]
    rows = TrainingBatches(small_data(), 2, seed=0).columns(torch.arange(2))
    draws = torch.zeros(2, 8, 4, 4), torch.zeros(2, 8)
    factor = blind(rows, INSTRUCTIONS[:2], torch.ones(2).bool(), torch.ones(2, 4), *draws)
    assert factor.shape == (2, 4)
    assert ((factor >= 0.5) & (factor <= 2)).all()


# --- checkpoints and configuration ---


def test_checkpoints_that_cannot_judge_these_data_are_explained(tmp_path: Path) -> None:
    folder, data = saved(tmp_path / "policy"), small_data()
    ours = small_preprocessor(data)
    with pytest.raises(ValueError, match=r"objective\.teacher=nowhere is no checkpoint folder of train_policy"):
        load_frozen("nowhere", "teacher", ours, INSTRUCTIONS)
    wide = {**data.statistics()}
    wide["state"] = Statistics.of(1.5 * data.state_NS.numpy())
    with pytest.raises(
        ValueError, match=r"objective\.blind=.* trained with data with other statistics of state or act"
    ):
        load_frozen(folder, "blind", Preprocessor(ROBOT, ours.tokenizer, wide), INSTRUCTIONS)
    words = WordTokenizer.from_instructions([*INSTRUCTIONS, "a word that comes first"])
    with pytest.raises(ValueError, match="was trained with other words"):
        load_frozen(folder, "teacher", Preprocessor(ROBOT, words, data.statistics()), INSTRUCTIONS)
    robot = replace(ROBOT, cameras=tuple(replace(camera, height=64, width=64) for camera in ROBOT.cameras))
    with pytest.raises(ValueError, match="another robot or image size"):
        load_frozen(folder, "teacher", Preprocessor(robot, ours.tokenizer, data.statistics()), INSTRUCTIONS)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"masking": 1.5}, "shares between 0 and 1"),
        ({"masking": -0.1}, "shares between 0 and 1"),
        ({"vision_dropout": 1.1}, "shares between 0 and 1"),
        ({"contrast": -1.0}, "weights must be positive"),
        ({"diversity": -1.0}, "weights must be positive"),
        ({"reading": -1.0}, "weights must be positive"),
        ({"matching": -1.0}, "weights must be positive"),
        ({"concepts": -1.0}, "weights must be positive"),
        ({"concept_pool": 1}, r"objective\.concept_pool must be at least 2"),
        ({"mask_pool": 0}, r"objective\.mask_pool must be at least 1"),
        ({"distillation": 1.0}, r"objective\.distillation needs a teacher: objective\.teacher=FOLDER.*base=FOLDER"),
        ({"prior": 1.0}, r"objective\.prior needs a policy that does not see: objective\.blind=FOLDER"),
        ({"prior": 2.0, "blind": "folder"}, "shares between 0 and 1"),
    ],
)
def test_switches_that_make_no_sense_are_explained(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ObjectiveConfig(**bad)
