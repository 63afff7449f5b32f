r"""Write a token router of your own: keep the patches with the strongest colours, or with the strongest edges.

    python examples/own_router.py       compares it with others in an untrained `tiny` policy, and writes
                                        outputs/examples/own_router.png

Every command knows the router after it has imported this file, whose folder is on PYTHONPATH. FOLDER is a policy that
reads patches (docs/routing.md says how to train one):

    export PYTHONPATH=examples
    uv run eval_libero 'imports=[own_router]' checkpoint=FOLDER router.name=vivid router.budget=0.25
    uv run train_policy 'imports=[own_router]' base=FOLDER routing=router routing.film=true objective=reading \
        routing.router.name=vivid 'routing.router.options={measure: edges}' output=outputs/vivid
    uv run compare_routers 'imports=[own_router]' checkpoint=FOLDER 'routers=[vivid,random,spatial_pool]'
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from cogvla.configs.load import load
from cogvla.envs.analysis.routing_pictures import picture
from cogvla.envs.analysis.routing_recording import covered, look
from cogvla.envs.contract import TargetMasks, required
from cogvla.envs.suite import get_suite
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.interface import Observation
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.policy import CogVLAPolicy
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterConfig, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, kept

ROOT = Path(__file__).resolve().parents[1]
MEASURES = ("colour", "edges")


@register_router("vivid")
class Vivid(TokenRouter):
    """Keep the patches that stand out in the picture; it asks neither the network nor the instruction.

    Args:
        sizes: see `RouterSizes`.
        measure: `colour`: difference between the largest and the smallest colour channel; `edges`: difference between
            neighbouring pixels. Both are means over the patch.
    """

    needs = frozenset({"pixels_B3HW", "grid"})
    stages = ("encoder_out", "projector_out")  # in the language model, tokens are no patches of a picture any more

    def __init__(self, sizes: RouterSizes, *, measure: str = "colour") -> None:
        super().__init__(sizes)
        if measure not in MEASURES:
            raise ValueError(f"router.options.measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        self.measure = measure

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.pixels_B3HW is not None
        assert context.grid is not None
        image_B3HW = context.pixels_B3HW.float()
        if self.measure == "colour":
            strength_BHW = image_B3HW.amax(1) - image_B3HW.amin(1)
        else:
            down_B3HW, right_B3HW = image_B3HW.diff(dim=2).abs(), image_B3HW.diff(dim=3).abs()
            strength_BHW = (down_B3HW[..., :-1] + right_B3HW[..., :-1, :]).mean(1)
        score_BN = adaptive_avg_pool2d(strength_BHW[:, None], context.grid).flatten(1)
        return kept(tokens_BND, best(score_BN, context.budget), score_BN)


def main() -> None:
    """Route the tokens of ten pictures with several routers, and draw those of one."""
    # `routing=router` is a policy on plain patches. This one is not trained: random weights, and the words, sizes and
    # statistics of the shipped policy.
    shipped = load_policy(ROOT / "checkpoints" / "tabletop_object")
    config = CogVLAConfig.from_dict({**load("policy", "tiny"), "routing": load("routing", "router")})
    torch.manual_seed(0)
    model = CogVLA(config, shipped.embodiment)
    grid, views = model.vision.grid, shipped.embodiment.camera_names
    scenes = list(pictures(grid, views))
    total = model.vision.tokens
    print(f"{total} patches of {len(views)} views; in 10 scenes, {sum(t.sum() for _, t in scenes)} show the target")
    shown: list[Image.Image] = []
    for name, options in (("vivid", {}), ("vivid", {"measure": "edges"}), ("random", {}), ("token_norm", {})):
        router = RouterConfig(name, 0.25, options=options)
        policy = CogVLAPolicy(model.with_router(router), shipped.preprocessor)  # the same network, the same weights
        moments = [look(policy, observation) for observation, _ in scenes]
        share = share_kept([moment.kept["router"] for moment in moments], [target for _, target in scenes])
        called = " ".join((name, *options.values()))
        print(f"{called:12s} keeps {len(moments[0].kept['router']):3d} patches, {share:4.0%} of the target's")
        shown += [picture(moments[0], "router", view, grid) for view in range(len(views))]
    sheet = Image.new("RGB", (len(shown) // 2 * shown[0].width, 2 * shown[0].height))
    for place, image in enumerate(shown):
        sheet.paste(image, (place // 2 * image.width, place % 2 * image.height))
    path = Path("outputs", "examples", "own_router.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"wrote {path}: a column for each router, bright patches are kept")


def pictures(grid: tuple[int, int], views: Sequence[str]) -> Iterator[tuple[Observation, np.ndarray]]:
    """Yield the first picture of each task, and which of its patches show the target, bool [V*H*W]."""
    suite = get_suite("tabletop_object")
    env = suite.make(image_size=128)
    masks = required(env, TargetMasks, "this example")
    for task in range(len(suite.tasks)):
        seen, info = env.reset(options={"task": task, "initial_state": 0})
        images = {view: seen[view][None] for view in views}
        mask_VHW = np.stack([masks.target_mask(view, 128, 128) for view in views])
        target_P = covered(torch.from_numpy(mask_VHW), grid).numpy()
        yield Observation(images, seen["state"][None], [info["instruction"]]), target_P
    env.close()


def share_kept(kept: Sequence[Tensor], targets: Sequence[np.ndarray]) -> float:
    """Return the share of all patches with a target that were kept."""
    found = sum(target_P[index_n.numpy()].sum() for index_n, target_P in zip(kept, targets, strict=True))
    return float(found / sum(target_P.sum() for target_P in targets))


if __name__ == "__main__":
    main()
