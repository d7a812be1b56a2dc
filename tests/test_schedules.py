"""Learning-rate schedules: their values, plain data and back, and refusals."""

import json
import math
import subprocess
import sys
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle

from distnadam import DistNadam
from distnadam.errors import ConfigError
from distnadam.schedules import (
    Constant,
    CosineRestarts,
    Exponential,
    InverseSquareRoot,
    OneCycle,
    Piecewise,
    Polynomial,
    Rate,
    Schedule,
    Sequential,
    Warmup,
    WarmupCosine,
    rate_at,
    rate_from,
    rate_to_dict,
)

ALL = [
    Constant(0.1),
    Exponential(0.1, 10, 0.9),
    Exponential(0.1, 10, 0.9, staircase=True),
    WarmupCosine(0.1, 10, 110, 0.01),
    Piecewise((5, 10), (0.3, 0.2, 0.1)),
    OneCycle(0.1, 100, anneal_strategy="linear", three_phase=True),
    CosineRestarts(0.1, 10, 2, 0.01),
    Polynomial(0.1, 100, 2.0, 0.01),
    InverseSquareRoot(0.1, 100),
]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(0.1), {0: 0.1, 10**6: 0.1}),
        (Exponential(0.1, 10, 0.5), {0: 0.1, 10: 0.05, 5: 0.1 * 0.5**0.5}),
        (
            Exponential(0.1, 10, 0.5, staircase=True),
            {0: 0.1, 9: 0.1, 10: 0.05, 19: 0.05, 20: 0.025},
        ),
        (WarmupCosine(1.0, 4, 104, 0.5), {0: 0.25, 3: 1.0, 4: 1.0, 54: 0.75, 104: 0.5, 10**6: 0.5}),
        (WarmupCosine(1.0, 0, 10), {0: 1.0, 5: 0.5, 10: 0.0}),
        (Piecewise((5, 10), (3.0, 2.0, 1.0)), {0: 3.0, 5: 3.0, 6: 2.0, 10: 2.0, 11: 1.0}),
        (Piecewise((), (3.0,)), {0: 3.0, 99: 3.0}),
        (
            OneCycle(1.0, 11, 3 / 11, "cos", 4.0, 5.0),
            {0: 0.25, 1: 0.625, 2: 1.0, 6: 0.525, 10: 0.05, 11: 0.05, 10**6: 0.05},
        ),
        (
            OneCycle(1.0, 9, 3 / 9, "linear", 4.0, 5.0, three_phase=True),
            {0: 0.25, 1: 0.625, 2: 1.0, 3: 0.625, 4: 0.25, 6: 0.15, 8: 0.05, 9: 0.05},
        ),
        (OneCycle(1.0, 1), {0: 4e-6, 1: 4e-6}),
        (OneCycle(1.0, 10, 0.1), {0: 1.0, 9: 4e-6}),
        (OneCycle(1.0, 10, 1.0, "linear", 2.0), {0: 0.5, 9: 1.0, 10: 1.0}),
        (CosineRestarts(1.0, 2, final=0.5), {0: 1.0, 1: 0.75, 2: 1.0, 3: 0.75, 10**9 + 1: 0.75}),
        (CosineRestarts(1.0, 2, 3), {0: 1.0, 1: 0.5, 2: 1.0, 5: 0.5, 8: 1.0, 17: 0.5, 26: 1.0}),
        (Polynomial(1.0, 4, 3.0, 0.5), {0: 1.0, 2: 0.5625, 3: 0.5078125, 4: 0.5, 10**6: 0.5}),
        (Polynomial(0.0, 4, final=1.0), {0: 0.0, 1: 0.25, 4: 1.0, 5: 1.0}),
        (InverseSquareRoot(1.0, 4), {0: 1.0, 12: 0.5, 5: 2 / 3, 396: 0.1}),
        (Warmup(0.5, 2), {0: 0.25, 1: 0.5, 2: 0.5, 10**6: 0.5}),
        (Warmup(Polynomial(1.0, 4), 2, 0.0), {0: 0.0, 1: 0.5, 2: 1.0, 3: 0.75, 6: 0.0}),
        (Warmup(Polynomial(1.0, 4), 0), {0: 1.0, 1: 0.75}),
        (
            Sequential((1.0, Polynomial(1.0, 4), Constant(2.0)), (3, 5)),
            {0: 1.0, 2: 1.0, 3: 1.0, 4: 0.75, 5: 2.0, 10**6: 2.0},
        ),
        (Sequential((1.0,), ()), {0: 1.0, 9: 1.0}),
    ],
    ids=repr,
)
def test_values_at_the_turning_points(schedule: Schedule, values: dict[int, float]) -> None:
    assert {step: schedule(step) for step in values} == {
        step: pytest.approx(value, rel=1e-14, abs=1e-16) for step, value in values.items()
    }


