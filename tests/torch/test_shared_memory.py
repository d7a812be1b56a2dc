"""A model of one process lies in its shards' memory, which nobody can tell but by the time: each
test trains a twin beside it, whose tensors somebody else has too, so that they stay where they are.
"""

import copy
import gc
import io
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")

import distnadam  # noqa: E402
from distnadam.errors import NonFiniteGradient, StructureError  # noqa: E402
from distnadam.torch.arrays import as_array, bits_of  # noqa: E402
from distnadam.torch.held import Held  # noqa: E402
from distnadam.torch.held_state import HeldState  # noqa: E402
from tests.torch.models import batches as batches_of_six  # noqa: E402
from tests.torch.models import bits, loss_of, make, train  # noqa: E402

ours = distnadam.torch


def wide(seed: int = 0, dtype: Any = torch.float32) -> Any:
    """A model whose tensors all lie on multiples of 64 bytes."""
    torch.manual_seed(seed)
    layers = torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16)
    return torch.nn.Sequential(*layers).to(dtype)


def batches(count: int, seed: int = 1, dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 16, generator=generator).to(dtype) for _ in range(count)]


def parameters_of(optimizer: Any) -> dict[str, Any]:
    """What the shards hold."""
    found: dict[str, Any] = optimizer._held.shards.optimizer.get_params()
    return found


def lie_there(optimizer: Any) -> list[str]:
    """The tensors that lie in the shards' memory: writing them has changed the shards'."""
    found = []
    for tensor, name in optimizer._held.names.items():
        before = tensor.detach().clone()
        tensor.data.add_(1)
        if np.array_equal(parameters_of(optimizer)[name], as_array(tensor)):
            found.append(name)
        tensor.data.copy_(before)
    return found


class Pair:
    """A model in its shards' memory, and a twin that is not, since its first memory is kept."""

    def __init__(self, model: Any, **arguments: Any) -> None:
        self.models = model, copy.deepcopy(model)
        self.kept = [tensor.detach() for tensor in self.models[1].parameters()]
        self.optimizers = [
            ours.DistNadamW(m.named_parameters(), backend="local", **arguments) for m in self.models
        ]

    def train(self, data: Any) -> None:
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            train(model, optimizer, data)

    def check(self) -> None:
        one, other = self.models
        assert bits(one) == bits(other)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), self.kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_model_of_one_process_lies_where_its_shards_step_it(num_shards: int, dtype: Any) -> None:
    pair = Pair(wide(dtype=dtype), num_shards=num_shards)
    pair.train(batches(1, dtype=dtype))
    one, other = pair.optimizers
    assert lie_there(one) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert lie_there(other) == []
    places = [tensor.data_ptr() for tensor in pair.models[0].parameters()]
    pair.train(batches(4, 2, dtype))
    pair.check()
    assert [tensor.data_ptr() for tensor in pair.models[0].parameters()] == places
    for name, tensor in pair.models[0].named_parameters():
        assert np.array_equal(parameters_of(one)[name], tensor.detach().numpy())


def test_every_kind_of_round_leaves_the_same_bits() -> None:
    pair = Pair(wide(), num_shards=2)
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for turn, batch in enumerate(batches(12)):
            model[0].weight.requires_grad_(turn not in (3, 4))
            loss_of(model, batch).backward()
            if turn in (5, 6, 9):
                optimizer.clip_grad_norm_(0.01)
            if turn in (2, 7):
                model[2].bias.grad = None
            if turn in (1, 8):
                optimizer.vote(True)
            optimizer.step()
            assert optimizer.overflowed == (turn in (1, 8))
            if turn == 10:
                for each in optimizer.state.values():
                    each["exp_avg"].mul_(0.5)
            scheduler.step()
            optimizer.zero_grad()
    pair.check()


def nothing(model: Any) -> None:
    """Change nothing."""


def clamp(model: Any) -> None:
    with torch.no_grad():
        model[0].weight.clamp_(-0.01, 0.01)


def write_by_numpy(model: Any) -> None:
    model[0].weight.detach().numpy()[3] = 0.25


def load(model: Any) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def new_memory(model: Any) -> None:
    model[0].weight.data = model[0].weight.data * 0.5


def new_memory_of_the_same_bits(model: Any) -> Any:
    old = model[0].weight.data
    model[0].weight.data = old.clone()
    return old


def keep_the_old_memory(model: Any) -> Any:
    old = model[0].weight.data
    model[0].weight.data = old * 0.5
    return old


