#!/usr/bin/env python3
"""Times SGLang's decode step with an attention backend, and says what part of it is attention.

    python bench_decode.py --model-path MODEL --attention-backend etap --page-size 64 --batches 1 16 64 --contexts 2048 16384

takes SGLang's own server arguments beside its own. The model is loaded as a scheduler would load it, CUDA graphs included. No
prompt is computed: the KV cache is filled with random values, and each request gets pages of its own, in random order. For each
batch and context it reports, in microseconds:

step       of the GPU, between replays of the step's CUDA graph one after another
attention  of the GPU in a whole forward pass, all layers: kernels that attention backends launch (page tables, plans, concatenated
           queries and keys included)
host       in the backend's init_forward_metadata_out_graph, which runs before each replay

Without CUDA it runs the step eagerly and reports `step` alone, by the host's clock.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.benchmark import one_batch
from sglang.srt.entrypoints.engine import _set_envs_and_config
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import PortArgs, ServerArgs

ATTENTION = re.compile(r"etap|fill_kernel|_fwd_(grouped_)?kernel|kv_splits|kv_ind|scan|cumsum|mla|MLA|flash|Cat")
OTHERS = re.compile(r"norm|Norm|set_mla_kv_buffer")  # in the namespace of a library that also has attention; the write to the cache
REPEATS = 30


def main() -> None:
    load_plugins()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ServerArgs.add_cli_args(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="requests (default: 1 16 64)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 16384], help="tokens of each (default: 2048 16384)")
    parser.add_argument("--rows", type=Path, help="append one JSON object a row to this file")
    parser.add_argument("--kernels", action="store_true", help="also list the kernels that count as attention")
    options = parser.parse_args()
    options.cuda_graph_bs_decode = options.batches
    arguments = ServerArgs.from_cli_args(options)
    arguments.resolve_once()
    _set_envs_and_config(arguments)
    one_batch.publish(arguments, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=0, gpu_id=0))
    one_batch._init_process_global_configs()
    wrapped, _ = one_batch.load_model(arguments, PortArgs.init_new(arguments), 0, 0)
    runner = wrapped.torch_runner
    for buffer in runner.token_to_kv_pool.kv_buffer:
        fill(buffer, runner.kv_cache_dtype)
    for batch in options.batches:
        for context in options.contexts:
            if batch * (context + runner.page_size) > runner.max_total_num_tokens:
                print(f"{batch} x {context}: more tokens than the KV cache holds, {runner.max_total_num_tokens}", flush=True)
                continue
            row = {"backend": options.decode_attention_backend or options.attention_backend, "kv": options.kv_cache_dtype}
            row |= {"page_size": runner.page_size, "batch": batch, "context": context, "layers": runner.token_to_kv_pool.layer_num}
            row |= measure(runner, decode_batch(runner, batch, context), list_kernels=options.kernels)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            if options.rows:
                with options.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def fill(buffer: torch.Tensor, dtype: torch.dtype) -> None:
    """Random values of the size that a normalised latent has."""
    for page in buffer.split(1 << 18):  # in pieces, which takes less memory
        page.copy_(torch.randn(page.shape, device=page.device).to(dtype).view(buffer.dtype))


def decode_batch(runner: Any, batch: int, context: int) -> ForwardBatch:
    """A decode step of `batch` requests of `context` tokens, the new one included, whose pages lie in random order."""
    pages = -(-context // runner.page_size)
    free = torch.randperm(runner.max_total_num_tokens // runner.page_size - 1, device=runner.device)[: batch * pages] + 1
    slots = free.view(batch, pages, 1) * runner.page_size + torch.arange(runner.page_size, device=runner.device)
    rows = torch.arange(1, batch + 1, device=runner.device)  # row 0 is that of padded requests
    runner.req_to_token_pool.req_to_token[rows, :context] = slots.flatten(1)[:, :context].int()
    lengths = torch.full((batch,), context, dtype=torch.int64)
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=batch,
        input_ids=torch.randint(0, runner.model_config.vocab_size, (batch,), device=runner.device),
        req_pool_indices=rows,
        seq_lens=lengths.to(runner.device),
        seq_lens_cpu=lengths,
        orig_seq_lens=lengths.to(runner.device),
        seq_lens_sum=batch * context,
        out_cache_loc=slots.flatten(1)[:, context - 1],
        positions=lengths.to(runner.device) - 1,
        return_logprob=False,
        spec_algorithm=runner.spec_algorithm,
        capture_hidden_mode=CaptureHiddenMode.NULL,
    )


def measure(runner: Any, batch: ForwardBatch, *, list_kernels: bool) -> dict[str, float]:
    runner.kv_index_translator.bind_runner_slots(batch)
    for _ in range(3):
        runner.forward(batch)
    if runner.device != "cuda":
        return {"step": round(host_time(lambda: runner.forward(batch)), 1)}
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
    times = {event.key: event.self_device_time_total / REPEATS for event in profile.key_averages()}
    kernels = {name: time for name, time in times.items() if ATTENTION.search(name) and not OTHERS.search(name)}
    if list_kernels:
        for name, microseconds in sorted(kernels.items(), key=lambda item: -item[1]):
            print(f"    {microseconds:8.1f} us  {name[:110]}")
    step = gpu_time(lambda: graphs.backend.replay(graphs._replay_graph_key, batch))
    return {"step": round(step, 1), "attention": round(sum(kernels.values()), 1), "host": round(statistics.median(host), 1)}


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
