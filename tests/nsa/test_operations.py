"""Claims about window and compression as operations: their routes equal the oracle on ranges written from the
definition, and they are dispatched, forced, refused and reported like selection."""

import msgspec
import pytest
import torch

from nsa.compression import compressed_attention
from nsa.defaults import DEFAULT_PATHS, default_candidate
from nsa.device import device_identity, software_identity
from nsa.dispatch import selection_attention, use_dispatch_table
from nsa.dispatch_entry import DispatchEntry
from nsa.dispatch_table import DispatchTable
from nsa.errors import ArgumentError, StrictDispatchError, UnsupportedPathError, UnsupportedSelection
from nsa.paths import PATHS, reference
from nsa.planning import CHAINS
from nsa.problem import SelectionProblem
from nsa.selection import Selection, StructuredSelection
from nsa.trace import record_paths
from nsa.window import window_attention
from tests.nsa.cases import keys_of

CPU = torch.device("cpu")
WINDOW, KERNEL, STRIDE = 9, 8, 4
ROUTES = {
    "window": ("sdpa_window", "dense"),
    "compression": ("sdpa_compressed", "dense"),
}
CALLS = [(1, 8), (1, 40), (8, 8), (9, 9), (31, 31), (37, 37), (5, 40), (6, 12), (4, 11)]
"""(queries, context): decode, whole contexts, later chunks, at the edges of a window, a block and a stride."""


@pytest.fixture(autouse=True)
def defaults_only():
    with use_dispatch_table(DispatchTable(device=device_identity("cpu"), software=software_identity())):
        yield


def keys_in(operation, context):
    return context if operation == "window" else sum(1 for i in range(context) if i * STRIDE + KERNEL <= context)


def given(operation, queries, context, groups=2):
    """The selection under test."""
    rows = (2, queries, groups)
    if operation == "window":
        return Selection.window(WINDOW, rows=rows, context_length=context, device=CPU)
    return Selection.compressed(KERNEL, STRIDE, rows=rows, first_position=context - queries, device=CPU)


def defined(operation, queries, context, groups=2):
    """What it means: (b, s, g) -> the keys of the row, one query and key at a time."""
    found = {}
    for s in range(queries):
        t = context - queries + s
        if operation == "window":
            keys = {j for j in range(context) if t - WINDOW < j <= t}
        else:
            keys = {i for i in range(context) if i * STRIDE + KERNEL <= t + 1}
        found |= {(b, s, g): keys for b in range(2) for g in range(groups)}
    return found


def plain(operation, queries, context, groups=2):
    """The same as a selection from ranges, whose positions cut nothing."""
    rows = defined(operation, queries, context, groups)
    ranges = [[[[[min(k), max(k) + 1] if (k := rows[b, s, g]) else [0, 0]] for g in range(groups)]
               for s in range(queries)] for b in range(2)]  # fmt: skip
    keys = max(1, keys_in(operation, context))
    last = torch.full((queries,), keys - 1)
    return Selection.from_ranges(torch.tensor(ranges), context_length=keys, query_positions=last)


def tensors_of(operation, queries, context, dims=(8, 8), dtype=torch.float32):
    """Query, key, value; key and value strided views with NaN behind them."""
    random, keys = torch.Generator().manual_seed(queries * 100 + context), keys_in(operation, context)
    query = torch.randn(2, queries, 2, 3, dims[0], generator=random, dtype=torch.float64)
    key = torch.randn(2, keys + 2, 2, dims[0], generator=random, dtype=torch.float64).transpose(1, 2)
    value = torch.randn(2, 2, keys + 2, dims[1], generator=random, dtype=torch.float64)
    for tensor in (key, value):
        tensor[:, :, keys:] = float("nan")
    return [tensor.to(dtype) for tensor in (query, key[:, :, :keys], value[:, :, :keys])]


def called(operation, tensors, context, **options):
    """The branch's public function."""
    if operation == "window":
        return window_attention(*tensors, window=WINDOW, **options)
    first = context - tensors[0].shape[1]
    return compressed_attention(*tensors, first_position=first, kernel_size=KERNEL, kernel_stride=STRIDE, **options)


def problem(operation, **changes):
    sizes = {"window": WINDOW} if operation == "window" else {"kernel_size": KERNEL, "kernel_stride": STRIDE}
    fields = {
        "mode": "prefill", "dtype": "float32", "B": 2, "S": 37, "T": 37, "G": 2, "h": 3, "Dk": 8, "Dv": 8,
        "block_size": 0, "topk": 1, "form": "ranges", "operation": operation, **sizes,
    }  # fmt: skip
    return SelectionProblem(**{**fields, **changes})


def entry(operation, path, parameters, **changes):
    fields = msgspec.structs.asdict(problem(operation, **changes))
    return DispatchEntry(
        **fields, path=path, parameters=parameters, median_us=1.0, peak_bytes=1, oracle_error=0.0, oracle_bound=1.0,
        kernels=(), run_id="run", date="2026-11-22",
    )  # fmt: skip


