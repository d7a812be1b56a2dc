"""In one process they do what torch's own do, in an ordinary loop of two changed lines."""

import copy
import gc
import inspect
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")

from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import distnadam  # noqa: E402
from distnadam.errors import ConfigError, GradientError, LifecycleError, StructureError  # noqa: E402
from tests.torch.models import PEERS, batches, bits, distance, loss_of, make, train  # noqa: E402

ours = distnadam.torch
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
CLOSE = 5e-6
lr_scheduler = torch.optim.lr_scheduler
SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=40),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=4),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[5],
    ),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [3, 8], 0.3),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 10),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine once": lambda o: lr_scheduler.CosineAnnealingLR(o, 12, 1e-4),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 15, 2.0),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "average": lambda o: torch.optim.swa_utils.SWALR(o, 0.005, anneal_epochs=6),
}


def peer(name: str, params: Any, **settings: Any) -> Any:
    cls, defaults = PEERS[name]
    return cls(params, **{**defaults, **settings})


def groups_of(model: Any) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if n.endswith("weight")], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if n.endswith("bias")], "lr": 5e-3, "eps": 1e-6},
    ]


def test_distnadam_torch_is_there_lazily_and_never_shadows_torch(tmp_path: Path) -> None:
    code = (
        "import sys, distnadam; assert 'torch' not in sys.modules; "
        "import torch; assert torch.optim.NAdam; "
        "assert distnadam.torch.DistNadam.__mro__[2] is torch.optim.Optimizer; "
        "assert sys.modules['torch'] is torch is not distnadam.torch; "
        "assert 'torch' not in distnadam.__all__ and 'torch' in dir(distnadam); "
        "import distnadam.interop.torch; assert 'ray' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "maximize": True, "lr": 1e-3}])
def test_a_loop_ends_where_torch_s_own_class_ends(name: str, settings: dict[str, Any]) -> None:
    one, other = make(), make()
    first = train(one, getattr(ours, name)(one.named_parameters(), **settings), batches(40))
    second = train(other, peer(name, other.parameters(), **settings), batches(40))
    assert distance(one, other) < CLOSE
    assert first == pytest.approx(second, abs=1e-5)


@pytest.mark.parametrize("name", PEERS)
def test_its_arguments_are_torch_s_by_name_place_and_default(name: str) -> None:
    own, (kind, settings) = getattr(ours, name), PEERS[name]
    found, theirs = (inspect.signature(each.__init__).parameters for each in (own, kind))
    left_out = theirs.keys() - found.keys()
    assert left_out <= {"foreach", "capturable", "differentiable", "fused", "amsgrad"}
    for argument, given in found.items():
        if argument != "others":
            assert given.kind == theirs[argument].kind
            assert given.default == settings.get(argument, theirs[argument].default), argument
    positional = [n for n, given in theirs.items() if given.kind is given.POSITIONAL_OR_KEYWORD]
    shared = [n for n in positional if n != "amsgrad"]
    assert [*found][: len(shared)] == shared
    weight = torch.nn.Parameter(torch.ones(1))
    defaults = own([weight]).defaults
    assert defaults.items() <= kind([weight], **settings).defaults.items()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_steps_it_as_it_steps_torch_s(name: str) -> None:
    one, other = make(), make()
    a, b = ours.DistNadam(groups_of(one)), torch.optim.NAdam(groups_of(other))
    train(one, a, batches(30), SCHEDULERS[name](a))
    train(other, b, batches(30), SCHEDULERS[name](b))
    assert distance(one, other) < CLOSE
    assert [g["lr"] for g in a.param_groups] == [g["lr"] for g in b.param_groups]


def test_no_scheduler_of_torch_is_left_out() -> None:
    tried = [schedule(ours.DistNadam(make().parameters())) for schedule in SCHEDULERS.values()]
    parts = [part for each in tried for part in getattr(each, "_schedulers", ())]
    found = {type(each).__name__ for each in [*tried, *parts]} | {"ReduceLROnPlateau"}
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= found


def test_a_plateau_and_a_tensor_as_learning_rate() -> None:
    one, other = make(), make()
    rates = torch.tensor(1e-2), torch.tensor(1e-2)
    a = ours.DistAdamW(one.parameters(), lr=rates[0])
    b = torch.optim.AdamW(other.parameters(), lr=rates[1])
    for model, optimizer, rate in ((one, a, rates[0]), (other, b, rates[1])):
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        for batch in batches(10):
            train(model, optimizer, [batch])
            plateau.step(1.0)
            rate.mul_(0.9)
    assert distance(one, other) < CLOSE


def test_groups_may_change_any_of_their_own_settings_between_steps() -> None:
    one, other = make(), make()
    a, b = ours.DistNadamW(groups_of(one)), peer("DistNadamW", groups_of(other))
    for model, optimizer in ((one, a), (other, b)):
        train(model, optimizer, batches(5))
        optimizer.param_groups[0].update(weight_decay=0.5, eps=1e-4)
        optimizer.param_groups[1]["lr"] = 1e-4
        train(model, optimizer, batches(5, 2))
    assert distance(one, other) < CLOSE
    a.param_groups[0]["momentum_decay"] = 1.0
    with pytest.raises(ConfigError, match=r"parameter group 1: momentum_decay=0\.004, and group 0"):
        train(one, a, batches(1))


def test_a_setting_that_is_changed_in_place_counts_at_the_next_step() -> None:
    one, other = make(), make()
    for model, cls in ((one, ours.DistNadam), (other, torch.optim.NAdam)):
        rate, betas = torch.tensor(0.01), [0.9, 0.99]
        optimizer = cls(model.parameters(), lr=rate, betas=betas)
        for step, batch in enumerate(batches(8)):
            if step == 2:
                rate.fill_(0.003)
            if step in (3, 4):
                betas[step % 2] = 0.8
            if step == 6:
                optimizer.param_groups[0] |= {"eps": 1e-3, "weight_decay": 0.1}
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    assert distance(one, other) < CLOSE


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    model, calls = make(), []
    optimizer = ours.DistNadam(model.parameters())

    def closure() -> Any:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, batches(1)[0])
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() > 0
    assert calls == [True]


