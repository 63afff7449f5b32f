"""How a pretrained language model can tell the towers the order of the words: by our layer, or by its own first layers.

    python tests/benchmarks/bench_word_order.py

A small classifier learns which of a suite's instructions a sentence means, from a summary of its words as FiLM reads
it: the mean of SmolLM2-135M's word embeddings, this mean with `routing.word_order`, or the mean of the states after its
first layers (frozen, as in LoRA training). It is tested with wordings that training never has. `order` counts only the
sentences whose instruction has the same words as another in a different order. Mean of three seeds after 400 steps.

Shape legend: W sentences, T words, E width of the language model, D width of the summary.
"""

from __future__ import annotations

import random
from collections import Counter

import torch
from torch import Tensor, nn

from cogvla.envs.suite import get_suite
from cogvla.policy.inputs.text_encoder import TextEncoder, open_encoder
from cogvla.policy.instructions.grammar import words_of
from cogvla.policy.instructions.paraphrase import LEVELS, reword, wordings
from cogvla.policy.model.text_projection import TextProjection
from cogvla.routing.word_order import WordOrder
from cogvla.tests.benchmarks.bench_text_encoders import HELD_OUT, SEEDS, STEPS, WIDTH, WORDINGS, Sentences
from cogvla.tests.support.text_encoders import smollm2

SUITES = ("tabletop_goal", "tabletop_long")
LAYERS = (0, 1, 2, 4, 8)


class Summary(nn.Module):
    """Classifier of the mean of projected words, with `ordered` also of their order."""

    def __init__(self, words_WTE: Tensor, mask_WT: Tensor, classes: int, ordered: bool) -> None:
        super().__init__()
        self.project = TextProjection(words_WTE.shape[-1], WIDTH, std=1.0)
        self.project.fit(words_WTE, mask_WT)
        self.order = WordOrder(WIDTH) if ordered else None
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, classes))

    def forward(self, words_WTE: Tensor, mask_WT: Tensor) -> Tensor:
        words_WTD, weight_WT1 = self.project(words_WTE), mask_WT[..., None].float()
        summary_WD = (words_WTD * weight_WT1).sum(1) / weight_WT1.sum(1)
        return self.head(summary_WD if self.order is None else summary_WD + self.order(words_WTD, mask_WT))


def states(encoder: TextEncoder, texts: list[str], layer: int) -> tuple[Tensor, Tensor]:
    """Return the states [W,T,E] after this many layers, and their mask [W,T]."""
    ids_WT, mask_WT = encoder.encode(texts)
    with torch.no_grad():
        found = encoder._network(input_ids=ids_WT, attention_mask=mask_WT.long(), output_hidden_states=True)
    return found.hidden_states[layer], mask_WT


def accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    truths: tuple[Tensor, Tensor],
    pairs_W: Tensor,
    ordered: bool,
) -> tuple[float, float]:
    """Return the share of test sentences that are understood: of all, and of those where the order decides."""
    shares = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model = Summary(*train, int(truths[0].max()) + 1, ordered)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4)
        for _ in range(STEPS):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(*train), truths[0]).backward()
            optimiser.step()
        with torch.no_grad():
            right_W = (model(*test).argmax(1) == truths[1]).float()
        shares.append(torch.stack([right_W.mean(), right_W[pairs_W].mean()]))
    total, order = torch.stack(shares).mean(0).tolist()
    return total, order


def main() -> None:
    torch.set_num_threads(1)
    encoder = open_encoder(str(smollm2()))
    for name in SUITES:
        own = tuple(dict.fromkeys(task.instruction for task in get_suite(name, {}).tasks))
        bags = Counter(tuple(sorted(words_of(text) or ())) for text in own)
        test: Sentences = [
            (number, reword(text, LEVELS[i % len(LEVELS)], random.Random(f"{i} {text}"), own))
            for number, text in enumerate(own)
            for i in range(HELD_OUT)
        ]
        made = wordings(own, WORDINGS)
        train: Sentences = [(number, some) for number, text in enumerate(own) for some in (text, *made[text])]
        truths = torch.tensor([number for number, _ in train]), torch.tensor([number for number, _ in test])
        pairs_W = torch.tensor([bags[tuple(sorted(words_of(own[number]) or ()))] > 1 for number, _ in test])
        print(f"{name}: {len(test)} sentences, {int(pairs_W.sum())} of them decided by the order")
        for layer in LAYERS:
            inputs = [states(encoder, [text for _, text in some], layer) for some in (train, test)]
            for ordered in (False, True) if layer == 0 else (False,):
                total, order = accuracy(inputs[0], inputs[1], truths, pairs_W, ordered)
                said = (
                    f"states after {layer} layers" if layer else "embeddings" + (" and word order" if ordered else "")
                )
                print(f"  {said}: all {100 * total:.0f} %, order {100 * order:.0f} %")


if __name__ == "__main__":
    main()
