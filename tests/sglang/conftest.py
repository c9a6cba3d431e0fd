"""SGLang on this machine: on its GPU, or on the CPU platform of the plugin."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # demo_lib: the small checkpoint, the server, the comparison of answers
sys.path.append(str(Path(__file__).parent))

if not torch.cuda.is_available():
    # Before the first import of sglang, in this process and in those that it starts.
    os.environ["ETAP_SGLANG_CPU"] = "1"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 checkpoint with random weights, whose answers depend on the whole context, and a layer that drafts."""
    from demo_lib.checkpoint import write_random
    from demo_lib.model import ModelConfig

    # On a GPU the dimensions of a rank of eight, which its kernels are made for; small ones where the CPU computes.
    rank = {"hidden_size": 1024, "qk_nope_head_dim": 128, "v_head_dim": 128} if torch.cuda.is_available() else {}
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    config = ModelConfig(draft_layers=1, **rank)
    write_random(folder, config)
    return folder
