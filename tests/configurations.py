"""A Hypothesis strategy of an optimizer's hyper-parameters, as its arguments."""

from typing import Any

from hypothesis import strategies as st

from distnadam import Group, LossScale

A_FEW: list[dict[str, Any]] = [
    {},
    {"formula": "adam", "weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True},
    {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 2},
    {"clocks": "tensor", "groups": [Group("a", beta_1=0.5, weight_decay=0.1)], "use_ema": True},
    {"loss_scale": LossScale(init_scale=4.0, growth_interval=2)},
]
"""Where each example costs much."""
_FORMULAS = st.one_of(
    st.fixed_dictionaries({}, optional={"schedule_decay": st.sampled_from([0.0, 0.1, 1.0])}),
    st.fixed_dictionaries(
        {"formula": st.sampled_from(["nadam_optax", "nadam_algoperf", "adam", "adam_keras"])}
    ),
)
_DECAYS = st.fixed_dictionaries(
    {},
    optional={
        "weight_decay": st.sampled_from([0.01, 0.3]),
        "decoupled_weight_decay": st.booleans(),
        "maximize": st.booleans(),
    },
)
_CLIPS = st.one_of(
    st.fixed_dictionaries({}, optional={"clipvalue": st.sampled_from([0.0, 0.05])}),
    st.fixed_dictionaries({"clipnorm": st.sampled_from([0.1, 0.7])}),
    st.fixed_dictionaries({"global_clipnorm": st.just(1.5), "clipvalue": st.just(0.01)}),
)
_AVERAGES = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"use_ema": st.just(True), "ema_momentum": st.sampled_from([0.0, 0.9])},
        optional={"ema_overwrite_frequency": st.just(2)},
    ),
)
_NUMBERS = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.sampled_from([0.0, 0.002, 0.1]),
        "beta_1": st.sampled_from([0.0, 0.5, 0.95]),
        "beta_2": st.sampled_from([0.0, 0.99]),
        "epsilon": st.sampled_from([1e-8, 1e-3]),
    },
)


def configurations(*patterns: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy of hyper-parameters that may stand together; groups of these patterns have
    betas of their own.

    Epsilon is never 0: beside gradients of 0 the step is 0/0 then, whose sign no law fixes.
    """
    some = st.lists(
        st.sampled_from(patterns or ("**",)), max_size=2 if patterns else 0, unique=True
    )
    betas = st.fixed_dictionaries(
        {},
        optional={
            "beta_1": st.sampled_from([0.0, 0.8, 0.9]),
            "beta_2": st.sampled_from([0.9, 0.99]),
            "lr_scale": st.just(0.5),
        },
    )
    grouped = st.tuples(some, betas, betas).map(
        lambda drawn: {
            "groups": [
                Group(p, **own).to_dict() for p, own in zip(drawn[0], drawn[1:], strict=False)
            ]
        }
    )
    clocks = st.sampled_from([{}, {"clocks": "tensor"}])
    parts = st.tuples(_FORMULAS, _DECAYS, _CLIPS, _NUMBERS, _AVERAGES, grouped, clocks)
    return parts.map(lambda found: {k: v for part in found for k, v in part.items()})
