"""The parts of a shard's range of one space: which elements step alike, and which step at all."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from distnadam.groups import groups_of
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.stepper import Part
from distnadam.tensors.layout import Layout, Range


class Parts:
    """The parts of elements [begin, end) of a space, with offsets from `begin`.

    Args:
        config: the hyper-parameters.
        layout: the model's.
        space: the space.
        bounds: begin and end.
        by_group: whether groups step by themselves even if their settings are alike.

    Attributes:
        groups: the index of each tensor's group, or -1; None if there are no groups.
        together: the fewest parts that step alike where one scale is that of all.
        by_tensor: a part of each tensor, whose scale is the tensor's index.
    """

    def __init__(
        self,
        config: NadamConfig,
        layout: Layout,
        space: str,
        bounds: Range,
        *,
        by_group: bool = False,
    ) -> None:
        self.groups: Sequence[int] | None = None
        if config.groups:
            self.groups = groups_of(config.groups, [tensor.path for tensor in layout.tensors])
        alike = list(config.groups)
        if not by_group:
            alike = [replace(group, pattern="**", clipnorm=None) for group in alike]
        self._settings = [0, *(alike.index(group) + 1 for group in alike)]
        begin, end = bounds
        self.by_tensor = [
            Part(s.begin - begin, s.end - begin, self._setting(s.tensor), s.tensor)
            for s in layout.segments(space, begin, end)
            if s.tensor not in layout.frozen
        ]
        self.together = list(_joined(self.by_tensor))

    def _setting(self, tensor: int) -> int:
        return 0 if self.groups is None else self._settings[self.groups[tensor] + 1]


def _joined(parts: Sequence[Part]) -> Iterator[Part]:
    """Yield the parts with neighbours of one setting as one, whose scale is the first."""
    waiting: Part | None = None
    for part in parts:
        if waiting is not None and (waiting.end, waiting.setting) == (part.begin, part.setting):
            waiting = Part(waiting.begin, part.end, part.setting)
            continue
        if waiting is not None:
            yield waiting
        waiting = Part(part.begin, part.end, part.setting)
    if waiting is not None:
        yield waiting
