"""Draft trees (--speculative-eagle-topk above 1), on this machine's GPU or on the CPU platform: their masks, and verification against
SGLang's reference."""

from __future__ import annotations

import random
import unittest
from types import SimpleNamespace

import numpy as np
import pytest
import sglang_kit as kit
import torch
from etap_sglang import backend as backend_module
from etap_sglang import refusals, tree_mask
from etap_sglang.cpu_kv_pool import CpuMLATokenToKVPool
from etap_sglang.draft import EtapMultiStepDraftBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.test.kits.attention_unittest.attention_methods import mla_attention
from sglang.test.kits.attention_unittest.runner_modes import speculative_target_verify_runner as verify
from test_block_table import slots_of, slots_of_branch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    not_sm90 = torch.cuda.get_device_capability() != (9, 0)
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not_sm90, reason="the GPU is not an SM90")]


@pytest.mark.parametrize("drafts", [1, 2, 8, 31, 32, 33, 64, 100])
def test_packed_masks(drafts: int, seed: int) -> None:
    """Guards the order of bits, and the highest of a word, which is the sign of an int32."""
    mask = torch.rand(7, drafts, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = torch.full((7, -(-drafts // 32)), -7, dtype=torch.int32, device=DEVICE)
    tree_mask.pack(mask.to(DEVICE), bits)
    padded = np.pad(mask.numpy(), ((0, 0), (0, -drafts % 32)))
    assert bits.tolist() == np.packbits(padded, axis=1, bitorder="little").view(np.int32).tolist()


class Verification:
    """A backend whose drafts are trees, and a batch of random ones to verify."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, seed: int, prefix_lens: tuple[int, ...], drafts: int, page_size: int = 1, num_heads: int = 4
    ) -> None:
        spec = SimpleNamespace(speculative_eagle_topk=2, speculative_num_draft_tokens=drafts, speculative_algorithm="EAGLE")
        for module in (backend_module, refusals):
            monkeypatch.setattr(module, "get_spec", lambda: spec)
        if DEVICE == "cpu":
            monkeypatch.setattr(mla_attention, "MLATokenToKVPool", CpuMLATokenToKVPool)
        self.case = kit.case(ForwardMode.TARGET_VERIFY, prefix_lens, window=drafts, page_size=page_size, num_heads=num_heads)
        self.fixture = mla_attention.build_mla_attention_fixture(
            unittest.TestCase(),
            self.case,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            max_context_len=256,
            dtype=torch.bfloat16,
            device=DEVICE,
        )
        self.backend, self.batch = self.fixture.backend, self.fixture.forward_batch
        verify._prepare_target_verify_batch(self.batch, self.case, DEVICE)
        masks = torch.zeros(len(prefix_lens), drafts, drafts, dtype=torch.bool)
        rng = random.Random(seed)
        for mask in masks:
            for i in range(drafts):
                mask[i] = mask[rng.randrange(i)] if i else False  # the parent's, and itself
                mask[i, i] = True
        self.masks = masks.to(DEVICE)

    def run(self) -> torch.Tensor:
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=self.backend)):
            return self.fixture.actual_module(self.fixture.input_hidden, self.batch)

    def check(self, out: torch.Tensor) -> None:
        prefixes = [torch.ones(self.masks.shape[1], n, dtype=torch.bool, device=DEVICE) for n in self.case.prefix_lens]
        masks = [torch.cat([prefix, mask], 1) for prefix, mask in zip(prefixes, self.masks, strict=True)]
        expected = mla_attention.mla_attention_reference_with_custom_mask(
            self.fixture.reference_module, self.case, self.fixture.prefix_hidden, self.fixture.input_hidden, masks
        )
        torch.testing.assert_close(out, expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("drafts", [3, 8, 40])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("num_heads", [4, 16] if DEVICE == "cuda" else [4])
def test_verify_trees(drafts: int, page_size: int, num_heads: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards drafts that see a sibling, and a request that is given the mask of another."""
    work = Verification(monkeypatch, seed, (1, 15, 16, 61, 64), drafts, page_size, num_heads)
    assert not work.backend.verify_mask.fits(1), "SGLang would write a mask into a buffer of nothing"
    work.batch.spec_info = SimpleNamespace(custom_mask=work.masks.flatten())
    work.backend.init_forward_metadata(work.batch)
    work.check(work.run())


def test_verify_trees_in_a_graph(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a mask that is fixed when the graph is captured: captured on one, replayed with another in the same buffer. Without a GPU, the
    same calls in that order."""
    work = Verification(monkeypatch, seed, (5, 40, 17), 6)
    backend, batch = work.backend, work.batch
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=24)
    verify_mask, size = backend.verify_mask, work.masks.numel()
    assert verify_mask.mode.name == "QLEN_ONLY"
    assert verify_mask.fits(4)
    batch.spec_info = SimpleNamespace(custom_mask=None)
    verify_mask.buffer[:size] = True
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    step = backend.forward_metadata

    def forward() -> torch.Tensor:
        backend.init_forward_metadata_in_graph(batch)
        return work.run()

    replay = kit.captured(forward)
    verify_mask.buffer[:size] = work.masks.flatten()
    backend.init_forward_metadata_out_graph(batch)
    assert backend.forward_metadata is step
    work.check(replay())


def test_a_padded_verification(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards data-parallel attention, which pads a batch after its mask was built: the requests that there are get their own."""
    work = Verification(monkeypatch, seed, (5, 40, 17), 6)
    work.batch.spec_info = SimpleNamespace(custom_mask=work.masks[:2].flatten())
    work.masks[2] = False
    work.backend.init_forward_metadata(work.batch)
    work.check(work.run())


@pytest.mark.parametrize("page_size", [1, 16])
def test_steps_of_a_tree_draft(page_size: int, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Guards the batch of a draft step, which is that of all branches: eager, and in the order of a graph with other lengths."""
    work = Verification(monkeypatch, seed, (14, 30), 1, page_size)
    batch, branches, steps = work.batch, 3, 4
    table = work.backend.req_to_token
    table.copy_(torch.arange(table.numel()).view(table.shape).flip(0))
    batch.forward_mode = ForwardMode.DECODE
    container = EtapMultiStepDraftBackend(work.fixture.runner, branches, steps)
    step = {"req_to_token": table, "req_pool_indices": batch.req_pool_indices, "seq_lens": batch.seq_lens}
    step |= {"branches": branches, "branch_tokens": steps, "page_size": page_size}

    def check(buffers: str) -> None:
        for number, backend in enumerate(container.attn_backends):
            assert backend.forward_metadata.plan.problem.batch == 2 * branches
            made = getattr(backend, buffers)
            for row in range(2 * branches):
                wanted = slots_of_branch(step, *divmod(row, branches), number + 1)
                assert int(made.seqlens[row]) == len(wanted)
                assert slots_of(made.table, row, len(wanted), page_size) == wanted

    container.init_forward_metadata(batch)
    check("_eager")
    container.init_cuda_graph_state(max_bs=2, max_num_tokens=2 * branches)
    container.init_forward_metadata_out_graph(batch, in_capture=True)
    batch.seq_lens += 5
    container.init_forward_metadata_in_graph(batch)
    check("_graph")
