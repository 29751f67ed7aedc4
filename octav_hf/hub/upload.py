"""Add the model card to uploads by Transformers' own methods."""

import weakref
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .._utils.transformers_compat import upload
from .model_card import model_card, write_card


class UploadWithCard:
    """Replaces a model's ``_upload_modified_files``, the last step of ``push_to_hub`` and ``save_pretrained``."""

    def __init__(self, model: PreTrainedModel):
        self._model = weakref.ref(model)  # this object is an attribute of the model

    def __call__(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Write the card into ``working_dir``, unless a person has written one, and upload its files."""
        model = self._model()
        assert model is not None
        write_card(Path(working_dir), model_card(model, name=repo_id))
        return upload(model, working_dir, repo_id, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model(),)
