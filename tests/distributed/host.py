"""Runs scenarios in several processes that form a process group: started by ``conftest.py``.

    python -m tests.distributed.host

Reads one request a line from its input, ``{"scenario": NAME, "ranks": N, "folder": PATH, "options": {...}}``, runs
``scenarios.NAME(folder, **options)`` in N forks of itself and answers with their exit codes. What a rank returns, or
the exception that it raises, is in FOLDER/RANK.pt. This process imports once and computes nothing itself.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import scenarios

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401  # Accelerate would import it in every fork

# Seconds after which a rank gives up waiting for another, and after which it is killed whatever it does.
TIMEOUT, LIMIT = 20, 60


def run_rank(rank: int, ranks: int, scenario: str, folder: Path, options: dict[str, Any]) -> None:
    """One scenario on one rank."""
    signal.alarm(LIMIT)
    torch.manual_seed(0)
    try:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            store = dist.FileStore(str(folder / "store"), ranks)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT)
            )
        outcome = getattr(scenarios, scenario)(folder, **options)
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"
    torch.save(outcome, folder / f"{rank}.pt")


def fork(*arguments: Any) -> int:
    """``run_rank`` in a separate process; returns its id."""
    process = os.fork()
    if process:
        return process
    try:
        run_rank(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        arguments = request["ranks"], request["scenario"], Path(request["folder"]), request["options"]
        processes = [fork(rank, *arguments) for rank in range(request["ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print("codes", *codes, flush=True)


if __name__ == "__main__":
    main()