def test_hooks_come_before_and_after_a_step_also_those_of_all_optimizers() -> None:
    model, seen = make(), []
    optimizer = ours.DistNadam(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    every = register_optimizer_step_post_hook(lambda *_: seen.append("all"))
    train(model, optimizer, batches(1))
    every.remove()
    assert seen == ["before", "after", "all"]


def test_tied_weights_count_once() -> None:
    class Tied(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x: Any) -> Any:
            return self.second(self.first(x).tanh())[:, :2]

    one, other = Tied(), Tied()
    train(one, ours.DistNadam(one.named_parameters()), batches(10))
    train(other, torch.optim.NAdam(other.parameters()), batches(10))
    assert distance(one, other) < CLOSE and one.second.weight is one.first.weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_of_another_dtype_has_masters_of_at_least_float32(dtype: Any) -> None:
    model, exact = make(dtype=dtype), make(dtype=torch.float64)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    optimizer = ours.DistNadam(model.named_parameters(), lr=1e-4)
    train(model, optimizer, batches(30, dtype=dtype))
    train(exact, torch.optim.NAdam(exact.parameters(), lr=1e-4), batches(30, dtype=torch.float64))
    limit = 1e-11 if dtype == torch.float64 else 3e-3
    assert distance(model.double(), exact) < limit
    assert next(iter(optimizer.state.values()))["exp_avg"].dtype in (torch.float32, torch.float64)


def masters(optimizer: Any) -> list[bytes]:
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    return [optimizer.state[tensor]["master"].numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_changed_in_a_half_model_leaves_the_masters_of_other_tensors(dtype: Any) -> None:
    seen = []
    for is_clamped in (False, True):
        model = make(dtype=dtype)
        optimizer = ours.DistNadam(model.named_parameters(), lr=1e-5, num_shards=2, backend="local")
        for batch in batches(20, dtype=dtype):
            optimizer.zero_grad()
            model[:2](batch).square().mean().backward()
            optimizer.step()
            if is_clamped:
                model[2].weight.data.mul_(0.5)
        seen.append(masters(optimizer))
    plain, clamped = seen
    assert plain[:2] == clamped[:2] and plain[2] != clamped[2]
    assert plain[0] != make(dtype=dtype)[0].weight.detach().float().numpy().tobytes()


@pytest.mark.parametrize("how", ["checkpoint", "state_dict", "late", "deepcopy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_model_that_is_saved_goes_on_with_the_same_masters(
    dtype: Any, how: str, tmp_path: Path
) -> None:
    one, other = make(dtype=dtype), make(9, dtype=dtype)
    a = ours.DistNadam(one.named_parameters(), lr=1e-4, num_shards=2, backend="local")
    b = ours.DistNadam(other.named_parameters(), lr=1e-4)
    train(one, a, batches(10, dtype=dtype))
    if how == "late":
        train(other, b, batches(3, dtype=dtype))
    if how == "deepcopy":
        other, b = copy.deepcopy((one, a))
    elif how == "state_dict":
        other.load_state_dict(one.state_dict())
        b.load_state_dict(a.state_dict())
    else:
        b.load(a.save(str(tmp_path)))
    assert masters(a) == masters(b)
    for model, optimizer in ((one, a), (other, b)):
        train(model, optimizer, batches(10, 2, dtype=dtype))
    assert masters(a) == masters(b)


def test_a_state_without_masters_leaves_them_and_another_model_has_its_own() -> None:
    one, other = make(dtype=torch.bfloat16), make(9, dtype=torch.bfloat16)
    a = ours.DistNadam(one.named_parameters(), lr=1e-4)
    b = ours.DistNadam(other.named_parameters(), lr=1e-4)
    for model, optimizer in ((one, a), (other, b)):
        train(model, optimizer, batches(10, dtype=torch.bfloat16))
    before, state = masters(a), a.state_dict()
    for each in state["state"].values():
        del each["master"]
        each["exp_avg"] = each["exp_avg"].bfloat16()
    a.load_state_dict(state)
    assert masters(a) == before
    b.load_state_dict(a.state_dict())  # of the moments alone
    train(other, b, batches(1, dtype=torch.bfloat16))
    for p in other.parameters():
        assert b.state[p]["master"].to(torch.bfloat16).tolist() == p.tolist()


def test_a_half_model_without_memory_has_a_state() -> None:
    with torch.device("meta"):
        model = make(dtype=torch.bfloat16)
    optimizer = ours.DistNadam(model.named_parameters())
    assert float(optimizer.state[model[0].weight]["step"]) == 0.0


def test_a_view_a_strided_and_a_transposed_parameter_are_updated_where_they_lie() -> None:
    storage = torch.ones(4, 6, 2)
    tensors = [storage[..., 0].requires_grad_(), torch.ones(3, 5).T.requires_grad_()]
    tensors += [torch.ones((), requires_grad=True), torch.ones(0, 3, requires_grad=True)]
    tensors += [torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()]
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    a, b = ours.DistNadam(tensors), torch.optim.NAdam(copies)
    for _ in range(5):
        for some, optimizer in ((tensors, a), (copies, b)):
            optimizer.zero_grad()
            sum((t * t).sum() for t in some).backward()  # type: ignore[union-attr]
            optimizer.step()
    assert all(torch.allclose(s, t, atol=1e-6) for s, t in zip(tensors, copies, strict=True))
    assert (storage[..., 1] == 1).all() and (storage[..., 0] != 1).all()


# -- gradients


def test_two_backward_passes_add_up_and_zero_grad_begins_again() -> None:
    one, other = make(), make()
    a, b = ours.DistNadam(one.parameters()), torch.optim.NAdam(other.parameters())
    for step, pair in enumerate(zip(batches(12), batches(12, 5), strict=True)):
        for model, optimizer in ((one, a), (other, b)):
            for batch in pair:
                loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=bool(step % 2))
    assert distance(one, other) < CLOSE


def test_every_way_to_change_a_gradient_before_the_step_counts() -> None:
    one, other = make(), make()
    a, b = ours.DistNadam(one.parameters()), torch.optim.NAdam(other.parameters())
    for step, batch in enumerate(batches(12)):
        for model, optimizer in ((one, a), (other, b)):
            loss_of(model, batch).backward()
            first, second, third, fourth = model.parameters()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            first.grad.data.clamp_(-0.01, 0.01)
            second.grad = second.grad * 2
            third.grad.mul_(step)
            fourth.grad = torch.full_like(fourth, 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert distance(one, other) < CLOSE


@pytest.mark.parametrize("keep", [lambda g: g, lambda g: g.detach(), lambda g: g.view(-1)])
def test_a_gradient_that_is_kept_stays_as_it_was_or_the_step_says_why_not(keep: Any) -> None:
    model = make()
    optimizer = ours.DistNadam(model.parameters())
    data = batches(4)
    train(model, optimizer, data[:2])
    loss_of(model, data[2]).backward()
    kept = [keep(p.grad) for p in model.parameters()]
    before = [g.clone() for g in kept]
    optimizer.zero_grad()
    loss_of(model, data[3]).backward()
    if keep(before[0]) is before[0]:
        optimizer.step()
    else:
        with pytest.raises(
            GradientError, match=r"a view of an earlier gradient of 'param0' is kept"
        ):
            optimizer.step()
    assert all(torch.equal(g, h) for g, h in zip(kept, before, strict=True))
    del kept
    optimizer.step()


def test_gradients_of_two_losses_can_be_told_apart_as_gradient_surgery_does() -> None:
    one, other = make(), make()
    a, b = ours.DistNadam(one.parameters()), torch.optim.NAdam(other.parameters())
    for first, second in zip(batches(8), batches(8, 3), strict=True):
        for model, optimizer in ((one, a), (other, b)):
            kept = []
            for batch in (first, second):
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                kept.append([p.grad for p in model.parameters()])
            for p, g, h in zip(model.parameters(), *kept, strict=True):
                p.grad = torch.where(g * h > 0, g + h, 0.0)
            optimizer.step()
    assert distance(one, other) < CLOSE


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_graph_of_the_gradient_stays_one() -> None:
    one, other = make(), make()
    a, b = ours.DistNadam(one.parameters()), torch.optim.NAdam(other.parameters())
    for batch in batches(6):
        for model, optimizer in ((one, a), (other, b)):
            optimizer.zero_grad()
            loss_of(model, batch).backward(create_graph=True)
            penalty = sum(p.grad.square().sum() for p in model.parameters())
            penalty.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(one, other) < CLOSE


def test_a_sparse_gradient_is_refused_in_torch_s_way() -> None:
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = ours.DistNadam(table.named_parameters())
    for _ in range(2):
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(
            RuntimeError, match="not support sparse gradients, and that of 'weight'"
        ):
            optimizer.step()
        table.weight.grad = None


def test_no_gradient_at_all_is_no_step_and_builds_nothing() -> None:
    model = make()
    optimizer, before = ours.DistNadam(model.parameters()), bits(model)
    assert optimizer.step() is None and optimizer.step(lambda: 3.0) == 3.0
    assert bits(model) == before and not optimizer._held.shards.is_built
    train(model, optimizer, batches(1))
    before = bits(model)
    optimizer.step()
    assert bits(model) == before
    assert {int(s["step"]) for s in optimizer.state.values()} == {1}


def test_infinity_is_refused_and_changes_nothing() -> None:
    model = make()
    optimizer = ours.DistNadam(model.named_parameters())
    train(model, optimizer, batches(2))
    before = bits(model)
    loss_of(model, batches(1)[0]).backward()
    model[0].weight.grad[0, 0] = torch.inf
    with pytest.raises(distnadam.errors.NonFiniteGradient, match=r"0\.weight"):
        optimizer.step()
    assert bits(model) == before
    optimizer.zero_grad()
    train(model, optimizer, batches(1))


def test_a_layer_without_a_gradient_stands_still_as_in_torch() -> None:
    """Frozen at first and later not, not used in one step, and never used."""

    def run(model: Any, optimizer: Any) -> list[Any]:
        unused = model.unused.weight.detach().clone()
        model[0].requires_grad_(False)
        for step, batch in enumerate(batches(14)):
            if step == 4:
                model[0].requires_grad_(True)
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            if step == 8:
                loss = model[2].bias.square().sum()
            loss.backward()
            optimizer.step()
        assert torch.equal(unused, model.unused.weight)
        return [float(optimizer.state[p].get("step", 0)) for p in model.parameters()]

    one, other = make(), make()
    for model in (one, other):
        model.register_module("unused", torch.nn.Identity())
        model.unused = torch.nn.Linear(2, 2)
        model.forward = torch.nn.Sequential(*list(model)[:3]).forward
    with torch.no_grad():
        for p, q in zip(one.unused.parameters(), other.unused.parameters(), strict=True):
            p.copy_(q)
    settings = {"weight_decay": 0.1, "decoupled_weight_decay": True}
    first = run(one, ours.DistNadam(one.named_parameters(), **settings))
    second = run(other, torch.optim.NAdam(other.parameters(), **settings))
    assert distance(one, other) < CLOSE
    assert first == second == [9.0, 9.0, 13.0, 14.0, 0.0, 0.0]


def test_groups_have_betas_of_their_own() -> None:
    def made(model: Any, cls: Any) -> Any:
        groups = groups_of(model)
        groups[0]["betas"] = (0.5, 0.9)
        return cls(groups, betas=(0.8, 0.99))

    one, other = make(), make()
    a, b = made(one, ours.DistNadam), made(other, torch.optim.NAdam)
    for model, optimizer in ((one, a), (other, b)):
        train(model, optimizer, batches(6))
        optimizer.param_groups[1]["betas"] = (0.6, 0.95)
        train(model, optimizer, batches(6, 2))
    assert distance(one, other) < CLOSE
    third = make()
    c = made(third, ours.DistNadam)
    c.load_state_dict(a.state_dict())
    third.load_state_dict(one.state_dict())
    train(one, a, batches(4, 3)), train(third, c, batches(4, 3))
    assert bits(one) == bits(third)


# -- whose parameters win


def test_what_is_written_into_the_parameters_between_steps_is_taken_over() -> None:
    one, other = make(), make()
    a, b = ours.DistNadam(one.parameters()), torch.optim.NAdam(other.parameters())
    saved = make(7).state_dict()
    for step, batch in enumerate(batches(12)):
        for model, optimizer in ((one, a), (other, b)):
            train(model, optimizer, [batch])
            if step == 2:
                model.load_state_dict(saved)
            if step == 4:
                model[0].weight.data.clamp_(-0.1, 0.1)
            if step == 6:
                model[2].bias.data = torch.zeros(2)
            if step == 8:
                with torch.no_grad():
                    model[2].weight[0, 0] = -0.0
    assert distance(one, other) < CLOSE


def test_a_model_that_is_converted_after_the_first_step_is_refused() -> None:
    model = make()
    optimizer = ours.DistNadam(model.named_parameters())
    train(model, optimizer, batches(2))
    model.half()
    model[0].weight.grad = torch.zeros(16, 6, dtype=torch.float16)
    with pytest.raises(
        StructureError, match=r"'0\.weight' is torch\.float16 of shape \(16, 6\) now"
    ):
        optimizer.step()
    model.float()
    model[2].bias.data = torch.zeros(3)
    model[0].weight.grad = torch.zeros(16, 6)
    with pytest.raises(StructureError, match=r"'2\.bias' is torch\.float32 of shape \(3,\) now"):
        optimizer.step()


def test_a_write_in_place_between_backward_passes_is_seen_by_autograd() -> None:
    model = make()
    optimizer = ours.DistNadam(model.named_parameters())
    train(model, optimizer, batches(2))
    loss = loss_of(model, batches(1)[0])
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_that_were_loaded_before_the_first_step_are_where_it_begins() -> None:
    one, other = make(), make(3)
    a = ours.DistNadam(one.parameters())
    one.load_state_dict(other.state_dict())
    train(one, a, batches(10))
    train(other, torch.optim.NAdam(other.parameters()), batches(10))
    assert distance(one, other) < CLOSE


# -- state_dict


@pytest.mark.parametrize("name", PEERS)
def test_the_state_goes_to_torch_s_class_and_comes_back(name: str) -> None:
    one, other = make(), make()
    a, b = getattr(ours, name)(groups_of(one)), peer(name, groups_of(other))
    train(one, a, batches(10))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    other.load_state_dict(one.state_dict())
    train(one, a, batches(5, 2)), train(other, b, batches(5, 2))
    assert distance(one, other) < CLOSE
    third = make()
    c = getattr(ours, name)(groups_of(third))
    c.load_state_dict(b.state_dict())
    third.load_state_dict(other.state_dict())
    train(third, c, batches(5, 3)), train(other, b, batches(5, 3))
    assert distance(third, other) < CLOSE


@pytest.mark.parametrize("name", PEERS)
def test_a_run_that_is_saved_and_loaded_has_the_same_bits(name: str) -> None:
    one = make()
    a = getattr(ours, name)(groups_of(one), num_shards=2, backend="local")
    train(one, a, batches(5))
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": a.state_dict()}, file)
    train(one, a, batches(5, 2))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = make(9)
    b = getattr(ours, name)(groups_of(other))
    b.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["model"])
    train(other, b, batches(5, 2))
    assert bits(one) == bits(other)


def test_the_state_is_zeros_from_construction_and_live_after() -> None:
    model = make()
    optimizer = ours.DistNadam(model.parameters())
    state = optimizer.state[model[0].weight]
    assert float(state["step"]) == 0 and not state["exp_avg"].any()
    train(model, optimizer, batches(3))
    peer_model = make()
    other = torch.optim.NAdam(peer_model.parameters())
    train(peer_model, other, batches(3))
    for p, q in zip(model.parameters(), peer_model.parameters(), strict=True):
        mine, torchs = optimizer.state[p], other.state[q]
        assert mine.keys() == torchs.keys()
        assert all(torch.allclose(mine[k].float(), torchs[k], atol=1e-6) for k in mine)


def test_a_state_that_is_edited_in_place_is_the_next_step_s() -> None:
    one, other = make(), make()
    for model, optimizer in (
        (one, ours.DistNadam(one.parameters())),
        (other, torch.optim.NAdam(other.parameters())),
    ):
        train(model, optimizer, batches(5))
        for state in optimizer.state.values():
            state["exp_avg"].mul_(0.5)
        train(model, optimizer, batches(5, 2))
    assert distance(one, other) < CLOSE


def test_loading_what_is_there_already_changes_nothing() -> None:
    model = make()
    optimizer = ours.DistNadam(model.parameters())
    train(model, optimizer, batches(3))
    epoch = optimizer._held.shards.worker.session.epoch
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    train(model, optimizer, batches(1))
    assert optimizer._held.shards.worker.session.epoch == epoch
    optimizer.load_state_dict(saved)
    train(model, optimizer, batches(1))
    assert optimizer._held.shards.worker.session.epoch > epoch
    assert {int(s["step"]) for s in optimizer.state.values()} == {4}


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (
            lambda s: s["state"][0].update(exp_avg=torch.ones(2)),
            StructureError,
            "exp_avg of 'param0'",
        ),
        (lambda s: s["state"][1].update(step=-1.0), StructureError, "step of 'param1': expected"),
        (lambda s: s["state"][2].update(mu_product=2.0), StructureError, "mu_product of 'param2'"),
        (
            lambda s: s["state"][3].pop("mu_product"),
            StructureError,
            "mu_product of 'param3' is not",
        ),
        (
            lambda s: s["state"][3].update(master=torch.ones(2)),
            StructureError,
            "master of 'param3': it has bits that the parameter has not, and would be lost",
        ),
        (
            lambda s: s["state"][0]["exp_avg_sq"].fill_(-1.0),
            StructureError,
            "exp_avg_sq of 'param0': expected numbers that are finite and at least 0",
        ),
        (
            lambda s: s["param_groups"][0].update(maximize=True),
            ConfigError,
            "maximize=True, and the",
        ),
        (lambda s: s["param_groups"][0].update(amsgrad=True), ConfigError, "amsgrad=True is not"),
        (lambda s: s["param_groups"].pop(), ValueError, "different number of parameter groups"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(
    spoil: Any, error: Any, said: str
) -> None:
    model = make()
    optimizer = ours.DistNadam(model.parameters())
    train(model, optimizer, batches(2))
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    saved["param_groups"][0]["lr"] = 7.0
    spoil(saved)
    with pytest.raises(error, match=said):
        optimizer.load_state_dict(saved)
    now = optimizer.state_dict()
    assert now["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(now["state"][key][name], state[name]) for name in state)


def test_what_users_keep_in_the_state_stays_there() -> None:
    model, twin = make(), make()
    optimizer, plain = ours.DistNadam(model.parameters()), ours.DistNadam(twin.parameters())
    optimizer.state["mine"] = 1
    first, second, *_ = model.parameters()
    optimizer.state[first]["ema"] = kept = torch.ones(3)
    train(model, optimizer, batches(2))
    optimizer.state[second]["note"] = "here"
    kept.add_(1)
    epoch = optimizer._held.shards.worker.session.epoch
    train(model, optimizer, batches(2, 2))
    assert optimizer._held.shards.worker.session.epoch == epoch  # the shards have no part in it
    train(twin, plain, batches(2) + batches(2, 2))
    assert bits(model) == bits(twin)
    assert optimizer.state["mine"] == 1 and optimizer.state[first]["ema"] is kept
    other_model = make()
    other = ours.DistNadam(other_model.parameters())
    other.state[next(other_model.parameters())]["gone"] = 1
    for loaded in (other, other, optimizer):  # another, the same, and what it has
        loaded.load_state_dict(optimizer.state_dict())
        first, second, *_ = (p for group in loaded.param_groups for p in group["params"])
        assert loaded.state["mine"] == 1 and loaded.state[second]["note"] == "here"
        assert torch.equal(loaded.state[first]["ema"], torch.full((3,), 2.0))
        assert "gone" not in loaded.state[first]
    copied = copy.deepcopy(optimizer)
    first = copied.param_groups[0]["params"][0]
    assert torch.equal(copied.state[first]["ema"], torch.full((3,), 2.0))


def test_hooks_of_state_dicts_come_in_order() -> None:
    model, seen = make(), []
    optimizer = ours.DistNadam(model.parameters())
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, s: seen.append("after"))
    optimizer.register_load_state_dict_pre_hook(lambda _, s: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "load", "loaded"]


# -- several, copies, groups


def test_two_optimizers_of_one_program_do_not_meet() -> None:
    def gan(optimizers: list[Any], models: list[Any]) -> None:
        generator, judge = models
        for batch in batches(8):
            for turn, optimizer in enumerate(optimizers):
                fake = generator(batch)
                loss = judge(torch.cat([fake, fake, fake], 1)).mean() * (-1) ** turn
                for each in optimizers:
                    each.zero_grad()
                loss.backward()
                optimizer.step()

    first, second = [make(0), make(1)], [make(0), make(1)]
    gan([ours.DistNadam(m.parameters()) for m in first], first)
    gan([torch.optim.NAdam(m.parameters()) for m in second], second)
    assert max(map(distance, first, second)) < CLOSE


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_is_an_optimizer_of_its_own_from_then_on(how: Any) -> None:
    model = make()
    optimizer = ours.DistNadamW(model.named_parameters(), num_shards=2, backend="local")
    early_model, early = how((model, optimizer))
    train(model, optimizer, batches(4))
    twin_model, twin = how((model, optimizer))
    train(model, optimizer, batches(4, 2))
    train(twin_model, twin, batches(4, 2))
    assert bits(model) == bits(twin_model)
    train(early_model, early, batches(4)), train(early_model, early, batches(4, 2))
    assert bits(model) == bits(early_model)
    assert repr(twin) == repr(optimizer)


def test_a_group_can_be_added_until_the_first_step() -> None:
    one, other = make(), make()
    a, b = ours.DistNadam(one[0].parameters()), torch.optim.NAdam(other[0].parameters())
    for model, optimizer in ((one, a), (other, b)):
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01})
        train(model, optimizer, batches(5))
    assert distance(one, other) < CLOSE
    with pytest.raises(LifecycleError, match="add_param_group: the shards were built at the first"):
        a.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
    assert len(a.param_groups) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1.0}, r"Invalid learning rate: -1\.0"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"betas": (torch.tensor(0.9), torch.ones(2))}, r"Tensor betas\[1\] must be 1-element"),
        ({"betas": (0.9, torch.tensor(0.99))}, "betas must be either both floats or both Tensors"),
        ({"betas": (1.0, 0.9)}, r"Invalid beta parameter at index 0: 1\.0"),
        ({"betas": (0.9, -1.0)}, r"Invalid beta parameter at index 1: -1\.0"),
        ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
        ({"weight_decay": -0.1}, r"Invalid weight_decay value: -0\.1"),
        ({"momentum_decay": -0.2}, r"Invalid momentum_decay value: -0\.2"),
        ({"num_shards": 0}, "num_shards"),
        ({"num_workers": 2}, "num_workers=2 needs rank too"),
        ({"backend": "remote"}, "backend must be"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ours.DistNadam(make().parameters(), **settings)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("w", "w"), "two parameters are called 'w'"),
        (("w", "layer*"), r"a parameter's name must be a str such as .* got 'layer\*'"),
        (("", "w"), "a parameter's name must be a str"),
        ((1, "w"), "a parameter's name must be a str"),
    ],
)
def test_a_name_that_is_no_tensor_s_own_is_refused(names: Any, said: str) -> None:
    first, second = make()[0].parameters()
    with pytest.raises(ConfigError, match=said):
        ours.DistNadam([(names[0], first), (names[1], second)])
    optimizer = ours.DistNadam([("other", make()[2].weight)])
    with pytest.raises(ConfigError, match=said):
        optimizer.add_param_group({"params": [(names[0], first), (names[1], second)]})
    assert len(optimizer.param_groups) == 1


