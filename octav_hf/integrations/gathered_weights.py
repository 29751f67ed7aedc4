"""Saving a model whose weights are sharded."""

from torch import Tensor
from transformers import PreTrainedModel

from .._utils.sharded_weights import sharded_shape
from .._utils.transformers_compat import argument_of_save_pretrained


def given_weights(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The argument ``state_dict`` of the running ``save_pretrained``, or ``None``.

    Trainer and Accelerate pass weights there that they gathered from FSDP or DeepSpeed's ZeRO-3. ``save_pretrained``
    does not pass it on to the quantizer of a quantized model, so it is read from the call stack.

    Raises:
        NotImplementedError: a weight is sharded and neither gathered nor sharded by Transformers itself.
    """
    given = argument_of_save_pretrained("state_dict")
    if getattr(model.config, "distributed_config", None) is None:
        for name, weight in dict(model.named_parameters()).items() if given is None else given.items():
            shape = sharded_shape(weight)
            if shape is not None:
                raise NotImplementedError(
                    f"{name} of shape {shape} is sharded, and this process has only a part of it. Trainer gathers the "
                    'weights if fsdp_config has "state_dict_type": "FULL_STATE_DICT", or DeepSpeed\'s config '
                    '"stage3_gather_16bit_weights_on_model_save": true. By hand, on every rank: state_dict = '
                    "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
                    "full_state_dict=True, cpu_offload=True)), or of a DeepSpeed engine "
                    "engine._zero3_consolidated_16bit_state_dict(); then on rank 0: model.save_pretrained(folder, "
                    "state_dict=state_dict)"
                )
    return given
