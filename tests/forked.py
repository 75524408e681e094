"""Two ranks, started as torchrun does, of one process that has imported what both need.

    python forked.py train recipe.yaml

Runs a command of `dape` on two ranks.
"""

import os
import signal
import sys
import traceback
from importlib import import_module

from torch.distributed import TCPStore


def fork(action):
    """Run an action, which returns an exit code or nothing, on two ranks."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # where ranks meet
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "0"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = set()
    for rank in "01":
        process = os.fork()
        if not process:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            code = 1
            try:
                code = action() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.add(process)
    while ranks:
        process, status = os.wait()
        ranks.remove(process)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def instead_of(torchrun):
    """Return the words that start a command of `dape` here in place of those of torchrun."""
    torchrun = [*map(str, torchrun)]
    assert torchrun[1:3] == ["-m", "torch.distributed.run"] and "--nproc_per_node=2" in torchrun
    place = torchrun.index("dape")
    assert torchrun[place - 1] == "-m"
    return [torchrun[0], __file__, *torchrun[place + 1 :]]


if __name__ == "__main__":
    main = import_module("dape.cli").main
    for name in ("dape.evaluate.evaluation", "dape.train.run"):
        import_module(name)
    fork(lambda: main(sys.argv[1:]))