def table(*entries):
    return DispatchTable(device=device_identity("cpu"), software=software_identity(), entries=entries)


# The selections


@pytest.mark.parametrize("operation", ROUTES)
@pytest.mark.parametrize(("queries", "context"), CALLS)
def test_derived_ranges_are_those_of_the_definition(operation, queries, context):
    selection, rows = given(operation, queries, context), defined(operation, queries, context)
    keys = keys_in(operation, context)
    assert keys_of(selection, keys) == rows
    assert selection.lengths.flatten().tolist() == [len(rows[place]) for place in sorted(rows)]
    again = {
        tuple(place): set(range(*selection.ranges[tuple(place)][0].tolist()))
        for place in torch.cartesian_prod(torch.arange(2), torch.arange(queries), torch.arange(2)).tolist()
    }
    assert again == rows
    assert selection.rows == (2, queries, 2)
    assert selection.context_length == keys


def test_a_window_or_compression_that_cannot_be_is_refused():
    with pytest.raises(ArgumentError, match="window is 0"):
        Selection.window(0, rows=(1, 1, 1), context_length=4, device=CPU)
    with pytest.raises(ArgumentError, match="5 queries cannot be the last of a context of 4"):
        Selection.window(3, rows=(1, 5, 1), context_length=4, device=CPU)
    with pytest.raises(ArgumentError, match="kernel_size 6 is no positive multiple of kernel_stride 4"):
        Selection.compressed(6, 4, rows=(1, 9, 1), first_position=0, device=CPU)
    with pytest.raises(ArgumentError, match=r"no compressed token exists for positions 0 \.\. 6"):
        Selection.compressed(8, 4, rows=(1, 7, 1), first_position=0, device=CPU)
    blocks = Selection.from_blocks(torch.zeros(1, 1, 1, 1, dtype=torch.int32), block_size=4, context_length=4)
    for operation in ("window", "compression"):
        with pytest.raises(UnsupportedSelection, match=f"no selection of {operation}"):
            blocks.structured(operation)
    with pytest.raises(UnsupportedSelection, match="has no blocks"):
        _ = given("window", 3, 9).blocks


# The routes


