"""Packed models on disk are restored bit for bit, and Transformers without this package refuses them."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from octav_hf import OctavConfig, apply_octav, calibrate_octav, coverage_report, pack_octav, unpack_octav
from octav_hf.hub.checkpoint_folder import CheckpointFolder
from octav_hf.nn import PackedLayer
from octav_hf.packing.pack import packed_layers
from tests.architectures.models import ARCHITECTURES
from tests.question_answering import logits

MakeBert = Callable[..., BertForQuestionAnswering]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture
def packed(small_bert: MakeBert) -> BertForQuestionAnswering:
    return pack_octav(apply_octav(small_bert(), OctavConfig()))


@pytest.fixture
def folder(packed: BertForQuestionAnswering, tmp_path: Path) -> Path:
    packed.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_it_comes_back_bit_for_bit(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path, bits: int, dtype: torch.dtype
) -> None:
    model = apply_octav(small_bert().to(dtype), OctavConfig(weight_bits=bits, activation_bits=bits))
    expected = logits(model, padded_batch)
    pack_octav(model).save_pretrained(tmp_path / "first")
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "first")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded, padded_batch), expected)
    assert str(coverage_report(loaded)) == str(coverage_report(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "second")
    first, second = tensors_in(tmp_path / "first"), tensors_in(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_the_file_holds_integers_scales_and_what_was_not_quantized(small_bert: MakeBert, folder: Path) -> None:
    tensors, floats = tensors_in(folder), small_bert().state_dict()
    for name, tensor in tensors.items():
        if name.endswith(".weight_scale"):
            weight = floats[name.removesuffix("_scale")]
            assert tensor.dtype == torch.float32
            assert tensor.shape == weight.shape[:1]
            assert tensors[name.removesuffix("_scale")].numel() == weight.numel() // 2
            assert tensors[name.removesuffix("_scale")].dtype == torch.uint8
        elif f"{name}_scale" not in tensors:
            assert torch.equal(tensor, floats[name])
    assert {name for name in tensors if not name.endswith(".weight_scale")} == set(floats)


@pytest.mark.versions
def test_sharded_and_with_a_device_map(packed: nn.Module, padded_batch: dict, tmp_path: Path) -> None:
    packed.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for device_map in (None, "auto", {"": "cpu"}):
        loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(logits(loaded, padded_batch), logits(packed, padded_batch))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloaded_weights_come_back_for_each_use(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path, where: str
) -> None:
    model = pack_octav(apply_octav(small_bert(), OctavConfig(embedding_bits=8)))
    expected, device = logits(model, padded_batch), torch.device("cpu")
    if where == "memory":
        cpu_offload(model, execution_device=device, offload_buffers=True)
    else:
        disk_offload(model, tmp_path, execution_device=device, offload_buffers=True)
    assert model.qa_outputs.weight.is_meta
    assert torch.equal(logits(model, padded_batch), expected)
    with pytest.raises(
        NotImplementedError, match=r"offloaded, but saving a packed checkpoint .* load the model without"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*.safetensors"))


def test_experts_in_float_are_stored_as_transformers_stores_them(tmp_path: Path) -> None:
    """Transformers splits the experts' weights for the files and merges them again; packed layers are beside them."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    pack_octav(apply_octav(model, OctavConfig(exclude_modules=["*.gate"])))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert any("experts.3" in name for name in tensors_in(tmp_path))
    loaded = MixtralForCausalLM.from_pretrained(tmp_path).eval()
    assert packed_layers(loaded).keys() == packed_layers(model).keys()
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_packed_weight_that_would_be_merged_is_not_saved(
    packed: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name, state_dict = "bert.encoder.layer.0.attention.self", dict(state_dict)
        parts = [state_dict.pop(f"{name}.{part}.weight") for part in ("query", "key")]
        return {**state_dict, f"{name}.qk.weight": torch.cat(parts)}

    monkeypatch.setattr("octav_hf.integrations.transformers_quantizer.revert_weight_conversion", merge)
    with pytest.raises(NotImplementedError, match=r"^bert.*\.query: Transformers .* add the layer to exclude_mod"):
        packed.save_pretrained(tmp_path)


def test_another_dtype_rounds_the_weights_and_not_the_scales(folder: Path, packed: nn.Module) -> None:
    loaded = AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for name, layer in packed_layers(loaded).items():
        original = packed.get_submodule(name)
        assert torch.equal(layer.weight_quantizer.scale, original.weight_quantizer.scale)
        assert torch.equal(layer.weight, original.weight.to(torch.bfloat16))


@pytest.mark.versions
def test_with_quantized_embeddings(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    model = pack_octav(apply_octav(small_bert(), OctavConfig()), embedding_bits=8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))
    assert tensors_in(tmp_path)["bert.embeddings.word_embeddings.weight"].dtype == torch.int8


@pytest.mark.versions
def test_a_tied_head_comes_back_tied(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = pack_octav(apply_octav(BertForMaskedLM(small_bert().config).eval(), OctavConfig()))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**padded_batch).logits, model(**padded_batch).logits)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def test_what_the_class_does_not_save_is_not_expected_in_the_files(padded_batch: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sides = {f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = MarianConfig(vocab_size=100, d_model=16, **sides, **heads, pad_token_id=1, decoder_start_token_id=1)
    model = pack_octav(apply_octav(MarianMTModel(config).eval(), OctavConfig()))
    model.save_pretrained(tmp_path)
    assert "model.encoder.embed_positions.weight" not in tensors_in(tmp_path)  # Transformers computes it
    tokens = {"input_ids": padded_batch["input_ids"], "decoder_input_ids": padded_batch["input_ids"]}
    loaded = MarianMTModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**tokens).logits, model(**tokens).logits)


