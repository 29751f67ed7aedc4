"""``model.push_to_hub`` of a quantized model: what Transformers does, with a card that says what the model is."""

import tempfile
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel

from ..model_card import model_card


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> Any:
    """Upload the model, in the form that it has, in one commit.

    The arguments are those of ``PreTrainedModel.push_to_hub``. A repository that has a card keeps it; otherwise the one
    that ``model_card`` writes goes with the model.

    Returns:
        ``huggingface_hub.CommitInfo``.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    try:
        card = ModelCard.load(repo_id, token=token if isinstance(token, str) else None)
    except EntryNotFoundError:
        card = model_card(model, name=repo_id)
    card.data.tags = [*(card.data.tags or []), *(tag for tag in tags or [] if tag not in (card.data.tags or []))]
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        card.save(f"{folder}/README.md")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
