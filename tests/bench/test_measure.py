"""The tensors of a shape, and what measuring makes of right and wrong results."""

from __future__ import annotations

import random

import pytest
import torch
from etap_bench.contenders import HostCopy
from etap_bench.inputs import Arena, Inputs, arena_tokens
from etap_bench.measure import Rounds, measure
from etap_bench.shape import Shape
from etap_bench.timing import CpuTimer


def random_shape(rng: random.Random) -> Shape:
    kv_format = rng.choice(["bf16", "fp16", "e4m3", "e4m3_group", "e4m3_656", "e4m3_528"])
    batch = rng.randint(2, 5)
    if rng.random() < 0.3:
        lengths = tuple(rng.randint(0, 300) for _ in range(batch - 1))
        rope = 0 if kv_format == "e4m3_528" else 64
        return Shape((*lengths, 300), rng.choice([4, 16]), kv_format=kv_format, d_rope=rope, context=rng.choice([300, 512]), sparse=True)
    shared = (("a", 128), ("b", 64))
    return Shape(
        lengths=tuple(rng.randint(200, 500) for _ in range(batch)),
        query_lens=tuple(rng.randint(1, 3) for _ in range(batch)),
        heads=rng.choice([4, 16]),
        kv_format=kv_format,
        d_rope=0 if kv_format == "e4m3_528" else 64,
        page_size=rng.choice([1, 16, 64]),
        shared=tuple(shared[: rng.randint(0, 2)] for _ in range(batch)),
    )


def test_block_tables(seed: int) -> None:
    """Shared blocks are the same pages, everything else is distinct, within a pool and between pools."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = random_shape(rng)
    inputs = Inputs(shape, Arena(shape.kv_format, 512, shape.d_rope, arena_tokens(shape, 3), "cpu"), pools=3)
    pages = [table[table >= 0] for table in inputs.block_tables]
    every = torch.cat([page.unique() for page in pages])
    assert len(every.unique()) == len(every)
    holders = [i for i, blocks in enumerate(shape.shared) if blocks]
    if len(holders) > 1:
        first, second = (inputs.block_tables[0, i, : 128 // shape.page_size] for i in holders[:2])
        assert torch.equal(first, second)
    assert len(pages[0].unique()) * shape.adjacent >= shape.distinct_kv_bytes // shape.token_bytes
    assert shape.distinct_kv_bytes <= shape.kv_bytes


def test_measure_finds_right_results_right(seed: int) -> None:
    """ETAP and PyTorch on random shapes, ragged queries and shared pages among them, agree with the float64 reference."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(4):
        shape = random_shape(rng)
        inputs = Inputs(shape, Arena(shape.kv_format, 512, shape.d_rope, arena_tokens(shape, 2), "cpu"), pools=2)
        result = measure(inputs, CpuTimer(), ceiling=HostCopy(), peer_names=["pytorch", "flashmla"], rounds=Rounds(2))
        assert result.wrong == [], (shape, result.worst_row_error)
        assert {"etap", "ceiling"} <= result.us.keys()
        assert all(us > 0 for us in result.us.values())
        assert ("pytorch" in result.us) == (shape.kv_format in ("bf16", "fp16"))
        assert result.skipped["flashmla"] == "takes CUDA tensors only"
        assert result.plan_us is not None
        assert result.sustained == {}


@pytest.mark.parametrize(
    "shape", [Shape(lengths=(1, 2), query_lens=(2, 2), heads=4), Shape(lengths=(0, 70), heads=4)], ids=["causal", "empty"]
)
def test_rows_that_see_no_token(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference was NaN there, and ETAP's zeros were called wrong. ETAP has to give 0, a peer may give anything."""
    from etap_bench import contenders, peers

    inputs = Inputs(shape, Arena("bf16", 512, 64, arena_tokens(shape, 1), "cpu"), pools=1)
    real = contenders.Etap.call

    def nan_in_row_0(pool: int) -> torch.Tensor:
        out = real(contenders.Etap(inputs), pool).clone()
        out[0] = torch.nan
        return out

    monkeypatch.setattr(peers, "prepare", lambda *_: nan_in_row_0)
    result = measure(inputs, CpuTimer(), ceiling=None, peer_names=["fa3"], rounds=Rounds(1))
    assert result.wrong == [] and {"etap", "fa3"} <= result.us.keys()
    assert max(result.error.values()) < 1e-2
    monkeypatch.setattr(contenders.Etap, "call", lambda _, pool: nan_in_row_0(pool))
    assert measure(inputs, CpuTimer(), ceiling=None, peer_names=[], rounds=Rounds(1)).wrong == ["etap"]


def test_measure_finds_wrong_results_wrong(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads one page too few, and one that gives NaN: both must be noticed."""
    from etap_bench import peers

    torch.manual_seed(seed)
    shape = Shape(lengths=(300, 200), query_lens=(1, 1), heads=4)
    inputs = Inputs(shape, Arena("bf16", 512, 64, arena_tokens(shape, 1), "cpu"), pools=1)
    short = Inputs(Shape(lengths=(236, 200), query_lens=(1, 1), heads=4), inputs.arena, pools=1)
    short.q, short.block_tables = inputs.q, inputs.block_tables

    def wrong(name: str, given: Inputs) -> object:
        if name == "fa3":
            return lambda pool: torch.full((2, 4, 512), torch.nan, dtype=torch.bfloat16)
        return real("pytorch", short if name == "flashmla" else given)

    real = peers.prepare
    monkeypatch.setattr(peers, "prepare", wrong)
    result = measure(inputs, CpuTimer(), ceiling=None, peer_names=["flashmla", "fa3", "pytorch"], rounds=Rounds(1))
    assert sorted(result.wrong) == ["fa3", "flashmla"]
