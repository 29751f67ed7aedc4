"""Fixtures of the export tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, calibrate_octav
from octav_hf.export import to_onnx

Batch = dict[str, torch.Tensor]


def quantized(model: Any, batch: Batch, config: OctavConfig | None = None) -> Any:
    """``model`` with static clips calibrated on ``batch``."""
    apply_octav(model, config or OctavConfig(activation_bits=8))
    return calibrate_octav(model.eval(), [batch], weights=True, progress_bar=False)


def run(folder: Path, batch: Batch) -> dict[str, np.ndarray]:
    """The outputs of an exported folder by name, with the session options that it names and otherwise the defaults."""
    options = onnxruntime.SessionOptions()
    for name, value in json.loads((folder / "octav_export.json").read_text())["session_options"].items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: x.numpy() for name, x in batch.items()}), strict=True))


def expected(model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: x.numpy() for name, x in model(**batch).items() if isinstance(x, torch.Tensor)}


def assert_same(model: nn.Module, folder: Path, batch: Batch) -> None:
    """Outputs of the small models agree up to float32 rounding, because no value is close to a rounding boundary."""
    outputs = expected(model, batch)
    found = run(folder, batch)
    assert found.keys() == outputs.keys()
    for name, x in outputs.items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=2e-6 * max(1.0, np.abs(x).max()))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertForQuestionAnswering, Path, Batch]:
    """A small BERT with 4-bit weights and 8-bit activations, its export, and the batch."""
    from transformers import BertConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForQuestionAnswering(BertConfig(vocab_size=100, max_position_embeddings=64, **sizes))
    ids = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    folder = tmp_path_factory.mktemp("exported")
    to_onnx(quantized(model, batch), folder, batch)
    return model, folder, batch


@pytest.fixture
def copied(exported: tuple[Any, Path, Batch], tmp_path: Path) -> Path:
    """A copy of the exported folder, for changes."""
    import shutil

    return Path(shutil.copytree(exported[1], tmp_path / "copied"))


MakeBert = Callable[..., BertForQuestionAnswering]
