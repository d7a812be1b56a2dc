"""A float32 model whose parameters and gradients are rounded to bfloat16 on their way."""

import copy
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")

import distnadam  # noqa: E402
from distnadam.errors import ConfigError, StructureError  # noqa: E402
from tests.torch.models import batches, bits, loss_of, make, train  # noqa: E402

ours = distnadam.torch


def masters(optimizer: Any) -> list[Any]:
    """The shards' own numbers, as the state has them."""
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    return [optimizer.state[tensor]["master"].clone() for tensor in tensors]


def require_rounded(model: Any, optimizer: Any) -> None:
    """Require the nearest bfloat16s of masters that are none themselves."""
    seen, exact = list(model.parameters()), masters(optimizer)
    for tensor, master in zip(seen, exact, strict=True):
        assert tensor.dtype == master.dtype == torch.float32
        assert torch.equal(tensor, master.bfloat16().float())
    assert not torch.equal(seen[0], exact[0])
    held = optimizer._held.shards.optimizer.get_params()
    for (name, _), master in zip(model.named_parameters(), exact, strict=True):
        assert held[name].tobytes() == master.numpy().tobytes()


@pytest.mark.parametrize("num_shards", [1, 3])
def test_parameters_are_the_masters_nearest_bfloat16_s_after_each_step(num_shards: int) -> None:
    model = make()
    optimizer = ours.DistNadam(
        model.named_parameters(),
        lr=1e-3,
        num_shards=num_shards,
        backend="local",
        pull_dtype="bfloat16",
    )
    plain = copy.deepcopy(model)
    reference = ours.DistNadam(plain.named_parameters(), lr=1e-3)
    for batch in batches(12):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step(), reference.step()
        require_rounded(model, optimizer)
        pairs = zip(masters(optimizer), plain.parameters(), strict=True)
        assert all(torch.equal(master, exact) for master, exact in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_gradients_are_rounded_at_the_step_and_stay_as_they_are(dtype: Any) -> None:
    one, other = make(), make()
    a = ours.DistNadamW(one.named_parameters(), push_dtype=dtype, num_shards=2, backend="local")
    b = ours.DistNadamW(other.named_parameters())
    for turn, batch in enumerate(batches(10)):
        loss_of(one, batch).backward()
        if turn == 4:
            one[2].bias.grad = None
        if turn == 6:
            loss_of(one, batch).backward()
            torch.nn.utils.clip_grad_norm_(one.parameters(), 0.01)
        before = [None if p.grad is None else p.grad.clone() for p in one.parameters()]
        for q, gradient in zip(other.parameters(), before, strict=True):
            q.grad = None if gradient is None else gradient.bfloat16().float()
        a.step(), b.step()
        for p, gradient in zip(one.parameters(), before, strict=True):
            assert gradient is None or torch.equal(p.grad, gradient)
        assert bits(one) == bits(other)
        assert gradient is None or not torch.equal(gradient, gradient.bfloat16().float())
        a.zero_grad()


@pytest.mark.parametrize("how", ["checkpoint", "state_dict", "late", "deepcopy"])
def test_a_saved_model_goes_on_with_the_same_masters(how: str, tmp_path: Path) -> None:
    rounding = {"pull_dtype": "bfloat16", "push_dtype": "bfloat16", "backend": "local"}
    one, other = make(), make(9)
    a = ours.DistNadam(one.named_parameters(), num_shards=2, **rounding)
    b = ours.DistNadam(other.named_parameters(), **rounding)
    train(one, a, batches(10))
    if how == "late":
        train(other, b, batches(3))
    if how == "deepcopy":
        other, b = copy.deepcopy((one, a))
    elif how == "checkpoint":
        b.load(a.save(str(tmp_path)))
        other.load_state_dict(one.state_dict())
    else:
        other.load_state_dict(one.state_dict())
        b.load_state_dict(a.state_dict())
    for model, optimizer in ((one, a), (other, b)):
        train(model, optimizer, batches(10, 2))
        require_rounded(model, optimizer)
    assert bits(one) == bits(other)
    for name in ("master", "exp_avg", "exp_avg_sq", "step", "mu_product"):
        assert all(torch.equal(a.state[p][name], b.state[q][name]) for p, q in pairs(one, other))


@pytest.mark.parametrize("of", ["bfloat16 tensors", "float16 tensors", "pull_dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masters_that_another_optimizer_has_no_place_for_are_refused_or_its_parameters(
    of: str, dtype: Any
) -> None:
    is_rounding = of == "pull_dtype"
    held = torch.float32 if is_rounding else getattr(torch, of.split()[0])
    one, other = make(dtype=held), make(9, dtype=dtype)
    rounding = {"pull_dtype": "bfloat16"} if is_rounding else {}
    a = ours.DistNadam(one.named_parameters(), lr=1e-3, **rounding)
    train(one, a, batches(5, dtype=held))
    other.load_state_dict(one.state_dict())
    b = ours.DistNadam(other.named_parameters(), lr=1e-3)
    before = copy.deepcopy(b.state_dict())
    with pytest.raises(StructureError, match=r"master of '0\.bias': .*pull_dtype='bfloat16'"):
        b.load_state_dict(a.state_dict())
    assert str(b.state_dict()) == str(before)
    for p, master in zip(other.parameters(), masters(a), strict=True):
        p.data.copy_(master)
    b.load_state_dict(a.state_dict())
    for p, q in pairs(one, other):
        p.grad = torch.full_like(p, 0.25)
        q.grad = torch.full_like(q, 0.25)
    a.step(), b.step()
    assert {float(each["step"]) for each in b.state.values()} == {6.0}
    for p, master in zip(other.parameters(), masters(a), strict=True):
        atol = 0.0 if dtype == torch.float32 else 1e-6
        assert torch.allclose(p, master.to(dtype), rtol=0, atol=atol)
        assert "master" not in b.state[p]


def pairs(one: Any, other: Any) -> Any:
    return zip(one.parameters(), other.parameters(), strict=True)


def test_what_is_written_into_a_tensor_is_its_master_and_the_others_keep_theirs() -> None:
    one, other = make(), make()
    a, b = (
        ours.DistNadam(m.named_parameters(), lr=1e-4, pull_dtype="bfloat16") for m in (one, other)
    )
    train(one, a, batches(5)), train(other, b, batches(5))
    before = masters(a)
    with torch.no_grad():
        one[2].weight.fill_(1 / 3)
    one[0].weight.grad = torch.zeros_like(one[0].weight)  # the clocks of all others stand
    a.step()
    after = masters(a)
    assert torch.equal(after[2], torch.full_like(after[2], 1 / 3))
    kept = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert kept == [False, True, False, True]
    require_rounded(one, a)


def test_a_change_that_rounds_to_the_same_before_the_first_step_is_the_master() -> None:
    one, other = make(), make(9)
    a, b = (ours.DistNadam(m.named_parameters(), pull_dtype="bfloat16") for m in (one, other))
    train(one, a, batches(5))
    other.load_state_dict(one.state_dict())
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        other[0].bias.mul_(1 + 2**-20)
    changed = other[0].bias.detach().clone()
    other[0].weight.grad = torch.zeros_like(other[0].weight)
    b.step()
    found = masters(b)
    assert torch.equal(found[1], changed)
    assert torch.equal(found[2], masters(a)[2]) and not torch.equal(found[2], one[2].weight)


def test_tensors_of_every_dtype_and_shape_are_rounded_or_left() -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    shapes: list[Any] = [(), (0, 3), (5, 7)]
    tensors = [
        torch.full(shape, 1 / 3, dtype=dtype, requires_grad=True)
        for dtype in dtypes
        for shape in shapes
    ]
    rounding = {"pull_dtype": "bfloat16", "push_dtype": "bfloat16", "backend": "local"}
    optimizer = ours.DistAdam(tensors, num_shards=2, **rounding)
    for _ in range(3):
        optimizer.zero_grad()
        for tensor in tensors:
            tensor.grad = torch.full_like(tensor, 1 / 7)
        optimizer.step()
    for tensor in tensors:
        state = optimizer.state[tensor]
        if tensor.dtype == torch.float64:
            assert "master" not in state
            assert not tensor.numel() or not torch.equal(tensor, tensor.bfloat16().double())
            continue
        assert torch.equal(tensor, state["master"].bfloat16().to(tensor.dtype))


@pytest.mark.parametrize("name", ["pull_dtype", "push_dtype"])
@pytest.mark.parametrize("given", ["float16", torch.float16, torch.float32, 16, ""])
def test_any_other_dtype_is_refused_by_name(name: str, given: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be None or 'bfloat16', got "):
        ours.DistNadam(make().parameters(), **{name: given})


def test_gradients_that_are_sent_one_by_one_are_not_rounded() -> None:
    with pytest.raises(ConfigError, match=r"push_dtype=torch.bfloat16: overlap=True sends"):
        ours.DistNadam(make().parameters(), overlap=True, push_dtype=torch.bfloat16)


def test_a_vote_and_a_clip_leave_the_masters_and_are_as_without_rounding() -> None:
    model = make()
    optimizer = ours.DistNadam(model.named_parameters(), pull_dtype="bfloat16")
    train(model, optimizer, batches(3))
    before, seen = masters(optimizer), bits(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.vote(True)
    optimizer.step()
    assert bits(model) == seen and optimizer.overflowed
    assert all(torch.equal(x, y) for x, y in zip(before, masters(optimizer), strict=True))
    norm = optimizer.clip_grad_norm_(0.01)
    optimizer.step()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
