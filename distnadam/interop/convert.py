"""Converts a checkpoint to another framework's file and back, by the framework's module.

Differences between the formulas are refused before anything is written.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from typing_extensions import override

from distnadam.checkpoint import store
from distnadam.checkpoint.storage.base import os_errors_as
from distnadam.checkpoint.storage.resolve import DirectoryLike
from distnadam.errors import CheckpointError, ConfigError
from distnadam.interop import keras, optax, own_files, torch
from distnadam.interop.formulas import Conversion
from distnadam.interop.optimizer_state import OptimizerState, load_checkpoint
from distnadam.places import local_path, shown
from distnadam.tensors.arrays import own_errors

Format = Literal["keras", "keras3", "torch", "optax", "safetensors", "numpy"]
FORMATS: tuple[Format, ...] = get_args(Format)
_WRITERS: dict[str, Callable[[OptimizerState, Conversion], None]] = {
    "keras": keras.write,
    "keras3": keras.write_keras_3,
    "torch": torch.write,
    "optax": optax.write,
    "safetensors": own_files.write_safetensors,
    "numpy": own_files.write_numpy,
}
_READERS: dict[str, Callable[[Conversion], OptimizerState]] = {
    "keras": keras.read,
    "keras3": keras.read_keras_3,
    "torch": torch.read,
    "optax": optax.read,
    "safetensors": own_files.read_safetensors,
    "numpy": own_files.read_numpy,
}
_OWN = ("safetensors", "numpy")


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Args:
        path: what was written: the file, or the checkpoint's directory.
        notes: sentences about what differs, or has to be set up outside the state.

    >>> Converted("adam.npz", ("the schedule is torch's to set up",)).notes
    ("the schedule is torch's to set up",)
    """

    path: str
    notes: tuple[str, ...]

    @override
    def __repr__(self) -> str:
        return f"Converted(path={shown(self.path)!r}, notes={self.notes!r})"


@own_errors()
def export_checkpoint(
    checkpoint: DirectoryLike,
    output: str | os.PathLike[str],
    *,
    to: Format,
    slots: bool = True,
    order: Sequence[str] | None = None,
    lossy: bool = False,
) -> Converted:
    """Write a checkpoint's state as a file of another framework, whole or not at all.

    Args:
        checkpoint: the path or fsspec URL of one checkpoint, or of a directory of them, which means
            its newest valid one.
        output: the file to write; an existing one is replaced.
        to: "keras" (the list of weights of the reference and of tf_keras legacy), "keras3",
            "torch", "optax", "safetensors" or "numpy".
        slots: False writes the parameters alone, each in its own dtype (safetensors and numpy
            only).
        order: the tensors' paths in the order of the other optimizer's variables, by which keras,
            keras3 and torch match; None means the order given to `build`, as in
            ``build(dict(model.named_parameters()))``. Frozen ones may be left out.
        lossy: write even if the other formula would train on differently.

    Returns:
        The file, and notes on what does not carry over because the framework keeps it elsewhere.

    Raises:
        ConfigError: an argument has a value that it cannot have.
        CheckpointError: the checkpoint is refused, or the file cannot be written.
        ConversionError: naming each difference, such as the momentum schedule, and its remedy where
            the framework has one outside its optimizer; nothing was written.

    >>> with DistNadam(backend="local").build({"w": np.ones(2, np.float32)}) as optimizer:
    ...     saved = optimizer.save("runs/exported")
    >>> export_checkpoint(saved, "state.npz", to="numpy").path.endswith("state.npz")
    True
    """
    if to not in _WRITERS:
        raise ConfigError(f"to must be one of {', '.join(map(repr, FORMATS))}, got {to!r}")
    if not slots and to not in _OWN:
        raise ConfigError(
            f"slots=False writes parameters alone, which is for {' and '.join(_OWN)}, got to={to!r}"
        )
    path = Path(local_path(output, "output"))
    _check_output(path)
    job = Conversion(path, order=order, slots=slots, lossy=lossy)
    _WRITERS[to](load_checkpoint(checkpoint), job)
    return Converted(str(job.path), job.all_notes)


def _check_output(path: Path) -> None:
    """Raise CheckpointError if no file can be written there, before anything is read."""
    with os_errors_as(path, "written"):
        is_directory, has_parent = path.is_dir(), path.parent.is_dir()
        in_checkpoint = (path.parent / store.MANIFEST).exists()
    if is_directory:
        raise CheckpointError(f"{path}: is a directory; give the file to write in it")
    if not has_parent:
        raise CheckpointError(f"{path}: cannot be written: there is no directory {path.parent}")
    if in_checkpoint:
        raise CheckpointError(
            f"{path}: cannot be written into the checkpoint {path.parent}, which would be refused "
            "with a file more"
        )


@own_errors()
def import_checkpoint(
    source: str | os.PathLike[str],
    directory: DirectoryLike,
    *,
    source_format: Format,
    config: Mapping[str, Any] | None = None,
    order: Sequence[str] | None = None,
    lossy: bool = False,
) -> Converted:
    """Write another framework's file as a checkpoint that `DistNadam.restore` continues from.

    Args:
        source: a file written by `export_checkpoint`, or the user's own in the layout that the
            framework's module in `distnadam.interop` describes.
        directory: the path or fsspec URL under which the new ``step_<iterations>/`` is written.
        source_format: the file's format, as `to` of `export_checkpoint`.
        config: hyper-parameters that the file lacks, or that replace its own, in our spelling or
            the framework's. Its `groups` come before those that the file's settings make.
        order: the tensors' paths in the order of the other optimizer's variables, if the file does
            not hold it.
        lossy: import even if ours would train on differently, as without AMSGrad.

    Returns:
        The checkpoint's directory, and notes on what was found.

    Raises:
        ConfigError: an argument has a value that it cannot have.
        CheckpointError: naming the file, the tensor, what was expected and what was found; or the
            directory holds that step already.
        ConversionError: naming each difference, such as AMSGrad, or steps that differ between
            tensors; nothing was written.

    >>> with DistNadam(lr=0.1, backend="local").build({"w": np.ones(2, np.float32)}) as optimizer:
    ...     file = export_checkpoint(optimizer.save("runs/imported"), "own.npz", to="numpy").path
    >>> found = import_checkpoint(file, "runs/again", source_format="numpy")
    >>> DistNadam.restore(found.path, backend="local").lr
    0.1
    """
    if source_format not in _READERS:
        raise ConfigError(
            f"source_format must be one of {', '.join(map(repr, FORMATS))}, got {source_format!r}"
        )
    path = Path(local_path(source, "source"))
    job = Conversion(path, order=order, config=config or {}, lossy=lossy)
    if not os.path.isfile(job.path):
        raise CheckpointError(f"{job.path}: there is no such file")
    state = _READERS[source_format](job)
    job.settle()
    return Converted(state.save(directory), job.all_notes)
