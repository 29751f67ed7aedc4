"""Shared fixtures: small random models, the real SQuAD files, and an environment without network."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# For the processes that tests start; ``one_thread`` says why. OpenMP reads it when it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

import transformers
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parent.parent
SHARED_SQUAD = ROOT.parent / "shared" / "squad"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pytest_report_header() -> str:
    """The versions that the tests run with."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the real SQuAD files or Chromium where they are missing, and put files with slow tests first.

    So no worker is left with a long one when the other is done. With ``CI`` in the environment a missing browser is
    not a reason to skip: the tests fail.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    missing = {}
    if not SHARED_SQUAD.is_dir():
        missing["needs_shared"] = f"the real SQuAD files are not at {SHARED_SQUAD}"
    if CHROMIUM is None and "CI" not in os.environ:
        missing["needs_browser"] = "Chromium is not installed (Debian: apt-get install chromium)"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread: if another process uses a core, OpenMP's waiting makes small operations 100 times slower."""
    torch.set_num_threads(1)


@pytest.fixture
def shared_squad() -> Path:
    """The folder of the real SQuAD files; for tests marked ``needs_shared``."""
    return SHARED_SQUAD


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """A headless Chromium without network services of its own; for tests marked ``needs_browser``."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "tests marked needs_browser need Chromium where CI is set (Debian: apt-get install chromium)"
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, chromium_sandbox=False, args=[*quiet, "--disable-gpu", "--disable-quic"]
        )
        yield browser
        browser.close()


@pytest.fixture
def small_bert() -> Callable[..., BertForQuestionAnswering]:
    """A function that makes a small random BERT in eval mode, always the same; keywords change its config."""

    def make(seed: int = 0, attn_implementation: str = "sdpa", **changes: object) -> BertForQuestionAnswering:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = BertConfig(vocab_size=100, max_position_embeddings=64, **(sizes | changes))
        config._attn_implementation = attn_implementation
        return BertForQuestionAnswering(config).eval()

    return make


@pytest.fixture
def padded_batch() -> dict[str, torch.Tensor]:
    """Token ids and mask of two sequences; the second one is padded."""
    ids = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def small_resnet() -> Callable[..., ResNetForImageClassification]:
    """A function that makes a small random ResNet in eval mode, always the same; keywords change its config."""

    def make(seed: int = 0, **changes: object) -> ResNetForImageClassification:
        torch.manual_seed(seed)
        sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"}
        return ResNetForImageClassification(ResNetConfig(num_labels=5, **(sizes | changes))).eval()

    return make


@pytest.fixture
def small_mobilenet() -> Callable[..., MobileNetV2ForImageClassification]:
    """A function that makes a small random MobileNetV2 in eval mode, always the same; keywords change its config."""

    def make(seed: int = 0, **changes: object) -> MobileNetV2ForImageClassification:
        torch.manual_seed(seed)
        sizes = {"depth_multiplier": 0.25, "expand_ratio": 2.0, "finegrained_output": False, "num_labels": 5}
        return MobileNetV2ForImageClassification(MobileNetV2Config(**(sizes | changes))).eval()

    return make
