"""A save into another directory than the one that shards go back to is no restore point."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.errors import Unrecoverable

PARAMS = {"w": np.linspace(-1, 1, 3000, dtype=np.float32)}
ONES = {"w": np.ones(3000, np.float32)}


@pytest.mark.usefixtures("ray_cluster")
def test_what_was_changed_and_saved_elsewhere_is_not_lost_in_silence(tmp_path: Path) -> None:
    options = Options(checkpoint_dir=str(tmp_path / "looked_for"))
    with DistNadam(num_shards=2, backend="ray", options=options).build(PARAMS) as one:
        one.apply_gradients(ONES)
        one.set_config(lr=0.5)
        one.save(tmp_path / "elsewhere")
        one.apply_gradients(ONES)
        os.kill(one.shards.backend.addresses[1].pid, signal.SIGKILL)
        lost = "configuration was replaced after round 1, which going back .* would lose"
        with pytest.raises(Unrecoverable, match=lost):
            one.apply_gradients(ONES)