@pytest.mark.parametrize("form", ["training", "packed"])
@pytest.mark.parametrize("in_original_format", [True, False])
def test_with_the_names_of_the_original_files_and_with_the_models(
    tmp_path: Path, in_original_format: bool, form: str
) -> None:
    vit = ARCHITECTURES["ViT"]
    model, batch = apply_octav(vit.make(), OctavConfig.groups()), vit.batch()
    calibrate_octav(model, [batch], weights=True, progress_bar=False)
    if form == "packed":
        pack_octav(model)
    model.save_pretrained(tmp_path, save_original_format=in_original_format)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    folder = CheckpointFolder(str(tmp_path))
    assert {layer.stored for layer in folder.layers()} == {"packed" if form == "packed" else "float32"}
    assert folder.frozen_weights == len(folder.layers())


def test_the_base_model_can_be_loaded_from_it(folder: Path, packed: nn.Module, padded_batch: dict) -> None:
    base = BertModel.from_pretrained(folder, add_pooling_layer=False)
    expected = packed.bert(**padded_batch).last_hidden_state
    assert torch.equal(base(**padded_batch).last_hidden_state, expected)


@pytest.mark.versions
def test_the_whole_model_can_be_loaded_from_the_base_model(small_bert: MakeBert, tmp_path: Path) -> None:
    base = pack_octav(apply_octav(small_bert().bert, OctavConfig()))
    base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"qa_outputs: this packed checkpoint has no packed weight of shape \(2, 32\)"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)


@pytest.mark.versions
def test_another_head_is_refused_not_initialised(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no packed weight of shape .* for BertForSequenceClassification"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialized tensors hold NaN, and integers 85, so that their values cannot pass for right ones."""

    def poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = function(*args, **kwargs)
            return tensor if tensor.is_meta else tensor.detach().fill_(torch.nan if tensor.is_floating_point() else 85)

        return make

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


STORED = {"packed": pack_octav, "frozen": partial(calibrate_octav, weights=True)}


@pytest.mark.versions
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("stored", STORED)
def test_uninitialized_memory_is_never_used(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path, stored: str
) -> None:
    config = small_bert().config
    for name, model_class in (("head", BertForSequenceClassification), ("tied head", BertForMaskedLM)):
        torch.manual_seed(0)
        model = STORED[stored](apply_octav(model_class(config).eval(), OctavConfig(embedding_bits=None)))
        expected, hidden = model(**padded_batch).logits, model.bert(**padded_batch).last_hidden_state
        for shards in ("5GB", "10KB"):
            folder = tmp_path / f"{name} {shards}"
            model.save_pretrained(folder, max_shard_size=shards)
            assert torch.equal(model_class.from_pretrained(folder)(**padded_batch).logits, expected)
            base = AutoModel.from_pretrained(folder, add_pooling_layer=name == "head")
            assert torch.equal(base(**padded_batch).last_hidden_state, hidden)


@pytest.mark.versions
@pytest.mark.parametrize("ignored", [True, False])
def test_a_head_of_another_shape_is_refused(small_bert: MakeBert, tmp_path: Path, ignored: bool) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(small_bert().config)
    pack_octav(apply_octav(model, OctavConfig())).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"classifier: .* no packed weight of shape \(5, 32\) for .* call unpack_octav"
    ):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=ignored)


