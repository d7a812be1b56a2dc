"""The tree of errors: the drawing in the module is the tree, and every error survives pickling."""

import pickle

import pytest

from distnadam import errors

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.DistNadamError)
]


def drawn() -> dict[str, list[str]]:
    """Return the bases of each class as the module's docstring draws and names them."""
    bases: dict[str, list[str]] = {}
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line[4:].lstrip("│├└─ ").split()
        if not line.startswith("    ") or not words:
            continue
        name = words[0]
        depth = line.index(name) // 4
        extra = words[1].strip("()") if len(words) > 1 and words[1].startswith("(") else None
        bases[name] = [above.get(depth - 1, "Exception"), *([extra] if extra else [])]
        above[depth] = name
    return bases


def test_the_drawing_is_the_tree() -> None:
    assert len(CLASSES) > 20
    assert drawn() == {cls.__name__: [base.__name__ for base in cls.__bases__] for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_survives_pickling(cls: type[errors.DistNadamError]) -> None:
    again = pickle.loads(pickle.dumps(cls("a sentence")))
    assert type(again) is cls
    assert str(again) == "a sentence"


def test_a_rewind_keeps_its_epoch_and_round_when_pickled() -> None:
    again = pickle.loads(pickle.dumps(errors.Rewound("all shards went back", epoch=3, step=7)))
    assert (again.epoch, again.step) == (3, 7)
