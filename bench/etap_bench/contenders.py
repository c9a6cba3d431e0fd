"""What is timed beside the peers: etap itself, and the stream ceiling."""

from __future__ import annotations

import ctypes

import etap_py as etap
import torch
from torch import Tensor

from etap_bench.inputs import Inputs
from etap_bench.timing import Call

COPY_ROWS = (16, 64)  # copy sizes tried for the ceiling: the faster counts


class Skip(Exception):
    """Why a contender does not take part."""


class Etap:
    """One plan for the shape, updated for its lengths."""

    def __init__(self, inputs: Inputs) -> None:
        shape = inputs.shape
        self.inputs = inputs
        self.kv_cache = inputs.arena.pages(shape.page_size)
        self.problem = shape.problem(inputs.device)
        self.decision = etap.query(self.problem)
        self.plan = etap.Plan(self.problem)
        self.out = torch.empty(shape.query_tokens, shape.heads, shape.d_latent, dtype=inputs.q.dtype, device=inputs.device)
        self.lse = torch.empty(shape.query_tokens, shape.heads, dtype=torch.float32, device=inputs.device)
        self.update()

    def update(self) -> None:
        """Tables of all pools share the same."""
        table = self.inputs.block_tables[0] if self.problem.shared_prefixes else None
        sums = None if self.inputs.shape.equal_query_lens else self.inputs.cu_seqlens_q
        self.plan.update(self.inputs.cache_seqlens, sums, block_table=table)

    def call(self, pool: int) -> Tensor:
        inputs, table = self.inputs, self.inputs.block_tables[pool]
        self.plan.run(
            inputs.q_nope,
            inputs.q_rope,
            self.kv_cache,
            None if inputs.shape.sparse else table,
            slots=table if inputs.shape.sparse else None,
            softmax_scale=inputs.softmax_scale,
            kv_scale=inputs.arena.kv_scale,
            kv_group_scales=inputs.kv_group_scales,
            out=self.out,
            lse=self.lse,
        )
        return self.out


class Probe:
    """The stream probe, which lies beside libetap where that has CUDA: brings pages into shared memory and does no arithmetic. Raises Skip
    where it is missing."""

    PAGES, ROWS, ASYNC = 0, 1, 2

    def __init__(self) -> None:
        library = etap.library_path().with_name("libetap_probe.so")
        if not library.is_file():
            raise Skip(f"there is no {library}, which comes with a libetap that was built with CUDA")
        self.lib = ctypes.CDLL(str(library))
        i32, i64, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
        self.lib.etap_probe_error.restype = ctypes.c_char_p
        self.lib.etap_probe_plan_bytes.restype = i64
        self.lib.etap_probe_plan.argtypes = [pointer, i32, pointer, i32, pointer]
        self.lib.etap_probe_stream.argtypes = [
            *(i32, pointer, i64, i64, i32, i32, pointer, i64),
            *(pointer, pointer, i32, i32, pointer),
        ]

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"stream probe: {self.lib.etap_probe_error(status).decode()}")

    def prepare(self, inputs: Inputs, mode: int, page_size: int, rows_per_copy: int = 0) -> Call:
        kv, lengths, tables = inputs.arena.pages(page_size), inputs.cache_seqlens, inputs.block_tables
        if page_size != inputs.shape.adjacent:
            tables = inputs.shuffled_tables(page_size)
        ctas = inputs.shape.num_sms or torch.cuda.get_device_properties(inputs.device).multi_processor_count
        pieces = torch.empty(self.lib.etap_probe_plan_bytes(ctas), dtype=torch.uint8, device=inputs.device)
        stream = torch.cuda.current_stream().cuda_stream
        self._check(self.lib.etap_probe_plan(lengths.data_ptr(), inputs.shape.batch, pieces.data_ptr(), ctas, stream))
        torch.cuda.synchronize()
        size, row_bytes = kv.element_size(), kv.shape[2] * kv.element_size()

        def call(pool: int) -> None:
            table = tables[pool]
            self._check(
                self.lib.etap_probe_stream(
                    mode,
                    kv.data_ptr(),
                    kv.stride(0) * size,
                    kv.stride(1) * size,
                    row_bytes,
                    page_size,
                    table.data_ptr(),
                    table.stride(0),
                    lengths.data_ptr(),
                    pieces.data_ptr(),
                    ctas,
                    rows_per_copy,
                    torch.cuda.current_stream().cuda_stream,
                )
            )

        return call

    def contenders(self, inputs: Inputs) -> dict[str, Call]:
        shape = inputs.shape
        if shape.sparse:  # nothing lies together that a copy of pages could bring faster
            return {f"ceiling-{name}": self.prepare(inputs, mode, 1) for name, mode in (("bulk", self.ROWS), ("async", self.ASYNC))}
        page_size = shape.page_size if shape.page_size >= min(COPY_ROWS) else 64
        calls = {f"ceiling{rows}": self.prepare(inputs, self.PAGES, page_size, rows) for rows in COPY_ROWS if rows <= page_size}
        if page_size != shape.page_size:
            calls["gather-bulk"] = self.prepare(inputs, self.ROWS, shape.page_size)
            calls["gather-async"] = self.prepare(inputs, self.ASYNC, shape.page_size)
        return calls


class HostCopy:
    """The CPU device's ceiling: PyTorch gathers the same pages into one buffer and does no arithmetic."""

    def contenders(self, inputs: Inputs) -> dict[str, Call]:
        pages = [table[table >= 0] for table in inputs.block_tables]
        kv = inputs.kv_cache.view(torch.uint8)  # PyTorch on the CPU can't index FP8 tensors
        buffer = torch.empty(len(pages[0]), *kv.shape[1:], dtype=torch.uint8)

        def call(pool: int) -> None:
            torch.index_select(kv, 0, pages[pool], out=buffer)

        return {"ceiling": call}


Ceiling = Probe | HostCopy


def ceiling_of(device: str) -> Ceiling:
    """Raises Skip, with the reason, where there is none."""
    return HostCopy() if device == "cpu" else Probe()
