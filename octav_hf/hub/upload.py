"""Uploading a quantized model by Transformers' own methods, with a card that says what the model is."""

import weakref
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .._utils.transformers_compat import upload
from .model_card import model_card, write_card


class UploadWithCard:
    """Takes the place of a model's ``_upload_modified_files``, with which ``push_to_hub`` and ``save_pretrained`` end.

    Args:
        model: is referred to weakly, so that nothing but its user keeps it alive.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = weakref.ref(model)

    def __call__(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Write the card among the files of ``working_dir``, unless somebody has written another, and upload them."""
        model = self._model()
        assert model is not None  # of which this is an attribute
        write_card(Path(working_dir), model_card(model, name=repo_id))
        return upload(model, working_dir, repo_id, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model(),)
