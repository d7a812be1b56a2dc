"""What a checkpoint can hold of a user's own: data, options, hyper-parameters, names of tensors.

Whatever it cannot hold is refused when it is given, before a byte is written.
"""

from collections.abc import Mapping
from typing import Any

import msgpack

from distnadam.config import Options
from distnadam.errors import ConfigError, StructureError
from distnadam.hyperparameters import NadamConfig
from distnadam.places import has_secret
from distnadam.plain_data import PlainData
from distnadam.tensors.layout import Layout

_LATER = {
    *("formula", "weight_decay", "decoupled_weight_decay", "maximize", "groups"),
    *("use_ema", "ema_momentum", "ema_overwrite_frequency", "clocks", "loss_scale"),
}
"""Settings that the first readers of this format do not know."""
_PLAIN = PlainData()
_MOST_AXES = 64
_MOST_LAYOUT = (24 << 20, 1_400_000)
_MOST_DATA = (24 << 20, 400_000)
"""The most bytes and objects of these parts, which together stay below what a reader refuses."""


def packed_data(data: Any) -> dict[str, Any]:
    """Return a caller's data (None: there is none) as plain data, which shares nothing with it.

    Raises:
        ConfigError: naming the key of something that no checkpoint can keep.
    """
    data = {} if data is None else data
    if not isinstance(data, Mapping):
        raise ConfigError(f"data must be a mapping, got {type(data).__name__} {data!r}")
    packed: dict[str, Any] = _PLAIN.pack(dict(data), "data")
    if (excess := _excess(packed, _MOST_DATA)) is not None:
        raise ConfigError(f"data: {excess}; keep large arrays in files of their own")
    return packed


def data_from(packed: Any) -> dict[str, Any]:
    """Return the data that `packed_data` packed; raise ConfigError for what it cannot have been."""
    data = _PLAIN.unpack(packed)
    if not isinstance(data, dict):
        raise ConfigError(f"data must be a mapping, got {type(data).__name__}")
    return data


def packed_options(options: Options) -> dict[str, Any]:
    """Return options as plain data, without a `checkpoint_dir` that has a password in it: whoever
    restores gives it again, or goes on where it restores from.
    """
    plain = options.to_dict()
    if plain["checkpoint_dir"] is not None and has_secret(plain["checkpoint_dir"]):
        plain["checkpoint_dir"] = None
    packed: dict[str, Any] = _PLAIN.pack(plain, "options")
    return packed


def options_from(packed: Any) -> Options:
    """Return the options that `packed_options` packed."""
    return Options.of(_PLAIN.unpack(packed))


def check_layout(layout: Layout) -> None:
    """Raise StructureError if no checkpoint has room for the names and shapes of its tensors."""
    if (excess := _excess(layout.to_dict(), _MOST_LAYOUT)) is not None:
        raise StructureError(
            f"params: {len(layout.tensors)} tensors: {excess} for their names and shapes"
        )


def _excess(plain: Any, most: tuple[int, int]) -> str | None:
    """Return by how much plain data exceeds the most bytes and objects, or None."""
    size, objects = len(msgpack.packb(plain)), _count_objects(plain)
    if size <= most[0] and objects <= most[1]:
        return None
    return (
        f"{size} bytes and {objects} objects, of which a checkpoint keeps at most {most[0]} and "
        f"{most[1]}"
    )


def _count_objects(plain: Any) -> int:
    if isinstance(plain, dict):
        return 1 + len(plain) + sum(map(_count_objects, plain.values()))
    return 1 + sum(map(_count_objects, plain)) if isinstance(plain, list) else 1


def config_from(config: Mapping[str, Any]) -> NadamConfig:
    """Return the config without its schedule, whose class need not be imported to inspect one."""
    without = {"lr": 0.0} if isinstance(config["lr"], Mapping) else {}
    groups = [
        {**group, "lr": 0.0} if isinstance(group.get("lr"), Mapping) else group
        for group in config.get("groups", ())
    ]
    return NadamConfig.from_dict({**config, **without, "groups": groups})


def whole_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the defaults of what one of an earlier version lacks."""
    return {**NadamConfig().to_dict(), **config}


def without_later(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the later settings that have their defaults, which readers of an
    earlier version refuse.
    """
    defaults = NadamConfig().to_dict()
    return {k: v for k, v in config.items() if k not in _LATER or v != defaults[k]}


def layout_from(data: Any) -> Layout:
    """Return the layout, after checking each number before anything is computed from it."""
    for path, shape, dtype, begin, end in data["tensors"]:
        if not (
            isinstance(path, str)
            and isinstance(dtype, str)
            and isinstance(shape, list)
            and len(shape) <= _MOST_AXES
        ):
            raise ValueError(f"tensor {str(path)[:80]!r} has a shape or dtype that none can have")
        if not all(map(is_natural, (*shape, begin, end))):
            raise ValueError(
                f"tensor {path[:80]!r} has a shape or place that is not of whole numbers"
            )
    return Layout.from_dict(data)


def is_natural(value: Any) -> bool:
    """Return whether a value is a whole number from 0 on, of 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
