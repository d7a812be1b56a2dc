"""A model's gradients, and where they lie for the shards: each has a slot in the worker's memory.

A hook copies a gradient into its slot once the backward pass has it, while it is in the cache, and
makes the slot the tensor's `.grad`. From then on whoever changes `.grad` changes what is sent:
another backward pass, `unscale_`, clipping, a write through `.data`. What `.grad` is at `step` is
what counts: another tensor is copied, None is no gradient. A gradient that requires a gradient
itself (`create_graph`) stays as it is, and is copied at `step`.

With `overlap` a hook sends a gradient on its way instead, and `.grad` stays torch's own.

On a GPU `.grad` stays torch's own too, and is copied at `step`; with `overlap` it begins to cross
in the hook, and is pushed once it is there.

A slot is overwritten at the next step. Whoever kept the gradient has it as torch leaves it: the
tensor that was kept gets memory of its own first.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch

from distnadam.errors import GradientError
from distnadam.torch.arrays import as_array, as_torch, require_memory
from distnadam.torch.device_copies import Landing, PinnedMemory, Slots


class Gradients:
    """The gradients of tensors, and their slots once there are some.

    Args:
        names: one for each tensor.
        tensors: the model's, each once.

    Attributes:
        are_read: whether the slots are those of a push in flight, and nobody may write there.
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        self._names = list(names)
        self._tensors = list(tensors)
        self._arrays: list[Any] = []
        self._slots: list[torch.Tensor] = []
        self._storages: list[Any] = []
        self._is_hooked = False
        self._handles: list[Any] = [None] * len(self._tensors)
        self._sent: list[tuple[torch.Tensor, int] | None] = []
        self._landing = Landing(self._tensors)
        self._from_device: Slots | None = None
        self.are_read = False

    def open(self, tree: dict[str, Any], pinned: PinnedMemory, *, in_place: bool) -> None:
        """Have slots from now on.

        Args:
            tree: the worker's views, by name.
            pinned: what of them is registered with a device's driver.
            in_place: whether hooks move gradients there during the backward pass.
        """
        self._arrays = [tree[name] for name in self._names]
        self._slots = [as_torch(array) for array in self._arrays]
        self._from_device = Slots(self._arrays, self._slots, pinned)
        self._storages = [slot.untyped_storage() for slot in self._slots]
        self._is_hooked = in_place
        if in_place:
            for index in range(len(self._tensors)):
                self._hook(index)

    def send(self, push: Callable[[str, Any], None] | None) -> None:
        """Have hooks push each gradient once the backward pass has it, in the order in which it
        comes; whoever changes it after that is refused at `gather_sent` or `gather`.

        Args:
            push: takes a tensor's name and its gradient; None: it goes from its device to its slot.
        """
        own = weakref.ref(self)
        self._sent = [None] * len(self._tensors)

        def hook(index: int) -> Callable[[torch.Tensor], None]:
            def sent(tensor: torch.Tensor) -> None:
                gradients = own()
                if gradients is None or tensor.grad is None:
                    return
                if push is None and (gradients.are_read or not gradients._can_cross(tensor.grad)):
                    return
                if gradients._sent[index] is not None:
                    raise GradientError(
                        f"{gradients._names[index]!r}: a second backward pass before the step, and "
                        "overlap=True has sent the gradient of the first: leave overlap out"
                    )
                gradients._send(index, tensor.grad, push)
                gradients._sent[index] = (tensor.grad, tensor.grad._version)

            return sent

        for index, tensor in enumerate(self._tensors):
            if tensor.requires_grad and tensor.is_leaf:
                self._handles[index] = tensor.register_post_accumulate_grad_hook(hook(index))
                if tensor.is_cuda and push is not None:
                    self._landing.reserve(index)

    def _can_cross(self, gradient: torch.Tensor) -> bool:
        """Whether a gradient is dense and on a GPU."""
        return bool(gradient.is_cuda and gradient.layout == torch.strided)

    def _send(
        self, index: int, gradient: torch.Tensor, push: Callable[[str, Any], None] | None
    ) -> None:
        """Push a gradient, or have it cross from its device first."""
        if push is None:
            assert self._from_device is not None
            self._from_device.begin(index, gradient.detach())
        elif self._can_cross(gradient):
            self._landing.begin(index, gradient)
            self._landing.push_arrived(lambda i, array: push(self._names[i], array))
        else:
            push(self._names[index], as_array(gradient))

    def gather_sent(self, push: Callable[[str, Any], None]) -> bool:
        """Push the gradients that no hook has sent; return whether there are any at all.

        Raises:
            GradientError: one was changed after it was sent.
        """
        sent = self._take_sent()
        self._landing.drain(lambda i, array: push(self._names[i], array))
        found = False
        for index, (tensor, known) in enumerate(zip(self._tensors, sent, strict=True)):
            if known is not None:
                self._require_same(index, known)
                found = True
            elif tensor.grad is not None:
                push(self._names[index], as_array(tensor.grad))
                found = True
        return found

    def _take_sent(self) -> list[tuple[torch.Tensor, int] | None]:
        """Return what hooks have sent, and have nothing sent."""
        sent, self._sent = self._sent, [None] * len(self._tensors)
        return sent

    def _require_same(self, index: int, sent: tuple[torch.Tensor, int]) -> None:
        if self._tensors[index].grad is not sent[0] or sent[0]._version != sent[1]:
            raise GradientError(
                f"the gradient of {self._names[index]!r} was changed after it was sent, "
                "which overlap=True promises not to do: leave overlap out"
            )

    def close(self) -> None:
        """Remove the hooks; gradients stay where they are."""
        for handle in filter(None, self._handles):
            handle.remove()

    def leave(self) -> None:
        """Leave the slots to a push in flight: what lies there and is a `.grad` gets memory of its
        own, and hooks move nothing there until the push has ended.
        """
        self.are_read = True
        for index, slot in enumerate(self._slots):
            if self._tensors[index].grad is slot:
                self._give_memory(index)

    def gather(self) -> dict[str, Any] | None:
        """Have each gradient in its slot, to be pushed from there.

        Returns:
            The slots by name, None for a tensor without a gradient; None if each has one.

        Raises:
            RuntimeError: a gradient is sparse.
            StructureError: a gradient's storage was freed.
            GradientError: a view of an earlier gradient is kept, or one was changed after it was
                sent.
        """
        if not self._sent and all(map(is_, map(_gradient_of, self._tensors), self._slots)):
            return None  # hooks have moved all
        with torch.no_grad():
            return self._gather()

    def _gather(self) -> dict[str, Any] | None:
        absent, on_device = [], {}
        is_sent = bool(self._sent)
        waiting = self._from_device.take_waiting() if self._from_device is not None else {}
        sent = self._take_sent() if is_sent else [None] * len(self._tensors)
        for index, tensor in enumerate(self._tensors):
            gradient = tensor.grad
            if (known := sent[index]) is not None:
                self._require_same(index, known)
                continue
            if gradient is self._slots[index]:
                continue
            if gradient is None:
                absent.append(index)
                continue
            _require_readable(self._names[index], gradient)
            self._free(index)
            if gradient.is_cuda:
                on_device[index] = gradient.detach()
            else:
                self._slots[index].copy_(gradient.detach())
            if self._is_hooked and self._handles[index] is None:
                self._hook(index)  # it was frozen before
        if on_device or is_sent:
            assert self._from_device is not None
            self._from_device.fill(on_device | waiting)
        if not absent:
            return None
        missing = set(absent)
        return {
            name: None if index in missing else self._arrays[index]
            for index, name in enumerate(self._names)
        }

    def _hook(self, index: int) -> None:
        """Have a tensor's gradients moved during the backward pass, where a slot can be `.grad`."""
        tensor, own = self._tensors[index], weakref.ref(self)
        dtype, device = self._slots[index].dtype, self._slots[index].device
        if not (tensor.requires_grad and tensor.is_leaf):
            return
        if (dtype, device) != (tensor.dtype, tensor.device):
            return

        def move(tensor: torch.Tensor) -> None:
            gradients = own()
            if gradients is not None:
                gradients._move(index, tensor)

        self._handles[index] = tensor.register_post_accumulate_grad_hook(move)

    def _move(self, index: int, tensor: torch.Tensor) -> None:
        """Move a gradient that the backward pass has made into its slot."""
        gradient = tensor.grad
        if gradient is None or gradient is self._slots[index] or self.are_read:
            return
        if _kind_of(gradient) != _kind_of(self._slots[index]):  # the model was moved or converted
            return
        if gradient.requires_grad or gradient.layout != torch.strided:
            return
        try:
            self._free(index)
        except GradientError:  # it is raised by `step`, unless they are gone by then
            return
        slot = self._slots[index]  # not before, as `_free` counts who has it
        slot.copy_(gradient)
        tensor.grad = slot

    def _free(self, index: int) -> None:
        """Have a slot that may be overwritten.

        Raises:
            GradientError: somebody keeps a view of it, which cannot get memory of its own.
        """
        if _uses(self._storages[index]) > _SLOT_ALONE:
            raise GradientError(
                f"a view of an earlier gradient of {self._names[index]!r} is kept (by .view(), "
                ".detach() or .numpy()), and its memory is used again: keep a .clone()"
            )
        if sys.getrefcount(self._slots[index]) > _LISTED_ALONE:  # this very tensor is kept
            self._give_memory(index)

    def _give_memory(self, index: int) -> None:
        """Have a slot of its own anew, and the tensor that was the slot memory of its own."""
        kept = self._slots[index]
        kept.set_(kept.clone())
        self._slots[index] = as_torch(self._arrays[index])
        self._storages[index] = self._slots[index].untyped_storage()


def _require_readable(name: str, gradient: torch.Tensor) -> None:
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"distnadam does not support sparse gradients, and that of {name!r} is one: give its "
            ".to_dense()"
        )
    if not gradient.data_ptr():
        require_memory(f"the gradient of {name}", gradient)


def _kind_of(tensor: torch.Tensor) -> tuple[torch.device, torch.dtype, torch.Size]:
    return tensor.device, tensor.dtype, tensor.shape


def _uses(storage: Any) -> int:
    """Return how many tensors, and Python's own object, have a storage."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


_gradient_of = attrgetter("grad")
_SLOT_ALONE = 2
_LISTED = [torch.empty(())]
_LISTED_ALONE = sys.getrefcount(_LISTED[0])
"""The references of a tensor that one list has and nobody else."""
