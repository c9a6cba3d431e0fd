"""Bad calls on the CUDA device: a status and a sentence that names the argument, no launch, outputs untouched, and the next good
call is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import Case, Inputs, check, make_inputs, reference
from harness import Guarded, Session, poisoned_workspace, problem_of
from torch import Tensor

import etap_py as etap

CASE = Case("bad_calls", lens=(300, 5, 64))
Change = Callable[[Inputs], Inputs]


def misaligned(tensor: Tensor) -> Tensor:
    """The same values one element further: 2 bytes off."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    view = storage[1:].view(tensor.shape)
    view.copy_(tensor)
    return view


def with_stride(tensor: Tensor, dim: int, stride: int) -> Tensor:
    """A view of other storage with that stride; its contents don't matter."""
    strides = list(tensor.stride())
    strides[dim] = stride
    storage = torch.zeros(
        sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) + 1, dtype=tensor.dtype, device=tensor.device
    )
    return storage.as_strided(tensor.shape, strides)


BAD_RUNS: dict[str, tuple[Change, str]] = {
    "q_nope misaligned": (lambda i: replace(i, q_nope=misaligned(i.q_nope)), "q_nope"),
    "q_rope misaligned": (lambda i: replace(i, q_rope=misaligned(i.q_rope)), "q_rope"),
    "q_rope missing": (lambda i: replace(i, q_rope=None), "q_rope"),
    "q of another type": (lambda i: replace(i, q_nope=i.q_nope.half()), "q_nope"),
    "q on the CPU": (lambda i: replace(i, q_nope=i.q_nope.cpu()), "q_nope"),
    "kv misaligned": (lambda i: replace(i, kv_cache=misaligned(i.kv_cache)), "kv_cache"),
    "kv of another type": (lambda i: replace(i, kv_cache=i.kv_cache.half()), "kv_cache"),
    "kv on the CPU": (lambda i: replace(i, kv_cache=i.kv_cache.cpu()), "kv_cache"),
    "kv row stride": (lambda i: replace(i, kv_cache=with_stride(i.kv_cache, 1, 577)), "kv_row_stride"),
    "kv page stride": (lambda i: replace(i, kv_cache=with_stride(i.kv_cache, 0, 64 * 576 + 4)), "kv_page_stride"),
    "kv row stride too small": (lambda i: replace(i, kv_cache=with_stride(i.kv_cache, 1, 512)), "kv_row_stride"),
    "table on the CPU": (lambda i: replace(i, block_table=i.block_table.cpu()), "block_table"),
    "table of 64-bit numbers": (lambda i: replace(i, block_table=i.block_table.long()), "block_table"),
    "table of another batch": (lambda i: replace(i, block_table=i.block_table[:2]), "block_table"),
    "scale not finite": (lambda i: replace(i, softmax_scale=float("nan")), "softmax_scale"),
    "kv_scale with a 16-bit cache": (lambda i: replace(i, kv_scale=0.5), "kv_scale"),
    "group scales with a 16-bit cache": (
        lambda i: replace(i, kv_group_scales=torch.ones(len(i.kv_cache), 64, 4, device=i.device)),
        "kv_group_scales",
    ),
}


@pytest.fixture
def inputs(seed: int, supported: Callable[[Case], None]) -> Inputs:
    supported(CASE)
    return make_inputs(CASE, seed, "cuda")


def refused(call: Callable[[], object], names: str) -> None:
    with pytest.raises((etap.EtapError, ValueError, TypeError)) as caught:
        call()
    assert names in str(caught.value), f"{caught.value!r} does not name {names}"


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_run(name: str, inputs: Inputs) -> None:
    change, argument = BAD_RUNS[name]
    session = Session(inputs)
    session.update()
    out, lse = inputs.outputs()
    guards = Guarded(out), Guarded(lse), Guarded(session.workspace)
    session.inputs = change(inputs)
    refused(lambda: session.run(out, lse), argument)
    torch.cuda.synchronize()
    assert all(guard.untouched() for guard in guards)
    session.inputs = inputs
    session.run(out, lse)
    check(inputs, out, lse, reference(inputs))