def test_one_cycle_is_its_formula_written_out() -> None:
    schedule = OneCycle(0.3, 47, 0.37)
    first, last, turn = 0.3 / 25, 0.3 / 25 / 1e4, 0.37 * 47 - 1
    for step in range(47):
        if step <= turn:
            expected = 0.3 + (first - 0.3) * (1 + math.cos(math.pi * step / turn)) / 2
        else:
            part = (step - turn) / (46 - turn)
            expected = last + (0.3 - last) * (1 + math.cos(math.pi * part)) / 2
        assert schedule(step) == pytest.approx(expected, rel=1e-12, abs=1e-16)


def test_cosine_restarts_are_their_formula_written_out() -> None:
    schedule = CosineRestarts(0.3, 5, 2, 0.1)
    lengths = [5] * 5 + [10] * 10 + [20] * 20
    places = [*range(5), *range(10), *range(20)]
    for step, (place, length) in enumerate(zip(places, lengths, strict=True)):
        expected = 0.1 + 0.2 * (1 + math.cos(math.pi * place / length)) / 2
        assert schedule(step) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.7])
def test_a_polynomial_is_its_formula_written_out(power: float) -> None:
    schedule = Polynomial(0.3, 60, power, 0.1)
    for step in range(61):
        expected = 0.1 + 0.2 * (1 - step / 60) ** power
        assert schedule(step) == pytest.approx(expected, rel=1e-14)


def test_a_warm_up_and_an_inverse_square_root_are_the_papers_rate() -> None:
    model, warmup = 512, 40
    schedule = Warmup(
        InverseSquareRoot((model * warmup) ** -0.5, warmup),
        steps=warmup - 1,
        initial=(model * warmup) ** -0.5 / warmup,
    )
    for number in range(1, 200):  # the paper counts from 1
        expected = model**-0.5 * min(number**-0.5, number * warmup**-1.5)
        assert schedule(number - 1) == pytest.approx(expected, rel=1e-14)


def test_a_warm_up_rises_as_that_before_a_cosine_does() -> None:
    whole, parts = WarmupCosine(0.3, 7, 107), Warmup(WarmupCosine(0.3, 0, 100), 7)
    assert [whole(step) for step in range(120)] == [parts(step) for step in range(120)]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_a_schedule_goes_to_plain_data_and_back(schedule: Schedule) -> None:
    plain = rate_to_dict(schedule)
    assert isinstance(plain, dict)
    assert all(
        isinstance(value, (int, float, bool, str, list)) for value in plain["config"].values()
    )
    assert rate_from(plain) == schedule


