"""Scenarios: each function runs on every rank of a process group, or in a single process; see ``host.py``."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.state import DistributedType, PartialState
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForQuestionAnswering, Trainer, TrainingArguments

import octav_hf
from octav_hf import OctavConfig, apply_octav
from octav_hf.analysis.operand_statistics import OperandStatisticsHooks
from octav_hf.nn import FakeQuantize, SynchronizedFakeQuantize, WeightFakeQuantize
from tests.frozen_activations import frozen_activations

GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)


def rank_and_ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def bert(dtype: str = "float64", seed: int = 0, **changes: Any) -> BertForQuestionAnswering:
    """A small random BERT without dropout; the same for the same seed.

    Results that depend on the order of sums are rare: in float64 hardly a value falls to the other side of a rounding,
    and with random biases, and 8 bits in attention, hardly a sum cancels to an exact zero, which a clip leaves out.
    """
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=100, max_position_embeddings=32, **(sizes | no_dropout | changes))
    model = BertForQuestionAnswering(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(getattr(torch, dtype))


def batch(size: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Sequences padded to 12 tokens, shorter ones first, with answer spans."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(3, 12, size).long()[:, None]
    mask = (torch.arange(12) < lengths).long()
    ids = torch.randint(1, 100, (size, 12), generator=generator) * mask
    spans = torch.randint(0, 3, (2, size), generator=generator).sort(dim=0).values
    return {"input_ids": ids, "attention_mask": mask, "start_positions": spans[0], "end_positions": spans[1]}


def part_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's share of a batch that is split into equal parts."""
    rank, ranks = rank_and_ranks()
    return {name: tensor.chunk(ranks)[rank] for name, tensor in tensors.items()}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def train_step(
    folder: Path,
    config: dict[str, Any],
    checkpointing: bool = False,
    distilled: bool = False,
    learned: bool = False,
    **model: Any,
) -> dict[str, Any]:
    """Gradients of one step on the global batch, and the loss on this rank's part of it."""
    octav = apply_octav(bert(**model), OctavConfig(**config)).train()
    if learned:
        octav_hf.calibrate_octav(octav, [part_of(batch())], learned=True, progress_bar=False)
    if distilled:
        octav_hf.distill(octav, bert(seed=1, **model), weight=0.5)
    if checkpointing:
        octav.activation_checkpointing_enable()
    wrapped = DistributedDataParallel(octav) if dist.is_initialized() else octav
    loss = wrapped(**part_of(batch())).loss
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(octav)}


def tensors() -> dict[str, Tensor]:
    """Tensors of many kinds, to be split into unequal parts."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3000, generator=generator)
    return {
        "normal": normal,
        "outliers": normal**5,
        "sorted": normal.sort().values,  # so that the ranks' own clips are far from each other
        "one sign here, two there": torch.cat([normal.abs(), normal[:10]]),
        "one sign": normal.relu(),
        "one magnitude": torch.full((50,), 3.0),
        "long": torch.nn.functional.gelu(normal.repeat(12) + torch.linspace(0, 1, 36000)),
        "one element": torch.tensor([-0.7]),
        "zeros": torch.zeros(20),
        "minus zeros": -torch.zeros(20),
        "nothing": torch.zeros(0),
        "huge": normal[:100] * 3e37,
        "tiny": normal[:100] * 1e-36,
        "float64": normal.double() * 1e30,
        "bfloat16": normal.bfloat16(),
        "float16": normal.half(),
        "matrix": normal.view(50, 60).t(),
    }


def cut(x: Tensor, nothing_on: int) -> Tensor:
    """This rank's part of a tensor; parts grow with the rank, and one rank has none."""
    rank, ranks = rank_and_ranks()
    having = [other for other in range(ranks) if other != nothing_on]
    if rank not in having:
        return x[:0]
    weights = torch.arange(1, len(having) + 1).cumsum(0) * len(x) // sum(range(1, len(having) + 1))
    return x.tensor_split(weights[:-1].tolist())[having.index(rank)]


@contextlib.contextmanager
def counting_collectives() -> Iterator[list[str]]:
    """Context that records the names of all collectives of ``torch.distributed`` in order."""
    names: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in ("c10d", "_c10d_functional"):
                names.append(func._schema.name.partition("::")[2])
            return func(*args, **(kwargs or {}))

    with Counting():
        yield names


