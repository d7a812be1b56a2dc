"""Where a model's gradients lie in memory: the stretches that are copied, and looked at, as one."""

from dataclasses import dataclass, replace

from distnadam.tensors.layout import Layout

BLOCK = 65536
"""Elements copied at a time, and checked while they are in the cache."""


@dataclass(frozen=True)
class Run:
    """Tensors [first, last) of a layout, which lie one after the other in elements [begin, end) of
    a space: small ones, that are copied by one call, or one that is larger than a block.
    """

    first: int
    last: int
    space: str
    begin: int
    end: int
    is_large: bool


def runs_of(layout: Layout) -> list[Run]:
    """Return the runs that the tensors of a layout make up, in order, but the frozen ones."""
    runs: list[Run] = []
    for index, tensor in enumerate(layout.tensors):
        if index in layout.frozen:
            continue
        last = runs[-1] if runs and runs[-1].last == index else None
        if last is not None and last.space == tensor.space and tensor.end - last.begin <= BLOCK:
            runs[-1] = replace(last, last=index + 1, end=tensor.end)
        else:
            bounds = tensor.begin, tensor.end
            is_large = tensor.end - tensor.begin > BLOCK
            runs.append(Run(index, index + 1, tensor.space, *bounds, is_large))
    return runs


def stretches_of(layout: Layout) -> dict[str, list[tuple[int, int]]]:
    """Return for each space the stretches of elements that no frozen tensor has."""
    found: dict[str, list[tuple[int, int]]] = {space: [] for space in layout.sizes}
    for index, tensor in enumerate(layout.tensors):
        stretches = found[tensor.space]
        if index in layout.frozen:
            continue
        if stretches and stretches[-1][1] == tensor.begin:
            stretches[-1] = stretches[-1][0], tensor.end
        else:
            stretches.append((tensor.begin, tensor.end))
    return found
