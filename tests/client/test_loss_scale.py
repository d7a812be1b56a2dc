"""A loss scale that the shards keep: gradients are unscaled where they come in, one rank's overflow
skips the round on all, and the scale follows the rounds as torch's GradScaler does.
"""

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import optree
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam import DistNadam, LossScale, Options
from distnadam.errors import ConfigError, NonFiniteGradient
from distnadam.loss_scale import ScaleState
from tests.models import bits, gradients, leaves, params

SCALE = LossScale(init_scale=1024.0, growth_interval=2)
ONES = {"w": np.ones(3, np.float32)}
INF = {"w": np.array([1.0, np.inf, 1.0], np.float32)}


def scaled(tree: Any, scale: float) -> Any:
    """Gradients of a scaled loss, each in its own dtype."""
    with np.errstate(over="ignore"):
        return optree.tree_map(lambda leaf: (leaf * np.asarray(scale)).astype(leaf.dtype), tree)


@pytest.mark.on_ray(slow=["ray-objects"])
@pytest.mark.parametrize("transport", ["auto", "objects"])
def test_all_ranks_see_one_scale_and_the_bits_are_those_without_one(
    backend: str, transport: Any, tmp_path: Any
) -> None:
    options = Options(transport=transport)
    seen = []
    with DistNadam(
        num_shards=2, num_workers=2, backend=backend, options=options, loss_scale=SCALE
    ).build(params()) as optimizer:
        assert optimizer.loss_scale == 1024.0
        workers = [optimizer.worker(rank) for rank in range(2)]
        for step in range(6):
            assert len({worker.loss_scale for worker in workers}) == 1
            seen.append(workers[0].loss_scale)
            trees = [scaled(narrow(gradients(step, r)), seen[-1]) for r in range(2)]
            if step == 2:
                trees[1]["dense"]["bias"][3] = np.inf
            tickets = [w.push(tree) for w, tree in zip(workers, trees, strict=True)]
            assert [t.result() for t in tickets] == [step + (step < 2)] * 2
            assert [t.found_inf for t in tickets] == [step == 2] * 2
            if step == 3:
                optimizer.reshard(3)
                for worker in workers:  # in one thread no push may have to be sent again
                    worker.pull()
        assert seen == [1024.0, 1024.0, 2048.0, 1024.0, 1024.0, 2048.0]
        assert optimizer.loss_scale == 2048.0
        assert (optimizer.round, optimizer.iterations, optimizer.skipped) == (6, 5, 1)
        got = bits(optimizer)
        optimizer.save(tmp_path)
        assert DistNadam.from_config(optimizer.get_config()).get_config() == optimizer.get_config()
    with DistNadam.restore(tmp_path, backend="local") as restored:
        worker = restored.worker(1)
        assert worker.loss_scale == 2048.0
        tickets = [
            w.push(scaled(gradients(9, r), 2048.0))
            for r, w in enumerate((restored.worker(0), worker))
        ]
        assert [ticket.result() for ticket in tickets] == [6, 6]
        assert worker.loss_scale == 4096.0  # the tracker was saved too
    with DistNadam(num_workers=2, backend="local").build(params()) as plain:
        workers = [plain.worker(rank) for rank in range(2)]
        for step in (0, 1, 3, 4, 5):
            for ticket in [w.push(narrow(gradients(step, w.rank))) for w in workers]:
                ticket.result()
        assert bits(plain) == got


def narrow(tree: Any) -> Any:
    """Gradients that stay exact when they are scaled."""
    return optree.tree_map(
        lambda leaf: (
            np.asarray(leaf).astype(np.float16).clip(-8, 8).astype(leaf.dtype)
            if leaf.dtype != np.float16
            else (leaf.clip(-0.01, 0.01) * 0).astype(np.float16)
        ),
        tree,
    )


