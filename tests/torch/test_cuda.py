"""Models on a GPU: the same bits as on a CPU by the same gradients, whatever crosses when."""

import copy
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU here that torch can use", allow_module_level=True)

import distnadam  # noqa: E402
from distnadam.errors import GradientError, LifecycleError  # noqa: E402
from distnadam.torch import device_copies  # noqa: E402
from distnadam.torch.arrays import as_torch  # noqa: E402
from distnadam.torch.shards import Shards  # noqa: E402
from tests.torch.models import batches, distance, loss_of, make, train  # noqa: E402

ours = distnadam.torch
GPU = torch.device("cuda", torch.cuda.current_device())
PAGE = device_copies.PAGE
LONG = 300_000_000
"""Cycles of the GPU, some tenths of a second: longer than all copies of a test."""
SHAPES = [(3,), (), (700, 900), (5, 0), (40, 30), (1,), (1100, 600), (17,), (2, 3, 4, 5)]


def model_of(dtype: Any = torch.float32, device: Any = GPU, shapes: Any = None) -> Any:
    """Tensors of many sizes, on both sides of what crosses alone; one is channels_last."""
    generator = torch.Generator().manual_seed(3)
    shapes = SHAPES if shapes is None else shapes
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    if len(shapes[-1]) == 4:
        tensors[-1] = tensors[-1].contiguous(memory_format=torch.channels_last)
    return torch.nn.ParameterList([torch.nn.Parameter(each) for each in tensors])


def give(model: Any, step: int, *, absent: Any = ()) -> None:
    """Gradients that are the same on each device."""
    generator = torch.Generator().manual_seed(step)
    for index, tensor in enumerate(model):
        made = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        tensor.grad = None if index in absent else made


def bits(model: Any) -> list[bytes]:
    return [
        p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for p in model.parameters()
    ]


