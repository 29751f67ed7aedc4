"""Trainer with FSDP2 and DeepSpeed ends with the weights of one process, and its checkpoints are complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForQuestionAnswering

from octav_hf import OctavConfig, pack_octav
from octav_hf.conversion.record import recorded_config

from .conftest import Run
from .scenarios import batch, bert

pytestmark = pytest.mark.slow

FSDP = {
    "fsdp": True,
    "fsdp_config": {"state_dict_type": "FULL_STATE_DICT", "transformer_layer_cls_to_wrap": ["BertLayer"]},
}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """DeepSpeed's ZeRO config, which shards even small weights and does not clip gradients."""
    optimization = {"stage": stage, "stage3_param_persistence_threshold": 0}
    optimization |= {"stage3_gather_16bit_weights_on_model_save": True}
    plain = {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    batches = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    return {"deepspeed": {"zero_optimization": optimization | more, **plain, **batches}}


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """All weights in one vector."""
    return torch.cat([weight.flatten().double() for _, weight in sorted(weights.items())])


def weights_in(folder: Path) -> torch.Tensor:
    # Not read off the file, where ZeRO-3's loading makes Transformers give some weights their old names.
    return flat(BertForQuestionAnswering.from_pretrained(folder).state_dict())


@pytest.mark.parametrize(
    ("arguments", "sharded", "in_float"),
    [
        (FSDP, True, []),
        (zero(0), False, []),
        (zero(1), False, []),
        (zero(2), False, []),
        (zero(3), True, []),
        (zero(3, memory_efficient_linear=False), True, ["*.attention.self.value"]),
    ],
    ids=["FSDP2", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 with a float layer in attention"],
)
def test_it_ends_as_one_process(
    succeed: Run, tmp_path: Path, arguments: dict[str, Any], sharded: bool, in_float: list[str]
) -> None:
    engine = "FSDPBertForQuestionAnswering"
    if "deepspeed" in arguments:
        pytest.importorskip("deepspeed", reason="pip install deepspeed")
        engine = "DeepSpeedEngine"
    config = {"activation_bits": 8, "sync_activation_clips": True, "exclude_modules": in_float}
    settings = {"config": config, "checkpoint": str(tmp_path / "float")}
    bert("float32").save_pretrained(settings["checkpoint"])
    (alone,) = succeed("train_sharded_with_trainer", 1, tmp_path / "one", per_device=8, **settings)
    ranks = succeed("train_sharded_with_trainer", 2, tmp_path / "two", per_device=4, **settings, **arguments)
    for rank in ranks:
        assert rank["engine"] == engine
        assert (rank["values"] <= alone["values"] // 2 + 100) is sharded
        if sharded:
            pack, save = rank["refusals"]
            assert "encoder.layer.0.attention.self.query: its weight of shape (16, 16) is sharded; save the mod" in pack
            assert "bert.embeddings.word_embeddings.weight of shape (100, 16) is sharded" in save

    expected = weights_in(tmp_path / "one" / "trained")
    begin = flat(bert("float32").state_dict())
    got = weights_in(tmp_path / "two" / "trained")
    # 3e-7; where a sum in another order falls to the other side of a rounding, it may be more.
    assert (got - expected).norm() < 1e-3 * (expected - begin).norm()
    assert torch.equal(weights_in(tmp_path / "two" / "run" / "checkpoint-3"), got)

    trained = BertForQuestionAnswering.from_pretrained(tmp_path / "two" / "trained")
    assert recorded_config(trained) == OctavConfig(**config)
    with torch.no_grad():
        logits = trained(**batch()).start_logits
        pack_octav(trained).save_pretrained(tmp_path / "packed")
        packed = BertForQuestionAnswering.from_pretrained(tmp_path / "packed")
        assert torch.equal(packed(**batch()).start_logits, logits)
