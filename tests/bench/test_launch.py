"""`benchmarks/launch.py`: the end of a command with all of its processes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dape.errors import UserError

# A child in a session of its own, as `torchrun` starts ranks, with a child in turn.
NESTED = """
import subprocess, sys
child = f"import subprocess; subprocess.run(['sleep', '{sys.argv[1]}'])"
print("begun", flush=True)
subprocess.run([sys.executable, "-S", "-c", child], start_new_session=True)
"""


@pytest.fixture(scope="module")
def launch(benchmarks):
    return benchmarks("launch")


def running(word):
    """Return the processes with a word among their arguments, apart from the ended ones."""
    commands = [path.read_bytes().split(b"\0") for path in Path("/proc").glob("[0-9]*/cmdline")]
    return [each for each in commands if word.encode() in each]


def test_a_command_that_takes_too_long_ends_with_all_below_it(launch, tmp_path):
    word = "98.7654"
    with launch.started([sys.executable, "-S", "-c", NESTED, word], tmp_path / "log") as process:
        while len(launch.family(process.pid)) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        with pytest.raises(UserError, match="not done after 0 s"):
            launch.run([sys.executable, "-S", "-c", NESTED, "8" + word], tmp_path / "other", 0.3)
        assert running(word) and not running("8" + word)
    assert not running(word)
    assert (tmp_path / "log").read_text() == "begun\n"


def test_the_signal_of_a_time_limit_leaves_nothing_on_the_gpus(launch, tmp_path):
    """`timeout 9m python benchmarks/large_run.py` ends the ranks too."""
    word = "97.6543"
    code = (
        f"import sys; sys.path.append({str(Path(launch.__file__).parent)!r}); import launch;"
        " from pathlib import Path;"
        " launch.run([sys.executable, '-S', '-c', *sys.argv[1:]], Path('log'), 60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, NESTED, word], cwd=tmp_path) as process:
        while len(launch.family(process.pid)) < 4:
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
    assert process.returncode == 143 and not running(word)


def test_the_line_with_the_reason_is_found(launch, tmp_path):
    code = "print('one'); raise SystemExit('[rank1]: dape: error: no room')"
    with pytest.raises(UserError, match=r"^dape: error: no room$"):
        launch.run([sys.executable, "-S", "-c", code], tmp_path / "log", 60)
    with pytest.raises(UserError, match=r"^status 3$"):
        launch.run([sys.executable, "-S", "-c", "raise SystemExit(3)"], tmp_path / "log", 60)
    assert launch.run([sys.executable, "-S", "-c", "print('two')"], tmp_path / "log", 60) == "two\n"
