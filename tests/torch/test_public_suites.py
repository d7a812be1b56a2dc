"""torch's own tests of its optimizers and schedulers, run against ours.

What they are given comes from the wheel; the files themselves are in no wheel. Where
DISTNADAM_TORCH_TESTS names a checkout's `test` folder, of the tag of the installed torch, they run;
elsewhere they are skipped, and what they check is in `test_optimizer.py`.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
pytest.importorskip("torch")

FOLDER = os.environ.get("DISTNADAM_TORCH_TESTS")
LEAST = os.environ.get("DISTNADAM_TORCH_TESTS_LEAST", "20")
ROOT = Path(__file__).parents[2]
CANNOT = {
    "test_state_dict_with_cuda_params": "needs CUDA",
    "test_optim_infos_do_not_specify_global_cliquey_kwargs": "of torch's table, not of optimizers",
    "test_param_groups_lr": "its groups differ in the formula, which is of all groups alike",
}
"""Tests of TestOptimRenewed that do not apply, and why; those of foreach, fused, capturable,
differentiable, complex, sparse and CUDA are not made, since the table says that ours has none.
"""
OPTIM = """
import importlib, sys, types, unittest
import distnadam
import torch.testing._internal.common_optimizers as co
folder, cannot = sys.argv[1], {cannot!r}
for name in ("test_lrscheduler", "test_optim", "test_swa_utils"):
    stub = types.ModuleType("optim." + name)
    stub.TestLRScheduler = stub.TestDifferentiableOptimizer = stub.TestSWAUtils = object
    sys.modules["optim." + name] = stub
sys.modules["optim"] = types.ModuleType("optim")
adam = next(info for info in co.optim_db if info.optim_cls is co.Adam)
skip = lambda name, why: co.DecorateInfo(unittest.skip(why), "TestOptimRenewed", name)
skips = tuple(skip(*pair) for pair in cannot.items())
co.optim_db[:] = [
    co.OptimizerInfo(
        distnadam.torch.DistNadam,
        optim_inputs_func=co.optim_inputs_func_nadam,
        optim_error_inputs_func=co.optim_error_inputs_func_nadam,
        scheduler_inputs=adam.scheduler_inputs,
        supported_impls=(),
        supports_complex=False,
        has_capturable_arg=False,
        skips=skips,
    )
]
scope = {{"__file__": folder + "/test_optim.py"}}
module = types.ModuleType("test_optim_of_torch")
sys.modules["test_optim_of_torch"] = module
exec(compile(open(folder + "/test_optim.py").read(), scope["__file__"], "exec"), module.__dict__)
suite = unittest.defaultTestLoader.loadTestsFromModule(module)
result = unittest.TextTestRunner(verbosity=2).run(suite)
assert result.testsRun - len(result.skipped) >= int(sys.argv[2]), "too few tests ran"
sys.exit(not result.wasSuccessful())
"""
SCHEDULERS = """
import sys, types, unittest
import distnadam, torch
torch.optim.Adam = distnadam.torch.DistAdam  # which the tests then import
folder = sys.argv[1]
module = types.ModuleType("test_lrscheduler_of_torch")
sys.modules[module.__name__] = module
source = open(folder + "/optim/test_lrscheduler.py").read()
exec(compile(source, folder + "/optim/test_lrscheduler.py", "exec"), module.__dict__)
suite = unittest.defaultTestLoader.loadTestsFromModule(module)
result = unittest.TextTestRunner().run(suite)
assert result.testsRun > 100, "too few tests ran"
sys.exit(not result.wasSuccessful())
"""


def run(code: str, file: str, tmp_path: Path) -> None:
    if FOLDER is None:
        pytest.skip("torch's wheel has no tests: DISTNADAM_TORCH_TESTS names no checkout's folder")
    if not Path(FOLDER, file).exists():
        pytest.skip(f"{file} is not in {FOLDER}")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), FOLDER, LEAST],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_test_optim_renewed(tmp_path: Path) -> None:
    run(OPTIM.format(cannot=CANNOT), "test_optim.py", tmp_path)


def test_test_lrscheduler(tmp_path: Path) -> None:
    run(SCHEDULERS, "optim/test_lrscheduler.py", tmp_path)
