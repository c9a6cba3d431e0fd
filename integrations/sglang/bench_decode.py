#!/usr/bin/env python3
"""Times SGLang's decode step with an attention backend, and says what part of it is attention.

    python bench_decode.py --model-path MODEL --attention-backend etap --page-size 64 --batches 1 16 64 --contexts 2048 16384

takes SGLang's own server arguments beside its own. The model is loaded as a scheduler would load it, CUDA graphs included. No
prompt is computed: the KV cache is filled with random values (the index keys of a sparse model, too), and each request gets pages of
its own, in random order; with --common-prefix all begin with the same ones. With --speculative-algorithm EAGLE the step is the
verification of --speculative-num-draft-tokens. For each batch and context it reports, in microseconds:

step       of the GPU, between replays of the step's CUDA graph one after another
attention  of the GPU in a whole forward pass, all layers: while kernels run that attention backends launch (page tables, plans,
           concatenated queries and keys included; not what fills up queries with heads of zeros)
host       in the backend's init_forward_metadata_out_graph, which runs before each replay

With ETAP_SGLANG_SHARED_PREFIXES=1 it also says how many requests read a prefix together. Without CUDA it runs the step eagerly and
reports `step` alone, by the host's clock.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from sglang.benchmark import one_batch
from sglang.srt.entrypoints.engine import _set_envs_and_config
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.speculative.eagle_info import EagleVerifyInput

from etap_sglang import calls
from etap_sglang.cpu_indexer import index_keys
from etap_sglang.cpu_kv_pool import packed

ATTENTION = re.compile(r"etap|fill_kernel|_fwd_(grouped_)?kernel|kv_splits|kv_ind|scan|cumsum|mla|MLA|flash|Cat")
# In the namespace of a library that also has attention; the write to the cache; an indexer's logits, concatenated in FP32.
OTHERS = re.compile(r"norm|Norm|set_mla_kv_buffer|Cat.*OpaqueType<4")
REPEATS = 30


def main() -> None:
    load_plugins()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ServerArgs.add_cli_args(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="requests (default: 1 16 64)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 16384], help="tokens of each (default: 2048 16384)")
    parser.add_argument("--common-prefix", type=int, nargs="+", default=[0], help="tokens that all begin with, in whole pages (default: 0)")
    parser.add_argument("--rows", type=Path, help="append one JSON object a row to this file")
    parser.add_argument("--kernels", action="store_true", help="also list the kernels; a star marks those that count as attention")
    options = parser.parse_args()
    options.cuda_graph_bs_decode = options.batches
    arguments = ServerArgs.from_cli_args(options)
    arguments.resolve_once()
    _set_envs_and_config(arguments)
    one_batch.publish(arguments, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=0, gpu_id=0))
    one_batch._init_process_global_configs()
    wrapped, _ = one_batch.load_model(arguments, PortArgs.init_new(arguments), 0, 0)
    runner = wrapped.torch_runner
    fill(runner.token_to_kv_pool, runner.kv_cache_dtype)
    backend = options.dsa_decode_backend or options.decode_attention_backend or options.attention_backend
    for batch, context, common in product(options.batches, options.contexts, options.common_prefix):
        table = random_pages(runner, batch, context, common)
        if table is None:
            print(f"{batch} x {context}: more tokens than the KV cache holds, {runner.max_total_num_tokens}", flush=True)
            continue
        step = decode_batch(runner, table, context)
        row = {"backend": backend, "kv": options.kv_cache_dtype, "heads": runner.model_config.num_attention_heads}
        row |= {"page_size": runner.page_size, "batch": batch, "context": context, "common_prefix": common}
        row |= {"query_tokens": len(step.input_ids) // batch, "layers": runner.token_to_kv_pool.layer_num}
        row |= measure(runner, step, list_kernels=options.kernels)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")


def fill(pool: Any, dtype: torch.dtype) -> None:
    """Random values of the size that a normalised latent has, in rows of whatever form; index keys with a scale of 1."""
    is_sparse = hasattr(pool, "index_key_cache")
    widths = pool.kv_lora_rank, pool.qk_rope_head_dim
    for layer, buffer in enumerate(pool.kv_buffer):
        for rows in buffer.split(1 << 18):  # in pieces, which takes less memory
            if is_sparse and pool.dsa_kv_cache_store_fp8:
                rows.view(torch.uint8).copy_(packed(*(torch.randn(len(rows), 1, width, device=rows.device) for width in widths)))
            else:
                rows.copy_(torch.randn(rows.shape, device=rows.device).to(dtype).view(rows.dtype))
        if is_sparse:
            keys, scales = index_keys(pool.get_index_k_with_scale_buffer(layer), pool.index_page_size, pool.index_head_dim)
            keys.copy_(torch.randn(keys.shape, device=keys.device))
            scales.fill_(1.0)


def random_pages(runner: Any, batch: int, context: int, common_prefix: int) -> torch.Tensor | None:
    """int64 [batch, pages] of requests of `context` tokens, or None where there are not so many. The step's own tokens are in no common
    page."""
    pages, common = -(-context // runner.page_size), min(common_prefix, context - 1) // runner.page_size
    free = torch.randperm(runner.max_total_num_tokens // runner.page_size - 1, device=runner.device) + 1
    if len(free) < common + batch * (pages - common):
        return None
    own = free[common : common + batch * (pages - common)].view(batch, -1)
    return torch.cat([free[:common].expand(batch, -1), own], 1)


def decode_batch(runner: Any, table: torch.Tensor, context: int) -> ForwardBatch:
    """A decode step of requests of `context` tokens, the new one included, in the pages of `table`: with speculation, a verification."""
    batch, drafts = len(table), runner.server_args.speculative_num_draft_tokens if runner.spec_algorithm.is_speculative() else 0
    slots = (table[:, :, None] * runner.page_size + torch.arange(runner.page_size, device=runner.device)).flatten(1)[:, :context]
    rows = torch.arange(1, batch + 1, device=runner.device)  # row 0 is that of padded requests
    runner.req_to_token_pool.req_to_token[rows, :context] = slots.int()
    new = drafts or 1
    lengths = torch.full((batch,), context - drafts, dtype=torch.int64)  # those of a verification don't count what it verifies
    hidden_mode = CaptureHiddenMode.FULL if drafts else CaptureHiddenMode.NULL
    return ForwardBatch(
        forward_mode=ForwardMode.TARGET_VERIFY if drafts else ForwardMode.DECODE,
        batch_size=batch,
        input_ids=torch.randint(0, runner.model_config.vocab_size, (batch * new,), device=runner.device),
        req_pool_indices=rows,
        seq_lens=lengths.to(runner.device),
        seq_lens_cpu=lengths,
        orig_seq_lens=lengths.to(runner.device),
        seq_lens_sum=int(lengths.sum()),
        out_cache_loc=slots[:, context - new :].flatten(),
        positions=torch.arange(context - new, context, device=runner.device).repeat(batch),
        return_logprob=False,
        spec_algorithm=runner.spec_algorithm,
        spec_info=verification(runner, lengths, drafts, hidden_mode) if drafts else None,
        capture_hidden_mode=hidden_mode,
    )


def verification(runner: Any, lengths: torch.Tensor, drafts: int, hidden_mode: CaptureHiddenMode) -> EagleVerifyInput:
    """Of a chain of drafts a request. Its mask is the causal one: for backends that read it."""
    seen = [torch.ones(drafts, int(length) + drafts, dtype=torch.bool).tril(int(length)) for length in lengths]
    return EagleVerifyInput(
        draft_token=None,
        custom_mask=torch.cat([mask.flatten() for mask in seen]).to(runner.device),
        positions=None,
        retrieve_index=None,
        retrieve_next_token=None,
        retrieve_next_sibling=None,
        retrieve_cum_len=None,
        spec_steps=drafts - 1,
        topk=1,
        draft_token_num=drafts,
        capture_hidden_mode=hidden_mode,
        seq_lens_sum=int(lengths.sum()),
        seq_lens_cpu=lengths,
    )


def measure(runner: Any, batch: ForwardBatch, *, list_kernels: bool) -> dict[str, float]:
    runner.kv_index_translator.bind_runner_slots(batch)
    for _ in range(3):
        runner.forward(batch)
    if runner.device != "cuda":
        return {"step": round(host_time(lambda: runner.forward(batch)), 1)} | sharers()
    graphs = runner.decode_cuda_graph_runner
    assert graphs.can_run_graph(batch), "the step has no CUDA graph"
    host: list[float] = []
    original = runner.attn_backend.init_forward_metadata_out_graph

    def timed(view: Any, in_capture: bool = False) -> None:
        start = time.perf_counter()
        original(view, in_capture)
        host.append((time.perf_counter() - start) * 1e6)

    runner.attn_backend.init_forward_metadata_out_graph = timed
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPEATS):
            runner.forward(batch)
        torch.cuda.synchronize()
    del runner.attn_backend.init_forward_metadata_out_graph
    times: dict[str, list[tuple[float, float]]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name, []).append((event.time_range.start, event.time_range.end))
    kernels = [name for name in times if ATTENTION.search(name) and not OTHERS.search(name)]
    attention = covered(chain.from_iterable(times[name] for name in kernels)) / REPEATS
    if list_kernels:
        totals = {name: covered(intervals) / REPEATS for name, intervals in times.items()}
        for name, microseconds in sorted(totals.items(), key=lambda item: -item[1]):
            print(f"  {'*' if name in kernels else ' '} {microseconds:8.1f} us  {name[:110]}")
    step = gpu_time(lambda: graphs.backend.replay(graphs._replay_graph_key, batch))
    return {"step": round(step, 1), "attention": round(attention, 1), "host": round(statistics.median(host), 1)} | sharers()


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """How long at least one of these (start, end) lasts: a kernel that waits for the one before it may have begun with it."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def sharers() -> dict[str, float]:
    """How many requests of the last step read a prefix with others."""
    found = calls.shared_prefixes()
    return {} if found is None else {"sharers": found["sequences"]}


def gpu_time(call: Callable[[], Any]) -> float:
    """Microseconds a call, between events around several, the median of several such."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(7)]
    for first, last in events:
        first.record()
        for _ in range(REPEATS):
            call()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events) * 1e3 / REPEATS


def host_time(call: Callable[[], Any]) -> float:
    """Microseconds a call, the median of several."""

    def once() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    return statistics.median(once() for _ in range(REPEATS))


if __name__ == "__main__":
    main()