def test_gradients_in_half_precision_keep_what_the_scale_has_saved() -> None:
    tiny = np.float32(2.0**-30)
    with DistNadam(backend="local", loss_scale=LossScale(2.0**20), lr=1.0).build(ONES) as optimizer:
        worker = optimizer.worker(0)
        for dtype in (np.float16, ml_dtypes.bfloat16):
            worker.step({"w": np.full(3, tiny * 2.0**20, dtype)})
        m = optimizer.get_weights()[2]
    first = tiny * np.float32(1 - 0.9)
    assert m.tolist() == pytest.approx([float(first * 1.9)] * 3, rel=1e-6)


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_every_way_of_pushing_is_unscaled_and_votes(on_nonfinite: Any) -> None:
    found = []
    options = Options(on_nonfinite=on_nonfinite)
    for way in ("tree", "tensor", "views", "accumulate", "outside"):
        with DistNadam(backend="local", loss_scale=SCALE, options=options).build(ONES) as optimizer:
            worker = optimizer.worker(0)
            for tree in (ONES, INF, ONES):
                given = scaled(tree, worker.loss_scale)
                before = optimizer.iterations
                if way == "tree":
                    worker.step(given)
                elif way == "tensor":
                    worker.push_tensor("w", given["w"])
                    worker.step()
                elif way == "views":
                    worker.gradients()["w"][:] = given["w"]
                    worker.step()
                elif way == "accumulate":
                    worker.accumulate(given)
                    worker.accumulate(given)
                    worker.step()
                else:
                    optimizer.apply_gradients(given)
                    worker.pull()
                assert optimizer.iterations == before + (tree is ONES)
                assert worker.found_inf == (tree is INF)
            assert worker.loss_scale == optimizer.loss_scale == 512.0
            found.append(bits(optimizer))
    assert all(each == found[0] for each in found)


def test_it_is_judged_after_unscaling_whether_a_square_overflows() -> None:
    with DistNadam(backend="local", loss_scale=LossScale(2.0**30)).build(ONES) as optimizer:
        worker = optimizer.worker(0)
        worker.step({"w": np.full(3, 2.0**80, np.float32)})
        assert not worker.found_inf
        worker.step({"w": np.full(3, 2.0**100, np.float32)})
        assert worker.found_inf


def test_a_norm_that_overflows_is_no_vote() -> None:
    """What was finite on each rank is refused, and leaves the scale."""
    huge = {"w": np.full(3, 1.5e19, np.float64)}
    with DistNadam(backend="local", num_workers=1, loss_scale=LossScale(1.0), clipnorm=1.0).build(
        {"w": np.ones(3)}
    ) as optimizer:
        worker = optimizer.worker(0)
        with pytest.raises(NonFiniteGradient):
            worker.step({"w": np.full(3, 1.2e154)})
        assert worker.loss_scale == 1.0
        worker.step(huge)


@given(
    config=st.builds(
        LossScale,
        st.sampled_from([1.0, 65536.0, 1e-30, 3.3]),
        st.sampled_from([2.0, 1.5, 1.001]),
        st.sampled_from([0.5, 0.9]),
        st.integers(1, 4),
    ),
    found=st.lists(st.booleans(), max_size=40),
)
def test_it_follows_the_rounds_as_torchs_grad_scaler_does(
    config: LossScale, found: list[bool]
) -> None:
    torch = pytest.importorskip("torch")
    scale = torch.full((), config.init_scale, dtype=torch.float32)
    tracker = torch.zeros((), dtype=torch.int32)
    ours = config.first
    for overflowed in found:
        torch._amp_update_scale_(
            scale,
            tracker,
            torch.tensor(float(overflowed)),
            config.growth_factor,
            config.backoff_factor,
            config.growth_interval,
        )
        ours = config.after(ours, "voted" if overflowed else "applied")
        assert ours == (scale.item(), tracker.item())


