"""Acting on all shards as one optimizer: hold them at one round, then read, write, step, save or restore. No maths, no Ray.

Shard 0 is held first and the others after it, so that two who act at once queue there and never wait for each other in a ring.
"""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distnadam.arrays import Flat, cut_flat, empty_flat
from distnadam.backends.base import Backend
from distnadam.checkpoint import store
from distnadam.checkpoint.format import leftover_readers
from distnadam.checkpoint.manifest import FileRecord, Manifest
from distnadam.config import Options
from distnadam.errors import PushesPending, StepTimeout
from distnadam.layout import Layout
from distnadam.messages import (
    Advance,
    Decided,
    Describe,
    Description,
    Held,
    Hold,
    Measured,
    Message,
    Read,
    Release,
    Restore,
    Save,
    SetRate,
    Step,
    StepNorms,
    Write,
)
from distnadam.nadam.norms import tensor_square_sums
from distnadam.nadam.schedule import Clock
from distnadam.schedules import Rate
from distnadam.transport.slot import GradientSlot

_IO_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True)
class Boundary:
    """All shards held at one round: the token they are held by, and where they stand."""

    token: str
    held: Held


class Controller:
    """The shards of one running optimizer, addressed as one. Picklable where its backend is."""

    def __init__(self, backend: Backend, layout: Layout, num_shards: int, options: Options) -> None:
        self.backend, self.layout, self.ranges, self.options = backend, layout, layout.cuts(num_shards), options
        self._slot: GradientSlot | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Controller, (self.backend, self.layout, len(self.ranges), self.options)

    def describe(self) -> Description:
        """Return where shard 0 stands; never waits for a round."""
        description: Description = self._ask({0: Describe()})[0]
        return description

    @contextmanager
    def boundary(self) -> Iterator[Boundary]:
        """Hold all shards between two rounds, the same two everywhere."""
        token = secrets.token_hex(8)
        try:
            held = self._ask({0: Hold(token)})
            held |= self._ask({index: Hold(token) for index in range(1, len(self.ranges))})
            newest = max(held.values(), key=lambda h: h.round)
            late = [index for index, h in held.items() if h.round < newest.round]
            self._ask({index: Advance(token, newest.round) for index in late})
            pending = {rank for index, h in held.items() if index not in late for rank in h.pending}
            yield Boundary(token, Held(newest.epoch, newest.round, newest.clock, newest.skipped, tuple(sorted(pending)), newest.ledger))
        finally:
            self.backend.post({index: Release(token) for index in range(len(self.ranges))})

    def read(self, at: Boundary, what: tuple[str, ...]) -> dict[str, Flat]:
        """Return the whole model's arrays of those names ("params", "m", "v"), copied."""
        whole = {name: empty_flat(self.layout.sizes) for name in what}
        for index, parts in self._ask(self._everyone(Read(at.token, what))).items():
            for name, flat in parts.items():
                for space, (begin, end) in self.ranges[index].items():
                    whole[name][space][begin:end] = flat[space]
        return whole

    def fill(self, state: Mapping[str, Flat], clock: Clock | None = None) -> None:
        """Replace whole arrays by name, and the clock where given, on every shard, between two rounds."""
        with self.boundary() as at:
            cuts = ({name: cut_flat(flat, ranges) for name, flat in state.items()} for ranges in self.ranges)
            self._ask({index: Write(at.token, cut, clock) for index, cut in enumerate(cuts)})

    def set_rate(self, lr: Rate) -> None:
        """Replace the learning rate from the next step on."""
        with self.boundary() as at:
            self._ask(self._everyone(SetRate(at.token, lr)))

    def step(self, gradients: Any) -> Decided:
        """Apply one step from an already averaged gradient tree; raise PushesPending where workers' pushes wait."""
        with self.boundary() as at:
            if at.held.pending:
                ranks = ", ".join(map(str, at.held.pending))
                raise PushesPending(f"ranks {ranks} have pushed for round {at.held.round + 1}: their round must end first")
            if self._slot is None:
                memory = empty_flat(self.layout.sizes)
                self._slot = GradientSlot(self.layout, self.ranges, "apply_gradients", memory, check=self.options.check_gradients)
            complaint = self._slot.fill(gradients)
            parts = self._slot.parts()
            answers = self._ask({i: Step(at.token, None if complaint else part, complaint) for i, part in enumerate(parts)})
            if any(isinstance(answer, Measured) for answer in answers.values()):
                totals = tensor_square_sums(len(self.layout.tensors), [answers[i].sums for i in sorted(answers)])
                answers = self._ask(self._everyone(StepNorms(at.token, totals)))
        decided: Decided = answers[0]
        return decided

    def save(self, root: Path, about: Mapping[str, Any]) -> Path:
        """Write a checkpoint of one round under `root` and return its directory; `about` is the manifest's part that shards do not know."""
        save_id = store.new_save_id()
        with self.boundary() as at:
            directory = store.step_directory(root, at.held.round)
            with store.writing(directory):
                count = len(self.ranges)
                names = {i: store.shard_file_name(i, count, save_id) for i in range(count)}
                try:
                    records = self._ask({i: Save(at.token, str(directory), n) for i, n in names.items()}, timeout_s=_IO_TIMEOUT_S)
                    files = tuple(records[i] for i in range(count))
                    store.commit(directory, self._manifest(save_id, at.held, files, about))
                except BaseException:
                    store.discard_partial(directory, save_id)
                    raise
        return directory

    def _manifest(self, save_id: str, held: Held, files: tuple[FileRecord, ...], about: Mapping[str, Any]) -> Manifest:
        return Manifest(
            save_id=save_id,
            layout=self.layout.to_dict(),
            iterations=held.clock.iterations,
            m_schedule=held.clock.m_schedule,
            round=held.round,
            skipped=held.skipped,
            ledger=held.ledger,
            files=files,
            **about,
        )

    def restore(self, directory: Path, manifest: Manifest) -> None:
        """Load a checkpoint into newly made shards, each reading its own ranges, every byte of every file verified by someone."""
        raw = manifest.to_bytes()
        leftovers = leftover_readers(manifest, len(self.ranges))
        with self.boundary() as at:
            messages: dict[int, Message] = {i: Restore(at.token, str(directory), raw, tuple(left)) for i, left in enumerate(leftovers)}
            self._ask(messages, timeout_s=_IO_TIMEOUT_S)

    def _everyone(self, message: Message) -> dict[int, Message]:
        return dict.fromkeys(range(len(self.ranges)), message)

    def _ask(self, messages: Mapping[int, Message], timeout_s: float | None = None) -> dict[int, Any]:
        if not messages:
            return {}
        timeout_s = self.options.step_timeout_s if timeout_s is None else timeout_s
        try:
            return self.backend.post(messages).result(timeout_s)
        except TimeoutError as error:
            kind = type(next(iter(messages.values()))).__name__
            raise StepTimeout(f"shards {sorted(messages)} did not all answer {kind} in {timeout_s:g} s") from error
