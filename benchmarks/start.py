"""How long until something is there: `consilium --help` and `import consilium`, each in a new process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.frame import Estimate, Result, Scale, alternate, check

NAME, TITLE = "start", "Start-up"


def run(scale: Scale) -> Result:
    """In turn with an interpreter that does nothing."""
    script = Path(sys.executable).parent / "consilium"
    installed = script.is_file()
    consilium = [str(script)] if installed else [sys.executable, "-m", "consilium"]
    commands = {
        "help": [*consilium, "--help"],
        "import": [sys.executable, "-c", "import consilium"],
        "nothing": [sys.executable, "-c", "pass"],
    }
    seconds = alternate({name: (lambda c=c: once(c)) for name, c in commands.items()}, scale.repeats(9), warm_up=1)
    result = Result()
    result.add(
        f"`{'consilium' if installed else 'python -m consilium'} --help`",
        Estimate.of(seconds["help"]),
        "s",
        ("<=", 0.3),
    )
    net = [one - other for one, other in zip(seconds["import"], seconds["nothing"], strict=True)]
    result.add("`import consilium`, beyond an empty interpreter", Estimate.of(net), "s", ("<=", 0.15))
    result.add("an empty interpreter", Estimate.of(seconds["nothing"]), "s")
    result.samples = dict(seconds)
    return result


def once(command: list[str]) -> float:
    """Seconds of a command that must succeed."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True)
    seconds = time.perf_counter() - started
    check(done.returncode == 0, done.stderr.decode()[-500:])
    return seconds
