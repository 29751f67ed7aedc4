"""``suggest_bits``: measured, allocated and written as an independent reference says, and the model left as it was."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering, ResNetForImageClassification

import octav_hf
from octav_hf import OctavConfig, apply_octav, suggest_bits
from octav_hf.nn import FakeQuantize, PackedLayer, QuantizedAttention, QuantizedLayer

BITS = (2, 3, 4, 8)
SELF_ATTENTION = "bert.encoder.layer.0.attention.self"
LAYERS = {  # name -> (rows, columns) of the weights of ``small_bert`` with one layer
    f"{SELF_ATTENTION}.query": (32, 32),
    f"{SELF_ATTENTION}.key": (32, 32),
    f"{SELF_ATTENTION}.value": (32, 32),
    "bert.encoder.layer.0.attention.output.dense": (32, 32),
    "bert.encoder.layer.0.intermediate.dense": (64, 32),
    "bert.encoder.layer.0.output.dense": (32, 64),
    "qa_outputs": (2, 32),
}


@pytest.fixture
def bert(small_bert: Callable[..., BertForQuestionAnswering]) -> BertForQuestionAnswering:
    return small_bert(num_hidden_layers=1)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def packed_bytes(name: str, bits: int) -> int:
    """Integers row by row, whole bytes, and a float32 scale for each row."""
    rows, columns = LAYERS[name]
    return rows * (-(-columns * bits // 8) + 4)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    return torch.stack([output.start_logits, output.end_logits]).double()


def divergence(reference: Tensor, other: Tensor) -> float:
    """Mean over questions, of start and end, of sum p (ln p - ln q)."""
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_bytes_against_all_combinations(bert: BertForQuestionAnswering, batch: dict[str, Tensor]) -> None:
    apply_octav(bert, OctavConfig())
    suggested = suggest_bits(bert, [batch], budget=3.5, bits=BITS)
    limit = sum(packed_bytes(name, 3) + packed_bytes(name, 4) for name in LAYERS) // 2
    alone = [suggested.sensitivity[name, "weight_bits"] for name in LAYERS]
    within = [
        sum(measured[bits] for measured, bits in zip(alone, option, strict=True))
        for option in itertools.product(BITS, repeat=len(LAYERS))
        if sum(packed_bytes(name, bits) for name, bits in zip(LAYERS, option, strict=True)) <= limit
    ]
    chosen = {name: suggested[name]["weight_bits"] for name in LAYERS}
    assert list(suggested.values()) == [{"weight_bits": bits} for bits in chosen.values()]
    assert len(set(chosen.values())) > 1
    assert suggested.cost == sum(packed_bytes(name, bits) for name, bits in chosen.items()) <= suggested.budget == limit
    found = sum(measured[bits] for measured, bits in zip(alone, chosen.values(), strict=True))
    assert found == pytest.approx(min(within), rel=1e-12)


def test_what_is_measured(bert: BertForQuestionAnswering, batch: dict[str, Tensor]) -> None:
    """Each operand alone, and all of them together, against models that are quantized so from the start."""
    reference = logits(bert, batch)
    config = OctavConfig(weight_clip="mse", activation_clip="mse")

    def expected(**fields: Any) -> Any:
        model = apply_octav(copy.deepcopy(bert), OctavConfig(weight_clip="mse", activation_clip="mse", **fields))
        return pytest.approx(divergence(reference, logits(model, batch)), rel=1e-4)

    model = apply_octav(copy.deepcopy(bert), config)
    suggested = suggest_bits(model, [batch], budget=4, unit="operations", bits=(2, 4))
    query, none = f"{SELF_ATTENTION}.query", {"quantize_attention": False}
    assert len(suggested.sensitivity) == 2 * len(LAYERS) + 1
    measured = suggested.sensitivity
    assert measured[query, "weight_bits"] == {
        bits: expected(target_modules=[query], weight_bits=bits, activation_bits=None) for bits in (2, 4)
    }
    assert measured[query, "activation_bits"] == {
        bits: expected(target_modules=[query], weight_bits=None, activation_bits=bits, **none) for bits in (2, 4)
    }
    assert measured[SELF_ATTENTION, "activation_bits"] == {
        bits: expected(
            weight_bits=None,
            activation_bits=None,
            module_overrides={
                SELF_ATTENTION: {"activation_bits": bits},
                **{name: {"activation_bits": None} for name in LAYERS},
            },
        )
        for bits in (2, 4)
    }
    assert suggested.divergence_before == expected()
    assert suggested.divergence == expected(module_overrides=suggested)


def test_operations_are_counted(bert: BertForQuestionAnswering, batch: dict[str, Tensor]) -> None:
    apply_octav(bert, OctavConfig())
    suggested = suggest_bits(bert, [batch, batch], budget=3, unit="operations", bits=(2, 3, 4))
    tokens, between_tokens = 2 * 24, 2 * 2 * 12 * 12  # two batches of two sequences of 12 tokens

    def operations(bits: Callable[[str, str], int]) -> int:
        layers = sum(
            tokens * rows * columns * bits(name, "weight_bits") * bits(name, "activation_bits")
            for name, (rows, columns) in LAYERS.items()
        )
        # queries with keys, probabilities with values: 32 channels in all heads together
        return layers + 2 * between_tokens * 32 * bits(SELF_ATTENTION, "activation_bits") ** 2

    assert suggested.budget == operations(lambda name, field: 3)
    assert suggested.cost == operations(lambda name, field: suggested[name][field]) <= suggested.budget
    assert suggested.cost > operations(lambda name, field: 2)


def test_the_model_is_left_as_it_was(bert: BertForQuestionAnswering, batch: dict[str, Tensor]) -> None:
    apply_octav(bert, OctavConfig(module_overrides={"qa_outputs": {"weight_clip": "max"}})).train()
    bert.bert.encoder.eval()

    def everything() -> list[Any]:
        return [
            [(name, id(module), module.training, type(module)) for name, module in bert.named_modules()],
            [module.init_kwargs for module in bert.modules() if isinstance(module, FakeQuantize)],
            [(name, id(tensor), tensor._version) for name, tensor in bert.named_parameters()],
            [(name, tensor.tolist()) for name, tensor in bert.state_dict().items()],
            bert.octav_config.to_dict(),
            torch.get_rng_state().tolist(),
        ]

    before = everything()
    suggest_bits(bert, [batch], budget=3, unit="operations", bits=(2, 4))
    assert everything() == before
    calls = itertools.count()

    def fail_in_the_middle(*_: Any) -> None:
        if next(calls) == 5:
            raise RuntimeError("stopped")

    hook = bert.qa_outputs.register_forward_pre_hook(fail_in_the_middle)
    with pytest.raises(RuntimeError, match="stopped"):
        suggest_bits(bert, [batch], budget=3, bits=(2, 4))
    hook.remove()
    assert everything() == before


def test_overrides_apply_and_pack_to_the_cost(bert: BertForQuestionAnswering, batch: dict[str, Tensor]) -> None:
    overrides = {"bert.encoder.layer.?.output": {"weight_bits": 5}, "qa_outputs": {"weight_clip": "max"}}
    config = OctavConfig(module_overrides=overrides, exclude_modules=[f"{SELF_ATTENTION}.key"])
    kept = "bert.encoder.layer.0.output.dense", f"{SELF_ATTENTION}.key"
    model = apply_octav(copy.deepcopy(bert), config)
    suggested = suggest_bits(model, [batch], budget=4)
    assert {name for name, field in suggested.chosen} == LAYERS.keys() - {*kept}
    assert suggested["bert.encoder.layer.?.output"] == {"weight_bits": 5}
    assert suggested["qa_outputs"] == {
        "weight_clip": "max",
        "weight_bits": suggested.chosen["qa_outputs", "weight_bits"],
    }
    assert overrides["qa_outputs"] == {"weight_clip": "max"}  # that of the config is not changed

    again = OctavConfig(module_overrides=suggested, exclude_modules=[f"{SELF_ATTENTION}.key"])
    octav_hf.pack_octav(apply_octav(bert, again))
    packed = {name: module for name, module in bert.named_modules() if isinstance(module, PackedLayer)}
    assert packed.keys() == LAYERS.keys() - {f"{SELF_ATTENTION}.key"}
    chosen = [packed[name].weight_quantizer for name, _ in suggested.chosen]
    assert [quantizer.num_bits for quantizer in chosen] == list(suggested.chosen.values())
    assert sum(q.packed_data.nbytes + q.scale.nbytes for q in chosen) == suggested.cost
    assert packed["bert.encoder.layer.0.output.dense"].weight_quantizer.num_bits == 5


def test_operations_apply(bert: BertForQuestionAnswering, batch: dict[str, Tensor]) -> None:
    """An override of attention, which holds for the layers inside too, changes none of theirs."""
    model = apply_octav(copy.deepcopy(bert), OctavConfig())
    suggested = suggest_bits(model, [batch], budget=3, unit="operations", bits=(2, 3, 8))
    apply_octav(bert, OctavConfig(module_overrides=suggested))
    for (name, field), bits in suggested.chosen.items():
        module = bert.get_submodule(name)
        if isinstance(module, QuantizedAttention):
            assert {quantizer.num_bits for quantizer in module.operand_quantizers.values()} == {bits}
        else:
            operand = "weight" if field == "weight_bits" else "input"
            assert module.operand_quantizers[operand].num_bits == bits


@pytest.mark.parametrize("pattern", [f"{SELF_ATTENTION}.query", "*.query"])
def test_attention_around_a_layer_with_an_override_stays(
    bert: BertForQuestionAnswering, batch: dict[str, Tensor], pattern: str
) -> None:
    overrides = {pattern: {"activation_bits": 6}}
    suggested = suggest_bits(
        apply_octav(copy.deepcopy(bert), OctavConfig(module_overrides=overrides)),
        [batch],
        budget=3,
        unit="operations",
        bits=(2, 3, 4),
    )
    assert (SELF_ATTENTION, "activation_bits") not in suggested.chosen
    assert (f"{SELF_ATTENTION}.query", "activation_bits") not in suggested.chosen
    assert (f"{SELF_ATTENTION}.query", "weight_bits") in suggested.chosen
    apply_octav(bert, OctavConfig(module_overrides=suggested))
    attention = bert.get_submodule(SELF_ATTENTION)
    assert attention.query.input_quantizer.num_bits == 6
    assert attention.query_quantizer.num_bits == 4


def test_first_and_last_layer_keep_their_bits(small_resnet: Callable[..., ResNetForImageClassification]) -> None:
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = apply_octav(small_resnet(), OctavConfig(first_last_bits=8))
    for unit in ("bytes", "operations"):
        suggested = suggest_bits(model, [{"pixel_values": images}], budget=4, unit=unit, bits=(3, 4, 6))
        again = apply_octav(small_resnet(), OctavConfig(first_last_bits=8, module_overrides=suggested))
        layers = [module for module in again.modules() if isinstance(module, QuantizedLayer)]
        assert [layers[end].operand_quantizers["input"].num_bits for end in (0, -1)] == [8, 8]
        assert [layers[end].weight_quantizer.num_bits for end in (0, -1)] == [8, 8]
        assert {layer.weight_quantizer.num_bits for layer in layers[1:-1]} >= {4, 6}


def test_tied_weights_have_one_width(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    bert = BertForMaskedLM(BertConfig(vocab_size=100, max_position_embeddings=64, **sizes)).eval()
    head, table = "cls.predictions.decoder", "bert.embeddings.word_embeddings"
    config = OctavConfig(embedding_bits=4)
    model = apply_octav(copy.deepcopy(bert), config)
    of_bytes = suggest_bits(model, [batch], budget=4, bits=(3, 8))
    assert not {(head, "weight_bits"), (table, "embedding_bits")} & of_bytes.chosen.keys()  # in float in packed files
    assert ("bert.embeddings.position_embeddings", "embedding_bits") in of_bytes.chosen
    suggested = suggest_bits(model, [batch], budget=4, unit="operations", bits=(3, 8))
    assert suggested[head]["weight_bits"] == suggested[table]["embedding_bits"]
    assert suggested.sensitivity[head, "weight_bits"] == suggested.sensitivity[table, "embedding_bits"]
    assert ("bert.embeddings.position_embeddings", "embedding_bits") not in suggested.chosen  # multiplies nothing
    apply_octav(copy.deepcopy(bert), OctavConfig(embedding_bits=4, module_overrides=suggested))
    overridden = OctavConfig(embedding_bits=4, module_overrides={table: {"embedding_bits": 6}})
    kept = suggest_bits(apply_octav(bert, overridden), [batch], budget=4, unit="operations", bits=(3, 8))
    assert (head, "weight_bits") not in kept.chosen
    assert (head, "activation_bits") in kept.chosen


def test_the_table(bert: BertForQuestionAnswering, batch: dict[str, Tensor]) -> None:
    suggested = suggest_bits(apply_octav(bert), [batch], budget=4, bits=(3, 4))
    lines = str(suggested).splitlines()
    assert lines[0].split() == ["module", "field", "bits", "alone", "at", "3", "alone", "at", "4"]
    assert [line.split()[0] for line in lines[1:8]] == list(LAYERS)
    assert f"{suggested.cost:,} bytes of at most {suggested.budget:,}" in lines[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 1.9}, r"from 2 \(2,968 bytes\) to 8 \(9,160 bytes\).*got 1.9"),
        ({"budget": 8.1}, "budget must be a number of bits from 2"),
        ({"budget": float("nan")}, "budget must be a number of bits from 2"),
        ({"budget": "4"}, "budget must be a number of bits from 2"),
        ({"budget": 4, "bits": (5, 6)}, r"from 5 \(.*got 4"),
        ({"budget": 4, "bits": ()}, "bits must be integers from 2 to 8"),
        ({"budget": 4, "bits": (1, 4)}, "bits must be integers from 2 to 8"),
        ({"budget": 4, "unit": "bits"}, "unit must be 'bytes' or 'operations', got 'bits'"),
        ({"budget": 4, "batches": []}, "got no batch"),
    ],
)
def test_impossible_arguments(
    bert: BertForQuestionAnswering, batch: dict[str, Tensor], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"suggest_bits.*{message}"):
        suggest_bits(apply_octav(bert), **({"batches": [batch]} | change))


@pytest.mark.parametrize("batches", [{}, torch.ones(1), 3, [3]])
def test_batches_of_another_type(bert: BertForQuestionAnswering, batches: Any) -> None:
    with pytest.raises(TypeError, match="suggest_bits takes"):
        suggest_bits(apply_octav(bert), batches, budget=4)


def test_impossible_models(bert: BertForQuestionAnswering, batch: dict[str, Tensor]) -> None:
    def refused(model: nn.Module, message: str) -> None:
        with pytest.raises(ValueError, match=f"suggest_bits: .*{message}"):
            suggest_bits(model, [batch], budget=4)

    refused(copy.deepcopy(bert), r"call apply_octav\(model, OctavConfig\(\)\) first")
    model = apply_octav(copy.deepcopy(bert))
    refused(nn.ModuleDict({"inner": model}), "on a model inside; pass that one")
    frozen = octav_hf.calibrate_octav(copy.deepcopy(model), [batch])
    refused(frozen, r"frozen.*call uncalibrate_octav\(model\) first")
    refused(octav_hf.pack_octav(model), "packed.*analyse the model before pack_octav")
    overridden = OctavConfig(module_overrides={name: {"weight_bits": 4} for name in LAYERS})
    refused(apply_octav(bert, overridden), "leaves no bits to choose for unit='bytes'")
