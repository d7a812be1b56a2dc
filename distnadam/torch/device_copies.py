"""Copies between a CUDA device and the memory that the worker and the shards share.

The memory is registered with the driver once, when it is first seen, so that copies need no staging
and no thread waits for them. Where the driver refuses, the same copies are made from memory that is
not pinned. All are ordered by the stream that is current at the call, but for gradients that cross
beside it, on a stream of their own, while the backward pass goes on.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from distnadam.errors import LifecycleError
from distnadam.tensors.arrays import Array
from distnadam.torch.arrays import as_array, as_torch, bits_of, copy_all

log = logging.getLogger("distnadam")

PAGE = 4096
LEAST_PINNED = 1 << 16
"""Bytes from which memory is registered: less crosses as fast without."""
SMALL, LARGEST_RUN = 1 << 20, 1 << 24
"""Bytes under which a tensor crosses together with its neighbours, and the most that do so."""
LEAST_BESIDE = 1 << 23
"""Bytes of gradients from which they begin to cross during the backward pass: each time costs a
dozen calls of the driver, as long as some MiB take to cross.
"""
_PORTABLE, _READ_ONLY = 1, 8  # cudaHostRegisterPortable, cudaHostRegisterReadOnly


def device_of(tensors: Sequence[torch.Tensor]) -> torch.device | None:
    """Return the CUDA device on which all tensors are; None where they are not on one."""
    if not tensors or not tensors[0].is_cuda:
        return None
    device: torch.device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        return None
    if torch.cuda.is_current_stream_capturing():
        raise LifecycleError(
            "a step waits for other ranks and cannot be captured in a CUDA graph: capture the "
            "forward and the backward pass, and step outside"
        )
    return device


class PinnedMemory:
    """Host memory that is registered with the CUDA driver.

    Only whole pages are: what shares a page with other memory stays as it is.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, Array]] = {}  # bytes, and what keeps the memory mapped
        self._process = os.getpid()
        self._is_refused = False
        self.version = 0
        """Counts registrations and releases: after one, an array has other `pieces`."""

    def hold(self, arrays: Iterable[Array]) -> None:
        """Have these arrays registered, and no others; warn once where the driver refuses."""
        wanted = {}
        for array in arrays:
            begin = -(-array.ctypes.data // PAGE) * PAGE
            size = (array.ctypes.data + array.nbytes) // PAGE * PAGE - begin
            if size >= LEAST_PINNED:
                wanted[begin] = size, array
        for begin in [b for b, (size, _) in self._held.items() if wanted.get(b, (0,))[0] != size]:
            self._release(begin)
        for begin, (size, array) in wanted.items():
            if begin not in self._held and not self._is_refused:
                self._register(begin, size, array)

    def _register(self, begin: int, size: int, array: Array) -> None:
        runtime = torch.cuda.cudart()
        kinds = (_PORTABLE,) if array.flags.writeable else (_PORTABLE | _READ_ONLY, _PORTABLE)
        for kind in kinds:
            error = runtime.cudaHostRegister(begin, size, kind)
            if not int(error):
                self._held[begin] = size, array
                self.version += 1
                return
            with suppress(RuntimeError):  # else the next call of anybody raises it
                torch.ones((), device="cuda")
        self._is_refused = True
        log.warning(
            "the CUDA driver does not register %d MiB of memory shared with shards (%s); copies "
            "to and from the GPU are slower. A limit of locked memory (ulimit -l) may be the cause",
            size >> 20,
            runtime.cudaGetErrorString(error),
        )

    def _release(self, begin: int) -> None:
        del self._held[begin]
        self.version += 1
        torch.cuda.cudart().cudaHostUnregister(begin)

    def pieces(self, array: Array) -> Iterator[tuple[int, int]]:
        """Yield the stretches of an array's elements that lie wholly within registered memory, or
        wholly outside; no copy may cross from one to the other. What is outside comes last.
        """
        first, size, end = array.ctypes.data, array.itemsize, array.ctypes.data + array.nbytes
        outside = []
        for begin, (length, _) in self._held.items():
            low, high = max(begin, first), min(begin + length, end)
            if low < high:
                yield (low - first) // size, (high - first) // size
                outside = [(0, (low - first) // size), ((high - first) // size, array.size)]
                break
        else:
            outside = [(0, array.size)]
        yield from ((low, high) for low, high in outside if low < high)

    def close(self) -> None:
        """Wait for copies, and have nothing registered; not in a forked child, where nothing is."""
        if self._held and self._process == os.getpid():
            torch.cuda.synchronize()
            for begin in list(self._held):
                self._release(begin)
        self._held.clear()


def runs_of(arrays: Sequence[Array]) -> list[list[int]]:
    """Return which arrays lie one after the other in memory, in one dtype: large ones alone, small
    ones together; those of no elements are left out.
    """
    order = sorted((i for i, a in enumerate(arrays) if a.size), key=lambda i: _place(arrays[i]))
    runs: list[list[int]] = []
    end, length = -1, 0
    for index in order:
        array = arrays[index]
        last = arrays[runs[-1][-1]] if runs else array
        if (
            _place(array) == end
            and array.dtype == last.dtype
            and max(array.nbytes, last.nbytes) < SMALL
            and length + array.nbytes <= LARGEST_RUN
        ):
            runs[-1].append(index)
        else:
            runs.append([index])
            length = 0
        end, length = _place(array) + array.nbytes, length + array.nbytes
    return runs


def _place(array: Array) -> int:
    place: int = array.__array_interface__["data"][0]
    return place


class _Stretch:
    """The memory of arrays that lie one after the other, as integers."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        size = arrays[0].itemsize
        self.__array_interface__ = {
            "data": (_place(arrays[0]), False),
            "shape": (sum(array.nbytes for array in arrays) // size,),
            "typestr": f"<i{size}",
            "version": 3,
        }
        self._arrays = list(arrays)  # keeps the memory


def _stretches(arrays: Sequence[Array], pinned: PinnedMemory) -> list[tuple[slice, torch.Tensor]]:
    """Return the memory of one run as tensors of integers, each with its place in the run."""
    whole = np.asarray(_Stretch(arrays))
    tensor = torch.from_numpy(whole)
    return [(slice(low, high), tensor[low:high]) for low, high in pinned.pieces(whole)]


class Slots:
    """Where gradients from a device go in the host's memory."""

    def __init__(
        self, arrays: Sequence[Array], slots: Sequence[torch.Tensor], pinned: PinnedMemory
    ) -> None:
        self._arrays, self._dtypes, self._pinned = arrays, [slot.dtype for slot in slots], pinned
        self._runs = runs_of(arrays)
        self._memory: dict[tuple[int, ...], list[tuple[slice, torch.Tensor]]] = {}
        self._version = pinned.version
        self._beside: torch.cuda.Stream | None = None
        self._waiting: dict[int, torch.Tensor] = {}
        self._streams: set[torch.cuda.Stream] = set()  # that compute those
        self._num_waiting = 0  # bytes

    def _memory_of(self, run: Sequence[int]) -> list[tuple[slice, torch.Tensor]]:
        """Return the memory of arrays that lie one after the other, each piece with its place."""
        if self._version != self._pinned.version:
            self._memory, self._version = {}, self._pinned.version
        if (key := tuple(run)) not in self._memory:
            if len(self._memory) > 4 * len(self._arrays):  # of ever other gradients
                self._memory.clear()
            arrays = [self._arrays[index] for index in run if self._arrays[index].size]
            self._memory[key] = _stretches(arrays, self._pinned) if arrays else []
        return self._memory[key]

    def begin(self, index: int, gradient: torch.Tensor) -> None:
        """Have a gradient copied, beside what the current stream does next, once it is computed,
        and others with it that are `LEAST_BESIDE` together; it must stay as it is until then.
        """
        self._waiting[index] = gradient
        self._streams.add(torch.cuda.current_stream(gradient.device))
        self._num_waiting += gradient.nbytes
        if self._num_waiting < LEAST_BESIDE:
            return
        if self._beside is None:
            self._beside = torch.cuda.Stream(gradient.device)
        for stream in self._streams:
            self._beside.wait_stream(stream)
        gradients = self.take_waiting()
        with torch.cuda.stream(self._beside), torch.no_grad():
            for run in self._runs_of(gradients):
                self._copy([gradients[index] for index in run], run)
        for each in gradients.values():  # who frees it must not have it reused meanwhile
            each.record_stream(self._beside)

    def take_waiting(self) -> dict[int, torch.Tensor]:
        """Return the gradients that have not begun to cross, by index, and forget them."""
        waiting, self._waiting = self._waiting, {}
        self._streams.clear()
        self._num_waiting = 0
        return waiting

    def _runs_of(self, gradients: Iterable[int]) -> Iterator[list[int]]:
        """Yield those of one run that are next to each other, together."""
        indices = sorted(gradients)
        for run in runs_of([self._arrays[index] for index in indices]):
            yield [indices[number] for number in run]

    def fill(self, gradients: dict[int, torch.Tensor]) -> None:
        """Copy gradients by index, in the slots' dtype, and wait until all are there."""
        if self._beside is not None:
            self._beside.synchronize()
        for run in self._runs if len(gradients) == len(self._arrays) else self._runs_of(gradients):
            self._copy([gradients[index] for index in run], run)
        for device in {gradient.device for gradient in gradients.values()}:
            torch.cuda.current_stream(device).synchronize()

    def _copy(self, gradients: Sequence[torch.Tensor], run: Sequence[int]) -> None:
        """Have the gradients of a run copied, which then are one tensor on the device."""
        flat = [gradient.reshape(-1) for gradient in gradients]
        joined = flat[0] if len(flat) == 1 else torch.cat(flat)
        bits = bits_of(joined.to(self._dtypes[run[0]]))
        for place, part in self._memory_of(run):
            part.copy_(bits[place], non_blocking=True)


class HandedOut:
    """What the shards' parameters were when they were written into a device's tensors: a copy on
    the device, as large as the model, with which the tensors are compared there.

    Args:
        tensors: the model's, on one device.
        arrays: the worker's parameters in the same order.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], arrays: Sequence[Array]) -> None:
        self._device = tensors[0].device
        self._runs = runs_of(arrays)
        self._flats, values = [], [torch.empty(0)] * len(arrays)
        for run in self._runs:
            dtype = as_torch(arrays[run[0]]).dtype
            flat = torch.empty(
                sum(tensors[i].numel() for i in run), dtype=dtype, device=self._device
            )
            parts = flat.split([tensors[i].numel() for i in run])
            for index, part in zip(run, parts, strict=True):
                values[index] = part.view(tensors[index].shape)
            self._flats.append(bits_of(flat))
        self._filled = [index for run in self._runs for index in run]
        self._values = [values[index] for index in self._filled]
        self._done = torch.cuda.Event()

    def copies(self, arrays: Sequence[Array], pinned: PinnedMemory) -> list[Any]:
        """Return what is copied to have these parameters; arrays may lie elsewhere than those of
        before, if their dtypes are the same.
        """
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for run, flat in zip(self._runs, self._flats, strict=True):
            those = [arrays[i] for i in run]
            if runs_of(those) == [list(range(len(run)))]:
                found += [(flat[at], memory) for at, memory in _stretches(those, pinned)]
                continue
            for array, part in zip(those, flat.split([a.size for a in those]), strict=True):
                found += [(part[at], memory) for at, memory in _stretches([array], pinned)]
        return found

    def take(self, copies: Sequence[Any], tensors: Sequence[torch.Tensor] | None = None) -> None:
        """Copy parameters to the device, and into the tensors if they do not hold them already."""
        for on_device, memory in copies:
            on_device.copy_(memory, non_blocking=True)
        if tensors is not None:
            copy_all([tensors[i] for i in self._filled], self._values)
        self._done.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Wait until the host's memory may be overwritten."""
        self._done.synchronize()

    def changed(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """Return which tensors have other bits than they were given."""
        self.wait()
        if not self._runs:
            return []
        values, flags = dict(zip(self._filled, self._values, strict=True)), []
        for run, flat in zip(self._runs, self._flats, strict=True):
            if any(tensors[index].dtype != values[index].dtype for index in run):  # rounded
                pairs = ((bits_of(tensors[i]), bits_of(values[i].to(tensors[i]))) for i in run)
                flags.append(torch.stack([(now != given).any() for now, given in pairs]).any())
                continue
            parts = [bits_of(tensors[index]).reshape(-1) for index in run]
            now = parts[0] if len(parts) == 1 else torch.cat(parts)
            flags.append((now != flat).any())
        differing = torch.stack(flags).tolist()
        if not any(differing):
            return []
        runs = (run for run, differs in zip(self._runs, differing, strict=True) if differs)
        return sorted(
            index
            for run in runs
            for index in run
            if not torch.equal(bits_of(tensors[index]), bits_of(values[index].to(tensors[index])))
        )


@contextmanager
def _beside(stream: torch.cuda.Stream, gradient: torch.Tensor) -> Iterator[None]:
    """Do something with a gradient on another stream once it is computed."""
    stream.wait_stream(torch.cuda.current_stream(gradient.device))
    with torch.cuda.stream(stream), torch.no_grad():
        yield
    gradient.record_stream(stream)  # who frees it must not have it reused meanwhile


class Landing:
    """Gradients on their way from a device, each to be pushed as soon as it is there, in the order
    in which the backward pass yields them; in pinned memory of their own.

    Args:
        tensors: whose gradients come.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._memory: dict[int, torch.Tensor] = {}
        self._arriving: dict[int, torch.cuda.Event] = {}
        self._stream: torch.cuda.Stream | None = None
        self._is_pinned = True

    def begin(self, index: int, gradient: torch.Tensor) -> None:
        """Have a gradient copied once it is computed, without waiting for it."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(gradient.device)
        memory = self._memory_of(index, gradient)
        with _beside(self._stream, gradient):
            memory.copy_(gradient.detach(), non_blocking=True)
            self._arriving[index] = torch.cuda.Event()
            self._arriving[index].record(self._stream)

    def drain(self, push: Callable[[int, Array], None]) -> None:
        """Push each gradient that is on its way, in the order of arrival, once it is there."""
        arriving, self._arriving = self._arriving, {}
        for index, event in arriving.items():
            event.synchronize()
            push(index, as_array(self._memory[index]))

    def push_arrived(self, push: Callable[[int, Array], None]) -> None:
        """Push those that are there already."""
        for index, event in list(self._arriving.items()):
            if not event.query():
                return
            del self._arriving[index]
            push(index, as_array(self._memory[index]))

    def reserve(self, index: int) -> None:
        """Have memory for a tensor's gradient, before the backward pass."""
        self._memory_of(index, self._tensors[index])

    def _memory_of(self, index: int, like: torch.Tensor) -> torch.Tensor:
        known = self._memory.get(index)
        if known is not None and (known.dtype, known.shape) == (like.dtype, like.shape):
            return known
        try:
            made = torch.empty(like.shape, dtype=like.dtype, pin_memory=self._is_pinned)
        except RuntimeError as error:
            self._is_pinned = False
            reason = str(error).partition("\n")[0]
            log.warning("no pinned memory for gradients (%s); copies are slower", reason)
            made = torch.empty(like.shape, dtype=like.dtype)
        self._memory[index] = made
        return made