@pytest.fixture(params=["pinned", "unpinned"])
def pinning(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "unpinned":
        monkeypatch.setattr(device_copies, "LEAST_PINNED", 1 << 60)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_same_gradients_give_the_same_bits_as_on_a_cpu(
    dtype: Any, shards: int, pinning: str
) -> None:
    one, other = model_of(dtype), model_of(dtype, "cpu")
    options = distnadam.Options(threads=2)
    a, b = (
        ours.DistNadam(each.parameters(), num_shards=shards, options=options)
        for each in (one, other)
    )
    rng = random.Random(0)
    for step in range(6):
        absent = rng.sample(range(len(SHAPES)), step)
        for model, optimizer in ((one, a), (other, b)):
            give(model, step, absent=absent)
            optimizer.step()
        assert bits(one) == bits(other), step
    states = zip(a.state.values(), b.state.values(), strict=True)
    assert all(torch.equal(x["exp_avg"], y["exp_avg"]) for x, y in states)
    a.close(), b.close()


@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_rounded_on_its_way_has_the_same_bits_as_on_a_cpu(
    shards: int, pinning: str
) -> None:
    one, other = model_of(), model_of(device="cpu")
    for model in (one, other):
        model[3].data, model[5].data = model[3].double(), model[5].bfloat16()
    rounding = {"pull_dtype": "bfloat16", "push_dtype": torch.bfloat16}
    a, b = (
        ours.DistNadam(each.parameters(), num_shards=shards, **rounding) for each in (one, other)
    )
    rng = random.Random(0)
    for step in range(8):
        absent = rng.sample(range(len(SHAPES)), step)
        for model, optimizer in ((one, a), (other, b)):
            give(model, step, absent=absent)
            optimizer.step()
            if step == 3:
                model[2].data[699, 899] = -0.0
            if step == 4:
                model[0].data[0] = 1 / 3
        assert bits(one) == bits(other), step
        if step in (5, 6):
            one.to("cpu" if step == 5 else GPU)
    states = zip(a.state.values(), b.state.values(), strict=True)
    assert all(
        torch.equal(x[name], y[name])
        for x, y in states
        for name in ("exp_avg", "master")
        if name in x
    )
    assert a.state[one[2]]["master"].shape == (700, 900)
    a.close(), b.close()


def test_what_is_changed_on_the_device_is_taken_over_with_the_same_bits() -> None:
    one, other = model_of(), model_of(device="cpu")
    a, b = ours.DistNadam(one.parameters()), ours.DistNadam(other.parameters())
    for step in range(8):
        for model, optimizer in ((one, a), (other, b)):
            give(model, step)
            optimizer.step()
            with torch.no_grad():
                if step == 1:
                    model[2].data[699, 899] = -0.0  # torch counts no such write
                if step == 2:
                    model[0].clamp_(-0.1, 0.1)
                if step == 3:
                    model[8].mul_(2.0), model[1].fill_(7.0)
                if step == 4:
                    model[2].data[699, 899] = 0.0
        if step == 5:
            one.to("cpu")
        if step == 6:
            one.to(GPU)
        assert bits(one) == bits(other), step


def test_a_model_may_go_to_the_gpu_and_back_between_two_steps() -> None:
    one, other = model_of(device="cpu"), model_of(device="cpu")
    a, b = ours.DistNadam(one.parameters()), ours.DistNadam(other.parameters())
    for step, device in enumerate(["cpu", "cpu", GPU, GPU, "cpu", GPU]):
        one.to(device)
        give(one, step), give(other, step)
        a.step(), b.step()
        assert bits(one) == bits(other), step


def test_memory_is_registered_once_and_released(caplog: pytest.LogCaptureFixture) -> None:
    one = model_of()
    a = ours.DistNadam(one.parameters())
    for step in range(3):
        give(one, step)
        a.step()
    registered = dict(a._held._pinned._held)
    assert len(registered) == 3, "the gradients and both buffers of the parameters"
    give(one, 4)
    a.step()
    assert a._held._pinned._held == registered
    runtime = torch.cuda.cudart()
    for begin in registered:
        assert as_torch(registered[begin][1][PAGE:]).is_pinned()
    a.close()
    assert not a._held._pinned._held
    for begin in registered:
        assert not as_torch(registered[begin][1][PAGE:]).is_pinned()
        assert int(runtime.cudaHostUnregister(begin)), "it was registered still"
        with pytest.raises(RuntimeError, match="CUDA error"):
            torch.ones((), device=GPU)
    assert not caplog.records


def test_a_refusal_of_the_driver_is_said_once_and_changes_no_bits(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_copies, "_PORTABLE", 1 << 12)  # no such flag: an error of CUDA's own
    one, other = model_of(), model_of(device="cpu")
    a, b = ours.DistNadam(one.parameters()), ours.DistNadam(other.parameters())
    with caplog.at_level(logging.WARNING, "distnadam"):
        for step in range(3):
            give(one, step), give(other, step)
            a.step(), b.step()
    assert bits(one) == bits(other)
    assert len(caplog.records) == 1, caplog.text
    assert "does not register" in caplog.text and "invalid argument" in caplog.text


def pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a worker's gradients go as they do where a relay takes them to other hosts."""
    monkeypatch.setattr(Shards, "are_far", True)


class Slow(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Each layer's gradient is there long after its hook was called."""

    def __init__(self, layers: int = 4, width: int = 512, device: Any = GPU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(width, width, device="cpu") for _ in range(layers)
        ).to(device)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = _Sleep.apply(layer(x).tanh())
        return x


class _Sleep(torch.autograd.Function):  # type: ignore[misc]
    cycles = 0

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        if _Sleep.cycles:
            torch.cuda._sleep(_Sleep.cycles)
        return gradient * 1.0


@pytest.mark.parametrize("goes", ["to slots", "tensor by tensor"])
@pytest.mark.parametrize("stream", ["default", "own"])
def test_gradients_that_cross_during_the_backward_pass_are_whole(
    stream: str, goes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Sleep, "cycles", LONG // 10)
    if goes == "tensor by tensor":  # as to shards of other hosts
        pushed(monkeypatch)
    found = []
    for overlap in (False, True):
        model = Slow()
        optimizer = ours.DistNadam(model.parameters(), overlap=overlap)
        own = torch.cuda.Stream() if stream == "own" else torch.cuda.current_stream()
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            for step in range(6):
                generator = torch.Generator(GPU).manual_seed(step)
                x = torch.randn(32, 512, device=GPU, generator=generator)
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                # memory that was a gradient's, written at once by the stream that freed it
                torch.full((512, 512), torch.nan, device=GPU)
        own.synchronize()
        found.append(bits(model))
    assert found[0] == found[1]


def test_a_step_waits_for_gradients_that_are_still_computed() -> None:
    one, other = model_of(), model_of(device="cpu")
    a, b = ours.DistNadam(one.parameters()), ours.DistNadam(other.parameters())
    for step in range(4):
        give(one, step), give(other, step)
        final = [p.grad for p in one]
        for tensor in one:
            tensor.grad = torch.full_like(tensor, torch.nan)
        torch.cuda._sleep(LONG)
        for tensor, right in zip(one, final, strict=True):
            tensor.grad.copy_(right)
        a.step(), b.step()
        assert bits(one) == bits(other)


def test_shards_do_not_write_what_is_still_copied_to_the_device() -> None:
    one, other = model_of(), model_of(device="cpu")
    a, b = ours.DistNadam(one.parameters()), ours.DistNadam(other.parameters())
    seen, expected = [], []
    for step in range(5):
        give(one, step), give(other, step)
        a.step()
        torch.cuda._sleep(LONG // 10)  # a later step must wait for it, not only for copies
        seen.append([p.detach().clone() for p in one])
        b.step()
        expected.append(bits(other))
    for tensors, right in zip(seen, expected, strict=True):
        assert bits(torch.nn.ParameterList(tensors)) == right


@pytest.mark.parametrize("overlap", [False, True])
def test_a_gradient_that_is_freed_or_changed_after_the_step_was_pushed_as_it_was(
    overlap: bool,
) -> None:
    one, other = make().to(GPU), make().to(GPU)
    a = ours.DistNadam(one.parameters(), overlap=overlap)
    b = ours.DistNadam(other.parameters())
    for batch in batches(5):
        for model, optimizer in ((one, a), (other, b)):
            loss_of(model, batch.to(GPU)).backward()
            optimizer.step()
            for tensor in model.parameters():
                tensor.grad.fill_(torch.nan)
            optimizer.zero_grad()
    assert bits(one) == bits(other)


def test_a_gradient_changed_after_it_left_is_refused_on_a_gpu_too() -> None:
    model = make().to(GPU)
    optimizer = ours.DistNadam(model.parameters(), overlap=True)
    for batch in batches(2):
        loss_of(model, batch.to(GPU)).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss_of(model, batches(1)[0].to(GPU)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(GradientError, match="was changed after it was sent"):
        optimizer.step()


def test_mixed_precision_skips_what_overflows_as_torch_does() -> None:
    scales = []
    ends = []
    for is_ours in (True, False):
        torch.manual_seed(0)
        model = make().to(GPU)
        kind = ours.GradScaler if is_ours else torch.amp.GradScaler
        scaler = kind("cuda", init_scale=2.0**10, growth_interval=3)
        optimizer = (ours.DistNadam if is_ours else torch.optim.NAdam)(model.parameters())
        seen = []
        for step, batch in enumerate(batches(12)):
            with torch.autocast("cuda", torch.float16):
                loss = loss_of(model, batch.to(GPU) * (1e30 if step in (4, 7) else 1.0))
            scaler.scale(loss).backward()
            if step % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seen.append(scaler.get_scale())
        scales.append(seen)
        ends.append(model)
    assert scales[0] == scales[1] and min(scales[0]) < 2.0**10
    assert distance(ends[0], ends[1]) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
def test_a_compiled_model_in_bfloat16_ends_near_where_torch_s_own_ends() -> None:
    ends = []
    for kind in (ours.DistNadam, torch.optim.NAdam):
        model = make(dtype=torch.float32).to(GPU)
        compiled = torch.compile(model)
        optimizer = kind(compiled.parameters())
        for batch in batches(8):
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(compiled, batch.to(GPU))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model)
    assert distance(*ends) < 1e-4


def test_states_and_checkpoints_travel_between_devices_and_torch_s_own(tmp_path: Path) -> None:
    def stepped(model: Any, optimizer: Any, seed: int) -> None:
        device = next(model.parameters()).device
        train(model, optimizer, [batch.to(device) for batch in batches(4, seed)])

    one = torch.nn.Sequential(torch.nn.BatchNorm1d(6), make()).to(GPU)
    a = ours.DistNadamW(one.parameters())
    stepped(one, a, 1)
    saved, where = copy.deepcopy(a.state_dict()), a.save(str(tmp_path), module=one)
    weights = copy.deepcopy(one.state_dict())
    theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(6), make(9)).to(GPU)
    theirs.load_state_dict(weights)
    b = torch.optim.NAdam(theirs.parameters(), decoupled_weight_decay=True, weight_decay=0.01)
    b.load_state_dict(saved)
    assert next(iter(b.state.values()))["exp_avg"].device == GPU
    other = torch.nn.Sequential(torch.nn.BatchNorm1d(6), make(4)).to(GPU)
    c = ours.DistNadamW(other.parameters())
    c.load(where, module=other)
    assert torch.equal(other[0].running_mean, one[0].running_mean)
    back = torch.nn.Sequential(torch.nn.BatchNorm1d(6), make(5)).to(GPU)
    back.load_state_dict(weights)
    d = ours.DistNadamW(back.parameters())
    d.load_state_dict(b.state_dict())
    for model, optimizer in ((one, a), (theirs, b), (other, c), (back, d)):
        stepped(model, optimizer, 2)
    assert bits(one) == bits(other)
    assert distance(one, theirs) < 1e-5 and distance(one, back) < 1e-5


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_step_inside_a_cuda_graph_is_refused() -> None:
    model = model_of()
    optimizer = ours.DistNadam(model.parameters())
    give(model, 0)
    optimizer.step()
    before, graph = bits(model), torch.cuda.CUDAGraph()
    with pytest.raises(LifecycleError, match="cannot be captured"), torch.cuda.graph(graph):
        optimizer.step()
    give(model, 1)
    optimizer.step()
    assert bits(model) != before


def test_two_optimizers_and_a_model_partly_on_the_cpu() -> None:
    def parts(device: Any) -> Any:
        first, second = model_of(device=device, shapes=SHAPES[:5]), model_of(device="cpu")
        both = torch.nn.ParameterList([*first, *second])
        return both, [ours.DistNadam(both.parameters()), ours.DistAdam(model_of(device=device))]

    (one, a), (other, b) = parts(GPU), parts("cpu")
    for step in range(3):
        for model, optimizers in ((one, a), (other, b)):
            give(model, step)
            give(optimizers[1].param_groups[0]["params"], step)
            for optimizer in optimizers:
                optimizer.step()
    assert bits(one) == bits(other)
    ends = [torch.nn.ParameterList(each[1].param_groups[0]["params"]) for each in (a, b)]
    assert bits(ends[0]) == bits(ends[1])


def test_copies_go_in_runs_of_neighbours() -> None:
    memory = np.zeros(3 << 20, np.uint8).view(np.float32)
    sizes = [10, 0, 20, 300_000, 5, 6]
    ends = np.cumsum(sizes)
    arrays = [memory[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    assert device_copies.runs_of(arrays) == [[0, 2], [3], [4, 5]]
    assert device_copies.runs_of(arrays[::-1]) == [[5, 3], [2], [1, 0]]
    assert device_copies.runs_of([arrays[0], arrays[5], arrays[4]]) == [[0], [2, 1]]
