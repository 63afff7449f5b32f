"""Notice that weights changed after something was computed from them."""

from __future__ import annotations

import weakref

from torch import nn


class WeightWatch:
    """Remembers the versions of a model's parameters, without keeping them in memory.

    In-place changes count, such as those of `load_state_dict` and of optimisers, and so do replaced parameters. What is
    written through `.data` does not, nor do parameters that were made in inference mode, which have no versions.

    Args:
        model: model to watch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = [weakref.ref(weight) for weight in model.parameters() if not weight.is_inference()]
        self._versions = self._now()

    def _now(self) -> list[int | None]:
        weights = [each() for each in self._weights]
        return [None if weight is None else weight._version for weight in weights]

    def changed(self) -> bool:
        """Return whether a weight has changed since then."""
        return self._now() != self._versions

    def check(self) -> None:
        """Check that an engine still has the weights of its model.

        Raises:
            ValueError: they have changed.
        """
        if self.changed():
            raise ValueError("the weights changed after the engine was built: call with_engine again")
