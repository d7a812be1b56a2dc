"""safetensors and npz files of our own state, exact, and of parameters alone.

With slots: ``params/<path>`` (master copies), ``m/<path>``, ``v/<path>``, with `use_ema`
``ema/<path>``, and a description with config and layout (in safetensors the metadata key `about`).
The clock is in the description of a safetensors file, and in arrays of an npz file; those of
tensors that have their own are in the description. Parameters alone: ``<path>``, each in its own
dtype, as other tools expect them; imported, they start at step 0 with moments of zero.
"""

from pathlib import Path
from typing import Any

import numpy as np

from distnadam.errors import CheckpointError, ConversionError
from distnadam.interop.formulas import Conversion
from distnadam.interop.npz import (
    ABOUT,
    about_from,
    about_text,
    expect_kind,
    group,
    read_npz,
    settings_of,
    write_npz,
    write_whole,
)
from distnadam.interop.optimizer_state import (
    OptimizerState,
    layout_of,
    make_config,
    make_state,
    read_layout,
)
from distnadam.nadam.step_scalars import TensorClocks
from distnadam.tensors.arrays import BFLOAT16, STATE_ARRAYS, Array, dtype_of


def write_numpy(state: OptimizerState, job: Conversion) -> None:
    """Write an npz file.

    Raises:
        ConversionError: without slots, for a parameter in bfloat16, which NumPy's format lacks.
    """
    if job.slots:
        clock = {
            "iterations": np.array(state.clock.iterations, np.int64),
            "m_schedule": np.array(state.clock.m_schedule),
        }
        write_npz(job.path, {**_with_slots(state), **clock}, _about(state))
        return
    arrays = _without_slots(state)
    for name, array in arrays.items():
        if array.dtype == BFLOAT16:
            raise ConversionError(
                f"{job.path}: {name!r}: NumPy's format has no bfloat16; export with slots, or to "
                "safetensors"
            )
        if name == ABOUT:
            raise ConversionError(
                f"{job.path}: a parameter cannot be called {ABOUT!r} there: export with slots"
            )
    write_npz(job.path, arrays, {"kind": "parameters"})


def read_numpy(job: Conversion) -> OptimizerState:
    """Return the state of an npz file, ours or one of named parameters alone."""
    arrays, about = read_npz(job.path)
    clock = (
        (arrays.pop("iterations", None), arrays.pop("m_schedule", None))
        if about.get("kind") == "state"
        else (0, 1.0)
    )
    return _state(job, arrays, about, clock)


def write_safetensors(state: OptimizerState, job: Conversion) -> None:
    """Write a safetensors file that any safetensors reader opens."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {
        name: np.ascontiguousarray(a).reshape(a.shape)
        for name, a in (_with_slots(state) if job.slots else _without_slots(state)).items()
    }
    about = (
        {**_about(state), "clock": [state.clock.iterations, state.clock.m_schedule]}
        if job.slots
        else {"kind": "parameters"}
    )

    def write(temporary: Path) -> None:
        try:
            save_file(arrays, temporary, metadata={ABOUT: about_text(about)})
        except SafetensorError as error:  # its word for what the system refuses
            raise OSError(str(error)) from error

    write_whole(job.path, write)


def read_safetensors(job: Conversion) -> OptimizerState:
    """Return the state of a safetensors file, ours or one of named parameters alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(job.path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a file, not a dict
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{job.path}: cannot be read as safetensors: {error}") from error
    about = about_from(str(job.path), metadata[ABOUT]) if ABOUT in metadata else {}
    clock = about.get("clock") if about.get("kind") == "state" else [0, 1.0]
    if not isinstance(clock, list) or len(clock) != 2:
        raise CheckpointError(f"{job.path}: its clock must be two numbers, got {str(clock)[:80]!r}")
    return _state(job, arrays, about, (clock[0], clock[1]))


def _with_slots(state: OptimizerState) -> dict[str, Array]:
    return {
        f"{slot}/{name}": array
        for slot in state.config.state_arrays
        for name, array in zip(state.names, getattr(state, slot), strict=True)
    }


def _without_slots(state: OptimizerState) -> dict[str, Array]:
    return {
        tensor.path: array.astype(dtype_of(tensor.dtype))
        for tensor, array in zip(state.layout.tensors, state.params, strict=True)
    }


def _about(state: OptimizerState) -> dict[str, Any]:
    tensors = state.clock.tensors
    return {
        "kind": "state",
        "config": state.config.to_dict(),
        "layout": state.layout.to_dict(),
        **({} if tensors is None else {"clocks": tensors.to_dict()}),
    }


def _clocks(where: str, given: Any) -> TensorClocks | None:
    """Return the tensors' clocks that a description has, if it has any."""
    try:
        return None if given is None else TensorClocks.from_dict(given)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{where}: its clocks are refused: {error}") from error


def _state(
    job: Conversion, arrays: dict[str, Any], about: dict[str, Any], clock: tuple[Any, Any]
) -> OptimizerState:
    path = job.path
    if about.get("kind") == "state":
        given = settings_of(str(path), about)
        names = (*STATE_ARRAYS, "ema") if given.get("use_ema") is True else STATE_ARRAYS
        slots = {slot: group(arrays, slot) for slot in names}
        others = len(arrays) - sum(map(len, slots.values()))
        if others:
            raise CheckpointError(
                f"{path}: expected entries under {', '.join(names)}, got {others} others"
            )
        settings = make_config(str(path), {**given, **job.config})
        return make_state(
            str(path),
            read_layout(str(path), about.get("layout")),
            settings,
            clock,
            slots,
            _clocks(str(path), about.get("clocks")),
        )
    expect_kind(path, about, "parameters")
    job.notes.append(
        f"{path} holds parameters alone: the optimizer starts at step 0, with moments of zero"
    )
    return make_state(
        str(path),
        layout_of(str(path), arrays),
        make_config(str(path), job.config),
        clock,
        {"params": arrays},
    )
