"""Tensors of torch, JAX and TensorFlow that are more or less than their numbers."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.errors import StructureError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(Sparse|.*quantize|.*nested|.*MaskedTensor):UserWarning"),
]
ONES = np.ones((5, 4), np.float32)


def gives(leaf: Any) -> Any:
    """Return what an optimizer makes of a leaf: as a parameter, and as each kind of gradient."""
    with DistNadam(backend="local").build({"e": leaf}) as optimizer:
        params = optimizer.get_params()["e"]
    with DistNadam(backend="local").build({"e": np.zeros(np.shape(params), np.float32)}) as other:
        gradient = other.get_gradients(lambda _: (0.0, {"e": leaf}), {"e": params})[0]
        assert gradient.tobytes() == params.tobytes()
        other.apply_gradients({"e": leaf})
        with other.worker(0) as worker:
            worker.step({"e": leaf})
            worker.push_tensor("e", leaf)
            worker.push().result()
    return params


def refused(leaf: Any, told: str) -> None:
    """Try a leaf everywhere and require one refusal of ours that names the tensor."""
    told = rf"(?s)'e'.*{told}"
    with pytest.raises(StructureError, match=told):
        DistNadam(backend="local").build({"e": leaf})
    with DistNadam(backend="local").build({"e": ONES}) as optimizer, optimizer.worker(0) as worker:
        for call in (optimizer.apply_gradients, optimizer.set_params, worker.push, worker.step):
            with pytest.raises(StructureError, match=told):
                call({"e": leaf})
        with pytest.raises(StructureError, match=told):
            worker.push_tensor("e", leaf)
        with pytest.raises(ValueError, match=told):
            optimizer.get_gradients(lambda _: (0.0, {"e": leaf}), {"e": ONES})
        with pytest.raises(StructureError, match=r"index 2: .*for m of 'e'"):
            optimizer.set_weights([0, 1.0, leaf, ONES])
        assert optimizer.apply_gradients({"e": ONES}) == 1


def coo(torch: Any) -> Any:
    indices = torch.tensor([[1, 1, 3], [0, 0, 2]])  # one index twice, which adds
    return torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0, 5.0]), (5, 4))


TORCH_TAKEN: dict[str, Callable[[Any, Any], Any]] = {
    "COO, not coalesced": lambda torch, t: coo(torch),
    "CSR": lambda torch, t: t.to_sparse_csr(),
    "CSC": lambda torch, t: t.to_sparse_csc(),
    "COO of bfloat16": lambda torch, t: t.to(torch.bfloat16).to_sparse(),
    "negative bit": lambda torch, t: torch.complex(t, t).conj().imag,
    "negative bit, bfloat16 afterwards": lambda torch, t: (
        torch.complex(t, t).conj().imag.bfloat16()
    ),
    "a view that is turned": lambda torch, t: t.t().contiguous().t(),
    "stretched": lambda torch, t: torch.ones(1).expand(5, 4),
    "a parameter": lambda torch, t: torch.nn.Parameter(t),
    "a result": lambda torch, t: torch.nn.Parameter(t) * 2,
    "mkldnn": lambda torch, t: t.to_mkldnn(),
    "of inference mode": lambda torch, t: torch.inference_mode()(lambda: t * 2)(),
}


@pytest.mark.parametrize("make", TORCH_TAKEN.values(), ids=TORCH_TAKEN)
def test_torch_tensors_that_have_numbers_are_taken(make: Any) -> None:
    torch = pytest.importorskip("torch")
    tensor = make(torch, torch.arange(20.0).reshape(5, 4) - 3)
    dense = tensor.detach()
    dense = (dense.to_dense() if dense.layout != torch.strided else dense).resolve_neg()
    got = gives(tensor)
    assert np.array_equal(got.astype(np.float32), dense.float().numpy())


def fake(torch: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(5, 4)


def freed(torch: Any) -> Any:
    tensor = torch.ones(5, 4)
    tensor.untyped_storage().resize_(0)
    return tensor


TORCH_REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "meta": (lambda torch: torch.ones(5, 4, device="meta"), "meta device.*to_empty"),
    "float8": (lambda torch: torch.ones(5, 4).to(torch.float8_e4m3fn), r"float8_e4m3fn.*\.float"),
    "float8 scale": (lambda torch: torch.ones(5, 4).to(torch.float8_e5m2), r"float8_e5m2"),
    "quantised": (
        lambda torch: torch.quantize_per_tensor(torch.ones(5, 4), 0.1, 0, torch.qint8),
        "quantised.*dequantize",
    ),
    "nested": (lambda torch: torch.nested.nested_tensor([torch.ones(4)] * 5), "nested.*unbind"),
    "jagged": (
        lambda torch: torch.nested.nested_tensor([torch.ones(4)] * 5, layout=torch.jagged),
        "nested.*unbind",
    ),
    "conjugate": (lambda torch: torch.ones(5, 4, dtype=torch.complex64).conj(), "complex64"),
    "fake": (fake, "FakeTensor.*plain tensor"),
    "freed": (freed, "storage was freed.*FSDP"),
    "not initialised": (lambda torch: torch.nn.UninitializedParameter(), "uninitialized"),
}


@pytest.mark.parametrize(("make", "told"), TORCH_REFUSED.values(), ids=TORCH_REFUSED)
def test_torch_tensors_without_numbers_are_refused_by_path(make: Any, told: str) -> None:
    refused(make(pytest.importorskip("torch")), told)


def test_a_masked_tensor_of_torch_is_refused() -> None:
    torch = pytest.importorskip("torch")
    masked = torch.masked.masked_tensor(torch.ones(5, 4), torch.ones(5, 4).bool())
    refused(masked, "MaskedTensor.*to_tensor")


def test_a_sparse_embedding_trains_as_a_dense_one_does() -> None:
    torch = pytest.importorskip("torch")
    results = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = torch.nn.Embedding(5, 4, sparse=sparse)
        with DistNadam(backend="local").build(OrderedDict(table.named_parameters())) as optimizer:
            for batch in ([1, 2, 1], [0, 1, 4]):
                table.zero_grad()
                loss = (table(torch.tensor(batch)) ** 2).sum()
                found = optimizer.get_gradients(loss, dict(table.named_parameters()))
                loss = (table(torch.tensor(batch)) ** 2).sum()
                loss.backward()
                assert np.array_equal(found[0], table.weight.grad.to_dense().numpy())
                optimizer.apply_gradients({"weight": table.weight.grad})
            results.append(optimizer.get_params()["weight"].tobytes())
    assert results[0] == results[1]


def test_torch_weights_that_are_tied_are_named() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 4), "head": torch.nn.Linear(4, 5)})
    model["head"].weight = model["embed"].weight
    with pytest.warns(UserWarning, match="'head.weight' is 'embed.weight'"):
        DistNadam(backend="local").build(model.state_dict()).close()
    with DistNadam(backend="local").build(OrderedDict(model.named_parameters())) as optimizer:
        assert sorted(optimizer.get_params()) == ["embed.weight", "head.bias"]


def test_gradients_in_the_order_of_the_modules_are_matched_by_path() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model(torch.ones(1, 2)).sum().backward()
    results = set()
    for kind in (dict, OrderedDict):
        with DistNadam(backend="local").build(kind(model.named_parameters())) as optimizer:
            optimizer.apply_gradients(kind((n, p.grad) for n, p in model.named_parameters()))
            results.add(b"".join(w.tobytes() for w in optimizer.get_weights()))
    assert len(results) == 1


def test_jax_arrays_that_are_no_numbers_are_refused_by_path() -> None:
    jax = pytest.importorskip("jax")
    from jax.experimental import sparse

    refused(sparse.BCOO.fromdense(jax.numpy.ones((5, 4))), r"\.todense\(\)")
    gone = jax.numpy.ones((5, 4))
    gone.delete()
    refused(gone, "deleted")
    refused(jax.random.key(0), "'e'|key")

    def inside(leaf: Any) -> Any:
        refused(leaf, "Tracer")
        return leaf.sum()

    jax.grad(inside)(jax.numpy.ones((5, 4)))
    refused(jax.numpy.ones((5, 4), jax.numpy.float8_e4m3fn), "float8_e4m3fn")
    assert np.array_equal(gives(jax.numpy.ones((5, 4))), ONES)


def test_tensorflow_slices_and_ragged_tensors_are_refused_by_path() -> None:
    tf = pytest.importorskip("tensorflow")
    slices = tf.IndexedSlices(tf.ones((2, 4)), tf.constant([0, 3]), tf.constant([5, 4]))
    refused(slices, "IndexedSlices.*convert_to_tensor")
    refused(tf.sparse.from_dense(tf.ones((5, 4))), "SparseTensor.*tf.sparse.to_dense")
    refused(tf.ragged.constant([[1.0], [1.0, 2.0]]), "RaggedTensor")
    assert np.array_equal(gives(tf.Variable(tf.ones((5, 4)))), ONES)
