"""Pushing to and loading from a Hub with the real client over HTTP: names, rights, revisions, and faults."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForQuestionAnswering

from .conftest import ADA, ADA_READING, BOB, run_script
from .loopback_hub import LoopbackHub
from .models import FORMS, logits, make

pytestmark = pytest.mark.slow

PUSH = """
from tests.hub.models import FORMS, make
for form in FORMS:
    make(form).push_to_hub(f"ada/{form}")
    make(form).push_to_hub(f"ada/{form}-sharded", max_shard_size="10KB")
    make(form).push_to_hub(f"ada/{form}-private", private=True)
    make(form, seed=1).push_to_hub(f"ada/{form}-versions")
    make(form, seed=2).push_to_hub(f"ada/{form}-versions", revision="dev")
    make(form, seed=3).push_to_hub(f"ada/{form}-versions")
"""

LOAD = """
import json, sys, torch, octav_hf
from transformers import AutoModelForQuestionAnswering
from tests.hub.models import logits
loaded = []
for repo, options in json.loads(sys.argv[1]):
    try:
        loaded.append(logits(AutoModelForQuestionAnswering.from_pretrained(repo, **options)))
    except Exception as error:
        loaded.append(f"{type(error).__name__}: {error}")
torch.save(loaded, sys.argv[2])
"""


@pytest.fixture(scope="module")
def pushed(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> LoopbackHub:
    """The hub after a process has pushed to it."""
    run_script(hub, tmp_path_factory.mktemp("home"), PUSH, token=ADA)
    return hub


def load_in_a_new_process(
    hub: LoopbackHub, home: Path, *wanted: tuple[str, dict[str, object]], token: str | None = None
) -> list[torch.Tensor | str]:
    """For each repository, with options of from_pretrained, the logits or the error."""
    output = home.parent / f"{home.name}.pt"
    run_script(hub, home, LOAD, json.dumps(wanted), output, token=token)
    return torch.load(output)


def test_models_come_back_bit_for_bit(pushed: LoopbackHub, tmp_path: Path) -> None:
    wanted, expected = [], []
    for form in FORMS:
        first, *_ = pushed.repositories[f"ada/{form}-versions"].commits.items()
        assert first[1].keys() == {".gitattributes"}
        commits = [
            commit
            for commit, files in pushed.repositories[f"ada/{form}-versions"].commits.items()
            if "model.safetensors" in files
        ]
        assert len(commits) == 3
        wanted += [(f"ada/{form}", {}), (f"ada/{form}-sharded", {}), (f"ada/{form}", {"device_map": "auto"})]
        expected += [logits(make(form))] * 3
        for seed, revision in ((1, commits[0]), (2, "dev"), (3, "main"), (3, commits[2])):
            wanted.append((f"ada/{form}-versions", {"revision": revision}))
            expected.append(logits(make(form, seed=seed)))
        wanted.append((f"ada/{form}-private", {"token": ADA}))
        expected.append(logits(make(form)))
    loaded = load_in_a_new_process(pushed, tmp_path / "home", *wanted)
    for what, got, right in zip(wanted, loaded, expected, strict=True):
        assert isinstance(got, torch.Tensor), (what, got)
        assert torch.equal(got, right), what


def test_what_is_pushed_is_the_form_that_the_model_has(pushed: LoopbackHub) -> None:
    packed = load(pushed.files("ada/packed")["model.safetensors"])
    assert packed["qa_outputs.weight"].dtype == torch.uint8
    training = load(pushed.files("ada/training")["model.safetensors"])
    assert training["qa_outputs.weight"].dtype == torch.float32
    assert set(pushed.files("ada/packed")) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    shards = [path for path in pushed.files("ada/packed-sharded") if path.endswith(".safetensors")]
    assert len(shards) > 3
    for form, said in (("packed", "| form | packed |"), ("training", "| form | training form |")):
        card = pushed.files(f"ada/{form}")["README.md"].decode()
        assert said in card
        assert f'from_pretrained("ada/{form}")' in card


def test_who_may_not_read_finds_nothing(pushed: LoopbackHub, tmp_path: Path) -> None:
    wanted = [
        ("ada/packed-private", {}),
        ("ada/packed-private", {"token": BOB}),
        ("ada/packed", {"revision": "nowhere"}),
    ]
    *answers, last = load_in_a_new_process(pushed, tmp_path / "home", *wanted)
    for answer in answers:
        assert isinstance(answer, str)
        assert "ada/packed-private is not a local folder and is not a valid model identifier" in answer
    assert isinstance(last, str)
    assert "nowhere is not a valid git identifier" in last


def test_a_second_process_uses_the_cache(pushed: LoopbackHub, tmp_path: Path) -> None:
    def downloads() -> int:
        return sum(
            method == "GET" and path.startswith("/ada/packed/resolve") and path.endswith("model.safetensors")
            for method, path in pushed.requests
        )

    before = downloads()
    first, second = (load_in_a_new_process(pushed, tmp_path / "home", ("ada/packed", {}))[0] for _ in range(2))
    assert downloads() == before + 1
    assert torch.equal(first, second)


TRY_TO_PUSH = """
import json, os, sys
from huggingface_hub import HfApi
from tests.hub.models import make
errors = []
for repo, action, token in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        HfApi().create_repo(repo, exist_ok=False) if action == "create" else make("packed").push_to_hub(repo)
        errors.append(None)
    except Exception as error:
        errors.append([type(error).__name__, str(error)])
