"""``card`` and ``push``: a checkpoint for others."""

import argparse
import os
from pathlib import Path
from typing import Any

from ..hub.checkpoint_folder import CheckpointFolder
from .arguments import display_name


def add_card(commands: Any) -> None:
    card = commands.add_parser("card", help="write README.md from the config and, if there is one, octav_run.json")
    card.add_argument("folder", metavar="FOLDER", type=os.path.expanduser)
    card.set_defaults(run=_card)


def add_push(commands: Any) -> None:
    push = commands.add_parser("push", help="upload a checkpoint in the form that it has, with its card")
    push.add_argument("folder", metavar="FOLDER", type=os.path.expanduser)
    push.add_argument("repo_id", metavar="REPO_ID", help="such as me/bert-4bit; it is created if need be")
    push.add_argument("--private", action="store_true", default=None, help="if the repository is created")
    push.add_argument("--revision", help="branch to push to; it is created if need be")
    push.add_argument("--commit-message")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    push.set_defaults(run=_push)


def _card(options: argparse.Namespace) -> None:
    folder = _local(options.folder)
    folder.write_card(display_name(folder.path))
    print(f"wrote {folder.path / 'README.md'}")


def _push(options: argparse.Namespace) -> None:
    folder = _local(options.folder)
    commit = folder.push(
        options.repo_id,
        private=options.private,
        revision=options.revision,
        commit_message=options.commit_message,
        create_pr=options.create_pr,
    )
    print(commit.pr_url or commit.commit_url)


def _local(folder: str) -> CheckpointFolder:
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder")
    return CheckpointFolder(folder)
