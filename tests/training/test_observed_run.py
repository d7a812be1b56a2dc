"""What the panel shows of a run that goes on elsewhere."""

import io
import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from distnadam.training.observed_run import ObservedRun
from distnadam.training.panel import render
from tests.training.test_callbacks import STATUS
from tests.training.test_fit import train


def test_a_panel_of_a_run_elsewhere_has_its_losses_where_its_files_can_be_seen(
    tmp_path: Path,
) -> None:
    history = train(tmp_path, 20, evaluate_every=10)
    status = replace(
        STATUS, name="mine", step=25, checkpoint=str(history.checkpoints[-1]), recoveries=1
    )
    view = ObservedRun("mine").view(replace(status, steps_per_s=4.0, awaited="the push of rank 1"))
    assert (view.step, view.steps, view.loss) == (25, 20, history.losses[-1])
    assert view.metrics == history.metrics
    output = io.StringIO()
    Console(file=output, width=100).print(render(view))
    for word in ("mine", "25/20", "4.0 steps/s", "distance", "1 recovered"):
        assert word in output.getvalue(), word
    assert "waits for" not in output.getvalue(), "a run that steps waits for a moment only"
    view = ObservedRun("mine").view(replace(status, steps_per_s=0.0, awaited="the push of rank 1"))
    Console(file=output, width=100).print(render(view))
    assert "waits for  the push of rank 1" in re.sub(" {2,}", "  ", output.getvalue())
    elsewhere = ObservedRun("mine").view(
        replace(status, checkpoint="s3://bucket/run/step_00000020")
    )
    assert (elsewhere.step, elsewhere.steps) == (25, None)
    assert ObservedRun("mine").view(replace(status, checkpoint=None)).recoveries == 1