def llama(model_class: type[nn.Module] = LlamaForCausalLM, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return model_class(LlamaConfig(vocab_size=100, **sizes, **fields)).eval()


def test_a_head_that_would_be_tied_to_a_packed_table_is_refused(tmp_path: Path) -> None:
    base = pack_octav(apply_octav(llama(LlamaModel, tie_word_embeddings=True), OctavConfig(embedding_bits=8)))
    base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head: .* no packed weight of shape \(100, 32\) for LlamaForCausalLM"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_float_head_that_would_be_tied_to_a_packed_table_is_refused(tmp_path: Path) -> None:
    base = llama(LlamaModel, tie_word_embeddings=True)
    base.lm_head = nn.Linear(32, 100)
    pack_octav(apply_octav(base, OctavConfig(embedding_bits=8, exclude_modules=["lm_head"])))
    del base.lm_head
    base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head: .* no packed weight of shape \(100, 32\) for LlamaForCausalLM"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.versions
def test_a_head_of_its_own_in_a_model_that_ties_comes_back(tmp_path: Path, padded_batch: dict) -> None:
    model = llama(tie_word_embeddings=True)
    model.lm_head = nn.Linear(32, 100, bias=False)
    expected = pack_octav(apply_octav(model, OctavConfig()))(**padded_batch).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path)(**padded_batch).logits, expected)


@pytest.mark.parametrize("embedding_bits", [None, 8])
def test_a_head_of_its_own_beside_a_table_that_three_modules_share(
    tmp_path: Path, padded_batch: dict, embedding_bits: int | None
) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=100, **sizes)).eval()
    model.lm_head = nn.Linear(16, 100, bias=False)
    pack_octav(apply_octav(model, OctavConfig(embedding_bits=embedding_bits))).save_pretrained(tmp_path)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    tokens = {"input_ids": padded_batch["input_ids"], "decoder_input_ids": padded_batch["input_ids"]}
    assert torch.equal(loaded(**tokens).logits, model(**tokens).logits)


@pytest.mark.versions
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_a_packed_table_cannot_be_resized(mean_resizing: bool) -> None:
    model = pack_octav(apply_octav(llama(), OctavConfig(embedding_bits=8)))
    before, text, config = model.state_dict(), str(model), model.config.to_dict()
    for size in (120, 80):
        with pytest.raises(RuntimeError, match=r"embed_tokens weight: .* \(100, 32\) is packed .*unpack_octav"):
            model.resize_token_embeddings(size, mean_resizing=mean_resizing)
        assert (str(model), model.config.to_dict()) == (text, config)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.versions
@pytest.mark.parametrize("used", [True, False])
def test_a_packed_head_beside_a_table_that_was_resized_comes_back(
    padded_batch: dict, tmp_path: Path, used: bool
) -> None:
    model = pack_octav(apply_octav(llama(), OctavConfig()))
    model.resize_token_embeddings(120, mean_resizing=False)
    if used:
        model(**padded_batch)
    model.save_pretrained(tmp_path)
    assert isinstance(model.lm_head, PackedLayer)
    with pytest.raises(RuntimeError, match=r"lm_head weight: .* \(120, 32\) is packed .*unpack_octav"):
        model.lm_head.requires_grad_(True)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**padded_batch).logits, model(**padded_batch).logits)


