"""The layer plan: known answers, and what must hold for every plan."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cogvla.routing.keep_schedule import keep_count
from cogvla.routing.layer_plan import LayerTokens, plan_layers


def test_known_answers() -> None:
    bypass = plan_layers(64, (None, 0.5, 0.25), drop=False)
    assert bypass == (LayerTokens(64, 64, 64, 64), LayerTokens(64, 64, 32, 64), LayerTokens(64, 64, 16, 64))
    drop = plan_layers(64, (0.25, 0.5, None), drop=True)
    assert drop == (LayerTokens(64, 64, 16, 16), LayerTokens(16, 16, 16, 16), LayerTokens(16, 16, 16, 16))
    removed = plan_layers(64, (None, 0.5, None), drop=False, routed={1: 20})
    assert removed == (LayerTokens(64, 64, 64, 64), LayerTokens(64, 20, 20, 20), LayerTokens(20, 20, 20, 20))
    fewer = plan_layers(64, (0.25, None, None), drop=True, routed={1: 20, 2: 8})
    assert fewer == (LayerTokens(64, 64, 16, 16), LayerTokens(16, 16, 16, 16), LayerTokens(16, 8, 8, 8))
    skipped = plan_layers(64, (None, None, None), drop=False, routed={1: 20}, bypass=True)
    assert skipped[1:] == (LayerTokens(64, 64, 20, 64), LayerTokens(64, 64, 64, 64))


@given(
    st.integers(0, 300),
    st.lists(st.one_of(st.none(), st.floats(0.01, 1)), min_size=1, max_size=8),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_tokens_only_get_fewer_and_a_layer_computes_no_more_than_there_are(
    vision: int, ratios: list[float | None], drop: bool, bypass: bool, data: st.DataObject
) -> None:
    routed: dict[int, int] = {}
    if not bypass or not any(ratios):
        routed = data.draw(st.dictionaries(st.integers(0, len(ratios) - 1), st.integers(0, 300)))
    plan = plan_layers(vision, ratios, drop, routed, bypass)
    assert plan[0].arrive == vision
    assert [a.leave for a in plan[:-1]] == [b.arrive for b in plan[1:]]
    for index, (tokens, ratio) in enumerate(zip(plan, ratios, strict=True)):
        assert tokens.arrive >= tokens.enter >= tokens.process >= 0
        assert tokens.enter >= tokens.leave >= tokens.process
        if ratio is not None:
            assert tokens.process <= keep_count(vision, ratio)
        elif index not in routed:
            assert tokens == LayerTokens(*[tokens.arrive] * 4)
        if not drop and (bypass or not routed):
            assert tokens.leave == vision
