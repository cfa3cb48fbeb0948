"""Claims about sizes whose element offsets pass 2^31, on a GPU: rows at the far end are right."""

import pytest
import torch

import nsa
from nsa.problem import SelectionProblem
from tuner.check import filled_with_nan
from tuner.inputs import make_inputs
from tuner.oracle import Oracle

T = 2**18 + 40  # with 64 heads of 128: 2.15e9 query elements, and a last tile that is not full


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["triton_token", "triton_union", "triton_block", "causal_prefix"])
def test_rows_beyond_two_to_the_31_elements_match_the_oracle(path):
    problem = SelectionProblem(
        mode="prefill", dtype="bfloat16", B=1, S=T, T=T, G=4, h=16, Dk=128, Dv=128, block_size=64, topk=16,
        overlap="low", cache="cold", complete=True,
    )  # fmt: skip
    assert problem.rows * problem.h * problem.Dk > 2**31
    inputs = make_inputs(problem, "random", 0, torch.device("cuda"))
    oracle = Oracle(inputs, problem.Dk**-0.5)
    with torch.no_grad(), filled_with_nan():
        out = nsa.selection_attention(inputs.query, inputs.key, inputs.value, inputs.selection, path=path)
    assert oracle.rows[-1] == T - 1
    oracle.compare(out, path)
