"""A checkpoint to another framework's file and back: picks the module, and settles what was found
before anything appears.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from distnadam.checkpoint.storage.resolve import DirectoryLike
from distnadam.errors import CheckpointError, ConfigError
from distnadam.interop import keras, optax, own_files, torch
from distnadam.interop.formulas import Conversion
from distnadam.interop.optimizer_state import OptimizerState, load_checkpoint

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
    """What a conversion wrote, and what the user should know about it, as sentences."""

    path: str
    notes: tuple[str, ...]


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
        checkpoint: one checkpoint, or a directory of them, of which the newest valid one; a path or
            an fsspec URL.
        output: the file to write; one that is there is replaced.
        to: "keras" (the reference's and tf_keras legacy's list of weights), "keras3", "torch",
            "optax", "safetensors" or "numpy".
        slots: False writes the parameters alone, each in its own dtype (safetensors and numpy
            only).
        order: the tensors' paths in the order of the other optimizer's variables (keras, keras3 and
            torch match by position).
        lossy: write it even where the other formula would train on differently.

    Returns:
        The file, and what does not carry over because it lives outside the state there.

    Raises:
        CheckpointError: the checkpoint is refused, or the file cannot be written.
        ConversionError: naming each difference, such as the momentum schedule; nothing was written.
    """
    if to not in _WRITERS:
        raise ConfigError(f"to must be one of {', '.join(map(repr, FORMATS))}, got {to!r}")
    if not slots and to not in _OWN:
        raise ConfigError(
            f"slots=False writes parameters alone, which is for {' and '.join(_OWN)}, got to={to!r}"
        )
    job = Conversion(Path(output).absolute(), order=order, slots=slots, lossy=lossy)
    _WRITERS[to](load_checkpoint(checkpoint), job)
    return Converted(str(job.path), job.told)


def import_checkpoint(
    source: str | os.PathLike[str],
    directory: DirectoryLike,
    *,
    source_format: Format,
    config: Mapping[str, Any] | None = None,
    order: Sequence[str] | None = None,
    lossy: bool = False,
) -> Converted:
    """Write another framework's file as a checkpoint that `verify` accepts and `DistNadam.restore`
    continues from.

    Args:
        source: a file as `export_checkpoint` writes it, or one's own of that layout (each module of
            `distnadam.interop` says which).
        directory: where ``step_<iterations>/`` is made, which must not be there yet; a path or an
            fsspec URL.
        source_format: what the file is.
        config: hyper-parameters that the file lacks, or that replace its own, in our spelling or
            the framework's.
        order: the tensors' paths in the order of the other optimizer's variables, where the file
            does not say it.
        lossy: import it even where ours would train on differently (weight decay).

    Returns:
        The checkpoint's directory, and what is worth knowing.

    Raises:
        CheckpointError: naming the file, the tensor, the expected and the given; or the directory
            holds that step already.
        ConversionError: naming each difference, such as weight decay or steps that differ between
            tensors; nothing was written.
    """
    if source_format not in _READERS:
        raise ConfigError(
            f"source_format must be one of {', '.join(map(repr, FORMATS))}, got {source_format!r}"
        )
    job = Conversion(Path(source).absolute(), order=order, config=config or {}, lossy=lossy)
    if not job.path.is_file():
        raise CheckpointError(f"{job.path}: there is no such file")
    state = _READERS[source_format](job)
    job.settle()
    return Converted(state.save(directory), job.told)
