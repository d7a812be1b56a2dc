"""Recipes for what trains for others: Lightning, accelerate and Hugging Face's Trainer. Nothing of
ours but the optimizer; each ends where torch's own class ends in a plain loop.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # of packages that are not ours
]
torch = pytest.importorskip("torch")

import distnadam  # noqa: E402
from tests.torch.models import batches, distance, loss_of, make  # noqa: E402

ours = distnadam.torch
CLOSE = 5e-6
ROOT = Path(__file__).parents[2]
EPOCHS = 2


def reference(clip: float | None = None, accumulate: int = 1) -> Any:
    """The model after two epochs of a plain loop with torch's class and a one-cycle schedule."""
    model = make()
    optimizer = torch.optim.NAdam(model.parameters(), lr=0.01)
    steps = EPOCHS * 8 // accumulate
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    for number, batch in enumerate(EPOCHS * batches(8)):
        (loss_of(model, batch) / accumulate).backward()
        if (number + 1) % accumulate:
            continue
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model


def test_lightning_trains_with_clipping_accumulation_and_a_checkpoint(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = make()

        def training_step(self, batch: Any, number: int) -> Any:
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> Any:
            optimizer = ours.DistNadam(self.named_parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=8)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def trainer(epochs: int) -> Any:
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=0.05,
            accumulate_grad_batches=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    data = torch.utils.data.DataLoader(batches(8), batch_size=None)
    first = Module()
    half = trainer(1)
    half.fit(first, data)
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = Module()
    trainer(EPOCHS).fit(second, data, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=False)
    assert distance(second.model, reference(0.05, 2)) < CLOSE


def test_accelerate_trains_in_its_own_loop_and_saves_its_state(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    data = torch.utils.data.DataLoader(batches(8), batch_size=None)

    def made() -> Any:
        model = make()
        optimizer = ours.DistNadam(model.named_parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=8)
        return accelerator.prepare(model, optimizer, schedule)

    def epoch(model: Any, optimizer: Any, schedule: Any) -> None:
        for batch in data:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    first = made()
    epoch(*first)
    accelerator.save_state(str(tmp_path))
    accelerator._models, accelerator._optimizers, accelerator._schedulers = [], [], []
    second = made()
    accelerator.load_state(str(tmp_path))
    epoch(*second)
    assert distance(second[0], reference(0.05, 2)) < CLOSE


def test_hugging_face_s_trainer_takes_it_with_its_schedule(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = make()

        def forward(self, batch: Any) -> Any:
            return {"loss": loss_of(self.model, batch)}

    model = Model()
    optimizer = ours.DistNadam(model.named_parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=EPOCHS * 8)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        max_grad_norm=0.05,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"batch": row} for batch in batches(8) for row in batch]

    class Trainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *given: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule)).train()
    assert distance(model.model, reference(0.05)) < CLOSE


TWO_RANKS = """
import sys
import torch
import distnadam
from accelerate import Accelerator
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from tests.torch.models import batches, distance, loss_of, make

accelerator = Accelerator(cpu=True)
rank, size = accelerator.process_index, accelerator.num_processes
assert size == 2
optimizer = distnadam.torch.DistNadam((model := make()).named_parameters(), lr=0.01)
model, optimizer = accelerator.prepare(model, optimizer)
model.register_comm_hook(None, noop_hook)  # our shards average, not DDP
for batch in batches(16)[rank::2]:
    accelerator.backward(loss_of(model, batch))
    optimizer.optimizer.clip_grad_norm_(0.05)  # of the mean of both, not of each
    optimizer.step()
    optimizer.zero_grad()
plain = make()
other = torch.optim.NAdam(plain.parameters(), lr=0.01)
every = batches(16)
for pair in zip(every[::2], every[1::2]):
    (sum(loss_of(plain, batch) for batch in pair) / 2).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    other.step()
    other.zero_grad()
assert distance(model.module, plain) < 5e-6, distance(model.module, plain)
"""


@pytest.mark.nightly
def test_accelerate_trains_two_ranks_with_ddp_s_all_reduce_off(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "script.py").write_text(TWO_RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"}
    environment |= {"RAY_AUTH_TOKEN": "t" * 64, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launcher, "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
