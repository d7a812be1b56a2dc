"""torch files with a real torch: exact round trips; other optimizers and clocks are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.checkpoint.diff import compare
from distnadam.errors import CheckpointError, ConversionError
from distnadam.interop import export_checkpoint, import_checkpoint, load_checkpoint
from distnadam.interop import torch as torch_format
from tests import models

pytestmark = pytest.mark.slow


def exported(tmp_path: Path, *, steps: int = 3, **config: Any) -> tuple[Path, Path]:
    with DistNadam(**config, backend="local").build(models.params()) as optimizer:
        for step in range(steps):
            optimizer.apply_gradients(models.gradients(step, 0))
        path = Path(optimizer.save(tmp_path / "a"))
    return path, Path(export_checkpoint(path, tmp_path / "file.pt", to="torch").path)


def changed(path: Path, change: Callable[[Any], object]) -> Path:
    import torch

    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("steps", [0, 3])
def test_there_and_back_is_the_same_checkpoint(steps: int, tmp_path: Path) -> None:
    before, file = exported(tmp_path, steps=steps)
    back = import_checkpoint(file, tmp_path / "b", source_format="torch")
    assert compare(before, Path(back.path)).same


def test_clipping_and_half_precision_are_noted(tmp_path: Path) -> None:
    path, _ = exported(tmp_path, clipnorm=1.0)
    notes = export_checkpoint(path, tmp_path / "other.pt", to="torch").notes
    assert [note.split(":")[0] for note in notes] == ["clipnorm", "half precision"]


def test_names_are_the_models_where_the_optimizer_has_none(tmp_path: Path) -> None:
    before, file = exported(tmp_path)
    changed(file, lambda c: c["optimizer"]["param_groups"][0].pop("param_names"))
    assert compare(
        before, Path(import_checkpoint(file, tmp_path / "b", source_format="torch").path)
    ).same


def test_groups_of_one_setting_are_one(tmp_path: Path) -> None:
    def split(content: Any) -> None:
        (group,) = content["optimizer"]["param_groups"]
        cut = [
            {**group, "params": group["params"][s], "param_names": group["param_names"][s]}
            for s in (slice(2), slice(2, None))
        ]
        content["optimizer"]["param_groups"] = cut

    before, file = exported(tmp_path)
    changed(file, split)
    assert compare(
        before, Path(import_checkpoint(file, tmp_path / "b", source_format="torch").path)
    ).same
    changed(file, lambda c: c["optimizer"]["param_groups"][1].update(momentum_decay=0.5))
    with pytest.raises(
        ConversionError,
        match=r"schedule_decay: its parameter groups have 0\.004 and 0\.5, and distnadam has one",
    ):
        import_checkpoint(file, tmp_path / "c", source_format="torch")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda c: c["optimizer"]["state"][1]["step"].add_(0.5),
            CheckpointError,
            r"'dense/bias': expected a whole number of steps .*, got 3\.5 and",
        ),
        (
            lambda c: c["optimizer"]["state"][1]["mu_product"].add_(2),
            CheckpointError,
            "'dense/bias': expected .* product of momentum coefficients, in .0, 1., got 3",
        ),
        (
            lambda c: c["optimizer"]["state"][1].pop("exp_avg_sq"),
            CheckpointError,
            "'dense/bias': expected .*; exp_avg_sq is missing",
        ),
        (
            lambda c: c["optimizer"]["state"].pop(2),
            CheckpointError,
            "'layers/0': expected .*; step is missing",
        ),
        (
            lambda c: c["optimizer"]["state"].update({9: {}}),
            CheckpointError,
            "its state is not that of the parameters in its groups",
        ),
        (
            lambda c: c["optimizer"]["param_groups"][0].pop("momentum_decay"),
            CheckpointError,
            r"KeyError: 'momentum_decay \(of NAdam\) or amsgrad \(of Adam and AdamW\)'",
        ),
        (
            lambda c: c["optimizer"].pop("state"),
            CheckpointError,
            "expected a state_dict of torch.optim.NAdam",
        ),
        (lambda c: c["model"].pop("half"), CheckpointError, r"the model lacks \['half'\]"),
        (
            lambda c: c["model"].update(half=3),
            CheckpointError,
            "model: expected a dict of tensors by name",
        ),
        (
            lambda c: c.pop("optimizer"),
            CheckpointError,
            "expected a dict of model and optimizer .* got model, about",
        ),
        (
            lambda c: c["optimizer"]["state"][0]["exp_avg_sq"][2, 3].fill_(float("nan")),
            CheckpointError,
            r"got nan at index \(2, 3\)",
        ),
        (
            lambda c: c["optimizer"]["state"][0].update(exp_avg=c["model"]["half"]),
            CheckpointError,
            r"expected shape \(90, 70\), got",
        ),
    ],
)
def test_what_is_not_of_one_clock_and_whole_is_named(
    change: Callable[[Any], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    _, file = exported(tmp_path)
    with pytest.raises(error, match=message) as caught:
        import_checkpoint(changed(file, change), tmp_path / "b", source_format="torch")
    assert str(file) in str(caught.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["RAdam", "SGD", "Adamax"])
def test_a_state_of_another_class_is_refused(name: str, tmp_path: Path) -> None:
    import torch

    weight = torch.nn.Parameter(torch.ones(3))
    state = getattr(torch.optim, name)([weight], lr=0.1).state_dict()
    torch.save({"model": {"w": weight.detach()}, "optimizer": state}, tmp_path / "other.pt")
    with pytest.raises(
        CheckpointError, match=r"expected a state_dict of torch\.optim\.NAdam, Adam or AdamW"
    ):
        import_checkpoint(tmp_path / "other.pt", tmp_path / "b", source_format="torch")


def test_amsgrad_is_refused_by_name_unless_asked_for(tmp_path: Path) -> None:
    before, file = exported(tmp_path, formula="adam")
    changed(file, lambda c: c["optimizer"]["param_groups"][0].update(amsgrad=True))
    with pytest.raises(ConversionError, match="amsgrad: True there, and distnadam has no AMSGrad"):
        import_checkpoint(file, tmp_path / "b", source_format="torch")
    back = import_checkpoint(file, tmp_path / "b", source_format="torch", lossy=True)
    assert back.notes[0].startswith("differs: amsgrad")
    assert compare(before, back.path).same


def test_an_earlier_torchs_weight_decay_is_adams_or_adamws_as_config_says(tmp_path: Path) -> None:
    before, file = exported(tmp_path, formula="adam", weight_decay=0.125)
    changed(file, lambda c: c["optimizer"]["param_groups"][0].pop("decoupled_weight_decay"))
    with pytest.raises(
        ConversionError, match=r"weight_decay: 0\.125 there, and an earlier torch's"
    ):
        import_checkpoint(file, tmp_path / "b", source_format="torch")
    back = import_checkpoint(
        file, tmp_path / "b", source_format="torch", config={"decoupled_weight_decay": True}
    )
    assert compare(before, back.path).same


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.125])
@pytest.mark.parametrize("formula", ["nadam", "adam"])
@pytest.mark.parametrize("steps", [0, 3])
def test_every_setting_goes_there_and_back(
    formula: str, weight_decay: float, decoupled: bool, steps: int, tmp_path: Path
) -> None:
    before, file = exported(
        tmp_path,
        steps=steps,
        formula=formula,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled,
        maximize=True,
    )
    back = import_checkpoint(file, tmp_path / "b", source_format="torch")
    assert compare(before, back.path).same


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("adam_keras", r"epsilon: .* adds it before .*, and torch\.optim\.Adam after"),
        (
            "nadam_algoperf",
            r"look-ahead: .* and torch\.optim\.NAdam by 1 - beta_1 \*\* \(step \+ 1\)",
        ),
    ],
)
def test_a_formula_that_torch_lacks_is_refused_by_name(
    formula: str, message: str, tmp_path: Path
) -> None:
    with DistNadam(formula=formula, backend="local").build(models.params()) as optimizer:
        path = optimizer.save(tmp_path / "a")
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(path, tmp_path / "file.pt", to="torch")
    with pytest.raises(ConversionError, match=message):
        torch_format.state_dict(load_checkpoint(path))
    done = export_checkpoint(path, tmp_path / "file.pt", to="torch", lossy=True)
    assert done.notes[0].startswith("differs: ")


class Harm:
    """The function that unpickling would call."""

    def __reduce__(self) -> Any:
        return print, ("harm",)


def test_truncated_files_noise_and_pickles_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    _, file = exported(tmp_path)
    whole = file.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cannot be read as a file of torch\.save"):
            import_checkpoint(file, tmp_path / "b", source_format="torch")
    torch.save({"model": Harm(), "optimizer": {}}, file)
    with pytest.raises(CheckpointError, match="weights_only=True"):
        import_checkpoint(file, tmp_path / "b", source_format="torch")
    assert "harm" not in capsys.readouterr().out


def test_bfloat16_parameters_keep_their_masters(tmp_path: Path) -> None:
    import ml_dtypes

    with DistNadam(backend="local").build({"w": np.ones(3, ml_dtypes.bfloat16)}) as optimizer:
        optimizer.apply_gradients({"w": np.ones(3, np.float32)})
        before = optimizer.save(tmp_path / "a")
    file = export_checkpoint(before, tmp_path / "file.pt", to="torch").path
    assert compare(
        Path(before), Path(import_checkpoint(file, tmp_path / "b", source_format="torch").path)
    ).same