def keep_the_new_memory(model: Any) -> Any:
    new = model[0].weight.data * 0.5
    model[0].weight.data = new
    return new


def memory_of_numpy(model: Any) -> Any:
    array = np.full((32, 16), 0.5, np.float32)
    model[0].weight.data = torch.from_numpy(array)
    return torch.from_numpy(array)


def transpose(model: Any) -> None:
    square = torch.arange(1024, dtype=torch.float32).view(32, 32) / 1024
    model[0].weight.data = square[:, :16]  # a part of what another has, not contiguous


def share_with_processes(model: Any) -> None:
    model.share_memory()


def share_with_processes_and_write(model: Any) -> None:
    model.share_memory()
    model[2].weight.data.mul_(0.5)


EDITS = [
    nothing,
    clamp,
    write_by_numpy,
    load,
    new_memory,
    new_memory_of_the_same_bits,
    keep_the_old_memory,
    keep_the_new_memory,
    memory_of_numpy,
    transpose,
    share_with_processes,
    share_with_processes_and_write,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_what_a_user_does_to_a_tensor_means_what_it_means_elsewhere(
    edit: Callable[[Any], Any], num_shards: int
) -> None:
    pair = Pair(wide(), num_shards=num_shards)
    pair.train(batches(2))
    for turn in range(3):
        kept = [edit(model) for model in pair.models]
        pair.train(batches(3, 2 + turn))
        assert bits(pair.models[0]) == bits(pair.models[1])
        if isinstance(kept[0], torch.Tensor):
            assert torch.equal(kept[0], kept[1])
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        for name, tensor in model.named_parameters():
            assert np.array_equal(parameters_of(optimizer)[name], tensor.detach().numpy())


@pytest.mark.parametrize("length", [0, 8])
def test_a_tensor_whose_storage_was_freed_is_refused_by_name(length: int) -> None:
    pair = Pair(wide())
    pair.train(batches(2))
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        own, freed = model[2].bias.data, torch.ones(16)
        freed.untyped_storage().resize_(length)
        model[2].bias.data = freed
        for tensor in model.parameters():
            tensor.grad = torch.ones_like(tensor)
        for _ in range(2):
            with pytest.raises(StructureError, match=f"^'2.bias' has a storage of {length} bytes"):
                optimizer.step()
        model[2].bias.data = own
        model[0].bias.data.clamp_(-0.01, 0.01)  # which is taken over all the same
        if not length:
            model[2].bias.grad = freed
            with pytest.raises(StructureError, match=r"^'the gradient of 2.bias' has a storage"):
                optimizer.step()
        optimizer.zero_grad()
    pair.train(batches(3, 2))
    pair.check()


@pytest.mark.parametrize("is_its_own", [True, False])
def test_a_tensor_that_torch_has_negated_is_stepped_by_its_numbers(is_its_own: bool) -> None:
    pair, plain = Pair(wide()), wide()
    reference = ours.DistNadamW(plain.named_parameters(), backend="local")
    pair.train(batches(2)), train(plain, reference, batches(2))
    for model in pair.models:
        data = model[0].weight.data
        model[0].weight.data = torch._neg_view(data if is_its_own else data.clone())
    plain[0].weight.data.neg_()
    for turn in range(2):
        pair.train(batches(2, 2 + turn)), train(plain, reference, batches(2, 2 + turn))
        for model in pair.models:
            pairs = zip(model.parameters(), plain.parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("edit", [nothing, clamp, new_memory], ids=lambda edit: edit.__name__)
def test_it_stays_there_where_nobody_has_memory_of_it(edit: Callable[[Any], Any]) -> None:
    pair = Pair(wide())
    pair.train(batches(2))
    edit(pair.models[0])
    train(pair.models[0], pair.optimizers[0], batches(1))
    assert len(lie_there(pair.optimizers[0])) == 4


def converted(model: Any) -> None:
    model.to(torch.float64)


def of_another_shape(model: Any) -> None:
    model[0].bias.data = torch.zeros(1)  # which would be spread over all 32


def of_as_many_elements(model: Any) -> None:
    model[0].weight.data = torch.zeros(16, 32)


@pytest.mark.parametrize("passes", [True, False], ids=["backward", "none"])
@pytest.mark.parametrize("edit", [converted, of_another_shape, of_as_many_elements])
def test_what_is_no_longer_the_shards_tensor_is_refused_by_name(
    edit: Callable[[Any], Any], passes: bool
) -> None:
    pair = Pair(wide())
    pair.train(batches(2))
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        edit(model)
        now = [
            (tensor.shape, tensor.dtype, bits_of(tensor).tolist()) for tensor in model.parameters()
        ]
        loss = sum(tensor.sum() for tensor in model.parameters())
        if passes:
            loss.backward()
        else:
            model[2].bias.grad = torch.ones_like(model[2].bias)
        with pytest.raises(StructureError, match=r"'0\.(weight|bias)' is torch\.\w+ of shape"):
            optimizer.step()
        assert now == [(t.shape, t.dtype, bits_of(t).tolist()) for t in model.parameters()]


def test_evaluation_with_other_weights_for_a_while() -> None:
    """As averages of weights are swapped in and out."""
    pair = Pair(wide())
    pair.train(batches(3))
    for model in pair.models:
        own = [tensor.data for tensor in model.parameters()]
        for tensor in model.parameters():
            tensor.data = torch.zeros_like(tensor)
        assert not model(batches(1)[0]).any()
        for tensor, data in zip(model.parameters(), own, strict=True):
            tensor.data = data
    del own
    pair.train(batches(3, 2))
    pair.check()
    assert len(lie_there(pair.optimizers[0])) == 4


def test_what_others_had_before_the_first_step_stays_theirs() -> None:
    array = np.full((32, 16), 0.125, np.float32)
    model = wide()
    model[0].weight = torch.nn.Parameter(torch.from_numpy(array))
    model[2].weight = torch.nn.Parameter(torch.zeros(40, 32)[:16])
    bias = model[2].bias.detach()
    optimizer = ours.DistNadam(model.named_parameters(), backend="local")
    train(model, optimizer, batches(3))
    assert lie_there(optimizer) == ["0.bias"]
    assert np.array_equal(array, model[0].weight.detach().numpy())
    assert torch.equal(bias, model[2].bias.detach())


@pytest.mark.parametrize("kept", ["untyped_storage", "storage"])
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_storage_that_somebody_keeps_stays_the_tensor_s(kept: str) -> None:
    model = wide()
    storage = getattr(model[0].weight, kept)()
    optimizer = ours.DistNadam(model.named_parameters(), backend="local")
    train(model, optimizer, batches(2))
    assert lie_there(optimizer) == ["0.bias", "2.weight", "2.bias"]
    assert storage.data_ptr() == model[0].weight.data_ptr()
    storage.fill_(0)
    assert not model[0].weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_torch_would_align_and_the_shards_do_not_is_copied(dtype: Any) -> None:
    model = make(dtype=dtype)
    model.scale = torch.nn.Parameter(torch.ones((), dtype=dtype))
    optimizer = ours.DistNadam(model.named_parameters(), backend="local")
    data = batches_of_six(4, dtype=dtype)
    for batch in data:
        (loss_of(model, batch) * model.scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(t.data_ptr() % 64 for t in model.parameters() if t.numel() > 1)
    aligned = ["0.weight", "0.bias", "2.bias"]  # the layout sorts them: 2.weight is at 8 bytes
    assert set(lie_there(optimizer)) <= set(aligned if dtype == torch.float32 else [])
    assert model.scale.item() != 1.0


def test_a_square_tensor_that_is_transposed_is_stepped_as_it_is_seen() -> None:
    torch.manual_seed(0)
    pair = Pair(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)))
    pair.train(batches(2))
    for model in pair.models:
        model[0].weight.data = model[0].weight.data.t()
    pair.train(batches(2, 2))
    assert bits(pair.models[0]) == bits(pair.models[1])


@pytest.mark.parametrize(
    ("owner", "place"), [(Held, "_pin"), (HeldState, "forget"), (Held, "_take_over")]
)
def test_an_interrupt_leaves_tensors_and_state_of_one_round(
    owner: type, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(wide(), num_shards=2)
    pair.train(batches(2))
    whole = getattr(owner, place)

    def interrupted(held: Any, *given: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        whole(held, *given)

    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        assert int(optimizer.state[model[0].weight]["step"]) == 2
        loss_of(model, batches(1)[0]).backward()
        with monkeypatch.context() as patched:
            patched.setattr(owner, place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        assert int(optimizer.state[model[0].weight]["step"]) == 3
        held = parameters_of(optimizer)
        assert all(np.array_equal(held[n], as_array(t)) for n, t in model.named_parameters())
    pair.check()
    pair.train(batches(2, 3))
    pair.check()


def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was() -> None:
    pair = Pair(wide())
    pair.train(batches(2))
    before = bits(pair.models[0])
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        loss_of(model, batches(1)[0]).backward()
        model[2].bias.grad[3] = torch.nan
        with pytest.raises(NonFiniteGradient, match=r"2\.bias"):
            optimizer.step()
        optimizer.zero_grad()
    assert bits(pair.models[0]) == before
    pair.train(batches(2, 2))
    pair.check()


@pytest.mark.parametrize("is_new_memory", [False, True])
def test_a_parameter_that_a_user_makes_not_finite_is_refused_by_name(is_new_memory: bool) -> None:
    pair = Pair(wide())
    pair.train(batches(2))
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        bias = model[2].bias
        memory, before = bias.data, bias.detach().clone()
        loss_of(model, batches(1)[0]).backward()
        with torch.no_grad():
            if is_new_memory:
                bias.data = torch.full((16,), -torch.inf)
            else:
                bias[3] = torch.nan
        for _ in range(2):
            with pytest.raises(StructureError, match=r"^params: '2\.bias': .* NaN or infinity"):
                optimizer.step()
        with torch.no_grad():
            bias.data = memory
            bias.copy_(before)
        optimizer.zero_grad()
    pair.train(batches(3, 2))
    pair.check()


def test_copies_of_the_model_are_apart_from_it() -> None:
    model = wide()
    optimizer = ours.DistNadam(model.named_parameters(), backend="local")
    train(model, optimizer, batches(2))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file.tell() < 16_000
    file.seek(0)
    loaded = wide(1)
    loaded.load_state_dict(torch.load(file))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]
    before = bits(model)
    train(model, optimizer, batches(2, 2))
    assert all(bits(each) == before for each in copies)
    for each in copies:
        train(each, torch.optim.SGD(each.parameters(), 0.1), batches(1))
    assert len(lie_there(optimizer)) == 4


def test_the_memory_lives_on_with_the_model() -> None:
    model = wide()
    optimizer = ours.DistNadam(model.named_parameters(), backend="local")
    train(model, optimizer, batches(2))
    before = bits(model)
    optimizer.close()
    del optimizer
    gc.collect()
    assert bits(model) == before
    twin = copy.deepcopy(model)
    for each in (model, twin):
        train(each, ours.DistAdam(each.named_parameters(), backend="local"), batches(3))
    assert bits(model) == bits(twin) != before


def test_two_optimizers_of_the_same_tensors_see_each_other_s_steps() -> None:
    models = [wide(), wide()]
    kept = [tensor.detach() for tensor in models[1].parameters()]
    for model in models:
        one = ours.DistNadam(model.named_parameters(), backend="local")
        other = ours.DistAdam(model.named_parameters(), lr=1e-2, backend="local")
        for batch in batches(6):
            train(model, one, [batch])
            train(model, other, [batch])
    assert bits(models[0]) == bits(models[1])
    assert kept


def test_a_checkpoint_goes_back_into_the_same_memory(tmp_path: Any) -> None:
    pair = Pair(wide(), num_shards=2)
    pair.train(batches(2))
    saved = [o.save(str(tmp_path / str(i))) for i, o in enumerate(pair.optimizers)]
    at_save = bits(pair.models[0])
    pair.train(batches(2, 2))
    for optimizer, path in zip(pair.optimizers, saved, strict=True):
        optimizer.load(path)
    assert bits(pair.models[0]) == at_save
    pair.train(batches(3, 3))
    pair.check()
    assert len(lie_there(pair.optimizers[0])) == 4


def test_a_forked_child_has_parameters_of_its_own() -> None:
    pair = Pair(wide())
    pair.train(batches(2))
    before = bits(pair.models[0])
    to_parent, to_child = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.read(to_child[0], 1)  # the parent has written and stepped
            assert bits(pair.models[0]) == before
            train(pair.models[0], pair.optimizers[0], batches(2, 2))  # one of its own, as it stands
            pair.models[0][0].weight.data.zero_()
            os.write(to_parent[1], b"1")
            status = 0
        finally:
            os._exit(status)
    for model in pair.models:
        model[0].weight.data.mul_(0.5)
    pair.train(batches(1, 3))
    os.write(to_child[1], b"1")
    assert os.read(to_parent[0], 1) == b"1"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pair.train(batches(2, 4))
    pair.check()
    assert len(lie_there(pair.optimizers[0])) == 4
