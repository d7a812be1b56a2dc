"""`python -m tests.hosts.systemctl VERB UNIT` stands in for systemd on a host of `installed`: it
starts and stops the program of a unit, without its user, limits and protection.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.deploy.units import Unit

_UNITS = Path("/etc/systemd/system")
_STATE = Path("/var/lib/units")
_START_S = 120.0


def _pid(unit: str) -> int | None:
    """Return the process of a unit, if it lives."""
    try:
        pid = int((_STATE / unit).read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return pid


def _start(unit: str) -> int:
    if _pid(unit) is not None:
        return 0
    read = Unit.parse((_UNITS / unit).read_text())
    texts = {str(path): path.read_text() for path in Path("/etc/distnadam").glob("*.env")}
    env = read.environment(texts)
    command, is_ray = read.command(env), "train" not in unit
    if is_ray:
        command.append("--num-cpus=2")
    known = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    log = _STATE / f"{unit}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env=known | env,
            cwd="/var/lib/distnadam",
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    (_STATE / unit).write_text(str(process.pid))
    deadline = time.monotonic() + _START_S
    while is_ray and "--block" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.stderr.write(log.read_text())
            return 1
        time.sleep(0.1)
    return 0


def _stop(unit: str) -> int:
    if (pid := _pid(unit)) is None:
        return 0
    read = Unit.parse((_UNITS / unit).read_text())
    sent = (read.values("Service", "KillSignal") or ["SIGTERM"])[-1]
    os.kill(pid, signal.Signals[sent])
    deadline = time.monotonic() + float(read.values("Service", "TimeoutStopSec")[-1])
    while _pid(unit) is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)  # what is left of its control group
    return 0


def main(verb: str, *rest: str) -> int:
    """Return the exit status."""
    _STATE.mkdir(exist_ok=True)
    units = [word for word in rest if word.endswith(".service")]
    if verb in ("start", "stop"):
        return max({"start": _start, "stop": _stop}[verb](unit) for unit in units)
    if verb in ("enable", "disable"):
        act = {"enable": _start, "disable": _stop}[verb]
        return max(act(unit) for unit in units) if "--now" in rest else 0
    if verb == "is-active":
        print("active" if (is_there := _pid(units[0]) is not None) else "inactive")
        return 0 if is_there else 3
    return 0 if verb == "daemon-reload" else 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