@pytest.mark.parametrize(("operation", "path"), [(name, path) for name, paths in ROUTES.items() for path in paths])
@pytest.mark.parametrize(("queries", "context"), CALLS)
@pytest.mark.parametrize("dims", [(8, 8), (8, 6), (6, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_route_equals_the_oracle_on_every_rung(operation, path, queries, context, dims, dtype):
    tensors, spelt = tensors_of(operation, queries, context, dims, dtype), plain(operation, queries, context)
    scale = dims[0] ** -0.5
    truth = reference.run(*tensors, spelt, scale=scale)
    eager = reference.run(*tensors, spelt, scale=scale, compute_dtype=str(dtype).removeprefix("torch."))
    limit = max(
        2 * float((eager.double() - truth).abs().max()), 4 * torch.finfo(dtype).eps * float(tensors[2].abs().max())
    )
    posed = problem(operation, mode="decode" if queries == 1 else "prefill", S=queries, T=context, dtype="float32")
    for item in PATHS[path].tunables(posed, CPU):
        for rung in (*item.ladder, 1, 3):
            out = called(operation, tensors, context, path=path, parameters={item.name: rung})
            assert out.dtype == dtype
            assert float((out.double() - truth).abs().max()) <= limit, (item.name, rung)


@pytest.mark.parametrize(("operation", "path"), [(name, path) for name, paths in ROUTES.items() for path in paths])
@pytest.mark.parametrize(("queries", "context"), [(1, 40), (37, 37), (6, 12)])
def test_gradients_of_every_route_equal_the_oracles(operation, path, queries, context):
    leaves = [t.requires_grad_() for t in tensors_of(operation, queries, context, (8, 6), torch.float64)]
    pull = torch.randn(2, queries, 2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((called(operation, leaves, context, path=path) * pull).sum(), leaves)
    spelt = plain(operation, queries, context)
    truth = torch.autograd.grad((reference.run(*leaves, spelt, scale=8**-0.5) * pull).sum(), leaves)
    # sums of at most 64 terms in two orders, each within 32 eps of the largest gradient there is
    limit = 64 * torch.finfo(torch.float64).eps * max(float(want.abs().max()) for want in truth)
    for found, want in zip(mine, truth, strict=True):
        assert float((found - want).abs().max()) <= limit


@pytest.mark.parametrize("operation", ROUTES)
def test_what_one_row_reads_reaches_no_other_row(operation):
    query, key, value = tensors_of(operation, 37, 37)
    before = called(operation, (query, key, value), 37)
    for position, rows in ((5, defined(operation, 37, 37)),):
        value = value.clone()
        value[:, :, position] += 1.0
        changed = (called(operation, (query, key, value), 37) != before).flatten(2).any(2)[0]
        assert changed.tolist() == [position in rows[0, s, 0] for s in range(37)]


# Dispatch


@pytest.mark.parametrize("operation", ROUTES)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_last_default_of_every_mode_runs_everything_and_ends_the_chain(operation, kind):
    for mode in ("decode", "prefill", "train"):
        path = DEFAULT_PATHS[operation][kind, mode][-1]
        assert CHAINS[operation][-1] == path
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            posed = problem(operation, mode=mode, S=1 if mode == "decode" else 37, dtype=dtype, Dv=6)
            assert PATHS[path].unsupported_reason(posed, torch.device(kind), {}) is None
            assert default_candidate(posed, kind).path == path


@pytest.mark.parametrize("operation", ROUTES)
def test_the_tables_choice_is_taken_with_its_status(operation):
    rung = {"sdpa_window": {"query_chunk": 3}, "sdpa_compressed": {"stride_chunk": 2}}
    path = ROUTES[operation][0]
    tensors = tensors_of(operation, 37, 37)
    with record_paths() as seen:
        called(operation, tensors, 37, table=table(entry(operation, path, rung[path])), strict=True)
    (ran,) = seen.executed
    assert (ran.operation, ran.path, ran.parameters, ran.status) == (operation, path, rung[path], "exact")


@pytest.mark.parametrize("operation", ROUTES)
def test_an_entry_serves_its_own_sizes_only(operation):
    other = {"window": {"window": WINDOW + 1}, "compression": {"kernel_size": 2 * KERNEL}}[operation]
    path = ROUTES[operation][0]
    found = table(entry(operation, path, PATHS[path].defaults(problem(operation), CPU)))
    assert found.lookup(problem(operation)).status == "exact"
    assert found.lookup(problem(operation, **other)).status == "default"
    assert found.lookup(problem(operation, B=1)).status == "bucket"


@pytest.mark.parametrize("operation", ROUTES)
def test_strict_refuses_what_was_not_measured(operation):
    tensors = tensors_of(operation, 37, 37)
    with pytest.raises(StrictDispatchError, match=f"the choice {ROUTES[operation][0]} is 'default'"):
        called(operation, tensors, 37, strict=True)


@pytest.mark.parametrize("operation", ROUTES)
def test_a_path_of_another_operation_is_refused_by_name(operation):
    tensors = tensors_of(operation, 37, 37)
    for path in ("gather", "sdpa_window" if operation == "compression" else "sdpa_compressed"):
        with pytest.raises(UnsupportedPathError, match=f"^unsupported: {path} is no path of {operation}"):
            called(operation, tensors, 37, path=path)
    query, key, value = tensors_of("window", 3, 9)
    blocks = Selection.from_blocks(torch.zeros(2, 3, 2, 1, dtype=torch.int32), block_size=4, context_length=9)
    with pytest.raises(UnsupportedPathError, match="is no path of selection"):
        selection_attention(query, key, value, blocks, path=ROUTES[operation][0])


@pytest.mark.parametrize("operation", ROUTES)
def test_a_path_that_cannot_run_is_named_and_never_replaced(operation):
    flash = {"window": "flash_attn_window", "compression": "flash_attn_compressed"}[operation]
    with pytest.raises(UnsupportedPathError, match=r"^unsupported: flash_attn needs a CUDA device"):
        called(operation, tensors_of(operation, 37, 37), 37, path=flash)


@pytest.mark.parametrize("operation", ROUTES)
def test_neither_dispatch_nor_its_route_derives_the_ranges(operation, monkeypatch):
    def derived(self):
        raise AssertionError("ranges were derived")

    for name in ("indices", "query_positions"):
        monkeypatch.setattr(StructuredSelection, name, property(derived))
    for queries, context in ((1, 40), (37, 37), (5, 40)):
        called(operation, tensors_of(operation, queries, context), context)


def test_compressed_attention_without_a_token_is_zeros_and_says_so():
    query, value = torch.randn(1, 7, 1, 2, 8), torch.zeros(1, 1, 0, 6)
    with record_paths() as seen:
        out = compressed_attention(
            query, torch.zeros(1, 1, 0, 8), value, first_position=0, kernel_size=KERNEL, kernel_stride=STRIDE
        )
    assert out.shape == (1, 7, 1, 2, 6)
    assert not out.any()
    assert [(ran.operation, ran.path) for ran in seen.executed] == [("compression", "zeros")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": 0}, "do not go with 'window'"),
        ({"operation": "selection"}, "do not go with 'selection'"),
        ({"operation": "compression", "window": 0, "kernel_size": 8}, "do not go with 'compression'"),
        ({"topk": 2}, "'window' reads one range per row, got 2 ranges"),
        ({"form": "blocks", "block_size": 4}, "'window' reads one range per row, got 1 blocks"),
    ],
)
def test_sizes_of_another_operation_are_refused(changes, said):
    with pytest.raises(ArgumentError, match=said):
        msgspec.structs.replace(problem("window"), **changes)
