"""Learning rates and betas that a step is given for itself alone: by all ranks alike, by group, and
read back by whoever takes a rank over.
"""

import math
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Group, Options
from distnadam.errors import ConfigError, RanksDisagree
from tests.models import bits, gradients, leaves, params

GROUPS = [Group("**/bias", lr_scale=0.5), Group("layers/**", lr=0.01), Group("half", clipvalue=0.1)]
STEPS = 5


def rates(step: int) -> dict[str, Any]:
    """Of one step: now none, now for all, now by group, betas as a one-cycle has them."""
    by_group = {None: 0.01 * (step + 1), "layers/**": 0.002 * step, "half": 0.1}
    return {
        "lr": [None, 0.03, by_group][step % 3],
        "betas": None if step == 3 else (0.95 - 0.02 * step, 0.999 - 0.001 * step),
    }


def stepped(optimizer: DistNadam, first: int, last: int) -> None:
    workers = [optimizer.worker(rank) for rank in range(2)]
    for step in range(first, last):
        for ticket in [w.push(gradients(step, w.rank), **rates(step)) for w in workers]:
            ticket.result()


@pytest.fixture(scope="module")
def reference() -> list[bytes]:
    """The bits where the whole optimizer's hyper-parameters are changed between the steps."""
    with DistNadam(num_workers=2, backend="local", groups=GROUPS).build(params()) as optimizer:
        begun = optimizer.get_config()
        for step in range(STEPS):
            lr, betas = rates(step)["lr"], rates(step)["betas"] or (0.9, 0.999)
            groups, lr = GROUPS, 0.002 if lr is None else lr
            if isinstance(lr, dict):
                own = {group.pattern: lr.get(group.pattern) for group in GROUPS}
                groups = [
                    g
                    if own[g.pattern] is None
                    else Group(g.pattern, lr=own[g.pattern], clipvalue=g.clipvalue)
                    for g in GROUPS
                ]
                lr = lr[None]
            optimizer.set_config(lr=lr, beta_1=betas[0], beta_2=betas[1], groups=groups)
            workers = [optimizer.worker(rank) for rank in range(2)]
            for ticket in [w.push(gradients(step, w.rank)) for w in workers]:
                ticket.result()
        optimizer.set_config(**{k: begun[k] for k in ("lr", "beta_1", "beta_2", "groups")})
        return bits(optimizer)


@pytest.mark.on_ray(slow=["ray-objects"])
@pytest.mark.parametrize("transport", ["auto", "objects"])
def test_a_step_with_rates_of_its_own_is_that_of_an_optimizer_that_has_them(
    backend: str, transport: Any, reference: list[bytes]
) -> None:
    options = Options(transport=transport)
    with DistNadam(
        num_shards=3, num_workers=2, backend=backend, groups=GROUPS, options=options
    ).build(params()) as optimizer:
        before = optimizer.get_config()
        stepped(optimizer, 0, 3)
        optimizer.reshard(2)
        stepped(optimizer, 3, STEPS)
        assert bits(optimizer) == reference
        assert optimizer.get_config() | {"num_shards": 3} == before


@pytest.mark.parametrize("kernel", ["numpy", "fused"])
@pytest.mark.parametrize("num_shards", [1, 4])
def test_both_kernels_step_so(kernel: Any, num_shards: int, reference: list[bytes]) -> None:
    options = Options(kernel=kernel, threads=2)
    with DistNadam(
        num_shards=num_shards, num_workers=2, backend="local", groups=GROUPS, options=options
    ).build(params()) as optimizer:
        stepped(optimizer, 0, STEPS)
        assert bits(optimizer) == reference


@pytest.mark.parametrize("formula", ["adam", "nadam"])
def test_betas_by_group_are_those_of_groups_that_have_them(formula: Any) -> None:
    found = []
    for own in (False, True):
        groups = [Group("**/bias", beta_1=0.5), Group("layers/**", beta_1=0.8)]
        with DistNadam(backend="local", num_shards=2, formula=formula, groups=groups).build(
            params()
        ) as optimizer:
            for step in range(3):
                one, other = (0.6 - 0.1 * step, 0.9), (0.7, 0.95 - 0.01 * step)
                if own:
                    changed = [
                        Group("**/bias", beta_1=one[0], beta_2=one[1]),
                        Group("layers/**", beta_1=other[0], beta_2=other[1]),
                    ]
                    optimizer.set_config(groups=changed)
                    optimizer.apply_gradients(gradients(step, 0))
                else:
                    betas = {"**/bias": one, "layers/**": other}
                    optimizer.apply_gradients(gradients(step, 0), betas=betas)
            found.append([leaf.tobytes() for leaf in leaves(optimizer.get_params())])
    assert found[0] == found[1]


def test_betas_of_groups_that_share_a_product_are_refused_by_name() -> None:
    with DistNadam(backend="local", groups=GROUPS).build(params()) as optimizer:
        with pytest.raises(ConfigError, match="group 'half' shares the optimizer's product"):
            optimizer.apply_gradients(gradients(0, 0), betas={"half": (0.5, 0.9)})
        optimizer.apply_gradients(gradients(0, 0), betas={None: (0.5, 0.9)})
        assert optimizer.iterations == 1
    with (
        DistNadam(backend="local", formula="adam", groups=GROUPS).build(params()) as optimizer,
        pytest.raises(ConfigError, match="betas: there is no group 'x'"),
    ):
        optimizer.apply_gradients(gradients(0, 0), betas={"x": (0.5, 0.9)})


