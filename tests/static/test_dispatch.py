"""The CUDA device's choice of kernel, tile and teams, on the host, for any problem and any SM90 GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CAUSAL, BATCH_INVARIANT = 1, 4


class Problem(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("device_type", "device_index", "num_heads", "d_latent", "d_rope", "page_size", "q_dtype", "kv_format", "out_dtype"),
                *("batch", "max_query_len", "total_q", "flags", "num_sms", "force_tile", "force_cluster", "reserved"),
            )
        ),
    ]


class Decision(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("tile_rows", "num_tiles", "cluster_size", "num_workers", "max_splits")),
        ("kernel", ctypes.c_char * 64),
        ("reason", ctypes.c_char * 256),
    ]


class DeviceLimits(ctypes.Structure):
    _fields_ = [("num_sms", ctypes.c_int)]


# SMs of an H100 or H200, of an H20, of a small slice.
GPUS = [132, 78, 16]

# All that may be refused, and for what. A refusal that is not here is a fault.
def allowed_refusal(fields: dict[str, Any], refusal: str) -> bool:
    scaled = fields["kv_format"] in (3, 4)
    if "kv_format has group scales" in refusal:
        return scaled and (fields["q_dtype"] != 0 or fields["dims"] != (512, 64))
    if "force_tile" in refusal:
        return fields.get("force_tile", 0) > (32 if fields["kv_format"] >= 2 else 64)
    if "batch times row tiles" in refusal:
        return fields["batch"] * fields["max_query_len"] * fields["num_heads"] > 2**29
    return False


problems = st.builds(
    dict,
    num_heads=st.integers(1, 128),
    dims=st.sampled_from([(512, 64), (512, 0), (256, 64)]),
    page_size=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256]),
    q_dtype=st.integers(0, 1),
    kv_format=st.integers(0, 4),
    out_dtype=st.integers(0, 2),
    batch=st.one_of(st.integers(1, 64), st.integers(1, 65536)),
    max_query_len=st.integers(1, 9),
    flags=st.sampled_from([0, CAUSAL, BATCH_INVARIANT, CAUSAL | BATCH_INVARIANT]),
    num_sms=st.one_of(st.just(0), st.integers(1, 200)),
)


def dispatch(lib: Any, sms: int, fields: dict[str, Any]) -> tuple[str | None, Decision, int]:
    """(why it is refused, or None; the decision; CTAs of a team). As the API does, an absent SM budget is all SMs and q_dtype fits the
    16-bit formats."""
    fields = dict(fields)
    d_latent, d_rope = fields.pop("dims")
    if fields["kv_format"] < 2:
        fields["kv_format"] = fields["q_dtype"]
    fields["num_sms"] = min(fields["num_sms"] or sms, sms)
    problem = Problem(size=ctypes.sizeof(Problem), device_type=1, d_latent=d_latent, d_rope=d_rope, **fields)
    if not fields.get("total_q"):
        problem.total_q = problem.batch * problem.max_query_len
    decision = Decision(size=ctypes.sizeof(Decision))
    team = ctypes.c_int()
    lib.shim_dispatch.argtypes = [ctypes.POINTER(Problem), ctypes.POINTER(DeviceLimits), ctypes.POINTER(Decision), ctypes.POINTER(ctypes.c_int)]
    lib.shim_dispatch.restype = ctypes.c_char_p
    refusal = lib.shim_dispatch(problem, DeviceLimits(sms), decision, team)
    return refusal and refusal.decode(), decision, team.value


@settings(max_examples=1000, deadline=None, print_blob=True)
@given(sms=st.sampled_from(GPUS), fields=problems)
def test_decision_fits_problem_and_gpu(sm90_host: Any, sms: int, fields: dict[str, Any]) -> None:
    """Exact N: no tile wastes a whole step of 8 rows. CTAs stay within the SM budget, in whole teams that no sequence leaves idle. The
    reason is a sentence that fits its field."""
    refusal, decision, team = dispatch(sm90_host, sms, fields)
    if refusal is not None:
        assert allowed_refusal(fields, refusal), refusal
        return
    rows = fields["num_heads"] * fields["max_query_len"]
    fewest = -(-rows // (32 if fields["kv_format"] >= 2 else 64))
    assert decision.num_tiles == fewest
    assert decision.tile_rows * decision.num_tiles - rows < 8 * decision.num_tiles
    assert decision.num_tiles == -(-rows // decision.tile_rows)
    assert decision.cluster_size == 1
    budget = min(fields["num_sms"] or sms, sms)
    assert 1 <= team <= min(8, decision.num_tiles, budget)
    assert decision.num_workers == budget // team * team
    assert decision.kernel.startswith(b"sm90_")
    assert 40 < len(decision.reason) < 255, decision.reason


@settings(max_examples=300, deadline=None, print_blob=True)
@given(sms=st.sampled_from(GPUS), fields=problems, tile=st.sampled_from(range(8, 72, 8)))
def test_experiments_are_honoured_or_refused(sm90_host: Any, sms: int, fields: dict[str, Any], tile: int) -> None:
    """A tuning run that is silently given another kernel measures the wrong thing."""
    fields = {**fields, "force_tile": tile}
    refusal, decision, _ = dispatch(sm90_host, sms, fields)
    if refusal is not None:
        assert allowed_refusal(fields, refusal), refusal
        return
    rows = fields["num_heads"] * fields["max_query_len"]
    assert (decision.tile_rows, decision.num_tiles) == (tile, -(-rows // tile))


@settings(max_examples=300, deadline=None, print_blob=True)
@given(sms=st.sampled_from(GPUS), fields=problems, more=st.integers(1, 70000))
def test_batch_does_not_choose_the_tile(sm90_host: Any, sms: int, fields: dict[str, Any], more: int) -> None:
    """Batch-invariant mode needs the same kernel and tile for every batch."""
    fields = {**fields, "flags": BATCH_INVARIANT}
    larger = {**fields, "batch": min(65536, fields["batch"] + more)}
    refusal, decision, _ = dispatch(sm90_host, sms, fields)
    other_refusal, other, _ = dispatch(sm90_host, sms, larger)
    if refusal is None and other_refusal is None:
        assert (decision.kernel, decision.tile_rows) == (other.kernel, other.tile_rows)


@pytest.mark.parametrize(
    ("rows", "sms", "team"),
    [(16, 132, 1), (64, 132, 1), (128, 132, 2), (192, 132, 3), (256, 132, 4), (128, 78, 2), (128, 1, 1)],
)
def test_tiles_of_a_sequence_are_walked_side_by_side(sm90_host: Any, rows: int, sms: int, team: int) -> None:
    """Tiles that read KV at other times read it from memory again."""
    fields = {"num_heads": min(rows, 128), "dims": (512, 64), "page_size": 64, "q_dtype": 0, "kv_format": 0, "out_dtype": 0, "batch": 16}
    refusal, _, found = dispatch(sm90_host, sms, {**fields, "max_query_len": -(-rows // 128), "flags": CAUSAL, "num_sms": 0})
    assert refusal is None
    assert found == (team if rows <= 128 else -(-(-(-rows // 128) * 128) // 64))


def test_ragged_batches_of_mostly_single_tokens_have_no_teams(sm90_host: Any) -> None:
    """A team whose tiles mostly don't exist would leave most SMs idle."""
    fields = {"num_heads": 128, "dims": (512, 64), "page_size": 64, "q_dtype": 0, "kv_format": 0, "out_dtype": 0, "batch": 64}
    fields |= {"max_query_len": 4, "flags": CAUSAL | 2, "num_sms": 0}
    assert dispatch(sm90_host, 132, {**fields, "total_q": 256})[2] == 8
    assert dispatch(sm90_host, 132, {**fields, "total_q": 70})[2] == 1