print(json.dumps(errors))
"""

REFUSED = [
    ("ada/new", "push", "hf_nobody", "Invalid credentials in Authorization header"),
    ("ada/new", "push", None, "401"),
    ("ada/new", "push", ADA_READING, "403 Forbidden"),
    ("bob/new", "push", ADA, "403 Forbidden"),
    ("ada/packed", "push", BOB, "403 Forbidden"),
    ("ada/packed", "create", ADA, "409"),
]


def test_a_refused_push_changes_nothing(pushed: LoopbackHub, tmp_path: Path) -> None:
    before = {name: dict(repository.branches) for name, repository in pushed.repositories.items()}
    attempts = json.dumps([attempt[:3] for attempt in REFUSED])
    process = run_script(pushed, tmp_path, TRY_TO_PUSH, attempts)
    for (*attempt, message), refusal in zip(REFUSED, json.loads(process.stdout.splitlines()[-1]), strict=True):
        assert refusal is not None, attempt
        error, text = refusal
        assert error == "HfHubHTTPError", text
        assert message in text, attempt
    assert {name: dict(repository.branches) for name, repository in pushed.repositories.items()} == before


PUSH_ONE = """
import os, sys
from pathlib import Path
from tests.hub.models import make
process_id, repo, seed = sys.argv[1:]
Path(process_id).write_text(str(os.getpid()))
make("packed", seed=int(seed)).push_to_hub(repo)
"""


def logits_of_the_files(hub: LoopbackHub, repo: str, folder: Path) -> torch.Tensor:
    """The logits of the model loaded from the files of a repository."""
    folder.mkdir()
    for path, content in hub.files(repo).items():
        (folder / path).write_bytes(content)
    return logits(AutoModelForQuestionAnswering.from_pretrained(folder))


def test_an_upload_that_is_interrupted_leaves_nothing_and_can_be_repeated(hub: LoopbackHub, tmp_path: Path) -> None:
    process_id = tmp_path / "process"
    hub.during_upload = lambda: os.kill(int(process_id.read_text()), signal.SIGKILL)
    before = set(hub.objects)
    killed = run_script(hub, tmp_path / "a", PUSH_ONE, process_id, "ada/interrupted", 5, token=ADA, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert set(hub.files("ada/interrupted")) == {".gitattributes"}
    assert set(hub.objects) == before
    run_script(hub, tmp_path / "a", PUSH_ONE, process_id, "ada/interrupted", 5, token=ADA)
    assert torch.equal(logits_of_the_files(hub, "ada/interrupted", tmp_path / "b"), logits(make("packed", seed=5)))


def test_a_connection_that_breaks_during_an_upload_is_tried_again(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.during_upload = lambda: None
    run_script(hub, tmp_path / "a", PUSH_ONE, tmp_path / "process", "ada/broken", 6, token=ADA)
    assert hub.during_upload is None
    assert torch.equal(logits_of_the_files(hub, "ada/broken", tmp_path / "b"), logits(make("packed", seed=6)))


def test_a_download_that_is_cut_off_gives_no_model(pushed: LoopbackHub, tmp_path: Path) -> None:
    pushed.drop_downloads_after = 1000
    (answer,) = load_in_a_new_process(pushed, tmp_path / "home", ("ada/packed", {}))
    pushed.drop_downloads_after = None
    assert isinstance(answer, str), "a model came of half a file"
    (answer,) = load_in_a_new_process(pushed, tmp_path / "home", ("ada/packed", {}))
    assert torch.equal(answer, logits(make("packed")))


TRAIN_AND_PUSH = """
import sys
from transformers import Trainer, TrainingArguments
from octav_hf.cli import main
from tests.hub.models import batch, make, make_tokenizer

