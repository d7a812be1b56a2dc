"""How one shard's ranges are stepped in a round: which elements step alike, which step at all, and
how the tensors' clocks go on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from distnadam.groups import groups_of
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_overrides import sets_groups
from distnadam.nadam.step_scalars import Clock, TensorClock, TensorClocks
from distnadam.nadam.stepper import Part, Shares, Stepper
from distnadam.tensors.layout import Layout, Ranges, Segment

NONE_ABSENT: frozenset[int] = frozenset()
"""The absent tensors of an ordinary round."""
_MOST_KEPT = 8
"""Arrangements that are kept for later rounds."""


class Arrangement:
    """How a round steps a shard's ranges.

    Args:
        segments: by space, the parts of tensors in the shard's range.
        begins: by space, where the range begins.
        steppers: by space, what deals parts out to its threads.
        settings: of each tensor, the index of its settings in `each_setting`.
        betas: of each of these, the first moment's decay that is its own, or None.
        clocks: of each tensor, its place in the table of clocks; None if all have one.
        trained: the tensors that are not frozen.
        absent: those of them that no rank has a gradient of.

    Attributes:
        tells_clocks_apart: whether the tensors' clocks are told apart.
        columns: the settings and the clock that each set of coefficients is made of.
        stepped: the tensors that it steps.
    """

    def __init__(
        self,
        segments: Mapping[str, Sequence[Segment]],
        begins: Mapping[str, int],
        steppers: Mapping[str, Stepper],
        settings: Sequence[int],
        betas: Sequence[float | None],
        *,
        clocks: Sequence[int] | None,
        trained: frozenset[int],
        absent: frozenset[int],
    ) -> None:
        self._segments = segments
        self._begins = begins
        self._steppers = steppers
        self._betas = betas
        self._clocks = clocks
        self.tells_clocks_apart = clocks is not None
        self.stepped = trained - absent
        columns: dict[tuple[int, int], int] = {}
        if clocks is None:
            columns = {(index, 0): index for index in range(max(settings) + 1)}
        pairs = zip(settings, [0] * len(settings) if clocks is None else clocks, strict=True)
        self._column = [columns.setdefault(pair, len(columns)) for pair in pairs]
        self.columns = tuple(columns)

    @cached_property
    def by_tensor(self) -> dict[str, list[Part]]:
        """By space, a part of each tensor that is stepped, whose scale is the tensor's index."""
        return {
            space: [
                Part(s.begin - begin, s.end - begin, self._column[s.tensor], s.tensor)
                for s in self._segments[space]
                if s.tensor in self.stepped
            ]
            for space, begin in self._begins.items()
        }

    @cached_property
    def shares_by_tensor(self) -> dict[str, Shares]:
        """The parts `by_tensor`, dealt out to the threads."""
        return {space: self._steppers[space].share(p) for space, p in self.by_tensor.items()}

    @cached_property
    def together(self) -> dict[str, Shares]:
        """By space, the fewest parts that step alike where one scale is that of all, dealt out to
        the threads.
        """
        return {
            space: self._steppers[space].share(_joined(parts))
            for space, parts in self.by_tensor.items()
        }

    @cached_property
    def _moves(self) -> tuple[list[tuple[int, int | None]], tuple[int, ...]]:
        """The distinct ways in which tensors' clocks go on, in the order of the first that goes so:
        the clock's place, and a set of coefficients, or None if it stands; and each tensor's way.
        """
        ways: dict[tuple[int, bool, float | None], int] = {}
        moves: list[tuple[int, int | None]] = []
        of_tensor: list[int] = []
        for tensor, column in enumerate(self._column):
            setting, place = self.columns[column]
            steps = tensor in self.stepped
            way = ways.setdefault((place, steps, self._betas[setting] if steps else 0.0), len(ways))
            if way == len(moves):
                moves.append((place, column if steps else None))
            of_tensor.append(way)
        return moves, tuple(of_tensor)

    def after(self, clock: Clock, columns: Sequence[TensorClock]) -> TensorClocks | None:
        """Return the tensors' clocks after the step, as `Stepping` says."""
        if self._clocks is None:
            return None
        moves, of_tensor = self._moves
        table = clock.table
        found = [table[place] if column is None else columns[column] for place, column in moves]
        if len(set(found)) == len(found):  # as nearly always
            return TensorClocks(tuple(found), of_tensor)
        return TensorClocks.of(found[move] for move in of_tensor)


class Arranger:
    """Arranges the rounds of one shard, and keeps the last few arrangements for rounds to come.

    Args:
        layout: the model's.
        ranges: the shard's.
        steppers: by space, what deals parts out to its threads.

    Attributes:
        groups: the index of each tensor's group, or -1; None before the first round, or if there
            are no groups.
    """

    def __init__(self, layout: Layout, ranges: Ranges, steppers: Mapping[str, Stepper]) -> None:
        self.groups: Sequence[int] | None = None
        self._layout = layout
        self._steppers = steppers
        self._begins = {space: begin for space, (begin, _) in ranges.items()}
        self._segments = {space: [*layout.segments(space, *at)] for space, at in ranges.items()}
        self._trained = frozenset(range(len(layout.tensors))) - layout.frozen
        self._config: NadamConfig | None = None
        self._is_by_group = False  # whether a group ever had a rate of one step alone
        self._settings: list[int] = []
        self._betas: list[float | None] = []
        self._kept: dict[tuple[tuple[int, ...] | None, frozenset[int]], Arrangement] = {}
        self._last: tuple[tuple[int, ...] | None, frozenset[int], Arrangement] | None = None

    def of(
        self,
        config: NadamConfig,
        clock: Clock,
        absent: frozenset[int] = NONE_ABSENT,
        overrides: bytes = b"",
    ) -> Arrangement:
        """Return how the round after `clock` is stepped.

        Args:
            config: the hyper-parameters.
            clock: before the round.
            absent: the tensors that no rank has a gradient of.
            overrides: the learning rates and betas of its step alone.
        """
        by_group = bool(overrides) and sets_groups(overrides) and not self._is_by_group
        if by_group or config is not self._config:
            self._is_by_group |= by_group
            self._take(config, anew=by_group)
        clocks = None
        if clock.tensors is not None:
            clocks = clock.tensors.index
        elif config.tells_clocks_apart:
            clocks = (0,) * len(self._layout.tensors)
        last = self._last
        if last is not None and last[0] == clocks and last[1] == absent:
            return last[2]
        found = self._kept.get((clocks, absent))
        if found is None:
            if len(self._kept) >= _MOST_KEPT:
                self._kept = {}
            found = self._kept[clocks, absent] = Arrangement(
                self._segments,
                self._begins,
                self._steppers,
                self._settings,
                self._betas,
                clocks=clocks,
                trained=self._trained,
                absent=absent,
            )
        self._last = clocks, absent, found
        return found

    def _take(self, config: NadamConfig, *, anew: bool) -> None:
        """Take hyper-parameters whose groups may be others: ones that were alike may be no more."""
        if anew or self._config is None or config.groups != self._config.groups:
            self._settings = [0] * len(self._layout.tensors)
            self._betas = [None, *(group.beta_1 for group in config.groups)]
            if config.groups:
                paths = [tensor.path for tensor in self._layout.tensors]
                alike = list(config.groups)
                if not self._is_by_group:
                    alike = [replace(group, pattern="**", clipnorm=None) for group in alike]
                first = [0, *(alike.index(group) + 1 for group in alike)]
                self.groups = groups_of(config.groups, paths)
                self._settings = [first[group + 1] for group in self.groups]
            self._kept = {}
            self._last = None
        self._config = config


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