def quantize(folder: Path, nothing_on: int, grad_mode: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Grid and quantized part of each of ``tensors``, and the collectives."""
    quantizer = SynchronizedFakeQuantize(4, name="layer input", **settings)
    outcomes = {}
    with getattr(torch, grad_mode)():
        for name, whole in tensors().items():
            part = cut(whole, nothing_on)
            with counting_collectives() as messages:
                grid = quantizer.dynamic_grid(part)
            outcome = {"signed": bool(grid.signed), "clip": grid.clip.clone(), "messages": messages}
            outcome["offset"] = 0.0 if grid.offset is None else float(grid.offset)
            outcomes[name] = outcome | {"output": quantizer(part).clone()}
            if not quantizer.asymmetric:  # asked for one by one, sign and clip are the same
                assert bool(quantizer.is_signed(part)) == outcome["signed"]
                assert torch.equal(quantizer.compute_clip(part), grid.clip)
    return outcomes


def quantize_parts(folder: Path, shape: list[int], **settings: Any) -> list[dict[str, Any]]:
    """Grid, quantized part and collectives of a tensor of this shape that is split over the ranks.

    The first time no value is negative, the second time one on the last rank, the third time half of them.
    """
    outcomes = []
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    for lowest in (0.0, -0.5, -9.0):
        x.view(-1)[-1] = lowest
        (part,) = part_of({"x": x - 1 if lowest == -9 else x}).values()
        quantizer = SynchronizedFakeQuantize(4, **settings)
        with counting_collectives() as messages:
            grid = quantizer.dynamic_grid(part)
        outcome = {"signed": bool(grid.signed), "clip": grid.clip, "messages": messages, "output": quantizer(part)}
        outcomes.append(outcome | {"offset": 0.0 if grid.offset is None else float(grid.offset)})
    return outcomes


def quantize_what_is_not_finite(folder: Path, values: list[float], **settings: Any) -> list[str]:
    """The error of each rank if one rank has such a value."""
    errors = []
    quantizer = SynchronizedFakeQuantize(4, name="layer input", **settings)
    for value in values:
        x = torch.ones(4, 2, dtype=torch.float64)
        if rank_and_ranks()[0] == 1:
            x[2, 1] = value
        try:
            quantizer(x)
        except ValueError as error:
            errors.append(str(error))
        assert float(quantizer.compute_clip(torch.ones(1, 4)).amax()) > 0  # no rank is behind the others
    return errors


def measure(folder: Path) -> dict[str, int]:
    """Elements of each operand that were measured, where only the first rank has a batch."""
    torch.manual_seed(0)
    model = apply_octav(torch.nn.Sequential(torch.nn.Linear(8, 8)), OctavConfig(sync_activation_clips=True))
    with OperandStatisticsHooks(model) as hooks:
        model(torch.randn(4 if rank_and_ranks()[0] == 0 else 0, 8))
    return {each.operand: each.elements for each in hooks.result()}


def quantize_compiled(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Compiled and eager results of quantizers whose clips take collectives, on this rank's part of a tensor."""
    (x,) = part_of({"x": torch.nn.functional.gelu(tensors()["normal"].view(50, 60))}).values()
    outcomes = {}
    for dim in (None, -1):
        quantizer = SynchronizedFakeQuantize(4, signed=None, asymmetric=True, dim=dim)
        compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
        outcomes[f"over {dim}"] = compiled(x), quantizer(x)
    return outcomes


def forward(folder: Path, sizes: list[int], frozen: bool, **config: Any) -> dict[str, Any]:
    """What a network, in evaluation, makes of this rank's part of a batch; ``sizes`` says how large each part is.

    With ``frozen`` clips are those of a calibration on that same batch.
    """
    torch.manual_seed(0)
    # Not a BERT, which cannot run on nothing.
    layers = torch.nn.Linear(6, 20), torch.nn.ReLU(), torch.nn.Linear(20, 20), torch.nn.GELU(), torch.nn.Linear(20, 3)
    model = apply_octav(torch.nn.Sequential(*layers).double(), OctavConfig(**config)).eval()
    part = torch.randn(sum(sizes), 6).double().split(sizes)[rank_and_ranks()[0]]
    if frozen:
        octav_hf.calibrate_octav(model, [part], progress_bar=False)
    with torch.inference_mode():
        return {"output": model(part).clone(), "clips": frozen_activations(model)}


def calibrate(folder: Path, batches: int, observer: str, **config: Any) -> dict[str, Any]:
    """Frozen clips by calibration on this rank's parts, and logits of a pass that rank 0 runs alone afterwards."""
    model = apply_octav(bert(hidden_act="relu"), OctavConfig(**config)).eval()
    parts = [part_of(batch(seed=seed)) for seed in range(batches)]
    octav_hf.calibrate_octav(model, parts, observer=observer, progress_bar=False)
    alone = None
    if rank_and_ranks()[0] == 0:
        with torch.no_grad():
            alone = model(**batch()).start_logits
    return {"clips": frozen_activations(model), "alone": alone}


def shard(model: torch.nn.Module) -> None:
    """FSDP2: each encoder layer, and the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train_sharded(folder: Path, config: dict[str, Any], sharded: bool = True, steps: int = 2) -> dict[str, Any]:
    """Losses on the global batch, clips of the weights and the weights after a few steps of SGD."""
    model = apply_octav(bert(), OctavConfig(**config)).train()
    if sharded and dist.is_initialized():
        shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    clips: dict[str, Tensor] = {}

    def note_clip(quantizer: FakeQuantize, args: tuple[Tensor], output: Tensor) -> None:
        assert not isinstance(args[0], DTensor)
        clips[quantizer.name] = quantizer.compute_clip(args[0]).clone()

    for module in model.modules():
        if isinstance(module, WeightFakeQuantize):
            module.register_forward_hook(note_clip)
    losses = []
    for _ in range(steps):
        loss = model(**part_of(batch())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    full = get_model_state_dict(model, options=GATHERED)
    return {"losses": torch.stack(losses), "clips": clips, "weights": full}


def refusals_of_a_part(model: BertForQuestionAnswering, folder: Path) -> list[str]:
    """The errors of packing and saving a model whose weights are not gathered; empty without an error."""
    refusals = []
    for action in (octav_hf.pack_octav, lambda model: model.save_pretrained(folder / "part")):
        try:
            action(model)
        except (ValueError, NotImplementedError) as error:
            refusals.append(str(error))
    return refusals


def save_sharded(folder: Path) -> dict[str, Any]:
    """Refusals, and a checkpoint of the gathered weights, saved by the first rank only, as in Trainer."""
    model = apply_octav(bert("float32"), OctavConfig())
    shard(model)
    refusals = refusals_of_a_part(model, folder)
    state = get_model_state_dict(model, options=GATHERED)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "gathered", state_dict=state)
        with pytest.raises(NotImplementedError, match=r"word_embeddings\.weight of shape \(100, 16\) is sharded"):
            model.save_pretrained(folder / "part", state_dict=dict(model.named_parameters()))
        with pytest.raises(NotImplementedError):  # what an earlier call was given is forgotten
            model.save_pretrained(folder / "part")
    return {"refusals": refusals, "is_written": (folder / "part").exists()}


def training_arguments(folder: Path, per_device: int, **arguments: Any) -> TrainingArguments:
    """Arguments for three steps of SGD without logs, and a checkpoint after the last."""
    settings = {"max_steps": 3, "save_steps": 3, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    return TrainingArguments(
        output_dir=str(folder / "run"), per_device_train_batch_size=per_device, **(settings | quiet | arguments)
    )


def trainer_of(model: BertForQuestionAnswering, arguments: TrainingArguments) -> Trainer:
    examples = batch(16)
    rows = [{name: tensor[row] for name, tensor in examples.items()} for row in range(16)]
    return Trainer(model=model, args=arguments, train_dataset=rows)


def train_with_trainer(folder: Path, config: dict[str, Any], per_device: int, **arguments: Any) -> dict[str, Any]:
    """Three steps with Trainer, then both forms of checkpoints in ``folder``; returns the files of this rank."""
    written = []
    save = transformers.modeling_utils.safe_save_file

    def counted(*args: Any, **kwargs: Any) -> None:
        written.append(args[1])
        save(*args, **kwargs)

    transformers.modeling_utils.safe_save_file = counted
    distributed = {"ddp_backend": "gloo"} if dist.is_initialized() else {}
    training = training_arguments(folder, per_device, use_cpu=True, **(distributed | arguments))
    trainer = trainer_of(apply_octav(bert(), OctavConfig(**config)), training)
    trainer.train()
    trainer.save_model(str(folder / "trained"))
    octav_hf.pack_octav(trainer.model)
    trainer.save_model(str(folder / "packed"))
    with torch.no_grad():
        logits = trainer.model.eval()(**batch()).start_logits
    return {"logits": logits, "written": [str(Path(path).relative_to(folder)) for path in written]}


def train_with_callback(folder: Path, config: dict[str, Any], per_device: int) -> list[dict[str, Any]]:
    """The logs of three steps by Trainer with ``OctavCallback``."""
    distributed = {"ddp_backend": "gloo"} if dist.is_initialized() else {}
    logging = {"logging_strategy": "steps", "logging_steps": 1, "save_strategy": "no"}
    training = training_arguments(folder, per_device, use_cpu=True, **(distributed | logging))
    trainer = trainer_of(apply_octav(bert(), OctavConfig(**config)), training)
    trainer.add_callback(octav_hf.OctavCallback())
    trainer.train()
    return trainer.state.log_history


def take_cpus_for_accelerators() -> None:
    """Make Accelerate, which runs FSDP and DeepSpeed only on accelerators, accept the CPU of this process."""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def train_sharded_with_trainer(
    folder: Path, checkpoint: str, config: dict[str, Any], per_device: int, **arguments: Any
) -> dict[str, Any]:
    """Three steps by Trainer from a float checkpoint; how many values of the weights this rank has, and refusals."""
    if dist.is_initialized():
        take_cpus_for_accelerators()
    if "deepspeed" in arguments:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled here and now
    # In the order of scripts: with these arguments made, ZeRO-3 shards what is loaded before it is quantized.
    training = training_arguments(folder, per_device, use_cpu=not dist.is_initialized(), **arguments)
    quantized = apply_octav(BertForQuestionAnswering.from_pretrained(checkpoint), OctavConfig(**config))
    trainer = trainer_of(quantized, training)
    trainer.train()
    trainer.save_model(str(folder / "trained"))
    parameters = list(quantized.parameters())
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters]
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "values": sum(part.numel() for part in local),
        "refusals": refusals_of_a_part(quantized, folder / str(rank_and_ranks()[0])),
    }
