"""Claims about causal_prefix: exact on complete selections, whatever runs its two parts, and refused on all others."""

import sys
from types import ModuleType

import msgspec
import pytest
import torch

import nsa
from nsa.errors import UnsupportedPathError
from nsa.paths import PATHS, causal_prefix, reference
from nsa.problem import SelectionProblem
from nsa.scoring import choose_blocks
from nsa.selection import Selection
from tuner.attest import FellBack, Seen, attest, hold_against

SIZE, TOPK, HEADS = 4, 3, 2
PREFIX = SIZE * TOPK
every_part = pytest.mark.parametrize(
    ("prefix", "inner"), [("flash", "dense"), ("math", "dense"), ("flash", "gather"), ("math", "gather")]
)


def complete_case(tokens, *, complete=True, dtype=torch.float32, key_dim=8, value_dim=8):
    """Query, key, value and the selection that scoring chose for them."""
    random = torch.Generator().manual_seed(tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    query = normal(2, tokens, 2, HEADS, key_dim)
    key, value = normal(2, tokens, 2, key_dim).transpose(1, 2), normal(2, 2, tokens, value_dim)
    compressed = normal(2, 2, max(0, (tokens - SIZE) // 2 + 1), key_dim)
    blocks = choose_blocks(
        query, compressed, context_length=tokens, kernel_size=SIZE, kernel_stride=2, block_size=SIZE, topk=TOPK
    )
    selection = Selection.from_blocks(blocks, block_size=SIZE, context_length=tokens, complete=complete)
    return query, key, value, selection


def allowed(truth, eager, largest):
    """The derived bound in float32."""
    return max(2 * float((eager - truth).abs().max()), 4 * torch.finfo(torch.float32).eps * largest)


@every_part
@pytest.mark.parametrize("tokens", [1, SIZE, PREFIX - 1, PREFIX, PREFIX + 1, 3 * PREFIX + 1])
def test_rows_on_either_side_of_the_edge_equal_the_oracle(tokens, prefix, inner):
    query, key, value, selection = complete_case(tokens)
    parameters = {"prefix": prefix, "inner": inner}
    truth = reference.run(query, key, value, selection, scale=0.3)
    eager = reference.run(query, key, value, selection, scale=0.3, compute_dtype="float32")
    out = PATHS["causal_prefix"].function()(query, key, value, selection, scale=0.3, workspace=None, **parameters)
    assert (out - truth).abs().max() <= allowed(truth, eager, float(value.abs().max()))


@every_part
def test_gradients_equal_the_oracles_on_both_sides(prefix, inner):
    found = {}
    for kind in ("truth", "eager", "path"):
        dtype = torch.float64 if kind == "truth" else torch.float32
        query, key, value, selection = complete_case(2 * PREFIX + 3)
        leaves = [t.detach().to(dtype).requires_grad_() for t in (query, key, value)]
        if kind == "path":
            parameters = {"prefix": prefix, "inner": inner}
            out = nsa.selection_attention(*leaves, selection, path="causal_prefix", parameters=parameters, scale=0.3)
        else:
            out = reference.run(*leaves, selection, scale=0.3, compute_dtype=str(dtype)[6:])
        weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        found[kind] = torch.autograd.grad((out * weight).sum(), leaves)
    for truth, eager, path in zip(*found.values(), strict=True):
        assert (path - truth).abs().max() <= allowed(truth, eager, float(truth.abs().max()))


def test_the_rest_never_reaches_dense_attention_and_the_path_reports_once(monkeypatch):
    query, key, value, selection = complete_case(PREFIX + 5)
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *a, **o: seen.append(q.shape) or plain(q, *a, **o),
    )
    with nsa.record_paths() as recorder:
        nsa.selection_attention(
            query, key, value, selection, path="causal_prefix", parameters={"prefix": "math", "inner": "gather"}
        )
    assert [shape[2] for shape in seen if shape[1] == 2 * HEADS] == [PREFIX]
    assert [(record.path, record.status) for record in recorder.executed] == [("causal_prefix", "forced")]


@every_part
@pytest.mark.parametrize("tokens", [PREFIX, 2 * PREFIX + 1])
def test_what_it_declares_is_what_a_profiler_sees(tokens, prefix, inner):
    query, key, value, selection = complete_case(tokens)
    problem = nsa.dispatch.call_problem(query, key, value, selection, grad=False, capturing=False)
    parameters, path = {"prefix": prefix, "inner": inner}, PATHS["causal_prefix"]
    evidence = path.evidence(problem, torch.device("cpu"), parameters, selection.lengths.flatten().tolist())
    other = {"prefix": "math" if prefix == "flash" else "flash", "inner": inner}
    attest(lambda: path.function()(query, key, value, selection, scale=0.3, **parameters), evidence, cuda=False)
    with pytest.raises(FellBack):
        attest(lambda: path.function()(query, key, value, selection, scale=0.3, **other), evidence, cuda=False)


def test_what_is_not_declared_complete_or_no_whole_prompt_is_refused():
    query, key, value, selection = complete_case(PREFIX + 2, complete=False)
    with pytest.raises(UnsupportedPathError, match="declared complete"):
        nsa.selection_attention(query, key, value, selection, path="causal_prefix")
    run = PATHS["causal_prefix"].function()
    query, key, value, selection = complete_case(PREFIX + 2)
    lengths = torch.full((2,), PREFIX + 2)
    tensor = Selection.from_blocks(selection.blocks, block_size=SIZE, context_length=lengths, complete=True)
    placed = Selection.from_blocks(
        selection.blocks, block_size=SIZE, context_length=PREFIX + 2, query_positions=torch.arange(PREFIX + 2),
        complete=True,
    )  # fmt: skip
    for case in (tensor, placed):
        with pytest.raises(UnsupportedPathError, match="whole prompt"):
            run(query, key, value, case, scale=0.3)
    chunk = Selection.from_blocks(selection.blocks[:, 2:], block_size=SIZE, context_length=PREFIX + 2, complete=True)
    with pytest.raises(UnsupportedPathError, match="whole prompt"):
        nsa.selection_attention(query[:, 2:], key, value, chunk, path="causal_prefix")


def test_a_backend_that_cannot_run_the_head_dims_is_named_before():
    query, key, value, selection = complete_case(PREFIX + 2, value_dim=16)
    with pytest.raises(UnsupportedPathError, match="flash has no causal attention"):
        nsa.selection_attention(query, key, value, selection, path="causal_prefix", parameters={"prefix": "flash"})
    out = nsa.selection_attention(query, key, value, selection, path="causal_prefix")
    assert out.isfinite().all()


@pytest.mark.parametrize("dims", [(8, 8), (16, 8), (8, 16)], ids=str)
def test_flash_attn_is_given_the_first_rows_in_equal_head_dims(dims, monkeypatch):
    query, key, value, selection = complete_case(PREFIX, key_dim=dims[0], value_dim=dims[1])
    leaves = [t.double().requires_grad_() for t in (query, key, value)]

    def attention(query, key, value, scale):
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] == max(dims)
        return causal_prefix.causal_attention(query, key, value, scale, "math")

    monkeypatch.setattr(causal_prefix, "flash_attn_attention", attention)
    weight = torch.linspace(-1, 1, dims[1], dtype=torch.float64)
    results = []
    for run in (reference.run, PATHS["causal_prefix"].function()):
        more = {"prefix": "flash_attn"} if results else {}
        out = run(*leaves, selection, scale=0.3, **more)
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    for want, found in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("overlap", ["low", "high"])
def test_the_rows_behind_the_prefix_keep_what_the_caller_knows_of_their_overlap(overlap):
    query, key, value, selection = complete_case(3 * PREFIX)
    told = Selection.from_blocks(
        selection.indices, block_size=SIZE, context_length=3 * PREFIX, overlap=overlap, complete=True
    )
    assert causal_prefix.problem_of(query, key, value, told).overlap == overlap


CUDA = torch.device("cuda")
LARGE = SelectionProblem(
    mode="prefill", dtype="bfloat16", B=1, S=4096, T=4096, G=4, h=16, Dk=128, Dv=128, block_size=64, topk=16,
    complete=True,
)  # fmt: skip
SMALL = msgspec.structs.replace(LARGE, S=1024, T=1024)
FORWARD_4 = "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensor0000o111_0"
BACKWARD_4 = "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at__tensor0000o111_0"
AROUND_4 = (
    "kernel_cutlass_kernel_flash_attncuteflash_bwd_preprocessFlashAttentionBackwardPreprocess_object_at__tensor_0"
)
SEEN = {
    "flash_attn": Seen(
        [("flash_attn::_flash_attn_forward", [])], ["void flash::flash_fwd_kernel<Flash_fwd_kernel_traits>"]
    ),
    "flash_attn_4": Seen([("FlashAttnFunc", [])], [FORWARD_4]),
    "flash": Seen(
        [
            ("aten::scaled_dot_product_attention", []),
            ("aten::_scaled_dot_product_flash_attention", [[1, 64, 1024, 128]]),
        ],
        ["void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits>"],
    ),
}


@pytest.mark.parametrize("declared", SEEN)
@pytest.mark.parametrize("seen", SEEN)
def test_no_library_passes_for_another(declared, seen):
    evidence = PATHS["causal_prefix"].evidence(SMALL, CUDA, {"prefix": declared, "inner": "triton_union"}, ())
    if declared == seen:
        hold_against(evidence, SEEN[seen])
        return
    with pytest.raises(FellBack):
        hold_against(evidence, SEEN[seen])


@pytest.mark.parametrize("prefix", ["flash_attn", "flash_attn_4", "flash", "cudnn"])
@pytest.mark.parametrize("inner", ["triton_union", "dense"])
def test_the_rest_may_run_what_it_declares_and_no_other_library(prefix, inner):
    evidence = PATHS["causal_prefix"].evidence(LARGE, CUDA, {"prefix": prefix, "inner": inner}, ())
    assert not set(evidence.required) & set(evidence.forbidden)
    absent = set(causal_prefix.support.LIBRARIES.values()) & set(evidence.forbidden)
    own = {prefix if prefix in causal_prefix.PACKAGES else "sdpa"} | ({"sdpa"} if inner == "dense" else set())
    assert absent == {pattern for name, pattern in causal_prefix.support.LIBRARIES.items() if name not in own}


def test_flash_attention_4_shows_a_forward_and_in_train_a_backward():
    parameters = {"prefix": "flash_attn_4", "inner": "triton_union"}
    train = PATHS["causal_prefix"].evidence(msgspec.structs.replace(SMALL, mode="train"), CUDA, parameters, ())
    hold_against(train, Seen([], [FORWARD_4, AROUND_4, BACKWARD_4]))
    for kernels in ([FORWARD_4], [FORWARD_4, AROUND_4], [FORWARD_4, FORWARD_4, BACKWARD_4], [AROUND_4, BACKWARD_4]):
        with pytest.raises(FellBack, match="flash_attncute"):
            hold_against(train, Seen([], kernels))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, None),
        ({"Dk": 64, "Dv": 64}, None),
        ({"Dk": 256, "Dv": 256, "dtype": "float16"}, None),
        ({"Dk": 192}, None),
        ({"Dk": 192, "mode": "train", "h": 1}, None),
        ({"Dk": 192, "mode": "train"}, "192 and 128"),
        ({"Dk": 128, "Dv": 192}, "128 and 192"),
        ({"Dk": 264, "Dv": 264}, "264 and 264"),
        ({"Dk": 36, "Dv": 36}, "36 and 36"),
        ({"dtype": "float32"}, "float32"),
    ],
)
def test_flash_attention_4_takes_the_head_dims_that_its_hopper_kernels_have(monkeypatch, changes, word):
    problem = msgspec.structs.replace(LARGE, **changes)
    monkeypatch.setattr(causal_prefix, "installed", lambda package: package == "flash_attn_4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = causal_prefix.prefix_reason("flash_attn_4", problem, CUDA)
    assert reason is None if word is None else word in reason


@pytest.mark.parametrize("prefix", causal_prefix.PACKAGES)
def test_a_package_that_is_not_there_is_named(monkeypatch, prefix):
    monkeypatch.setattr(causal_prefix, "installed", lambda package: False)
    assert causal_prefix.PACKAGES[prefix] in causal_prefix.prefix_reason(prefix, LARGE, CUDA)


def test_flash_attention_4_is_for_one_compute_capability(monkeypatch):
    monkeypatch.setattr(causal_prefix, "installed", lambda package: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in ((8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        reason = causal_prefix.prefix_reason("flash_attn_4", LARGE, CUDA)
        assert (reason is None) == (capability == (9, 0))


def test_the_packages_stand_on_the_ladder_of_a_gpu_alone_and_are_nobodys_default():
    for kind, there in (("cuda", True), ("cpu", False)):
        ladder = PATHS["causal_prefix"].tunables(LARGE, torch.device(kind))[0]
        assert all((name in ladder.ladder) == there for name in causal_prefix.PACKAGES)
        assert ladder.default not in causal_prefix.PACKAGES


@pytest.mark.parametrize("prefix", causal_prefix.PACKAGES)
def test_a_package_is_called_as_its_interface_is(monkeypatch, prefix):
    def attention(q, k, v, *, softmax_scale, causal, window_size=(-1, -1)):
        assert (causal, window_size) == (True, (-1, -1))
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        plain = torch.nn.functional.scaled_dot_product_attention
        out = plain(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True).transpose(1, 2)
        return out if prefix == "flash_attn" else (out, None)  # the log-sum-exp, for who asks

    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    (package if prefix == "flash_attn" else cute).flash_attn_func = attention
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    query, key, value, selection = complete_case(PREFIX, value_dim=16)
    truth = reference.run(query, key, value, selection, scale=0.3)
    eager = reference.run(query, key, value, selection, scale=0.3, compute_dtype="float32")
    out = causal_prefix.run(query, key, value, selection, scale=0.3, prefix=prefix)
    assert (out - truth).abs().max() <= allowed(truth, eager, float(value.abs().max()))
