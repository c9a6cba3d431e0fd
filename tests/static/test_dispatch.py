"""The CUDA device's choice of tile, cluster and workers, on the host, for any problem and any SM90 GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from etap_bench.model.benchmark import OURS, OURS_FP8
from etap_bench.model.gpu import load_gpu
from etap_bench.model.kernel import rows_on_m, tile_of
from etap_bench.shape import Shape
from hypothesis import given, settings
from hypothesis import strategies as st

CAUSAL, BATCH_INVARIANT, TREE_MASK, SHARED_PREFIXES = 1, 4, 8, 16


class Problem(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("device_type", "device_index", "num_heads", "d_latent", "d_rope", "page_size", "q_dtype", "kv_format", "out_dtype"),
                *("batch", "max_query_len", "total_q", "flags", "num_sms", "force_tile", "force_cluster", "reserved", "topk"),
            )
        ),
    ]


class Decision(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("tile_rows", "num_tiles", "cluster_size", "num_workers", "max_splits")),
        ("kernel", ctypes.c_char * 64),
        ("reason", ctypes.c_char * 256),
        ("max_sharers", ctypes.c_int32),
    ]


class DeviceLimits(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("num_sms", "flop_per_cycle", "bytes_per_cycle")),
        ("max_clusters", ctypes.c_int * 9),
    ]


class SharingCosts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("usual", "together", "usual_own", "together_own", "merge", "sms")]


# SMs, what an SM's tensor cores and the memory of all do a cycle, and clusters of 1 to 8 CTAs that run at a time ([0] is not used): an
# H100 or H200 as measured, an H20 if its GPCs are even, a small slice.
H100 = (132, 4096, 1590, (0, 132, 66, 39, 30, 22, 17, 15, 15))
H200 = (132, 4096, 2330, (0, 132, 66, 39, 30, 22, 17, 15, 15))
H20 = (78, 1024, 1900, (0, 78, 39, 26, 18, 15, 12, 11, 8))
GPUS = [H100, H200, H20, (16, 4096, 200, (0, 16, 8, 5, 4, 3, 2, 2, 2))]
Gpu = tuple[int, int, int, tuple[int, ...]]


def allowed_refusal(fields: dict[str, Any], refusal: str) -> bool:
    """All that may be refused, and for what."""
    if refusal.startswith("kv_format has group scales; the CUDA device takes it with"):
        widths = (512, 0) if fields["kv_format"] == 5 else (512, 64)
        return fields["kv_format"] in (3, 4, 5) and (fields["q_dtype"] != 0 or fields["dims"] != widths)
    if refusal.startswith("force_tile is none of the tiles that there are"):
        e4m3 = (8, 16, 24, 32, 48, 64)
        tiles = {2: e4m3, 3: e4m3, 4: e4m3, 5: e4m3[3:]}
        return fields["force_tile"] not in tiles.get(fields["kv_format"], range(8, 72, 8))
    if refusal.startswith("force_cluster is more than the SMs that num_sms allows"):
        sms = fields["num_sms"] or 16  # of 16 SMs each cluster of 8 and fewer fits
        return not fields["flags"] & BATCH_INVARIANT and fields["force_cluster"] > sms
    if refusal.startswith("batch times row tiles exceeds 2^30"):
        chunks = 32 if fields["flags"] & BATCH_INVARIANT else 1
        return fields["batch"] * fields["max_query_len"] * fields["num_heads"] * chunks > 2**29
    return False


problems = st.builds(
    dict,
    num_heads=st.integers(1, 128),
    dims=st.sampled_from([(512, 64), (512, 0), (256, 64)]),
    page_size=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256]),
    q_dtype=st.integers(0, 1),
    kv_format=st.integers(0, 5),
    out_dtype=st.integers(0, 2),
    batch=st.one_of(st.integers(1, 64), st.integers(1, 65536)),
    max_query_len=st.one_of(st.integers(1, 9), st.integers(10, 500)),
    flags=st.sampled_from([0, CAUSAL, BATCH_INVARIANT, CAUSAL | BATCH_INVARIANT, TREE_MASK, SHARED_PREFIXES, SHARED_PREFIXES | CAUSAL]),
    num_sms=st.one_of(st.just(0), st.integers(1, 200)),
    topk=st.sampled_from([0, 0, 0, 2048]),
)


def c_problem(gpu: Gpu, fields: dict[str, Any]) -> Problem:
    """As the API makes it, an absent SM budget is all SMs and q_dtype fits the 16-bit formats."""
    fields = dict(fields)
    d_latent, d_rope = fields.pop("dims")
    if fields["kv_format"] < 2:
        fields["kv_format"] = fields["q_dtype"]
    fields["num_sms"] = min(fields["num_sms"] or gpu[0], gpu[0])
    problem = Problem(size=ctypes.sizeof(Problem), device_type=1, d_latent=d_latent, d_rope=d_rope, **fields)
    problem.total_q = problem.batch * problem.max_query_len
    return problem


def dispatch(lib: Any, gpu: Gpu, fields: dict[str, Any]) -> tuple[str | None, Decision]:
    """(why it is refused, or None; the decision)"""
    return dispatch_problem(lib, gpu, c_problem(gpu, fields))


def limits_of(gpu: Gpu) -> DeviceLimits:
    return DeviceLimits(*gpu[:3], (ctypes.c_int * 9)(*gpu[3]))


def dispatch_problem(lib: Any, gpu: Gpu, problem: Problem) -> tuple[str | None, Decision]:
    limits = limits_of(gpu)
    decision = Decision(size=ctypes.sizeof(Decision))
    lib.shim_dispatch.argtypes = [ctypes.POINTER(Problem), ctypes.POINTER(DeviceLimits), ctypes.POINTER(Decision)]
    lib.shim_dispatch.restype = ctypes.c_char_p
    refusal = lib.shim_dispatch(problem, limits, decision)
    return refusal and refusal.decode(), decision


@settings(max_examples=1000, deadline=None, print_blob=True)
@given(gpu=st.sampled_from(GPUS), fields=problems)
def test_decision_fits_problem_and_gpu(sm90_host: Any, gpu: Gpu, fields: dict[str, Any]) -> None:
    """Exact N: no tile wastes a whole step of 8 rows, but where rows stand on WGMMA's M or tiles are of few sizes (FP8). Workers are
    clusters that run at the same time, within the SM budget: pieces of one sequence wait for each other. The reason is a sentence that fits
    its field."""
    refusal, decision = dispatch(sm90_host, gpu, fields)
    if refusal is not None:
        assert allowed_refusal(fields, refusal), refusal
        return
    rows = fields["num_heads"] * fields["max_query_len"]
    assert decision.tile_rows % 8 == 0
    padding = decision.tile_rows * decision.num_tiles - rows
    assert b"rows_on_m" not in decision.kernel or decision.tile_rows == 64
    if b"rows_on_m" in decision.kernel or b"e4m3" in decision.kernel:
        assert 0 <= padding < decision.tile_rows
    else:
        assert decision.num_tiles == -(-rows // 64)
        assert 0 <= padding < 8 * decision.num_tiles
    assert 1 <= decision.cluster_size <= 8
    assert decision.num_workers >= 1
    assert decision.num_workers * decision.cluster_size <= min(fields["num_sms"] or gpu[0], gpu[0])
    assert decision.num_workers <= gpu[3][decision.cluster_size]
    may_be_single = 1 < decision.cluster_size <= 3 and not fields.get("force_cluster")
    most = decision.num_workers * (decision.cluster_size if may_be_single else 1)
    if fields["flags"] & BATCH_INVARIANT:
        assert decision.cluster_size == 1
        most = 4 if fields["topk"] else 32 if decision.tile_rows <= 32 else 16
        while most > 1 and most * decision.num_tiles > 128:
            most //= 2
    assert decision.max_splits == most
    assert (b"or single CTAs" in decision.reason) == may_be_single
    assert (b"chunk(s)" in decision.reason) == bool(fields["flags"] & BATCH_INVARIANT)
    assert decision.kernel.startswith(b"sm90_")
    assert 40 < len(decision.reason) < 255, decision.reason


@settings(max_examples=500, deadline=None, print_blob=True)
@given(gpu=st.sampled_from(GPUS), fields=problems, shared=st.just(SHARED_PREFIXES))
def test_shared_prefixes(sm90_host: Any, gpu: Gpu, fields: dict[str, Any], shared: int) -> None:
    """The flag changes nothing of the kernel, its reason says how many sequences a group can have, and what a plan with groups uses, on
    all SMs, is no more than the workspace that the caller was told of."""
    fields = {**fields, "flags": fields["flags"] & CAUSAL, "topk": 0}
    refusal, plain = dispatch(sm90_host, gpu, fields)
    problem = c_problem(gpu, {**fields, "flags": fields["flags"] | shared})
    refusal_too, decision = dispatch_problem(sm90_host, gpu, problem)
    assert refusal == refusal_too
    if refusal is not None:
        return
    rows = fields["num_heads"] * fields["max_query_len"]
    wanted = 1 if fields["batch"] > 512 else max(1, min(64 // rows, fields["batch"]))
    assert (plain.max_sharers, decision.max_sharers) == (0, wanted)
    assert decision.reason.startswith(plain.reason)
    assert (b"read a common prefix together" in decision.reason) == (wanted > 1)
    same = ("tile_rows", "num_tiles", "cluster_size", "num_workers", "max_splits", "kernel")
    assert all(getattr(plain, name) == getattr(decision, name) for name in same)
    used, given, workers = workspace(sm90_host, gpu, problem, decision)
    assert used <= given
    assert workers == (min(problem.num_sms, 144) if wanted > 1 else 0)


def workspace(lib: Any, gpu: Gpu, problem: Problem, decision: Decision) -> tuple[int, int, int]:
    out = (ctypes.c_int64 * 3)()
    lib.shim_workspace(ctypes.byref(problem), ctypes.byref(decision), ctypes.byref(limits_of(gpu)), out)
    return tuple(out)


@settings(max_examples=300, deadline=None, print_blob=True)
@given(gpu=st.sampled_from(GPUS), fields=problems, smaller=st.floats(0, 1), flag=st.sampled_from([SHARED_PREFIXES, BATCH_INVARIANT]))
def test_a_workspace_serves_smaller_problems(sm90_host: Any, gpu: Gpu, fields: dict[str, Any], smaller: float, flag: int) -> None:
    """Guards: a batch that shrinks may be looked through for prefixes where the larger one was not, and gets larger clusters or more of
    them; what the larger one was given must be enough."""
    fields = {**fields, "flags": fields["flags"] & CAUSAL | flag, "topk": 0}
    refusal, decision = dispatch(sm90_host, gpu, fields)
    less = {**fields, "batch": max(1, int(fields["batch"] * smaller))}
    refusal_too, decision_too = dispatch(sm90_host, gpu, less)
    if refusal is None and refusal_too is None:
        given = workspace(sm90_host, gpu, c_problem(gpu, fields), decision)[1]
        assert workspace(sm90_host, gpu, c_problem(gpu, less), decision_too)[0] <= given


def sharing_costs(lib: Any, gpu: Gpu, heads: int, kv_format: int, batch: int) -> SharingCosts:
    fields = {**problem_of(heads, 1, (512, 64)), "kv_format": kv_format, "batch": batch, "flags": CAUSAL | SHARED_PREFIXES}
    refusal, decision = dispatch(lib, gpu, fields)
    assert refusal is None
    costs = SharingCosts()
    lib.shim_sharing_costs(ctypes.byref(c_problem(gpu, fields)), ctypes.byref(decision), ctypes.byref(limits_of(gpu)), ctypes.byref(costs))
    return costs


def sharing_pays(lib: Any, gpu: Gpu, heads: int, kv_format: int, batch: int, common: int, own: int) -> bool:
    """As the plan decides: for full groups of a batch whose sequences have so many blocks in common, and so many of their own."""
    costs = sharing_costs(lib, gpu, heads, kv_format, batch)
    lib.shim_gain.restype = ctypes.c_int64
    lib.shim_pay.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    lib.shim_pay.restype = ctypes.c_bool
    members = 64 // heads
    gained = batch // members * max(0, lib.shim_gain(ctypes.byref(costs), members, common))
    if not gained:
        return False
    return bool(lib.shim_pay(ctypes.addressof(costs), gained, batch * common, batch * own))


@pytest.mark.parametrize(
    ("gpu", "heads", "kv_format", "batch", "common", "own", "pays"),
    [
        (H200, 16, 0, 64, 256, 16, True),  # the table of docs/shared-prefixes.md
        (H200, 16, 0, 16, 128, 128, True),
        (H200, 16, 0, 32, 64, 16, True),
        (H200, 16, 0, 128, 0, 32, False),
        (H200, 16, 0, 16, 32, 16, False),  # 3 us are saved, and the merge takes six
        (H200, 32, 0, 64, 256, 16, True),
        (H200, 16, 2, 64, 256, 16, True),  # FP8
        (H200, 16, 2, 16, 128, 128, False),  # the suffixes' tiles of 64 rows cost more than is saved
        (H20, 16, 0, 64, 256, 16, False),  # tensor cores that four sequences keep as busy together as one after the other
        (H20, 16, 2, 64, 256, 16, False),
    ],
)
def test_sharing_where_it_pays(sm90_host: Any, gpu: Gpu, heads: int, kv_format: int, batch: int, common: int, own: int, pays: bool) -> None:
    assert sharing_pays(sm90_host, gpu, heads, kv_format, batch, common, own) == pays


@pytest.mark.parametrize(("batch", "common", "own", "us"), [(64, 256, 16, 152.3), (16, 128, 128, 65.2), (32, 64, 16, 34.3)])
def test_what_the_usual_kernel_is_taken_to_cost(sm90_host: Any, batch: int, common: int, own: int, us: float) -> None:
    """What an H200 took without the flag for sequences whose pages are shared (docs/shared-prefixes.md): what sharing saves is reckoned
    from it. 9 us of a call are not of its blocks."""
    costs = sharing_costs(sm90_host, H200, 16, 0, batch)
    cycles = batch * (common * costs.usual + own * costs.usual_own) / costs.sms
    assert 9 + cycles / 1900 == pytest.approx(us, rel=0.1)


@settings(max_examples=200, deadline=None, print_blob=True)
@given(
    gpu=st.sampled_from(GPUS),
    heads=st.sampled_from([4, 8, 16, 32]),
    kv_format=st.sampled_from([0, 2, 3]),
    batch=st.integers(16, 512),
    common=st.integers(0, 2000),
    own=st.integers(0, 2000),
    more=st.integers(1, 1000),
)
def test_more_of_its_own_never_makes_sharing_pay(
    sm90_host: Any, gpu: Gpu, heads: int, kv_format: int, batch: int, common: int, own: int, more: int
) -> None:
    """Guards the signs of the decision: what is read by one sequence alone saves nothing, and can cost."""
    args = (sm90_host, gpu, heads, kv_format, batch, common)
    assert sharing_pays(*args, own) or not sharing_pays(*args, own + more)
    assert (64 // heads - 1) * common > 17 or not sharing_pays(*args, own)  # what a group must save in blocks


@settings(max_examples=300, deadline=None, print_blob=True)
@given(gpu=st.sampled_from(GPUS), fields=problems, tile=st.sampled_from(range(8, 72, 8)), cluster=st.integers(1, 8))
def test_experiments_are_honoured_or_refused(sm90_host: Any, gpu: Gpu, fields: dict[str, Any], tile: int, cluster: int) -> None:
    """A tuning run that is silently given another kernel measures the wrong thing."""
    fields = {**fields, "force_tile": tile, "force_cluster": cluster}
    refusal, decision = dispatch(sm90_host, gpu, fields)
    if refusal is not None:
        assert allowed_refusal(fields, refusal), refusal
        return
    rows = fields["num_heads"] * fields["max_query_len"]
    assert (decision.tile_rows, decision.num_tiles) == (tile, -(-rows // tile))
    assert decision.cluster_size == (1 if fields["flags"] & BATCH_INVARIANT else cluster)  # as etap.h says


@settings(max_examples=300, deadline=None, print_blob=True)
@given(gpu=st.sampled_from(GPUS), fields=problems, more=st.integers(1, 70000))
def test_batch_does_not_choose_the_tile(sm90_host: Any, gpu: Gpu, fields: dict[str, Any], more: int) -> None:
    """Batch-invariant mode needs the same kernel, tile, cluster and number of chunks for every batch."""
    fields = {**fields, "flags": BATCH_INVARIANT}
    larger = {**fields, "batch": min(65536, fields["batch"] + more)}
    refusal, decision = dispatch(sm90_host, gpu, fields)
    other_refusal, other = dispatch(sm90_host, gpu, larger)
    if refusal is None and other_refusal is None:
        assert decision.cluster_size == other.cluster_size == 1
        assert (decision.kernel, decision.tile_rows, decision.max_splits) == (other.kernel, other.tile_rows, other.max_splits)


@pytest.mark.parametrize(
    ("heads", "kv_format", "batch", "cluster"),
    [
        *((16, 0, batch, cluster) for batch, cluster in [(1, 8), (4, 8), (8, 6), (16, 6), (24, 4), (32, 2), (64, 2)]),
        (16, 0, 10, 5),  # not measured: as eight, two clusters for each sequence
        (16, 0, 36, 3),
        *((32, 0, batch, cluster) for batch, cluster in [(1, 1), (2, 1), (4, 1), (8, 1), (12, 8), (16, 6), (64, 2)]),
        (64, 0, 64, 2),
        (64, 0, 36, 3),
        *((64, 0, batch, 1) for batch in (4, 16, 32, 40, 128)),  # merged by a kernel of its own
        (96, 0, 4, 1),
        (128, 0, 16, 1),
        # FP8 wants all SMs
        *((16, 2, batch, cluster) for batch, cluster in [(4, 8), (8, 1), (12, 8), (16, 1), (24, 1), (28, 4), (32, 2)]),
        *((16, 2, batch, cluster) for batch, cluster in [(40, 1), (48, 1), (56, 2), (64, 2), (128, 1)]),
        (32, 2, 16, 1),
        (16, 3, 32, 2),
    ],
)
def test_measured_clusters(sm90_host: Any, heads: int, kv_format: int, batch: int, cluster: int) -> None:
    """On 132 SMs: what docs/tuning-log.md found fastest with every cluster size forced (on short contexts, where lengths decide) is what
    the dispatch takes."""
    fields = {"num_heads": heads, "dims": (512, 64), "page_size": 64, "q_dtype": 0, "kv_format": kv_format, "out_dtype": 0, "batch": batch}
    refusal, decision = dispatch(sm90_host, H200, {**fields, "max_query_len": 1, "flags": CAUSAL, "num_sms": 0})
    assert refusal is None
    assert decision.cluster_size == cluster, decision.reason.decode()


@pytest.mark.parametrize(("num_sms", "cluster"), [(44, 1), (66, 1), (100, 6)])
@pytest.mark.parametrize("heads", [16, 32, 64])
def test_part_of_a_card(sm90_host: Any, heads: int, num_sms: int, cluster: int) -> None:
    """Clusters on half of a card or less stand close together: 66 SMs, 16 x 16K, 16 heads 111.5 us on fours, 89.2 on single CTAs."""
    refusal, decision = dispatch(sm90_host, H200, {**problem_of(heads, 1, (512, 64)), "num_sms": num_sms})
    assert refusal is None
    assert decision.cluster_size == cluster, decision.reason.decode()


@pytest.mark.parametrize(
    ("gpu", "kv_format", "rows", "kernel"),
    [
        *((gpu, "bf16", rows, f"token_split_n{rows}") for gpu in (H20, H200) for rows in (8, 16, 24, 32)),
        *((H200, "bf16", rows, "rows_on_m_n64") for rows in (33, 40, 48, 64, 100, 128)),
        *((H20, "bf16", rows, f"dv_split_n{rows}") for rows in (40, 48)),
        (H20, "bf16", 64, "rows_on_m_n64"),
        (H20, "bf16", 96, "dv_split_n48"),
        *((gpu, "e4m3", rows, f"e4m3_split_n{rows}") for gpu in (H20, H200) for rows in (8, 16, 24)),
        *((gpu, "e4m3", 25, "e4m3_dv_split_n32") for gpu in (H20, H200)),
        *((H200, "e4m3", rows, "e4m3_dv_split_n48") for rows in (33, 48, 72, 96, 144)),
        *((H200, "e4m3", rows, "rows_on_m_n64") for rows in (49, 64, 100, 128)),
        (H20, "e4m3", 128, "e4m3_dv_split_n32"),
        *((H200, "e4m3_528", rows, "e4m3_dv_split_n32") for rows in (1, 16, 32)),
        (H200, "e4m3_528", 64, "rows_on_m_n64"),
    ],
)
def test_orientation(sm90_host: Any, gpu: Gpu, kv_format: str, rows: int, kernel: str) -> None:
    """KV on M where exact N saves more than it costs: everywhere with few rows, to 48 and more where the tensor cores are slow. The
    reason says what decided it."""
    refusal, decision = dispatch(sm90_host, gpu, problem_of(rows, 1, (512, 0 if kv_format == "e4m3_528" else 64), kv_format))
    assert refusal is None
    assert decision.kernel.decode() == f"sm90_bf16_{kernel}"
    assert (b"rows on M, because" in decision.reason) == ("rows_on_m" in kernel), decision.reason


@pytest.mark.parametrize(("limits", "name"), [(H20, "h20"), (H100, "h100-sxm"), (H200, "h200")])
@pytest.mark.parametrize("dims", [(512, 64), (512, 0), (256, 64)])
@pytest.mark.parametrize("kv_format", ["bf16", "e4m3"])
def test_the_model_knows_the_orientation(sm90_host: Any, limits: Gpu, name: str, dims: tuple[int, int], kv_format: str) -> None:
    """Guards: a model that predicts KV on M where the library has query rows there, or the other way round, or other tiles."""
    gpu = load_gpu(name)
    kernel = OURS_FP8 if kv_format == "e4m3" else OURS
    for heads in range(1, 129):
        for query_len in (1, 2, 3):
            refusal, decision = dispatch(sm90_host, limits, problem_of(heads, query_len, dims, kv_format))
            assert refusal is None
            shape = Shape.equal(16, 4096, heads, query_len, d_latent=dims[0], d_rope=dims[1], kv_format=kv_format)
            assert rows_on_m(shape, gpu) == (b"rows_on_m" in decision.kernel), (heads, query_len, decision.kernel)
            assert tile_of(kernel, shape, gpu) == (decision.tile_rows, decision.num_tiles), (heads, query_len, decision.kernel)


KV_FORMATS = {"bf16": 0, "e4m3": 2, "e4m3_528": 5}


def problem_of(heads: int, query_len: int, dims: tuple[int, int], kv_format: str = "bf16") -> dict[str, Any]:
    return {
        **dict.fromkeys(("q_dtype", "out_dtype", "flags", "num_sms"), 0),
        "kv_format": KV_FORMATS[kv_format],
        "num_heads": heads,
        "dims": dims,
        "page_size": 64,
        "batch": 16,
        "max_query_len": query_len,
    }