def test_a_users_schedule_is_registered_when_it_is_defined() -> None:
    @dataclass(frozen=True)
    class Halving(Schedule):
        start: float

        def __call__(self, step: int) -> float:
            return self.start / 2**step

    assert rate_from(rate_to_dict(Halving(1.0)))(3) == 0.125  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exponential(0.1, 0, 0.9), "Exponential: decay_steps must be at least 1, got 0"),
        (lambda: Exponential(0.1, 1, -0.9), "Exponential: decay_rate must be at least 0, got -0.9"),
        (
            lambda: WarmupCosine(0.1, -1, 10),
            "WarmupCosine: warmup_steps must be at least 0, got -1",
        ),
        (
            lambda: WarmupCosine(0.1, 10, 10),
            "WarmupCosine: total_steps must be more than warmup_steps, got 10",
        ),
        (
            lambda: Piecewise((1, 2), (0.1, 0.2)),
            r"Piecewise: rates must be one longer than boundaries, got \(0.1, 0.2\)",
        ),
        (
            lambda: Piecewise((2, 1), (0.1, 0.2, 0.3)),
            r"Piecewise: boundaries must be increasing, got \(2, 1\)",
        ),
        (
            lambda: OneCycle(0.1, 10, 1.5),
            r"OneCycle: pct_start must be in \[0, 1\], got 1.5",
        ),
        (
            lambda: OneCycle(0.1, 10, 0.6, three_phase=True),
            r"OneCycle: pct_start must be in \[0, 0.5\] with three_phase, got 0.6",
        ),
        (
            lambda: OneCycle(0.1, 10, anneal_strategy="cosine"),  # type: ignore[arg-type]
            "OneCycle: anneal_strategy must be 'cos' or 'linear', got 'cosine'",
        ),
        (
            lambda: OneCycle(0.1, 10.5),  # type: ignore[arg-type]
            "OneCycle: total_steps must be a whole number of at least 1, got 10.5",
        ),
        (
            lambda: OneCycle(0.1, 10, div_factor=0),
            "OneCycle: div_factor must be above 0, got 0.0",
        ),
        (
            lambda: OneCycle(0.1, 10, three_phase="no"),  # type: ignore[arg-type]
            "OneCycle: three_phase must be True or False, got 'no'",
        ),
        (
            lambda: CosineRestarts(0.1, 10, 0),
            "CosineRestarts: growth must be a whole number of at least 1, got 0",
        ),
        (
            lambda: CosineRestarts(math.inf, 10),
            "CosineRestarts: peak must be finite and at least 0, got inf",
        ),
        (lambda: Polynomial(0.1, 10, 0.0), "Polynomial: power must be above 0, got 0.0"),
        (
            lambda: Polynomial(-0.1, 10),
            "Polynomial: initial must be finite and at least 0, got -0.1",
        ),
        (
            lambda: InverseSquareRoot(0.1, 0),
            "InverseSquareRoot: timescale must be above 0, got 0.0",
        ),
        (
            lambda: Warmup(0.1, -1),
            "Warmup: steps must be a whole number of at least 0, got -1",
        ),
        (
            lambda: Warmup(lambda step: 0.1, 5),  # type: ignore[arg-type]
            "Warmup: schedule must be a number or a Schedule, got <function",
        ),
        (
            lambda: Warmup(Constant, 5),  # type: ignore[arg-type]
            r"Warmup: schedule must be a number or a Schedule, .*give an instance, Constant\(",
        ),
        (
            lambda: Warmup("0.1", 5),  # type: ignore[arg-type]
            "Warmup: schedule must be a number, got '0.1'",
        ),
        (
            lambda: Sequential((0.1, 0.2), ()),
            r"Sequential: boundaries must be one fewer than schedules, got \(\)",
        ),
        (
            lambda: Sequential((0.1, 0.2, 0.3), (5, 5)),
            r"Sequential: boundaries must be increasing, got \(5, 5\)",
        ),
        (
            lambda: Sequential((0.1, 0.2), (0,)),
            r"Sequential: boundaries\[0\] must be a whole number of at least 1, got 0",
        ),
        (
            lambda: Sequential((0.1, None), (1,)),  # type: ignore[arg-type]
            r"Sequential: schedules\[1\] must be a number, got None",
        ),
        (
            lambda: Sequential(Constant(0.1), ()),  # type: ignore[arg-type]
            r"Sequential: schedules must be a tuple, got Constant\(rate=0.1\)",
        ),
        (
            lambda: rate_at(lambda step: math.nan, 7),
            "lr at step 7 must be finite and at least 0, got nan",
        ),
        (
            lambda: rate_at(Constant(-1.0), 0),
            "lr at step 0 must be finite and at least 0, got -1.0",
        ),
        (
            lambda: rate_from({"class_name": "Cubic", "config": {}}),
            "lr: unknown schedule 'Cubic'; known are .*WarmupCosine",
        ),
        (
            lambda: rate_from({"class_name": "Constant", "config": {"x": 1}}),
            "lr: schedule Constant does not take {'x': 1}",
        ),
        (
            lambda: rate_from({"class_name": "Constant", "config": 5}),
            "lr: config of schedule Constant must be a mapping, got 5",
        ),
        (lambda: DistNadam(lr=WarmupCosine), "lr is the class WarmupCosine: give an instance"),
        (
            lambda: rate_to_dict(lambda step: 0.1),
            "is a plain function, which a checkpoint cannot store",
        ),
    ],
)
def test_a_bad_schedule_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        make()


