"""Steps on Ray that end before the tensors have their round: the next one goes on rightly."""

import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
torch = pytest.importorskip("torch")

import distnadam  # noqa: E402
from distnadam.errors import Rewound, StepTimeout  # noqa: E402
from tests.eventually import eventually  # noqa: E402
from tests.torch.models import batches, bits, make, train  # noqa: E402

ours = distnadam.torch


@contextmanager
def two_ranks(name: str, **arguments: Any) -> Iterator[list[tuple[Any, Any]]]:
    """Two ranks of one model, each with its optimizer."""
    ranks = []
    for rank in range(2):
        model = make()
        place = {"rank": rank, "num_workers": 2, "backend": "ray", "name": name, **arguments}
        ranks.append((model, ours.DistNadam(model.named_parameters(), num_shards=2, **place)))
    try:
        yield ranks
    finally:
        for _, optimizer in reversed(ranks):
            optimizer.close()


def backward(model: Any, seed: int) -> None:
    """Have gradients that do not depend on the parameters, as a backward pass gives them."""
    generator = torch.Generator().manual_seed(seed)
    products = [(p * torch.randn(p.shape, generator=generator)).sum() for p in model.parameters()]
    torch.stack(products).sum().backward()


def step(model: Any, optimizer: Any, seed: int) -> None:
    optimizer.zero_grad(set_to_none=False)
    backward(model, seed)
    optimizer.step()


def reference(rounds: int, change: Callable[[Any, Any], None] | None = None) -> list[bytes]:
    """The parameters after rounds of gradients 0, 1, ... of a rank and 10, 11, ... of another, with
    a change after the second.
    """
    model = make()
    optimizer = ours.DistNadam(model.named_parameters(), num_workers=1, backend="local")
    for turn in range(rounds):
        if turn == 2 and change is not None:
            change(model, optimizer)
        for seed in (turn, 10 + turn):
            backward(model, seed)
        for tensor in model.parameters():
            tensor.grad.div_(2)
        optimizer.step()
        optimizer.zero_grad()
    return bits(model)


@contextmanager
def cut(how: str, session: Any, round: int) -> Iterator[None]:
    """End the step in the body while its push for a round is in flight."""
    if how == "timeout":
        whole, usual = session._wait, session._timeout_s

        def wait(push: Any) -> Any:
            session._timeout_s = 0.1 if push.round == round else usual
            return whole(push)

        session._wait = wait
        with pytest.raises(StepTimeout):
            yield
        session._wait, session._timeout_s = whole, usual
        return
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        eventually(lambda: getattr(session.in_flight, "round", 0) == round)
        signal.pthread_kill(main, signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    interrupting.join()


@pytest.mark.parametrize(("how", "overlap"), [("interrupt", False), ("timeout", True)])
def test_what_a_cut_step_has_pushed_counts_once_and_the_next_one_goes_on(
    how: str, overlap: bool
) -> None:
    name = f"cut-by-{how}-{overlap}"
    with two_ranks(name, overlap=overlap) as (one, other), ThreadPoolExecutor(1) as thread:
        for turn in range(2):
            theirs = thread.submit(step, *other, 10 + turn)
            step(*one, turn)
            theirs.result(100)
        session = one[1]._held.shards.worker.session
        for turn in range(2, 4):  # the second one is of a step after one that was cut
            with cut(how, session, turn + 1):
                step(*one, turn)
            one[1].zero_grad(set_to_none=False)
            if not overlap:  # where the backward pass waits for the push in flight
                backward(one[0], 99)  # while the shards still read what was pushed
            thread.submit(step, *other, 10 + turn).result(100)
            assert bits(other[0]) == reference(turn + 1)
        theirs = thread.submit(step, *other, 14)
        step(*one, 4)
        theirs.result(100)
        assert bits(one[0]) == bits(other[0]) == reference(5)


def test_what_is_changed_after_a_cut_step_counts_after_its_round() -> None:
    saved: dict[str, Any] = {}

    def change(model: Any, optimizer: Any) -> None:
        optimizer.load_state_dict(copy.deepcopy(saved))
        with torch.no_grad():
            next(model.parameters()).fill_(0.5)

    with two_ranks("changed-after") as (one, other), ThreadPoolExecutor(1) as thread:
        theirs = thread.submit(step, *other, 10)
        step(*one, 0)
        theirs.result(100)
        saved |= copy.deepcopy(one[1].state_dict())
        for each in saved["state"].values():
            each["exp_avg"].fill_(0.01)
        with cut("timeout", one[1]._held.shards.worker.session, 2):
            step(*one, 1)
        change(*one)
        thread.submit(step, *other, 11).result(100)
        change(*other)
        for turn in (2, 3):
            theirs = thread.submit(step, *other, 10 + turn)
            step(*one, turn)
            theirs.result(100)
        assert bits(one[0]) == bits(other[0]) == reference(4, change)


@pytest.mark.parametrize("before", ["set_config", "fill"])
def test_rank_0_goes_on_with_what_all_have_agreed_on(before: str) -> None:
    def change(model: Any, optimizer: Any) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.1
        for each in optimizer.state.values():
            each["exp_avg"].mul_(0.5)

    with two_ranks(f"agreed-{before}") as (one, other), ThreadPoolExecutor(1) as thread:
        for turn in range(3):
            if turn == 2:
                change(*one)
                change(*other)
            theirs = thread.submit(step, *other, 10 + turn)
            if turn == 2:
                shards = one[1]._held.shards.optimizer
                owner = shards if before == "set_config" else shards.shards
                whole = getattr(owner, before)

                def interrupted(*given: Any, whole: Any = whole, **others: Any) -> None:
                    signal.raise_signal(signal.SIGINT)
                    whole(*given, **others)

                with pytest.MonkeyPatch.context() as patched:
                    patched.setattr(owner, before, interrupted)
                    with pytest.raises(KeyboardInterrupt):
                        step(*one, turn)
            step(*one, turn)
            theirs.result(100)
        assert bits(one[0]) == bits(other[0]) == reference(3, change)


def test_tensors_are_what_the_shards_went_back_to() -> None:
    model, plain = make(), make()
    optimizer = ours.DistNadam(model.named_parameters(), num_shards=2, backend="ray")
    begun = bits(model)
    train(model, optimizer, batches(3))
    os.kill(optimizer._held.shards.optimizer.shards.backend.addresses[0].pid, signal.SIGKILL)
    with pytest.raises(Rewound):
        train(model, optimizer, batches(1, 5))
    assert bits(model) == begun
    assert all(float(each["step"]) == 0 for each in optimizer.state.values())
    optimizer.zero_grad()
    train(model, optimizer, batches(4, 2))
    train(plain, ours.DistNadam(plain.named_parameters(), backend="local"), batches(4, 2))
    assert bits(model) == bits(plain)
    optimizer.close()
