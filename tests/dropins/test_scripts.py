"""The programs in docs/from-*.md run as they stand, and with their import line as it was before ETAP."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import etap_flash_attn_3
import etap_flashmla
import pytest
from etap_flashinfer import mla

DOCS = Path(__file__).resolve().parents[2] / "docs"
PEERS = {
    "from-flashmla.md": ("flash_mla", etap_flashmla),
    "from-flashinfer.md": ("flashinfer.mla", mla),
    "from-flash-attention-3.md": ("flash_attn_interface", etap_flash_attn_3),
}


@pytest.mark.parametrize("page", PEERS)
def test_program(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page says that one line changes. Here the peer's module is ETAP's under the peer's name."""
    text = (DOCS / page).read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    before, after = re.findall(r"^[-+](from .*)$", text, flags=re.MULTILINE)
    name, module = PEERS[page]
    assert before == after.replace(module.__name__, name)
    assert program.count(after) == 1
    exec(compile(program, page, "exec"), {})
    if "." in name:
        monkeypatch.setitem(sys.modules, name.partition(".")[0], sys.modules["etap_flashinfer"])
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(program.replace(after, before), page, "exec"), {})


# Parameters in order, those with a default after the bar: FlashMLA 9241ae3, FlashInfer fb28d72, FlashAttention 0251105 (summer of 2026)
SIGNATURES = {
    etap_flashmla.flash_mla_with_kvcache: """
        q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata | num_splits softmax_scale causal is_fp8_kvcache indices
        attn_sink extra_k_cache extra_indices_in_kvcache topk_length extra_topk_length""",
    mla.BatchMLAPagedAttentionWrapper.__init__: """
        self float_workspace_buffer | use_cuda_graph qo_indptr kv_indptr kv_indices kv_len_arr backend""",
    mla.BatchMLAPagedAttentionWrapper.plan: """
        self qo_indptr kv_indptr kv_indices kv_len_arr num_heads head_dim_ckv head_dim_kpe page_size causal sm_scale q_data_type
        kv_data_type | use_profiler""",
    mla.BatchMLAPagedAttentionWrapper.run: """
        self q_nope q_pe ckv_cache kpe_cache | out lse return_lse profiler_buffer kv_len page_table return_lse_base_on_e o_scale""",
    etap_flash_attn_3.flash_attn_with_kvcache: """
        q k_cache v_cache | k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad page_table cu_seqlens_q
        cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale v_descale softmax_scale causal window_size attention_chunk softcap
        rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin return_softmax_lse""",
    etap_flash_attn_3.get_scheduler_metadata: """
        batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens | qkv_dtype headdim_v cu_seqlens_q
        cu_seqlens_k_new cache_leftpad page_size max_seqlen_k_new causal window_size attention_chunk has_softcap num_splits pack_gqa
        sm_margin""",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_positional_arguments(function: Callable[..., object]) -> None:
    """An argument that a script gives by position must arrive where the peer has it."""
    required, optional = SIGNATURES[function].split("|")
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in parameters if p.default is p.empty] == required.split()
    assert [p.name for p in parameters if p.default is not p.empty] == optional.split()


@pytest.mark.parametrize("page", PEERS)
def test_every_argument_is_in_the_tables(page: str) -> None:
    """A parameter that the tables forget is one of which nobody knows whether it counts."""
    functions = {
        "from-flashmla.md": [etap_flashmla.flash_mla_with_kvcache],
        "from-flashinfer.md": [
            mla.BatchMLAPagedAttentionWrapper,
            mla.BatchMLAPagedAttentionWrapper.plan,
            mla.BatchMLAPagedAttentionWrapper.run,
        ],
        "from-flash-attention-3.md": [etap_flash_attn_3.flash_attn_with_kvcache],
    }[page]
    tables = "\n".join(line for line in (DOCS / page).read_text().splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([a-z0-9_]+)", tables))
    for function in functions:
        missing = set(inspect.signature(function).parameters) - named - {"self"}
        assert not missing, f"{page} says nothing of {sorted(missing)}"