def test_a_step_from_outside_takes_them_too() -> None:
    found = []
    for how in ({"lr": 0.5, "betas": (0.5, 0.9)}, {}):
        with DistNadam(backend="local", num_shards=2).build(params()) as optimizer:
            if not how:
                optimizer.set_config(lr=0.5, beta_1=0.5, beta_2=0.9)
            optimizer.apply_gradients(gradients(0, 0), **how)
            found.append(bits(optimizer))
    assert found[0] == found[1]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_ranks_that_differ_in_one_bit_are_refused_alike_whatever_comes_first(
    order: tuple[int, ...],
) -> None:
    ones = {"w": np.ones(3, np.float32)}
    lr = [0.1, math.nextafter(0.1, 1.0), 0.1]
    with DistNadam(backend="local", num_workers=3, num_shards=2).build(ones) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(3)]
        tickets = [workers[rank].push(ones, lr=lr[rank], betas=(0.9, 0.99)) for rank in order]
        for ticket in tickets:
            with pytest.raises(
                RanksDisagree,
                match="round 1 was refused, no shard has moved: overrides must be equal on all "
                r"ranks: rank 0 has lr=0.1, beta_1=0.9, beta_2=0.99, rank 1 has "
                r"lr=0.10000000000000002, beta_1=0.9, beta_2=0.99, rank 2 has lr=0.1, ",
            ):
                ticket.result()
        for ticket in [worker.push(ones, lr=0.1, betas=(0.9, 0.99)) for worker in workers]:
            assert ticket.result() == 1


def test_minus_zero_is_zero() -> None:
    ones = {"w": np.ones(3, np.float32)}
    with DistNadam(backend="local", num_workers=2).build(ones) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(2)]
        tickets = [
            workers[0].push(ones, lr=0.0, betas=(0.0, 0.9)),
            workers[1].push(ones, lr=-0.0, betas=[-0.0, np.float64(0.9)]),
        ]
        assert [ticket.result() for ticket in tickets] == [1, 1]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"lr": -0.1}, "lr must be finite and at least 0, got -0.1"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": {"bias": 0.1}}, "lr: there is no group 'bias'; expected patterns of groups, which"),
        ({"lr": {"**/bias": -1.0}}, r"lr of group '\*\*/bias' must be finite and at least 0"),
        ({"betas": 0.9}, r"betas must be \(beta_1, beta_2\), got 0.9"),
        ({"betas": (0.9,)}, "betas must be"),
        ({"betas": (0.9, 1.0)}, r"beta_2 must be in \[0, 1\), got 1.0"),
        ({"betas": (-0.1, 0.9)}, "beta_1 must be finite and at least 0"),
    ],
)
def test_what_no_step_can_have_is_refused_and_nothing_is_sent(given: Any, why: str) -> None:
    with DistNadam(backend="local", groups=GROUPS).build(params()) as optimizer:
        worker = optimizer.worker(0)
        worker.push_tensor("dense/kernel", np.ones((90, 70)))
        for call in (worker.push, worker.step):
            with pytest.raises(ConfigError, match=why):
                call(**given)
        with pytest.raises(ConfigError, match=why):
            optimizer.apply_gradients(gradients(0, 0), **given)
        assert optimizer.round == 0
        assert optimizer.waiting_for() == (0,)


@pytest.mark.on_ray
def test_a_worker_that_takes_a_rank_over_reads_the_last_steps_rates_and_the_round(
    backend: str,
) -> None:
    with DistNadam(
        num_shards=2, num_workers=2, backend=backend, groups=GROUPS, lr=lambda step: 0.1 + step
    ).build(params()) as optimizer:
        fresh = optimizer.worker(1).settings
        assert (fresh.round, fresh.iterations, fresh.betas) == (0, 0, (0.9, 0.999))
        assert fresh.lr == {None: 0.1, "**/bias": 0.05, "layers/**": 0.01, "half": 0.1}
        stepped(optimizer, 0, 3)
        skipped = [optimizer.worker(rank).push(found_inf=True, lr=0.7) for rank in range(2)]
        assert [ticket.result() for ticket in skipped] == [3, 3]
        now = optimizer.worker(1).settings
        assert (now.round, now.iterations) == (4, 3)
        assert now.betas == rates(2)["betas"]
        by_group = rates(2)["lr"]
        assert now.lr == by_group | {"**/bias": by_group[None] * 0.5}
        optimizer.apply_gradients(gradients(0, 0))
        assert optimizer.worker(1).settings.lr[None] == 3.1


def test_sums_of_micro_batches_and_tensors_pushed_go_with_them() -> None:
    ones = {"w": np.ones(3, np.float32)}
    found = []
    for way in range(3):
        with DistNadam(backend="local").build(ones) as optimizer:
            worker = optimizer.worker(0)
            if way == 0:
                worker.accumulate(ones)
                worker.accumulate(ones)
                worker.step(lr=0.5, betas=(0.5, 0.9))
            elif way == 1:
                worker.push_tensor("w", ones["w"])
                worker.push(lr=0.5, betas=(0.5, 0.9)).result()
            else:
                optimizer.set_config(lr=0.5, beta_1=0.5, beta_2=0.9)
                worker.step(ones)
            found.append(bits(optimizer))
    assert found[0] == found[1] == found[2]