@pytest.mark.versions
def test_initializing_a_packed_model_again_is_an_error(folder: Path, packed: nn.Module) -> None:
    for model in (packed, AutoModelForQuestionAnswering.from_pretrained(folder)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"qa_outputs weight: .*call octav_hf\.unpack_octav"):
            model.qa_outputs.reset_parameters()
        model.init_weights()  # of what is not initialized yet
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.versions
def test_unpacked_it_can_be_saved_and_trained_on(folder: Path, padded_batch: dict, tmp_path: Path) -> None:
    model = unpack_octav(AutoModelForQuestionAnswering.from_pretrained(folder))
    model.save_pretrained(tmp_path / "unpacked")
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "unpacked")
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.train()(**padded_batch).start_logits.sum().backward()


def test_dequantize_gives_the_packed_values_in_float(folder: Path, packed: nn.Module) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(folder).dequantize()
    assert "quantization_config" not in model.config.to_dict()
    assert torch.equal(model.qa_outputs.weight, packed.qa_outputs.weight)
    assert type(model.qa_outputs) is nn.Linear


def test_a_float_model_is_not_loaded_as_packed(small_bert: MakeBert, tmp_path: Path) -> None:
    small_bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="call pack_octav"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path, quantization_config=OctavConfig(packed=True))


WITHOUT_THE_PLUGIN = """
import sys
from transformers import AutoModelForQuestionAnswering
assert "octav_hf" not in sys.modules
AutoModelForQuestionAnswering.from_pretrained(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.versions
def test_without_the_plugin_a_packed_model_does_not_load(folder: Path) -> None:
    for bits in (4, 8):
        if bits == 8:
            model = AutoModelForQuestionAnswering.from_pretrained(folder)
            pack_octav(apply_octav(model.dequantize(), OctavConfig(weight_bits=8))).save_pretrained(folder)
        run = subprocess.run(
            [sys.executable, "-c", WITHOUT_THE_PLUGIN, str(folder)], capture_output=True, text=True, check=False
        )
        assert run.returncode != 0
        assert "Unknown quantization type, got octav" in run.stderr
        assert "MISMATCH" in run.stderr
        assert run.stderr.rstrip().splitlines()[-1].startswith("RuntimeError")


@pytest.mark.slow
def test_without_the_plugin_a_training_form_is_the_float_model(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path
) -> None:
    apply_octav(small_bert(), OctavConfig()).save_pretrained(tmp_path)
    torch.save(padded_batch, tmp_path / "batch.pt")
    script = (
        WITHOUT_THE_PLUGIN.replace("AutoModelForQuestionAnswering.from", "model = AutoModelForQuestionAnswering.from")
        + "import torch\n"
        "output = model(**torch.load(sys.argv[1] + '/batch.pt'))\n"
        "torch.save(torch.cat([output.start_logits, output.end_logits]), sys.argv[1] + '/logits.pt')\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "Unknown quantization type, got octav" in run.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(small_bert(), padded_batch))


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))


def test_a_newer_format_is_refused_with_the_version_it_needs(folder: Path) -> None:
    edit_config(folder, format_version=3, octav_hf_version="7.1.0", something_new=True)
    with pytest.raises(ValueError, match=r"format version 3, written by octav_hf 7\.1\.0;.*octav-hf>=7\.1\.0"):
        AutoModelForQuestionAnswering.from_pretrained(folder)


@pytest.mark.parametrize("version", [0, "1", None, 1.0, True])
def test_a_version_that_is_none_is_refused(folder: Path, version: object) -> None:
    edit_config(folder, format_version=version)
    with pytest.raises(
        ValueError, match="format_version of a checkpoint's quantization_config must be an integer >= 1"
    ):
        AutoModelForQuestionAnswering.from_pretrained(folder)


def test_a_config_that_does_not_belong_to_the_file_is_refused(folder: Path) -> None:
    edit_config(folder, activation_bits=5)
    with pytest.raises(ValueError, match=r"model\.safetensors was written with activation_bits=4.*has 5"):
        AutoModelForQuestionAnswering.from_pretrained(folder)


def test_a_checkpoint_from_before_versions_is_read(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for field in ("format_version", "octav_hf_version", "packed"):
        del config["quantization_config"][field]
    path.write_text(json.dumps(config))
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))