row = {name: values[0] for name, values in batch().items()} | {"start_positions": 1, "end_positions": 2}
arguments = TrainingArguments(
    sys.argv[1], max_steps=2, report_to=[], use_cpu=True, push_to_hub=True, hub_model_id="ada/by-trainer",
    hub_strategy="end", hub_private_repo=True,
)
trainer = Trainer(make("training"), arguments, train_dataset=[row] * 4, processing_class=make_tokenizer())
trainer.train()
trainer.push_to_hub()
assert main(["pack", sys.argv[1], sys.argv[1] + "/packed"]) == 0
assert main(["push", sys.argv[1] + "/packed", "ada/by-command", "--revision", "dev", "--commit-message", "ours"]) == 0
assert main(["inspect", "ada/by-trainer"]) == 0
"""


def test_trainer_and_the_console_command_push(hub: LoopbackHub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = run_script(hub, tmp_path / "a", TRAIN_AND_PUSH, out, token=ADA)
    assert "ada/by-trainer: BertForQuestionAnswering, training form" in process.stdout
    assert hub.repositories["ada/by-trainer"].private
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(hub.files("ada/by-trainer"))
    assert set(hub.files("ada/by-command")) == {".gitattributes"}
    pushed = hub.files("ada/by-command", "dev")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(pushed)
    assert not [path for path in pushed if path.endswith(".bin") or "trainer_state" in path]
    assert 'from_pretrained("ada/by-command")' in pushed["README.md"].decode()
    wanted = [("ada/by-trainer", {"token": ADA}), ("ada/by-command", {"revision": "dev"}), (str(out), {})]
    first, second, third = load_in_a_new_process(hub, tmp_path / "b", *wanted)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


PIPELINE = """
import sys, torch, octav_hf
from transformers import BertForSequenceClassification, pipeline
from tests.hub.models import make_tokenizer, small_config
tokenizer = make_tokenizer()
torch.manual_seed(0)
model = octav_hf.apply_octav(BertForSequenceClassification(small_config(len(tokenizer))).eval(), octav_hf.OctavConfig())
before = pipeline("text-classification", model=model, tokenizer=tokenizer)("When was the museum opened?")
octav_hf.pack_octav(model).push_to_hub("ada/classifier")
tokenizer.push_to_hub("ada/classifier")
assert pipeline("text-classification", "ada/classifier")("When was the museum opened?") == before
print(before)
"""


def test_a_pipeline_runs_on_a_packed_model(hub: LoopbackHub, tmp_path: Path) -> None:
    assert "score" in run_script(hub, tmp_path, PIPELINE, token=ADA).stdout


def request(hub: LoopbackHub, method: str, path: str, body: bytes) -> int:
    """Status of a request that the client would not make."""
    headers = {"Authorization": f"Bearer {ADA}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(hub.url + path, body, headers, method=method)) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_hub_takes_only_what_was_uploaded_whole(pushed: LoopbackHub) -> None:
    right, wrong = hashlib.sha256(b"right").hexdigest(), hashlib.sha256(b"wrong").hexdigest()
    assert request(pushed, "PUT", f"/lfs/{right}", b"wrong") == 400
    verify = json.dumps({"oid": right, "size": 5}).encode()
    assert request(pushed, "POST", "/lfs/verify", verify) == 404
    assert request(pushed, "PUT", f"/lfs/{right}", b"right") == 200
    assert request(pushed, "POST", "/lfs/verify", verify) == 200
    before = pushed.files("ada/packed")
    line = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": wrong, "size": 5}}
    assert request(pushed, "POST", "/api/models/ada/packed/commit/main", json.dumps(line).encode()) == 400
    assert pushed.files("ada/packed") == before
