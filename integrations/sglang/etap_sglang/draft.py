"""EAGLE's draft: one decode backend for each step that follows the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .backend import Branches, EtapAttnBackend

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class EtapMultiStepDraftBackend:
    """The container that SGLang's draft worker asks for. Step i reads the batch's lengths and i + 1 draft tokens, in each of `topk`
    branches."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: ModelRunner, topk: int, num_steps: int) -> None:
        self.topk = topk
        self.speculative_num_steps = num_steps
        self.kv_index_translator = runner.kv_index_translator
        branches = Branches(topk, num_steps)
        self.attn_backends = [EtapAttnBackend(runner, draft_step=step + 1, branches=branches) for step in range(num_steps - 1)]
        self.attn_backend_list = self.attn_backends
        self.forward_metadata = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode, build_inner_fb_view

        inner = build_inner_fb_view(forward_batch, bs=forward_batch.batch_size, forward_mode=ForwardMode.DECODE)
        for backend in self.attn_backends:
            backend.init_forward_metadata_out_graph(inner, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata_in_graph(forward_batch)