def test_it_stays_in_the_range_of_float32_and_other_ends_leave_it() -> None:
    config = LossScale(growth_interval=1)
    top = bottom = config.first
    for _ in range(300):
        top, bottom = config.after(top, "applied"), config.after(bottom, "voted")
    assert (top.scale, bottom.scale) == (2.0**120, 2.0**-120)
    for outcome in ("skipped", "refused", "disagreed"):
        assert config.after(ScaleState(8.0, 1), outcome) == (8.0, 1)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"loss_scale": 2.0}, "loss_scale must be a LossScale or None, got 2.0"),
        ({"loss_scale": {"scale": 2.0}}, "loss_scale must be a LossScale or None"),
        ({"loss_scale": {"growth_factor": 1.0}}, "growth_factor must be above 1, got 1.0"),
        ({"loss_scale": {"backoff_factor": 1.0}}, r"backoff_factor must be in \(0, 1\)"),
        ({"loss_scale": {"init_scale": 0.0}}, "init_scale must be in"),
        ({"loss_scale": {"growth_interval": 0}}, "growth_interval must be a whole number"),
        (
            {"loss_scale": SCALE, "options": Options(check_gradients=False)},
            r"loss_scale needs Options\(check_gradients=True\)",
        ),
    ],
)
def test_what_no_scale_can_be_is_refused(given: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        DistNadam(**given)


def test_it_is_fixed_and_views_in_half_precision_are_refused_by_name() -> None:
    with DistNadam(backend="local", loss_scale=SCALE).build(ONES) as optimizer:
        with pytest.raises(ConfigError, match="loss_scale=None cannot be changed: its scale foll"):
            optimizer.set_config(loss_scale=None)
        with pytest.raises(ConfigError, match="views in float16 cannot hold what is divided"):
            optimizer.worker(0).gradients("float16")
        assert optimizer.worker(0).is_scaled
    with DistNadam(backend="local").build(ONES) as optimizer:
        assert (optimizer.loss_scale, optimizer.worker(0).loss_scale) == (1.0, 1.0)
        assert not optimizer.worker(0).is_scaled


@pytest.mark.on_ray
@pytest.mark.parametrize("clip", [{"global_clipnorm": 0.5}, {"clipnorm": 0.5}])
def test_the_norm_of_the_gradient_is_told_where_clipping_needs_it(
    clip: dict[str, float], backend: str
) -> None:
    with DistNadam(num_shards=3, num_workers=2, backend=backend, **clip).build(
        params()
    ) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(2)]
        for ticket in [w.push(gradients(0, w.rank)) for w in workers]:
            ticket.result()
        mean = optree.tree_map(
            lambda a, b: (np.float64(a) + np.float64(b)) / 2, gradients(0, 0), gradients(0, 1)
        )
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves(mean)))
        assert workers[0].gradient_norm == workers[1].gradient_norm
        assert workers[0].gradient_norm == pytest.approx(norm, rel=1e-6)
        for ticket in [w.push(found_inf=True) for w in workers]:
            ticket.result()
        assert [w.gradient_norm for w in workers] == [None, None]
        optimizer.apply_gradients(mean)
        assert optimizer.worker(0).gradient_norm is None  # has not looked
        told = optimizer.shards.describe().gradient_norm
        assert told == pytest.approx(norm, rel=1e-6)


def test_no_norm_is_told_where_none_is_needed() -> None:
    with DistNadam(backend="local").build(ONES) as optimizer:
        worker = optimizer.worker(0)
        worker.step(ONES)
        assert worker.gradient_norm is None


def test_steps_from_outside_follow_the_scale() -> None:
    with DistNadam(backend="local", loss_scale=SCALE).build(ONES) as optimizer:
        scales = []
        for tree in itertools.islice(itertools.cycle((ONES, ONES, INF)), 7):
            scales.append(optimizer.loss_scale)
            optimizer.apply_gradients(scaled(tree, optimizer.loss_scale))
        assert scales == [1024.0, 1024.0, 2048.0, 1024.0, 1024.0, 2048.0, 1024.0]
        assert (optimizer.iterations, optimizer.skipped) == (5, 2)
