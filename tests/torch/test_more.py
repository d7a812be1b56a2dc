"""Gradients that leave during the backward pass, checkpoints with buffers, compiled models."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
torch = pytest.importorskip("torch")

import distnadam  # noqa: E402
from distnadam.errors import (  # noqa: E402
    CheckpointError,
    GradientError,
    LifecycleError,
    StructureError,
)
from tests.torch.models import batches, bits, distance, loss_of, make, train  # noqa: E402

ours = distnadam.torch
CLOSE = 5e-6


class WithNorm(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, seed: int = 0, width: int = 6) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(width)
        self.body = make(seed)

    def forward(self, x: Any) -> Any:
        return self.body(self.norm(x))


def test_gradients_that_leave_in_the_backward_pass_step_to_the_same_bits() -> None:
    one, other = make(), make()
    a = ours.DistNadam(one.named_parameters(), overlap=True)
    b = ours.DistNadam(other.named_parameters())
    for model, optimizer in ((one, a), (other, b)):
        train(model, optimizer, batches(4))
        model[0].weight.requires_grad_(False)
        optimizer.clip_grad_norm_(0.05)
        train(model, optimizer, batches(3, 2))
        model[0].weight.requires_grad_(True)
        with torch.no_grad():
            model[2].bias.add_(0.5)
        train(model, optimizer, batches(3, 3))
        optimizer.step()
    assert bits(one) == bits(other)


def test_clipping_gives_the_norm_that_torch_s_function_gives_once_it_has_stepped() -> None:
    one, other = make(), make()
    a, b = ours.DistNadam(one.parameters()), torch.optim.NAdam(other.parameters())
    for step, batch in enumerate(batches(8)):
        loss_of(one, batch).backward(), loss_of(other, batch).backward()
        if step != 4:
            norm = a.clip_grad_norm_(0.05)
            assert norm.isnan()
            expected = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        a.step(), b.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
        a.zero_grad(), b.zero_grad()
    assert distance(one, other) < CLOSE


def test_a_gradient_that_is_changed_after_it_left_is_refused() -> None:
    model = make()
    optimizer = ours.DistNadam(model.named_parameters(), overlap=True)
    train(model, optimizer, batches(2))
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(GradientError, match="a second backward pass before the step"):
        loss_of(model, batches(1)[0]).backward()


def test_clipping_by_torch_after_gradients_left_is_refused() -> None:
    model = make()
    optimizer = ours.DistNadam(model.named_parameters(), overlap=True)
    train(model, optimizer, batches(2))
    loss_of(model, batches(1)[0]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(GradientError, match="was changed after it was sent"):
        optimizer.step()


def test_a_checkpoint_has_the_buffers_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    one = WithNorm()
    a = ours.DistNadamW(one.named_parameters(), num_shards=2, backend="local")
    with pytest.raises(LifecycleError, match="nothing to save before the first step"):
        a.save(str(tmp_path))
    schedule = torch.optim.lr_scheduler.StepLR(a, 2, 0.5)
    train(one, a, batches(5), schedule)
    where = a.save(str(tmp_path), module=one)
    other = WithNorm(7)
    b = ours.DistNadamW(other.named_parameters())
    b.load(where, module=other)
    assert b.param_groups[0]["lr"] == a.param_groups[0]["lr"] == 5e-4
    assert torch.equal(one.norm.running_mean, other.norm.running_mean)
    assert int(other.norm.num_batches_tracked) == 5
    train(one, a, batches(4, 2)), train(other, b, batches(4, 2))
    assert bits(one) == bits(other)
    one.eval(), other.eval()
    assert torch.equal(one(batches(1)[0]), other(batches(1)[0]))
    assert distnadam.DistNadam.restore(where, backend="local", num_shards=1).iterations == 5


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    one = WithNorm()
    a = ours.DistNadam(one.named_parameters())
    train(one, a, batches(2))
    where = a.save(str(tmp_path / "with"), module=one)
    plain = ours.DistNadam(make().named_parameters())
    with pytest.raises(StructureError, match=r"'body\.0\.bias' is \(16,\) in the checkpoint"):
        plain.load(where)
    other = WithNorm(3)
    b = ours.DistNadam([{"params": [p]} for p in other.named_parameters()])
    before = bits(other)
    with pytest.raises(CheckpointError, match="has 1 parameter groups, and the optimizer 6"):
        b.load(where, module=other)
    without = a.save(str(tmp_path / "without"))
    c = ours.DistNadam(other.named_parameters())
    with pytest.raises(StructureError, match=r"buffer 'norm\.running_mean' is not there in the"):
        c.load(without, module=other)
    assert bits(other) == before


def test_a_forked_child_that_ends_leaves_its_parent_s_optimizer_alone() -> None:
    model = make()
    optimizer = ours.DistNadam(model.named_parameters())
    train(model, optimizer, batches(2))
    child = os.fork()
    if not child:
        status = 1
        try:
            optimizer.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    train(model, optimizer, batches(2))
    data = torch.utils.data.DataLoader(
        batches(4), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    train(model, optimizer, data)
    assert {int(s["step"]) for s in optimizer.state.values()} == {8}


def test_torch_s_distributed_checkpoint_reads_and_sets_the_state_without_a_step() -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    one, other = make(), make(4)
    a, b = ours.DistNadam(one.parameters()), ours.DistNadam(other.parameters())
    before = bits(one)
    assert dcp.get_optimizer_state_dict(one, a)["state"]["0.weight"]["step"] == 0
    assert bits(one) == before
    train(one, a, batches(3))
    model, optimizer = copy.deepcopy(dcp.get_state_dict(one, a))
    train(one, a, batches(3, 2))
    dcp.set_state_dict(other, b, model_state_dict=model, optim_state_dict=optimizer)
    train(other, b, batches(3, 2))
    assert bits(one) == bits(other)


def test_a_compiled_model_is_stepped_as_the_model_itself() -> None:
    one, other = make(), make()
    compiled = torch.compile(one, backend="eager")
    a = ours.DistNadam(compiled.named_parameters())
    for batch in batches(5):
        loss_of(compiled, batch).backward()
        a.step()
        a.zero_grad()
    train(other, torch.optim.NAdam(other.parameters()), batches(5))
    assert distance(one, other) < CLOSE
    assert a.param_groups[0]["param_names"][0] == "_orig_mod.0.weight"


@pytest.mark.filterwarnings("ignore")  # of torch.compile itself
def test_a_turn_of_the_loop_that_is_compiled_whole_has_its_step_outside_of_the_graph() -> None:
    one, other = make(), make()
    a, b = ours.DistNadam(one.named_parameters()), torch.optim.NAdam(other.parameters())

    def turn(model: Any, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()

    compiled = torch.compile(turn, backend="eager")
    for batch in batches(5):
        compiled(one, a, batch)
        turn(other, b, batch)
    assert distance(one, other) < CLOSE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_model_on_a_gpu_ends_where_it_ends_on_a_cpu() -> None:
    one, other = make().cuda(), make()
    a = ours.DistNadam(one.named_parameters())
    for batch in batches(10):
        loss_of(one, batch.cuda()).backward()
        a.step()
        a.zero_grad()
    train(other, torch.optim.NAdam(other.parameters()), batches(10))
    assert distance(one.cpu(), other) < 1e-4
