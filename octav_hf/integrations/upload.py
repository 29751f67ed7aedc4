"""Uploading a quantized model by Transformers' own methods, with a card that says what the model is."""

from pathlib import Path
from typing import Any

from ..model_card import model_card, write_card
from .model_method import ModelMethod


class UploadWithCard(ModelMethod):
    """In the place of ``_upload_modified_files``, with which ``push_to_hub`` and ``save_pretrained`` end."""

    def __call__(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Write the card among the files of ``working_dir``, unless somebody has written another, and upload them."""
        write_card(Path(working_dir), model_card(self.model, name=repo_id))
        return type(self.model)._upload_modified_files(self.model, working_dir, repo_id, *args, **kwargs)