@dataclass(frozen=True)
class Then(Schedule):
    first: Rate
    second: Rate
    at: int

    def __call__(self, step: int) -> float:
        return rate_at(self.first, step) if step < self.at else rate_at(self.second, step - self.at)


@dataclass(frozen=True)
class Table(Schedule):
    rates: Any

    def __call__(self, step: int) -> float:
        return float(self.rates[min(step, len(self.rates) - 1)])


@dataclass(frozen=True)
class Named(Schedule):
    by_name: dict[str, Any]
    rate: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", float(len(self.by_name)))

    def __call__(self, step: int) -> float:
        return self.rate


@dataclass(frozen=True, slots=True)
class Slotted(Schedule):
    rate: float

    def __call__(self, step: int) -> float:
        return self.rate


@dataclass(frozen=True)
class Wrapped(Constant):
    pass


COMPOSED = [
    Then(Constant(0.1), Then(0.2, WarmupCosine(0.1, 1, 5), 3), 2),
    Table(np.array([0.1, 0.2])),
    Table(np.float32([0.1, np.nan])),
    Table(((0, 0.1), [1, (2, 0.3)])),
    Table([Constant(0.1), {"then": (Constant(0.2),)}]),
    Table({"class_name": "Constant", "config": {"rate": 1.0}}),
    Table((math.inf, 2**70, "\udcff", b"\xff", None, True)),
    Named({"class_name": 1, "config": 2, 3: (4,)}),  # type: ignore[dict-item]
    Constant(np.float32(0.1)),  # type: ignore[arg-type]
    Slotted(0.5),
    Wrapped(0.5),
    Warmup(OneCycle(0.1, 10), 5),
    Sequential((0.1, Warmup(CosineRestarts(0.1, 5), 3, 0.0), Constant(0.2)), (4, 9)),
]


def of(schedule: Schedule) -> Schedule:
    """The schedule that comes back from a config written as JSON."""
    config = json.loads(json.dumps(DistNadam(lr=schedule).get_config(), allow_nan=False))
    return DistNadam.from_config(config).lr  # type: ignore[return-value]


@pytest.mark.parametrize("schedule", COMPOSED, ids=lambda s: type(s).__name__)
def test_a_schedule_made_of_anything_that_is_kept_comes_back_equal(schedule: Schedule) -> None:
    back = of(schedule)
    assert back == schedule
    assert type(back) is type(schedule)
    assert repr(back) == repr(schedule)  # tells tuples from lists, and a float32 from a float


def test_a_restored_optimizer_has_the_composed_schedule(tmp_path: Path) -> None:
    with DistNadam(lr=COMPOSED[0], backend="local").build({"w": np.ones(2)}) as optimizer:
        optimizer.apply_gradients({"w": np.ones(2)})
        path = optimizer.save(tmp_path)
    with DistNadam.restore(path, backend="local") as restored:
        assert restored.lr == COMPOSED[0]


def test_schedules_of_other_values_or_types_are_not_equal() -> None:
    assert Table(np.array([0.1])) != Table(np.array([0.2]))
    assert Table(np.array([0.1])) != Table([0.1])
    assert Table((0.1,)) != Table([0.1])
    assert Constant(0.5) != Wrapped(0.5)
    assert len({Constant(0.5), Constant(0.5), Constant(0.25)}) == 2


def test_what_an_optimizer_was_given_is_what_it_keeps() -> None:
    rates = np.array([0.1, 0.2])
    with DistNadam(lr=Table(rates), backend="local").build({"w": np.ones(2)}) as optimizer:
        rates[:] = 9.0
        optimizer.lr.rates[:] = 9.0  # type: ignore[union-attr]
        assert optimizer.lr == Table(np.array([0.1, 0.2]))
        optimizer.lr = Table(rates)
        rates[:] = 5.0
        assert optimizer.lr == Table(np.array([9.0, 9.0]))


@dataclass
class Thawed(Schedule):
    rate: float = 0.1

    def __call__(self, step: int) -> float:
        return self.rate


@dataclass(frozen=True)
class Scaled(Schedule):
    rate: float
    scale: InitVar[float]

    def __post_init__(self, scale: float) -> None:
        object.__setattr__(self, "rate", self.rate * scale)

    def __call__(self, step: int) -> float:
        return self.rate


