"""Configuration of the model: plain data, checked when it is built.

Facts about the robot (views, image size, chunk, action and state dimension) are in `Embodiment`, not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cogvla.configs.build import build
from cogvla.policy.model.heads.registry import HEADS
from cogvla.routing.aggregation import FUSIONS
from cogvla.routing.attention import ATTENTION
from cogvla.routing.keep_schedule import keep_ratios
from cogvla.routing.pruning import POSITION_POLICIES, SCALES
from cogvla.routing.router import MODES, RouterConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TowerConfig:
    """One vision transformer.

    Attributes:
        patch_size: side of a patch in pixels; must divide the image size.
        timm: timm model that gives architecture and pretrained weights; leave out the sizes below then.
        width: width of a new transformer.
        depth: number of blocks of a new transformer, including one that is not computed.
            Features are taken from the last block but one.
        heads: number of attention heads of a new transformer.
        mlp_ratio: width of the MLP of a new transformer, as a multiple of `width`.
        class_token: add a class token before the patches, as in DINOv2.
        registers: number of register tokens before the patches, as in DINOv2.
        layer_scale: initial value of LayerScale on both branches; None: no LayerScale.
        mean: mean of the RGB values in [0,1], for their normalisation.
        std: standard deviation of the RGB values in [0,1], for their normalisation.
    """

    patch_size: int
    timm: str | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    class_token: bool = False
    registers: int = 0
    layer_scale: float | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        sizes = (self.width, self.depth, self.heads)
        if self.timm is not None:
            if any(size is not None for size in sizes):
                raise ValueError(f"tower {self.timm!r} takes its sizes from timm; leave out width, depth and heads")
        elif any(size is None or size < 1 for size in sizes):
            raise ValueError("a tower needs either a timm name or width, depth and heads")
        elif self.width % self.heads or self.depth < 2:  # type: ignore[operator]
            raise ValueError(f"tower: width must be divisible by heads and depth at least 2, got {sizes}")
        if self.patch_size < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError("a tower needs a positive patch_size, three means and three positive stds")


@dataclass(frozen=True)
class VisionConfig:
    """The two vision towers.

    Attributes:
        dinov2: first tower; it can load the published weights of DINOv2.
        siglip: second tower; it can load the published weights of SigLIP.
        aggregation_tokens: number M of aggregation tokens per view in each tower.
        drop_last_block: build the towers without the last block, whose output is not used.
    """

    dinov2: TowerConfig
    siglip: TowerConfig
    aggregation_tokens: int
    drop_last_block: bool = True

    def __post_init__(self) -> None:
        if self.aggregation_tokens < 1:
            raise ValueError("aggregation_tokens must be positive")


@dataclass(frozen=True)
class LanguageConfig:
    """A Llama-style decoder.

    Attributes:
        vocab_size: number of tokens of the vocabulary.
        width: width of the token embeddings.
        intermediate: width of the MLP.
        layers: number of layers.
        heads: number of attention heads.
        bos_token: id of the first token of the sequence.
        stop_token: id of the last token of the sequence.
        architecture: `llama` or `qwen2` (biases on q, k and v).
        kv_heads: number of key and value heads; None: the same as `heads`.
        rms_norm_eps: epsilon of RMSNorm, as in transformers.
        rope_theta: base of the rotary position embedding, as in transformers.
        init_std: initial standard deviation of the linear layers.
        embedding_std: initial standard deviation of the token embeddings; None: `init_std`.
            For training from scratch use about 1: FiLM reads the mean embedding, and small embeddings hide the
            instruction from it for thousands of steps.
        hub: pretrained weights with these sizes: hub id, folder or GGUF file; None: no pretrained weights.
        encoder: pretrained text encoder in place of word embeddings: hub id, folder or GGUF file; None: none.
            It stays frozen; its states are projected to `width`, see `policy.inputs.text_encoder`.
        encoder_width: width of the encoder's states; None: read it from the encoder.
    """

    vocab_size: int
    width: int
    intermediate: int
    layers: int
    heads: int
    bos_token: int
    stop_token: int
    architecture: Literal["llama", "qwen2"] = "llama"
    kv_heads: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    init_std: float = 0.02
    embedding_std: float | None = None
    hub: str | None = None
    encoder: str | None = None
    encoder_width: int | None = None

    def __post_init__(self) -> None:
        if self.encoder is not None and not self.encoder.strip():
            raise ValueError("language.encoder is empty: give a hub id, a folder or a GGUF file, or null for none")
        if self.encoder_width is not None and (self.encoder is None or self.encoder_width < 1):
            raise ValueError(
                f"language.encoder_width is {self.encoder_width}: it is the width of language.encoder's states, "
                "and null without one"
            )
        _one_of("language.architecture", self.architecture, ("llama", "qwen2"))
        if min(self.vocab_size, self.width, self.intermediate, self.layers, self.heads) < 1:
            raise ValueError("language: all sizes must be positive")
        if self.width % self.heads or self.heads % (self.kv_heads or self.heads):
            raise ValueError("language: width must be divisible by heads, and heads by kv_heads")
        if not (0 <= self.bos_token < self.vocab_size and 0 <= self.stop_token < self.vocab_size):
            raise ValueError(f"language: bos_token and stop_token must be below vocab_size {self.vocab_size}")


@dataclass(frozen=True)
class ActionHeadConfig:
    """Action placeholders, and the head that reads their states.

    Attributes:
        kind: `l1` (regression, the paper), `diffusion` (DDIM), `flow` (flow matching) or `discrete` (tokens).
            `discrete` has 256 tokens per dimension. See `policy/model/heads`.
        tokens_per_step: placeholders per step of the chunk: `one`, or one per `action_dim`ension (the paper, K*A).
        placeholder: `learned` embeddings, or `zero` vectors (the paper).
        blocks: number of residual blocks of the head.
        steps: number of steps from noise to action, for `diffusion` and `flow`.
        shifted: read each action from the token before it (the published code); False: from its own placeholder.
            The first action is then read from the last word, as in next-token prediction.
        prefix: largest number of committed actions that the policy reads (training-time real-time chunking); 0: none.
            Training then gives `training.prefix_share` of the samples the actions that come first.
    """

    kind: str = "l1"
    tokens_per_step: Literal["one", "action_dim"] = "one"
    placeholder: Literal["learned", "zero"] = "learned"
    blocks: int = 2
    steps: int = 10
    shifted: bool = False
    prefix: int = 0

    def __post_init__(self) -> None:
        _one_of("head.kind", self.kind, tuple(HEADS))
        if self.prefix < 0:
            raise ValueError(f"head.prefix must be a number of actions, or 0 for none; got {self.prefix}")
        if self.blocks < 0 or self.steps < 1:
            raise ValueError(f"head: blocks must be at least 0 and steps at least 1, got {self}")
        _one_of("head.tokens_per_step", self.tokens_per_step, ("one", "action_dim"))
        _one_of("head.placeholder", self.placeholder, ("learned", "zero"))


@dataclass(frozen=True)
class RoutingConfig:
    """The three stages of the paper, each with a switch. `faithful` means: as in the published code.

    Attributes:
        efa: stage 1; False: patch tokens with the channels of both towers concatenated, and one projector.
        film: without stage 1, still modulate the towers with the instruction, and keep the patches (OpenVLA-OFT+).
        fusion: combination of the two streams with `efa` or `film`: `mix`, `sum`, `concat` or `experts`.
            See `routing.aggregation.StreamFusion`.
        summary: summary of the instruction: `contextual` (mean of the words, and what a layer says about their order,
            see `routing.word_order`), `words` (the mean alone), or `faithful` (the mean with bos and stop).
        film_init: initial standard deviation of FiLM's scale and shift; None: PyTorch's default, see `routing.film`.
        lfp: stage 2; False: every layer processes all vision tokens.
        schedule: schedule of the keep ratios over the layers, see `routing.keep_schedule.keep_ratios`.
        mean_keep: mean keep ratio of the schedule.
        period: number of layers over which a decay runs; None: the number of layers minus 1.
        mode: tokens that a layer does not keep skip this layer (`bypass`), or are removed from there on (`drop`).
        position_policy: `keep` the positions of kept tokens, or `renumber` them in routed layers (faithful).
        scale: values that the router's probability multiplies: `all`, `visual_only` or `values`.
            The router learns through this product. `all`: MLP outputs of all tokens (faithful). `visual_only`: MLP
            outputs of vision tokens. `values`: MLP outputs and attention values of vision tokens. Only `values` trains
            the router of the last layer, because the MLP output of a vision token is not used there.
        attention: stage 3: `coupled`; `causal` and `bidirectional` are ablations.
        router: another router of vision tokens, alone or together with these stages, see `routing.router`.
    """

    efa: bool = True
    film: bool = False
    fusion: Literal["mix", "sum", "concat", "experts"] = "mix"
    summary: Literal["contextual", "words", "faithful"] = "contextual"
    film_init: float | None = 1.0
    lfp: bool = True
    schedule: str = "shiftedcos_decay_0.85_0.15"
    mean_keep: float = 0.5
    period: int | None = None
    mode: Literal["bypass", "drop"] = "bypass"
    position_policy: Literal["keep", "renumber"] = "keep"
    scale: Literal["all", "visual_only", "values"] = "values"
    attention: Literal["coupled", "causal", "bidirectional"] = "coupled"
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        _one_of("routing.fusion", self.fusion, FUSIONS)
        _one_of("routing.summary", self.summary, ("contextual", "words", "faithful"))
        _one_of("routing.mode", self.mode, MODES)
        _one_of("routing.position_policy", self.position_policy, POSITION_POLICIES)
        _one_of("routing.scale", self.scale, SCALES)
        _one_of("routing.attention", self.attention, ATTENTION)
        keep_ratios(self.schedule, 2, self.mean_keep, self.period)
        router = self.router
        if router.name is not None and router.mode == "bypass" and router.layers and self.lfp:
            raise ValueError("a router that bypasses layers replaces LFP: set routing.lfp=false")
        if router.name is not None and self.position_policy == "renumber" and router.position != "compact":
            raise ValueError(
                f"routing.position_policy=renumber renumbers tokens in every layer, which contradicts "
                f"router.position={router.position}: set router.position=compact"
            )

    def keep_ratios(self, layers: int) -> tuple[float | None, ...]:
        """Return the keep ratio of each layer; None for a layer that is not routed."""
        return keep_ratios(self.schedule if self.lfp else "none", layers, self.mean_keep, self.period)


@dataclass(frozen=True)
class CogVLAConfig:
    """The whole network, without the facts about the robot."""

    vision: VisionConfig
    language: LanguageConfig
    head: ActionHeadConfig = field(default_factory=ActionHeadConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CogVLAConfig:
        """Build the configuration from nested plain data, as from YAML or JSON.

        Raises:
            ValueError: unknown or missing keys (the message lists the valid ones), or invalid values.
        """
        return build(cls, data, "model")

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain data for `from_dict`."""
        return asdict(self)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
