"""Batches for a task from what already deals them: a torch DataLoader, a Ray dataset.

A step's batch is a function of the step alone, as `Task.batch` asks: the data's order follows from
seed and epoch, and step k has the k-th `batch_size` samples of it, of which each rank takes its
part. So the round in a checkpoint is the position in the data: a resumed run sees each batch once,
also on another number of workers.
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np

from distnadam.checks import check_count
from distnadam.errors import ConfigError


def _seed_of(seed: int, epoch: int) -> int:
    """Return a seed for the order of an epoch."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _part(rank: int, world_size: int, batch_size: int) -> slice:
    """Return the part of a step's batch that is a rank's.

    Raises:
        ConfigError: the batch cannot be dealt equally.
    """
    if batch_size % world_size:
        raise ConfigError(
            f"batch_size={batch_size} is of all ranks together and must be a multiple of their "
            f"number, {world_size}, so that the mean over ranks is the mean over samples"
        )
    each = batch_size // world_size
    return slice(rank * each, (rank + 1) * each)


class _InOrder:
    """Gives the batches of one rank by step; they are made one after the other, in order.

    A call for another step than the next, as after a recovery, begins there anew.
    """

    def __init__(self) -> None:
        self._began: tuple[int, int, int] | None = None  # rank, world size and the next step
        self._batches: Iterator[Any] = iter(())

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_began": None, "_batches": iter(())}

    def __call__(self, step: int, rank: int, world_size: int) -> Any:
        """Return a rank's part of the batch of a step, from 0."""
        if self._began != (rank, world_size, step):
            self._batches = self._from(step, rank, world_size)
        self._began = None  # if it raises
        batch = next(self._batches)
        self._began = (rank, world_size, step + 1)
        return batch

    def _from(self, first: int, rank: int, world_size: int) -> Iterator[Any]:
        raise NotImplementedError


class LoaderBatches(_InOrder):
    """Batches of a `torch.utils.data.DataLoader`, for `Task.batch`.

    The loader's dataset, sampler, `collate_fn` and workers are used; its `batch_size` is a step's,
    of all ranks together. A sampler with `set_epoch` is told the epoch, one with a `generator` gets
    one seeded with seed and epoch; others must give the same order each time. The last samples of
    an epoch that fill no batch are left out with `drop_last`, else filled up from its first ones.
    What a dataset draws itself, such as augmentations, it should draw from the sample's index.

    Args:
        loader: of a dataset with a length.
        seed: of the order.

    Raises:
        ConfigError: the dataset can only be iterated, or the loader has a batch sampler of its own.

    >>> class Mine:
    ...     def init(self, seed):  # loader = DataLoader(dataset, batch_size=64, shuffle=True)
    ...         self.batches = LoaderBatches(loader, seed)
    ...     def batch(self, step, rank, world_size):
    ...         return self.batches(step, rank, world_size)
    """

    def __init__(self, loader: Any, seed: int = 0) -> None:
        super().__init__()
        if not (hasattr(loader.dataset, "__getitem__") and hasattr(loader.dataset, "__len__")):
            raise ConfigError(
                f"LoaderBatches: {type(loader.dataset).__name__} can only be iterated, so no step "
                "can be found in it again; give a dataset with __getitem__ and __len__"
            )
        if loader.batch_size is None:
            raise ConfigError(
                "LoaderBatches: the loader has a batch sampler of its own; give it batch_size and, "
                "for the order, a sampler"
            )
        self._dataset = loader.dataset
        self._sampler = loader.sampler
        self._size = int(loader.batch_size)
        self._drops_last = bool(loader.drop_last)
        self._seed = check_count("seed", seed, least=0)
        self._order: tuple[int, Sequence[int]] | None = None
        names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn")
        self._how = {name: getattr(loader, name) for name in names}
        if loader.num_workers:
            self._how |= {
                "prefetch_factor": loader.prefetch_factor,
                "multiprocessing_context": loader.multiprocessing_context,
            }

    def indices(self, step: int) -> list[int]:
        """Return the samples of a step's batch, of all ranks together."""
        length = len(self._sampler)
        per_epoch = length // self._size if self._drops_last else -(-length // self._size)
        if per_epoch == 0:
            raise ConfigError(
                f"LoaderBatches: an epoch has {length} samples, and batch_size={self._size} of all "
                "ranks together: there is no whole batch"
            )
        epoch, number = divmod(step, per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._order_of(epoch))
        order = self._order[1]
        begin = number * self._size
        return [int(order[i % length]) for i in range(begin, begin + self._size)]

    def _order_of(self, epoch: int) -> Sequence[int]:
        import torch

        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
        elif hasattr(self._sampler, "generator"):
            generator = torch.Generator()
            self._sampler.generator = generator.manual_seed(_seed_of(self._seed, epoch))
        return list(self._sampler)

    def _from(self, first: int, rank: int, world_size: int) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        part = _part(rank, world_size, self._size)
        parts = _Parts(self, first, part)
        generator: Any = None
        if self._how["num_workers"]:
            import torch

            generator = torch.Generator().manual_seed(_seed_of(self._seed, first))
        return iter(
            DataLoader(self._dataset, batch_sampler=parts, generator=generator, **self._how)
        )


class _Parts:
    """A batch sampler: one rank's samples of each step from the first on, without an end."""

    def __init__(self, batches: LoaderBatches, first: int, part: slice) -> None:
        self._batches = batches
        self._first = first
        self._part = part

    def __iter__(self) -> Iterator[list[int]]:
        for step in count(self._first):
            yield self._batches.indices(step)[self._part]


class DatasetBatches(_InOrder):
    """Batches of a `ray.data.Dataset`, for `Task.batch`: columns as NumPy arrays, by name.

    Each rank reads the dataset and takes its part of each batch; a run that is resumed amid an
    epoch reads up to there. The last rows of an epoch that fill no batch are left out.

    Args:
        dataset: Ray's; its order is preserved.
        batch_size: rows of a step, of all ranks together.
        shuffle: whether each epoch has an order of its own.
        seed: of the orders.

    Raises:
        ConfigError: the dataset has fewer rows than a batch.

    >>> class Mine:
    ...     def init(self, seed):  # dataset = ray.data.read_parquet("s3://bucket/rows")
    ...         self.batches = DatasetBatches(dataset, batch_size=64, shuffle=True, seed=seed)
    ...     def batch(self, step, rank, world_size):
    ...         return self.batches(step, rank, world_size)
    """

    def __init__(
        self, dataset: Any, batch_size: int, *, shuffle: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self._dataset = dataset
        self._size = check_count("batch_size", batch_size)
        self._shuffles = shuffle
        self._seed = check_count("seed", seed, least=0)
        self._per_epoch = dataset.count() // self._size
        if self._per_epoch == 0:
            raise ConfigError(
                f"DatasetBatches: the dataset has fewer rows than batch_size={batch_size}, which "
                "is of all ranks together"
            )

    def _from(self, first: int, rank: int, world_size: int) -> Iterator[Any]:
        part = _part(rank, world_size, self._size)
        began, skipped = divmod(first, self._per_epoch)
        for epoch in count(began):
            dataset = self._dataset
            if self._shuffles:
                dataset = dataset.random_shuffle(seed=_seed_of(self._seed, epoch))
            dataset.context.execution_options.preserve_order = True
            batches = dataset.iter_batches(
                batch_size=self._size, batch_format="numpy", drop_last=True
            )
            for batch in islice(batches, skipped if epoch == began else 0, None):
                yield {name: column[part] for name, column in batch.items()}