@dataclass(frozen=True)
class Doubled(Schedule):
    rate: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", self.rate * 2)

    def __call__(self, step: int) -> float:
        return self.rate


class Undeclared(Schedule):
    def __call__(self, step: int) -> float:
        return 0.1


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Then(Constant(0.1), lambda step: 0.1, 2), r"^lr: Then.second: expected .* function"),
        (Table({1, 2}), r"^lr: Table.rates: expected .*, got set"),
        (Then(Table([Path("x")]), 0.1, 1), r"^lr: Then.first: Table.rates\[0\]: .* PosixPath"),
        (Table(np.array([None])), "^lr: Table.rates: .* dtype object"),
        (Thawed(), r"^lr=Thawed\(rate=0.1\): a Schedule must be a frozen dataclass"),
        (Undeclared(), "a Schedule must be a frozen dataclass"),
        (Scaled(0.1, 2.0), "cannot be made again of its fields rate: TypeError: .*'scale'"),
        (Doubled(0.1), r"made again of its fields, it is Doubled\(rate=0.4\)"),
        (Then(Undeclared(), 0.1, 1), "^lr: Then.first=.*must be a frozen dataclass"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_schedule_that_no_checkpoint_holds_is_refused_at_once(
    schedule: Schedule, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DistNadam(lr=schedule)
    with DistNadam(backend="local").build({"w": np.ones(2)}) as optimizer:
        with pytest.raises(ConfigError, match=message):
            optimizer.lr = schedule
        assert optimizer.lr == 0.002


def test_schedules_nested_without_end_are_refused() -> None:
    nested: Rate = 0.1
    for _ in range(400):
        nested = Then(nested, 0.1, 1)
    with pytest.raises(ConfigError, match="deeper than"):
        DistNadam(lr=nested)


def local_classes() -> list[type[Schedule]]:
    """Classes that pickle by value, as those of a script or a notebook do."""

    @dataclass(frozen=True)
    class Halved(Schedule):
        rate: float

        def __call__(self, step: int) -> float:
            return self.rate / (1 + step)

    @dataclass(frozen=True)
    class Extended(Constant):
        floor: float = 0.0

    class Inherited(Constant):
        pass

    @dataclass(frozen=True, slots=True)
    class InSlots(Schedule):
        rate: float

        def __call__(self, step: int) -> float:
            return self.rate

    return [Halved, Extended, Inherited, InSlots]


@pytest.mark.parametrize("kind", local_classes(), ids=lambda kind: kind.__name__)
def test_a_class_that_came_back_from_ray_is_still_the_schedule_of_its_name(
    kind: type[Schedule],
) -> None:
    schedule = kind(0.25)  # type: ignore[call-arg]
    for _ in range(2):
        returned = cloudpickle.loads(cloudpickle.dumps(schedule))
        cloudpickle.loads(cloudpickle.dumps(kind))
    assert type(returned) is kind
    assert returned == schedule
    assert type(of(schedule)) is kind
    assert of(schedule) == schedule


ELSEWHERE = """
import sys
from ray import cloudpickle
from distnadam import DistNadam
raw = sys.stdin.buffer.read()
schedules = [cloudpickle.loads(raw) for _ in range(2)][-1]
for schedule in schedules:
    again = DistNadam.from_config(DistNadam(lr=schedule).get_config()).lr
    assert again == schedule and again(3) == schedule(3), schedule
"""


def test_a_process_that_knows_a_class_only_by_value_can_make_it_again() -> None:
    schedules = [kind(0.25) for kind in local_classes()]  # type: ignore[call-arg]
    raw = cloudpickle.dumps(schedules)
    subprocess.run([sys.executable, "-c", ELSEWHERE], input=raw, check=True, timeout=120)


def test_a_class_defined_again_takes_the_place_of_the_first() -> None:
    first, second = local_classes()[0], local_classes()[0]
    cloudpickle.loads(cloudpickle.dumps(first(0.5)))  # type: ignore[call-arg]
    assert type(rate_from(rate_to_dict(second(0.5)))) is second  # type: ignore[call-arg]


def test_a_class_with_the_name_of_another_modules_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"'Constant' is defined in distnadam.schedules.curves: rename"
    ):

        @dataclass(frozen=True)
        class Constant(Schedule):
            rate: float

            def __call__(self, step: int) -> float:
                return 0.0