def test_bad_outputs(inputs: Inputs) -> None:
    session = Session(inputs)
    session.update()
    out, lse = inputs.outputs()
    refused(lambda: session.run(out[:2], lse), "out")
    refused(lambda: session.run(out.float(), lse), "out")
    refused(lambda: session.run(with_stride(out, 1, 8), lse), "out_head_stride")
    refused(lambda: session.run(out, lse.double()), "lse")
    refused(lambda: session.run(out.cpu(), lse), "out")


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("cache_seqlens", lambda lens: lens.long()),
        ("cache_seqlens", lambda lens: lens[:2]),
        ("cache_seqlens", lambda lens: lens.cpu()),
    ],
    ids=["64-bit", "another batch", "on the CPU"],
)
def test_bad_update(argument: str, make: Callable[[Tensor], Tensor], inputs: Inputs) -> None:
    session = Session(inputs)
    workspace = Guarded(session.workspace)
    session.inputs = replace(inputs, cache_seqlens=make(inputs.cache_seqlens))
    refused(session.update, argument)
    torch.cuda.synchronize()
    assert workspace.untouched()


def test_query_counts_without_a_ragged_problem(inputs: Inputs) -> None:
    session = Session(inputs)
    counts = torch.arange(4, dtype=torch.int32, device="cuda")
    refused(lambda: session.plan.update(inputs.cache_seqlens, cu_seqlens_q=counts), "cu_seqlens_q")


@pytest.mark.parametrize("kind", ["too small", "misaligned", "on the CPU"])
def test_bad_workspace(kind: str, inputs: Inputs) -> None:
    problem = problem_of(CASE, "cuda")
    good = poisoned_workspace(problem)
    bad = {"too small": good[:-1], "misaligned": torch.cat([good, good])[16:], "on the CPU": good.cpu()}[kind]

    def use() -> None:
        plan = etap.Plan(problem, workspace=bad)
        plan.update(inputs.cache_seqlens)

    before = bad.clone()
    refused(use, "workspace")
    torch.cuda.synchronize()
    assert torch.equal(bad, before)


BAD_PROBLEMS = {
    "num_heads": [0, 129, -1],
    "batch": [0, -1, 65537],
    "page_size": [0, 3, 512, -64],
    "d_latent": [0, 128, 576],
    "max_query_len": [0, -1],
    "num_sms": [-1],
    "force_tile": [-8, 7],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD_PROBLEMS.items() for value in values])
def test_bad_problem(field: str, value: int) -> None:
    fields = {"num_heads": 16, "batch": 2, "device": "cuda", field: value}
    refused(lambda: etap.query(etap.Problem(**fields)), field)
    refused(lambda: etap.Plan(etap.Problem(**fields)), field)


def test_no_such_gpu() -> None:
    refused(lambda: etap.query(etap.Problem(num_heads=16, batch=2, device="cuda:63")), "device_index")


def test_tensors_on_another_device_than_the_plan(inputs: Inputs) -> None:
    """A plan for the CPU must not be given CUDA pointers: it would read them."""
    plan = etap.Plan(problem_of(CASE, device="cpu"))
    refused(lambda: plan.update(inputs.cache_seqlens), "cache_seqlens")


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_another_current_device(inputs: Inputs) -> None:
    """The plan's device counts, not the thread's current one, which must come back unchanged."""
    expected = reference(inputs)
    session = Session(inputs)
    out, lse = inputs.outputs()
    stream = torch.cuda.current_stream("cuda:0")
    with torch.cuda.device(1):
        session.plan.update(inputs.cache_seqlens, stream=stream)
        session.run(out, lse)
        assert torch.cuda.current_device() == 1
    torch.cuda.synchronize(0)
    check(inputs, out, lse, expected)
