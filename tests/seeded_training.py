"""A short training run from a seed, for the tests of determinism; as a command it prints the digest of the weights."""

from __future__ import annotations

import hashlib
import sys

import torch
from transformers import BertConfig, BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav


def train(seed: int) -> str:
    """The SHA-256 of the weights after four steps; layer inputs and a weight are large enough for the fast kernels."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 256}
    model = apply_octav(BertForQuestionAnswering(BertConfig(vocab_size=100, **sizes)), OctavConfig()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(4):
        ids = torch.randint(0, 100, (4, 64))
        loss = model(ids, start_positions=ids[:, 0] % 64, end_positions=ids[:, 1] % 64).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(train(int(sys.argv[1])))
