"""Claims about the workspace: capacity is what was ever needed, reserves hold, counters tell, refusals come first."""

import pytest
import torch

from nsa import workspace as module
from nsa.errors import ReserveError
from nsa.workspace import Workspace, free_bytes

CPU = torch.device("cpu")


def take(workspace, rows, width=4, role="key", dtype=torch.float32, reserve_rows=0):
    """A float32 view on the CPU unless told."""
    return workspace.take(role, rows, width, dtype=dtype, device=CPU, reserve_rows=reserve_rows)


@pytest.fixture
def allocations(monkeypatch):
    """Element counts that the workspace asked torch for."""
    asked = []
    empty = torch.empty
    monkeypatch.setattr(module.torch, "empty", lambda count, **options: asked.append(count) or empty(count, **options))
    return asked


def test_a_view_has_the_shape_and_dtype_asked_for():
    workspace = Workspace()
    view = take(workspace, 3, 5, dtype=torch.int64)
    assert (view.shape, view.dtype) == ((3, 5), torch.int64)
    assert view.is_contiguous()


@pytest.mark.parametrize("shapes", [[(10, 4), (3, 4)], [(2, 8), (16, 1)], [(5, 4), (1, 20), (20, 1)]])
def test_alternating_shapes_do_not_grow(shapes):
    workspace = Workspace()
    for rows, width in shapes:
        take(workspace, rows, width)
    grown, held = workspace.growths, workspace.bytes
    for _ in range(4):
        for rows, width in shapes:
            assert take(workspace, rows, width).shape == (rows, width)
    assert (workspace.growths, workspace.bytes) == (grown, held)


def test_capacity_is_the_most_ever_needed():
    workspace = Workspace()
    take(workspace, 100)
    take(workspace, 1)
    assert workspace.bytes == 100 * 4 * 4
    assert take(workspace, 100).shape == (100, 4)
    assert workspace.growths == 1


def test_a_context_that_grows_a_row_a_call_rarely_allocates():
    workspace = Workspace()
    for rows in range(1, 257):
        take(workspace, rows)
    assert workspace.growths <= 9  # 2 to the power of 8 rows, doubling
    assert workspace.bytes < 2 * 257 * 4 * 4


def test_the_first_allocation_is_exactly_the_need_or_the_reserve():
    for rows, reserve, expected in ((7, 0, 7), (7, 3, 7), (7, 50, 50)):
        workspace = Workspace()
        view = take(workspace, rows, reserve_rows=reserve)
        assert view.shape == (rows, 4)
        assert workspace.bytes == expected * 4 * 4


def test_up_to_its_reserve_a_buffer_never_grows():
    workspace = Workspace()
    for rows in (1, 20, 49, 50, 3):
        take(workspace, rows, reserve_rows=50)
    assert (workspace.growths, workspace.reuses) == (1, 4)
    take(workspace, 51, reserve_rows=50)
    assert workspace.growths == 2


def test_counters_and_report_say_what_happened():
    workspace = Workspace()
    take(workspace, 10)
    take(workspace, 5)
    take(workspace, 10, role="value")
    take(workspace, 10, role="value")
    report = workspace.report()
    assert (report.growths, report.reuses) == (2, 2)
    assert report.buffers == {"key": 160, "value": 160}
    assert report.bytes == workspace.bytes == 320


def test_roles_and_dtypes_have_buffers_of_their_own():
    workspace = Workspace()
    views = [
        take(workspace, 4, role=role, dtype=dtype)
        for role in ("key", "value")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for number, view in enumerate(views):
        view.fill_(number)
    assert [float(view.mean()) for view in views] == [0.0, 1.0, 2.0, 3.0]
    assert len({view.data_ptr() for view in views}) == 4
    assert workspace.bytes == 2 * 4 * 4 * (4 + 2)
    assert workspace.growths == 4


def test_one_role_is_one_buffer():
    workspace = Workspace()
    assert take(workspace, 8).data_ptr() == take(workspace, 3).data_ptr() == take(workspace, 4, 8).data_ptr()


def test_a_reserve_beyond_memory_is_refused_before_allocation_with_both_numbers(allocations):
    workspace = Workspace()
    with pytest.raises(ReserveError) as raised:
        take(workspace, 1, reserve_rows=2**45)
    wanted = 2**45 * 4 * 4
    said = str(raised.value)
    assert f"asked for {wanted} bytes" in said
    there = int(said.split(" bytes (")[1].split(", ")[1])
    assert 0 < there < wanted
    assert "'key'" in said
    assert allocations == []
    assert (workspace.bytes, workspace.growths) == (0, 0)


def test_the_memory_limit_bounds_all_buffers_together(allocations):
    workspace = Workspace(memory_limit_bytes=1000)
    take(workspace, 40)
    with pytest.raises(ReserveError, match=r"asked for 640 bytes .* 360 bytes"):
        take(workspace, 40, role="value")
    assert workspace.bytes == 640
    take(workspace, 22, role="value")
    assert workspace.bytes == 640 + 352
    assert len(allocations) == 2


def test_a_buffer_that_grows_gives_its_own_bytes_back_to_the_limit():
    workspace = Workspace(memory_limit_bytes=1000)
    take(workspace, 40)
    take(workspace, 62)  # 992 bytes; twice 640 would not fit
    assert workspace.bytes == 992
    with pytest.raises(ReserveError, match=r"asked for 1008 bytes .* 1000 bytes"):
        take(workspace, 63)


def test_a_refused_growth_leaves_the_buffer_in_use():
    workspace = Workspace(memory_limit_bytes=1000)
    take(workspace, 40).fill_(3.0)
    with pytest.raises(ReserveError):
        take(workspace, 100)
    assert float(take(workspace, 40).mean()) == 3.0
    assert workspace.growths == 1


def test_a_reserve_error_is_a_memory_error():
    with pytest.raises(MemoryError):
        take(Workspace(memory_limit_bytes=0), 1)


def test_poison_fills_every_buffer_whole():
    workspace = Workspace()
    take(workspace, 2, reserve_rows=10).zero_()
    take(workspace, 3, role="index", dtype=torch.int64).zero_()
    workspace.poison()
    assert take(workspace, 10).isnan().all()
    assert (take(workspace, 3, role="index", dtype=torch.int64) == -1).all()
    assert workspace.growths == 2


def test_free_bytes_of_the_host_are_those_of_the_kernel():
    assert 0 < free_bytes(CPU) < 2**50