def test_an_optimizer_that_is_dropped_takes_its_hooks_and_shards_with_it() -> None:
    model = make()
    optimizer = ours.DistNadam(model.parameters())
    train(model, optimizer, batches(2))
    held = optimizer._held
    del optimizer
    gc.collect()
    with pytest.raises(LifecycleError):
        held.shards.read()
    loss_of(model, batches(1)[0]).backward()
    train(model, ours.DistNadam(model.parameters()), batches(2))


# -- loss scales


@pytest.mark.parametrize("scaler", ["torch", "ours"])
def test_a_scaler_skips_a_step_that_overflowed_and_halves_the_scale(scaler: str) -> None:
    def run(model: Any, optimizer: Any, scaler: Any) -> list[float]:
        scales = []
        for step, batch in enumerate(batches(8)):
            optimizer.zero_grad()
            loss = loss_of(model, batch) * (torch.inf if step in (2, 5) else 1.0)
            scaler.scale(loss).backward()
            if step % 2:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    one, other = make(), make()
    made = {"torch": torch.amp.GradScaler, "ours": ours.GradScaler}[scaler]
    settings = {"device": "cpu", "init_scale": 256.0, "growth_interval": 2}
    first = run(one, ours.DistNadam(one.parameters()), made(**settings))
    second = run(other, torch.optim.NAdam(other.parameters()), torch.amp.GradScaler(**settings))
    assert first == second and distance(one, other) < CLOSE
