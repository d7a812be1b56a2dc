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
    "test_forloop_goes_right_direction_multigpu": "needs two GPUs",
    "test_optim_infos_do_not_specify_global_cliquey_kwargs": "of torch's table, not of optimizers",
    "test_param_groups_lr": "its groups differ in the formula, which is of all groups alike",
}
"""Tests of TestOptimRenewed that do not apply, and why. These are not made, since the table says
what our optimizers have none of:

- sparse gradients: test_rosenbrock_sparse;
- complex parameters: test_complex, test_complex_2d;
- foreach: test_foreach_matches_forloop, test_foreach_large_tensor, test_peak_memory_foreach,
  test_set_default_dtype_works_with_foreach, test_defaults_changed_to_foreach;
- fused: test_fused_matches_forloop, test_fused_error_on_params_on_meta, test_fused_large_tensor,
  test_fused_does_not_step_if_foundinf, test_fused_cpu_matches_cuda, test_cpu_load_state_dict;
- both of these on several GPUs: test_mixed_device_dtype;
- steps that need a closure: test_second_order_optims_return_consistent_types.

Where a gradient of zeros must move nothing, torch's table gives AdamW, by its name, a small rate;
ours that decay by default are left out of test_step_is_noop_for_zero_grads.

What torch's Adam is given of amsgrad, foreach, fused, capturable and differentiable is left out.
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
not_ours = {{"amsgrad", "capturable", "differentiable", "foreach", "fused"}}
def of_ours(inputs):
    def kept(device, dtype=None):
        every = inputs(device, dtype)
        given = [getattr(each, "optimizer_error_input", each).kwargs for each in every]
        return [each for each, kwargs in zip(every, given) if not not_ours & kwargs.keys()]
    return kept
skip = lambda name, why: co.DecorateInfo(unittest.skip(why), "TestOptimRenewed", name)
def skips_of(name):
    decays = {{"test_step_is_noop_for_zero_grads": "decays without gradients"}}
    without = cannot | (decays if name[-1] == "W" else {{}})
    return tuple(skip(*pair) for pair in without.items())
adam = next(info for info in co.optim_db if info.optim_cls is co.Adam)
theirs = {{"Nadam": "nadam", "NadamW": "nadam", "Adam": "adam", "AdamW": "adamw"}}
co.optim_db[:] = [
    co.OptimizerInfo(
        getattr(distnadam.torch, "Dist" + name),
        optim_inputs_func=of_ours(getattr(co, "optim_inputs_func_" + same)),
        optim_error_inputs_func=of_ours(getattr(co, "optim_error_inputs_func_" + same)),
        scheduler_inputs=adam.scheduler_inputs,
        supported_impls=(),
        supports_complex=False,
        has_capturable_arg=False,
        skips=skips_of(name),
    )
    for name, same in theirs.items()
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
