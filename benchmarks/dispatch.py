"""What dispatch costs the host: ``python benchmarks/dispatch.py`` prints ``median lookup N us``, and the rest.

The lookup is of a problem that was asked for before, as every layer of a model after the first asks; ``first
lookup`` is of one that was not. The next line says what ``selection_attention`` adds around the path it runs. On a GPU
the rest is a decode call of 64 heads on 4 groups through ``triton_decode``, and its parts, on the host's clock.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import msgspec
import torch

import nsa
from nsa.defaults import default_candidate
from nsa.device import device_identity, software_identity
from nsa.dispatch_entry import DispatchEntry
from nsa.paths import triton_decode
from nsa.problem import SelectionProblem

CALLS, REPEATS = 1000, 200
CONTEXTS = [512 * 4**i for i in range(5)]


def table() -> nsa.DispatchTable:
    """A table of 5 contexts by 8 batches, each entry the default."""
    entries = []
    for batch in (1, 2, 4, 8, 16, 32, 64, 128):
        for context in CONTEXTS:
            problem = decode_problem(batch, context)
            pick = default_candidate(problem, "cpu")
            entries.append(
                DispatchEntry(
                    **msgspec.structs.asdict(problem), path=pick.path, parameters=pick.parameters, median_us=1.0,
                    peak_bytes=0, oracle_error=0.0, oracle_bound=1.0, kernels=(), run_id="benchmark", date="",
                )
            )  # fmt: skip
    return nsa.DispatchTable(device=device_identity("cpu"), software=software_identity(), entries=tuple(entries))


def decode_problem(batch: int, context: int) -> SelectionProblem:
    """A decode problem at the PR31 shape."""
    return SelectionProblem(
        mode="decode", dtype="float32", B=batch, S=1, T=context, G=2, h=4, Dk=32, Dv=32, block_size=64, topk=16
    )


def median_us(*calls, count: int) -> list[float]:
    """Median over repeats of the mean microseconds per call; several calls take turns, so that they share the noise."""
    found = [[] for _ in calls]
    for _ in range(REPEATS):
        for call, times in zip(calls, found, strict=True):
            began = time.perf_counter_ns()
            for _ in range(count):
                call()
            times.append((time.perf_counter_ns() - began) / 1e3 / count)
    return [statistics.median(times) for times in found]


def triton_call() -> dict[str, Callable[[], object]]:
    """A decode call and its parts, by name, on the current GPU."""
    from nsa.kernels import decode, launch  # Triton, where there is a GPU

    query, key = (
        torch.randn(size, dtype=torch.bfloat16, device="cuda") for size in ((1, 1, 4, 16, 128), (1, 4, 1024, 128))
    )
    blocks = torch.zeros(1, 1, 4, 16, dtype=torch.int32, device="cuda")
    selection = nsa.Selection.from_blocks(blocks, block_size=64, context_length=1024)
    parameters = {**triton_decode.USUAL, "splits": 8, "stages": 3}
    rest = "decode", False, *parameters.values()
    path = nsa.PATHS["triton_decode"].function()
    call = decode.call_for(query, key, key, selection, False, parameters)
    out = call(query, key, key, selection, 0.1, None)
    part, counter = decode.scratch(call.rows, call.elements, out)
    given = query, key, key, key, blocks, 1024, None, out, None, part, counter, 1024, 0.1
    call.forward(call.rows * call.splits, *given)
    addresses = [item.data_ptr() if isinstance(item, torch.Tensor) else item for item in (*given, *call.forward._tail)]
    return {
        "selection_attention, bound": lambda: nsa.selection_attention(
            query, key, key, selection, path="triton_decode", parameters=parameters
        ),
        "its path, unbound": lambda: path(query, key, key, selection, scale=0.1, workspace=None, **parameters),
        "its call, made before": lambda: call(query, key, key, selection, 0.1, None),
        "key of a call": lambda: launch.call_key(query, key, key, selection, *rest),
        "output": lambda: torch.empty_like(query, memory_format=torch.contiguous_format),
        "scratch": lambda: decode.scratch(call.rows, call.elements, out),
        "plan": lambda: call.forward(call.rows * call.splits, *given),
        "launcher": lambda: call.forward._launcher(call.rows * call.splits, 1, addresses),
        "launcher, no program": lambda: call.forward._launcher(0, 1, addresses),
        "Selection.from_blocks": lambda: nsa.Selection.from_blocks(blocks, block_size=64, context_length=1024),
    }


def main() -> None:
    """Print the figures."""
    known = table()
    twins = itertools.cycle([decode_problem(4, 2048) for _ in range(64)])  # equal, but never the same object
    empty, lookup = median_us(lambda: next(twins), lambda: known.lookup(next(twins)), count=CALLS)
    print(f"median lookup {lookup - empty:.3f} us")
    fresh = iter([decode_problem(4, 600 + i) for i in range(REPEATS * 100)])
    print(f"first lookup {median_us(lambda: known.lookup(next(fresh)), count=100)[0]:.3f} us")
    query, key = torch.zeros(1, 1, 2, 4, 32), torch.zeros(1, 2, 512, 32)
    blocks = torch.zeros(1, 1, 2, 16, dtype=torch.int32)
    selection = nsa.Selection.from_blocks(blocks, block_size=64, context_length=512)
    path, scale, parameters = nsa.PATHS["gather"].function(), 32**-0.5, {"row_chunk": 0}
    with torch.no_grad():
        bare, whole = median_us(
            lambda: path(query, key, key, selection, scale=scale, workspace=None, **parameters),
            lambda: nsa.selection_attention(query, key, key, selection, table=known),
            count=20,
        )
    print(f"selection_attention {whole:.1f} us, its path alone {bare:.1f} us, dispatch around it {whole - bare:.1f} us")
    if torch.cuda.is_available():
        with torch.no_grad():
            for name, call in triton_call().items():
                print(f"{name:30} {median_us(call, count=50)[0]:6.2f} us")


if __name__ == "__main__":
    main()
