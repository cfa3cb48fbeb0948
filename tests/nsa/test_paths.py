"""Claims about every path: it equals the float64 oracle on any selection, forward and backward, within its bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa
from nsa.paths import PATHS, reference
from nsa.problem import SelectionProblem
from nsa.selection import Selection
from nsa.workspace import Workspace
from tests.nsa.cases import keys_of, selections, tensors

EAGER = ("dense", "gather", "packed", "varlen")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def bound(selection, query, key, value, scale, dtype):
    """Twice the error of the same formula in the working dtype, or 4*eps*max|v|; and the truth."""
    truth = reference.run(query, key, value, selection, scale=scale)
    eager = reference.run(query, key, value, selection, scale=scale, compute_dtype=str(dtype).removeprefix("torch."))
    floor = 4 * torch.finfo(dtype).eps * float(value.abs().max())
    return truth, max(2 * float((eager.double() - truth).abs().max()), floor)


def test_the_oracle_is_the_formula_on_hand_computed_numbers():
    query = torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 2)
    key = torch.tensor([[0.0, 9.0], [1.0, 9.0], [5.0, 9.0]]).view(1, 1, 3, 2)
    value = torch.tensor([[1.0], [3.0], [100.0]]).view(1, 1, 3, 1)
    selection = Selection.from_ranges(torch.tensor([[[[[0, 1], [0, 2]]]]]), context_length=3)
    e = torch.exp(torch.tensor(2.0, dtype=torch.float64))
    assert reference.run(query, key, value, selection, scale=2.0).item() == pytest.approx(
        (1 + 3 * e.item()) / (1 + e.item())
    )


@settings(max_examples=60)
@given(selections(), st.integers(1, 3), st.booleans())
def test_the_oracle_equals_a_plain_python_softmax_also_one_sequence_at_a_time(case, heads, one_at_a_time):
    selection, context = case
    query, key, value = tensors(selection, context, heads, 4, 3)
    with pytest.MonkeyPatch.context() as patch:
        if one_at_a_time:
            patch.setattr(reference, "KEY_ELEMENTS", 1)
        out = reference.run(query, key, value, selection, scale=0.5)
    for (b, s, g), keys in keys_of(selection, context).items():
        if not keys:
            assert out[b, s, g].abs().max() == 0
            continue
        chosen = sorted(keys)
        scores = query[b, s, g].double() @ key[b, g, chosen].double().T * 0.5
        assert torch.allclose(out[b, s, g], scores.softmax(-1) @ value[b, g, chosen].double(), atol=1e-12)


@pytest.mark.parametrize("name", ["gather", "packed", "varlen"])
def test_the_gradient_of_a_key_that_every_row_reads_is_not_summed_in_bfloat16(name):
    rows = 600
    selection = Selection.from_blocks(torch.zeros(1, rows, 1, 1, dtype=torch.int64), block_size=16, context_length=rows)
    query, key, value = (torch.zeros(1, rows, 1, 1, 8), torch.zeros(1, 1, rows, 8), torch.ones(1, 1, rows, 8))
    leaf = value.to(torch.bfloat16).requires_grad_()
    out = PATHS[name].function()(query.to(leaf.dtype), key.to(leaf.dtype), leaf, selection, scale=1.0)
    out.sum().backward()
    wanted = sum(1 / min(row + 1, 16) for row in range(rows))
    assert float(leaf.grad[0, 0, 0, 0]) == pytest.approx(wanted, rel=2**-7)


@pytest.mark.parametrize("name", EAGER)
@settings(max_examples=40, deadline=None)
@given(case=selections(), heads=st.sampled_from((1, 2, 4, 16)), dims=st.sampled_from(((8, 8), (8, 4), (4, 16))))
def test_path_equals_the_oracle_on_any_selection(name, case, heads, dims):
    selection, context = case
    query, key, value = tensors(selection, context, heads, *dims)
    truth, allowed = bound(selection, query, key, value, dims[0] ** -0.5, torch.float32)
    workspace = Workspace()
    for _ in range(2):
        out = nsa.selection_attention(query, key, value, selection, path=name, workspace=workspace)
        assert out.shape == truth.shape
        assert out.dtype == value.dtype
        assert (out - truth).abs().max() <= allowed
        workspace.poison()


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 2, 4, 16])
def test_path_equals_the_oracle_in_every_dtype_for_every_group_size(name, dtype, heads):
    selection = fixed_selection()
    query, key, value = tensors(selection, 45, heads, 16, 16, dtype)
    truth, allowed = bound(selection, query, key, value, 0.25, dtype)
    out = nsa.selection_attention(query, key, value, selection, path=name)
    assert (out.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("heads", [1, 2, 4, 16])
def test_gradients_equal_the_oracles(name, heads):
    selection = fixed_selection()
    grads = {}
    for kind in ("truth", "eager", "path"):
        dtype = torch.float64 if kind == "truth" else torch.float32
        query, key, value = (t.detach().to(dtype).requires_grad_() for t in tensors(selection, 45, heads, 16, 12))
        if kind == "path":
            out = nsa.selection_attention(query, key, value, selection, path=name, workspace=Workspace())
        else:
            out = reference.run(query, key, value, selection, scale=0.25, compute_dtype=str(dtype)[6:])
        weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        grads[kind] = torch.autograd.grad((out * weight).sum(), (query, key, value))
    for truth, eager, found in zip(*grads.values(), strict=True):
        floor = 4 * torch.finfo(torch.float32).eps * float(truth.abs().max())
        allowed = max(2 * float((eager - truth).abs().max()), floor)
        assert (found - truth).abs().max() <= allowed
        assert found.isfinite().all()


@pytest.mark.parametrize("name", EAGER)
def test_an_empty_row_gives_exact_zeros_and_zero_gradient(name):
    blocks = torch.tensor([[[[-1, -1]], [[0, 1]]]], dtype=torch.int32)
    selection = Selection.from_blocks(blocks, block_size=4, context_length=8)
    query, key, value = tensors(selection, 8, 2, 4, 4, requires_grad=True)
    out = nsa.selection_attention(query, key, value, selection, path=name)
    assert torch.equal(out[0, 0], torch.zeros_like(out[0, 0]))
    (gradient,) = torch.autograd.grad(out.sum() + out.square().sum(), query)
    assert torch.equal(gradient[0, 0], torch.zeros_like(gradient[0, 0]))
    assert gradient[0, 1].abs().max() > 0


@pytest.mark.parametrize("name", EAGER)
def test_every_rung_of_every_ladder_gives_the_oracles_result(name):
    selection = fixed_selection()
    query, key, value = tensors(selection, 45, 2, 8, 8)
    truth, allowed = bound(selection, query, key, value, 8**-0.5, torch.float32)
    problem = nsa.planning.call_problem(query, key, value, selection, grad=False, capturing=False)
    for item in PATHS[name].tunables(problem, torch.device("cpu")):
        for rung in item.ladder:
            workspace = Workspace()
            for _ in range(2):
                out = nsa.selection_attention(
                    query, key, value, selection, path=name, parameters={item.name: rung}, workspace=workspace
                )
                assert (out - truth).abs().max() <= allowed, (item.name, rung)
                workspace.poison()


@pytest.mark.parametrize("name", EAGER)
def test_keys_and_values_are_views_without_a_copy(name):
    """A (B, T, H, D) model passes transposed views; poisoning what lies between must not matter."""
    selection = fixed_selection()
    query, key, value = tensors(selection, 45, 2, 8, 8)
    wide = torch.full((2, 45, 2, 3, 8), float("nan"))
    wide[:, :, :, 1] = key.transpose(1, 2)
    view = wide[:, :, :, 1].transpose(1, 2)
    assert not view.is_contiguous()
    same = nsa.selection_attention(query, view, value, selection, path=name)
    assert torch.equal(same, nsa.selection_attention(query, key.contiguous(), value, selection, path=name))


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("tracked", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)], ids=str)
def test_gradients_of_some_inputs_survive_a_shared_workspace(name, tracked):
    selection, workspace = fixed_selection(), Workspace()
    leaves = [
        t.detach().requires_grad_(bool(on)) for t, on in zip(tensors(selection, 45, 2, 8, 8), tracked, strict=True)
    ]
    first = nsa.selection_attention(*leaves, selection, path=name, workspace=workspace)
    nsa.selection_attention(*tensors(selection, 45, 2, 8, 8, seed=1), selection, path=name, workspace=workspace)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(first.sum(), wanted)
    truth = reference.run(*(leaf.double() for leaf in leaves), selection, scale=8**-0.5)
    for have, want in zip(found, torch.autograd.grad(truth.sum(), wanted), strict=True):
        assert (have - want).abs().max() <= 64 * torch.finfo(torch.float32).eps * want.abs().max()


@pytest.mark.parametrize("name", EAGER)
def test_nan_beyond_a_sequence_is_never_read(name):
    lengths = torch.tensor([9, 45])
    blocks = torch.randint(-1, 6, (2, 7, 2, 4), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    selection = Selection.from_blocks(blocks, block_size=8, context_length=lengths)
    query, key, value = tensors(selection, 45, 2, 8, 8)
    clean = nsa.selection_attention(query, key, value, selection, path=name)
    unused = (torch.arange(45) >= lengths[:, None])[:, None, :, None]
    spoilt = [tensor.masked_fill(unused, float("nan")) for tensor in (key, value)]
    assert torch.equal(nsa.selection_attention(query, *spoilt, selection, path=name), clean)


@pytest.mark.parametrize("name", EAGER)
def test_a_workspace_that_inference_mode_filled_serves_other_modes(name):
    selection, workspace = fixed_selection(), Workspace()
    inputs = tensors(selection, 45, 2, 8, 8)
    with torch.inference_mode():
        first = nsa.selection_attention(*inputs, selection, path=name, workspace=workspace)
    with torch.no_grad():
        assert torch.equal(first, nsa.selection_attention(*inputs, selection, path=name, workspace=workspace))


@pytest.mark.parametrize("name", EAGER)
def test_autocast_leaves_dtypes_and_results_as_the_caller_gave_them(name):
    selection = fixed_selection()
    inputs = tensors(selection, 45, 2, 8, 8)
    plain = nsa.selection_attention(*inputs, selection, path=name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nsa.selection_attention(*inputs, selection, path=name), plain)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("dense", {"query_chunk": -1}, "query_chunk=-1 is below 0"),
        ("packed", {"bucket_rounding": 0}, "bucket_rounding=0 is below 1"),
        ("gather", {"row_chunk": "x"}, "row_chunk='x' is no int"),
        ("varlen", {"reserve_rows": -5}, "reserve_rows=-5 is below 0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(name, parameters, message):
    selection = fixed_selection()
    with pytest.raises(nsa.errors.ArgumentError, match=message):
        nsa.selection_attention(*tensors(selection, 45, 2, 8, 8), selection, path=name, parameters=parameters)


def test_context_lengths_are_checked_on_every_call():
    blocks = torch.zeros(2, 1, 1, 1, dtype=torch.int32)
    good, bad = (
        Selection.from_blocks(blocks, block_size=8, context_length=torch.tensor(lengths))
        for lengths in ([9, 24], [32, 24])
    )
    inputs = tensors(good, 24, 1, 8, 8)
    nsa.selection_attention(*inputs, good, path="gather")
    with pytest.raises(nsa.errors.ArgumentError, match="exceeds the 24 keys"):
        nsa.selection_attention(*inputs, bad, path="gather")


def test_flex_equals_the_oracle_where_it_compiles():
    selection = fixed_selection(block_size=16)
    query, key, value = tensors(selection, 45, 2, 16, 16)
    truth, allowed = bound(selection, query, key, value, 0.25, torch.float32)
    out = nsa.selection_attention(query, key, value, selection, path="flex")
    assert (out - truth).abs().max() <= allowed


def test_a_blocks_only_path_says_so_for_ranges():
    selection = Selection.from_ranges(torch.zeros(1, 1, 1, 1, 2, dtype=torch.int64), context_length=4)
    query, key, value = tensors(selection, 4, 1, 8, 8)
    with pytest.raises(nsa.UnsupportedPathError, match=r"^unsupported: needs blocks"):
        nsa.selection_attention(query, key, value, selection, path="flex")


def fixed_selection(block_size=8):
    """Ragged rows over 45 keys: an empty row, duplicates, a tail block, B = G = 2."""
    generator = torch.Generator().manual_seed(3)
    count = -(-45 // block_size)
    blocks = torch.randint(-1, count, (2, 7, 2, 4), generator=generator, dtype=torch.int32)
    blocks[0, 0, 0] = -1
    blocks[1, 6, 1] = count - 1
    return Selection.from_blocks(blocks, block_size=block_size, context_length=45)


@pytest.mark.parametrize(("path", "reserve"), [("varlen", "reserve_keys"), ("packed", "reserve_rows")])
def test_a_reserve_is_for_one_chunk_and_not_for_the_whole_prompt(path: str, reserve: str) -> None:
    """At 128k all rows' gathered keys are 256 GiB, and a reserve of them cannot be had anywhere."""
    large = SelectionProblem(
        mode="prefill", dtype="bfloat16", B=1, S=131072, T=131072, G=4, h=16, Dk=128, Dv=128, block_size=64, topk=16
    )
    items = {item.name: item for item in PATHS[path].tunables(large, torch.device("cuda"))}
    rows = int(items["row_chunk"].default)
    assert 0 < rows < large.rows
    assert items[reserve].ladder[1] == rows * (large.row_width if path == "varlen" else 1)


def test_packed_counts_as_many_buckets_as_rows_can_fill_however_long_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    selection = Selection.from_blocks(torch.tensor([[[[0, 3]]]]), block_size=4, context_length=4096)
    query, key, value = tensors(selection, 4096, 2, 8, 8)
    sizes = []
    scatter = torch.Tensor.scatter_add_
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda *args: sizes.append(args[0].numel()) or scatter(*args))
    PATHS["packed"].function()(query, key, value, selection, scale=1.0, workspace=None, bucket_rounding=4)
    assert sizes == [3]
