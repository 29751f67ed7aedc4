"""Shell commands of the pages: the package's own run, the others are parsed by the program that they name."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator

from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from octav_hf import cli

from .table_in_page import ROOT


def run_commands(code: str) -> None:
    """Run or parse each command of a shell block; ``AssertionError`` or ``SystemExit`` for one that is wrong."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            COMMANDS[words[0]](words[1:])


def _octav_hf(arguments: list[str]) -> None:
    if arguments[0] in ("push", "export"):  # tests/hub and tests/test_cli.py run them: one uploads, one takes long
        cli._parser().parse_args(arguments)
    else:
        assert cli.main(arguments) == 0, arguments


def _make(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(arguments) <= set(targets), arguments


def _pip(arguments: list[str]) -> None:
    assert arguments[:3] == ["install", "-c", "constraints.txt"], arguments
    assert (ROOT / arguments[2]).is_file()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for package in arguments[3:]:
        named = re.fullmatch(r"\.(?:\[(.+)\])?", package)
        assert named, package
        assert set(filter(None, (named[1] or "").split(","))) <= set(extras), package


def _source(arguments: list[str]) -> None:
    assert arguments == [".venv/bin/activate"]


def _python(arguments: list[str]) -> None:
    script, *options = arguments
    assert (ROOT / script).is_file(), script
    if script == "examples/squad/run_squad.py":
        with _arguments([script, *options]):
            runpy.run_path(str(ROOT / script))["parse_arguments"](None)
        return
    help_text = io.StringIO()
    with _arguments([script, "--help"]), contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    for option in (word for word in options if word.startswith("--")):
        assert option in help_text.getvalue(), f"{script} has no {option}"


def _torchrun(arguments: list[str]) -> None:
    parsed = get_args_parser().parse_args(arguments)
    _python([parsed.training_script, *parsed.training_script_args])


def _accelerate(arguments: list[str]) -> None:
    assert arguments[0] == "launch", arguments
    parsed = launch_command_parser().parse_args(arguments[1:])
    _python([parsed.training_script, *parsed.training_script_args])


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "accelerate": _accelerate,
    "make": _make,
    "octav-hf": _octav_hf,
    "pip": _pip,
    "python": _python,
    "source": _source,
    "torchrun": _torchrun,
}


@contextlib.contextmanager
def _arguments(arguments: list[str]) -> Iterator[None]:
    """The process's own arguments for a while, and the script's folder to import from."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = arguments
    sys.path.insert(0, str((ROOT / arguments[0]).parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
