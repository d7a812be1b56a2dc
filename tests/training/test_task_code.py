"""What of a task's source goes to the workers: one process packs it, and once the files are gone
another one runs it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

PACK = """
import pickle, sys
from distnadam.cli.training import load_task
from distnadam.training.task_code import TaskCode
task = load_task(sys.argv[1])
code = TaskCode(task)
code.sources
for edit in sys.argv[2:]:
    open(edit, "w").write("raise SystemExit('edited since')")
sys.stdout.buffer.write(pickle.dumps((code, task)))
"""
RUN = """
import pickle, sys
code, task = pickle.load(sys.stdin.buffer)
print(code, task.batch(1, 2, 3))
"""
TASK = """{}
class T:
    def init(self, seed): return {{}}
    def batch(self, step, rank, world_size): {}
    def loss_and_gradients(self, params, batch): return 0.0, params
    def evaluate(self, params): return {{}}
"""
HELP = "def total(*parts): return 'sum', sum(parts)\n"
LAYOUTS = {
    "alone": {"t.py": TASK.format("", "return 'sum', step + rank + world_size")},
    "module": {
        "t.py": TASK.format("from helper import total", "return total(step, rank, world_size)"),
        "helper.py": HELP,
    },
    "in a function": {
        "t.py": TASK.format("", "import helper; return helper.total(step, rank, world_size)"),
        "helper.py": HELP,
    },
    "of another": {
        "t.py": TASK.format("import middle", "return middle.total(step, rank, world_size)"),
        "middle.py": "from deep.er.est import total\n",
        "deep/__init__.py": "",
        "deep/er/__init__.py": "from .est import total\n",
        "deep/er/est.py": "def total(*parts):\n from ..near import total\n return total(*parts)\n",
        "deep/near.py": HELP,
    },
    "package without init": {
        "t.py": TASK.format(
            "", "from lib import helper; return helper.total(step, rank, world_size)"
        ),
        "lib/helper.py": HELP,
    },
    "state that cannot be pickled": {
        "t.py": TASK.format("import helper", "return helper.total(step, rank, world_size)"),
        "helper.py": f"import threading\nlock = threading.Lock()\n{HELP}",
    },
    "found at run time": {
        "t.py": TASK.format(
            "import importlib; helper = importlib.import_module('hel' + 'per')",
            "return helper.total(step, rank, world_size)",
        ),
        "helper.py": HELP,
    },
}


def python(*args: str, cwd: Path, stdin: bytes = b"") -> bytes:
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, input=stdin, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_task_and_what_it_imports_beside_it_run_where_no_file_of_theirs_is(
    layout: dict[str, str], tmp_path: Path
) -> None:
    for name, code in layout.items():
        (tmp_path / "hide" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hide" / name).write_text(code)
    packed = python("-c", PACK, "hide/t.py:T", cwd=tmp_path)
    (tmp_path / "hide").rename(tmp_path / "elsewhere")
    (tmp_path / "other").mkdir()
    assert python("-c", RUN, cwd=tmp_path / "other", stdin=packed) == b"None ('sum', 6)\n"


def test_a_worker_that_starts_later_runs_the_code_of_the_beginning(tmp_path: Path) -> None:
    layout = LAYOUTS["in a function"]
    for name, code in layout.items():
        (tmp_path / name).write_text(code)
    packed = python("-c", PACK, "t.py:T", *layout, cwd=tmp_path)
    assert python("-c", RUN, cwd=tmp_path, stdin=packed) == b"None ('sum', 6)\n"


def test_what_a_script_imports_beside_it_goes_along(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(HELP)
    script = TASK.format("from helper import total", "return total(step, rank, world_size)")
    script += PACK.replace("load_task(sys.argv[1])", "T()").replace(
        "import pickle, sys", "import sys, ray.cloudpickle as pickle"
    )
    (tmp_path / "script.py").write_text(script)
    packed = python("script.py", cwd=tmp_path)
    (tmp_path / "helper.py").unlink()
    (tmp_path / "other").mkdir()
    assert python("-c", RUN, cwd=tmp_path / "other", stdin=packed) == b"None ('sum', 6)\n"


@pytest.mark.parametrize("task", ["digits", "t.py:T"])
def test_what_is_installed_stays(task: str, tmp_path: Path) -> None:
    code = TASK.format("import click, json, numpy, helper", "import rich, wave; return step")
    (tmp_path / "t.py").write_text(code)
    (tmp_path / "helper.py").write_text(HELP)
    (tmp_path / "numpy").mkdir()  # as a folder of data may be called
    show = f"{PACK.partition('for edit')[0]}print(sorted(code.sources))"
    said = python("-c", show, task, cwd=tmp_path)
    assert said == (b"[]\n" if task == "digits" else b"['helper', 't']\n")
