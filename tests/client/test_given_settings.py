"""What a worker is given for a step alone is packed once while the same is given, and anew as soon
as anything in it differs.
"""

from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Group
from distnadam.errors import ConfigError

ONES = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}


def test_what_is_given_again_is_what_it_says_now_whoever_has_changed_it() -> None:
    groups = [Group("b", lr=0.5)]
    by_group: dict[str | None, float] = {None: 0.1, "b": 0.2}
    given: list[dict[str, Any]] = [
        {"lr": 0.1},
        {"lr": 0.1, "betas": (0.8, 0.9)},
        {"lr": 0.1, "betas": (0.8, 0.9)},
        {"lr": np.float32(0.25)},
        {},
        {"lr": 0.1, "betas": [0.8, 0.9]},
        {"lr": by_group},
        {"lr": by_group},
        {"betas": (0.5, 0.9)},
        {"lr": {None: 0.1}},
        {"lr": 0},
    ]
    models = [
        DistNadam(groups=groups, backend="local").build({k: v.copy() for k, v in ONES.items()})
        for _ in range(2)
    ]
    kept, anew = (model.worker(0) for model in models)
    for number, each in enumerate(given):
        if number == 7:
            by_group["b"] = 0.3
        found = kept.step(ONES, **each)
        if number % 2:
            anew.close()
            anew = models[1].worker(0)  # which has been given nothing
        expected = anew.step(ONES, **each)
        for name in ONES:
            np.testing.assert_array_equal(found[name], expected[name])
        rate = kept.settings.lr
        assert rate == anew.settings.lr
        if "lr" in each and not isinstance(each["lr"], dict):
            assert rate[None] == float(each["lr"])
    assert kept.step(ONES, lr=0.1) is not None
    for refused in (True, "0.1", np.array([0.1, 0.2]), float("nan")):
        with pytest.raises(ConfigError, match="lr"):
            kept.step(ONES, lr=refused)
    with pytest.raises(ConfigError, match="there is no group 'c'"):
        kept.step(ONES, lr={None: 0.1, "c": 0.1})
    for worker, model in zip((kept, anew), models, strict=True):
        worker.close()
        model.close()


def test_the_same_settings_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with DistNadam(backend="local").build(ONES) as optimizer, optimizer.worker(0) as worker:
        packed = []
        of = type(optimizer.shards).overrides
        monkeypatch.setattr(
            type(optimizer.shards),
            "overrides",
            lambda shards, lr, betas: packed.append(lr) or of(shards, lr, betas),
        )
        for lr in (0.1, 0.1, 0.2, 0.2, 0.1):
            worker.step(ONES, lr=lr, betas=(0.9, 0.99))
        worker.push(found_inf=True, lr=0.1, betas=(0.9, 0.99)).result()
        worker.step(ONES, lr=0.1, betas=(0.9, 0.99))
        assert packed == [0.1, 0.2, 0.1, 0.1]
        assert not worker.found_inf
