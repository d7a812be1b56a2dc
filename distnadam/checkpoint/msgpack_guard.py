"""Checks msgpack bytes before they are unpacked: completeness, number of objects, depth.

A few bytes of msgpack can ask for gigabytes of Python objects, so excess is refused while it is
still bytes. Nothing is unpacked here; what the objects mean is checked in `manifest`.
"""

from distnadam.errors import CheckpointError

MAX_OBJECTS = 2_000_000
MAX_DEPTH = 500

# by type byte: the payload's size in bytes
_FIXED = {
    0xC0: 0,
    0xC2: 0,
    0xC3: 0,
    0xCA: 4,
    0xCB: 8,
    0xCC: 1,
    0xCD: 2,
    0xCE: 4,
    0xCF: 8,
    0xD0: 1,
    0xD1: 2,
    0xD2: 4,
    0xD3: 8,
}
# by type byte: the size of the payload's length field
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
# by type byte: the size of the count field, and the items per count (a map's are key and value)
_COUNTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def check_msgpack(raw: bytes, where: str) -> None:
    """Check that `raw` is exactly one msgpack object of acceptable size.

    Raises:
        CheckpointError: beginning with `where`; it is cut short, too large, too deeply nested, of a
            type that no manifest holds, or followed by more bytes.
    """
    end, at, objects = len(raw), 0, 1
    open_items = [1]  # objects still to come, in each container that encloses `at`
    while open_items:
        if open_items[-1] == 0:
            open_items.pop()
            continue
        open_items[-1] -= 1
        if at >= end:
            raise CheckpointError(f"{where}: cannot be read as msgpack: it ends too early")
        at, children = _item(raw, at, where)
        if children:
            objects += children
            open_items.append(children)
            if objects > MAX_OBJECTS or len(open_items) > MAX_DEPTH or children > end - at:
                raise CheckpointError(
                    f"{where}: asks for {objects} objects or more, {len(open_items)} deep; refused"
                )
    if at != end:
        raise CheckpointError(f"{where}: cannot be read as msgpack: {end - at} bytes too many")


def _item(raw: bytes, at: int, where: str) -> tuple[int, int]:
    """Return the end of the object that begins at `at`, without its items, and their number."""
    kind = raw[at]
    at += 1
    if kind < 0x80 or kind >= 0xE0:
        return at, 0
    if kind < 0x90:
        return at, 2 * (kind & 0x0F)
    if kind < 0xA0:
        return at, kind & 0x0F
    if kind < 0xC0:
        return at + (kind & 0x1F), 0
    if kind in _FIXED:
        return at + _FIXED[kind], 0
    if kind in _SIZED:
        length = _SIZED[kind]
        return at + length + int.from_bytes(raw[at : at + length], "big"), 0
    if kind in _COUNTED:
        length, each = _COUNTED[kind]
        return at + length, each * int.from_bytes(raw[at : at + length], "big")
    raise CheckpointError(
        f"{where}: cannot be read as msgpack: byte {at - 1} begins something that no manifest holds"
    )
