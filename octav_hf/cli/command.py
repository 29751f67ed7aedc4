"""The command line: its parser, and how errors are shown."""

import argparse
import sys

from huggingface_hub.utils import httpx
from transformers import logging

from .._utils.escaping import escaped
from .convert import add_export, add_pack, add_unpack
from .inspect import add_inspect
from .publish import add_card, add_push
from .report import add_report

# HTTPError covers errors of the Hub and failed connections; huggingface_hub exports the client that it uses.
_EXPECTED_ERRORS = (ValueError, OSError, NotImplementedError, ImportError, httpx.HTTPError)


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv``, by default the process's, and return the exit status.

    It is 1 after an error, which is printed to stderr in one line. Progress bars appear if stderr is a terminal.
    """
    options = parser().parse_args(argv)
    had_progress_bar = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        options.run(options)
    except _EXPECTED_ERRORS as error:
        print(f"octav-hf: {escaped(' '.join(str(error).split()), longest=None)}", file=sys.stderr)
        return 1
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; ``run`` of what it parses carries the command out."""
    made = argparse.ArgumentParser(prog="octav-hf", description="Checkpoints of models quantized with octav_hf.")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_pack, add_unpack, add_export, add_inspect, add_report, add_card, add_push):
        add(commands)
    return made
