"""The runtime of nsa-tune: selection attention by the fastest correct path, as measured on this device."""

from .attention import NSAAttention
from .cache import NSACache
from .config import NSAConfig
from .decode import DecodeGraph
from .dispatch import dispatch_stats, selection_attention, use_dispatch_table
from .dispatch_entry import Choice
from .dispatch_table import DispatchTable, load_dispatch_table
from .errors import UnsupportedPathError, UnsupportedSelection
from .paths import PATHS
from .problem import SelectionProblem
from .selection import Selection
from .trace import record_paths
from .workspace import Workspace

__all__ = [
    "PATHS",
    "Choice",
    "DecodeGraph",
    "DispatchTable",
    "NSAAttention",
    "NSACache",
    "NSAConfig",
    "Selection",
    "SelectionProblem",
    "UnsupportedPathError",
    "UnsupportedSelection",
    "Workspace",
    "dispatch_stats",
    "load_dispatch_table",
    "record_paths",
    "selection_attention",
    "use_dispatch_table",
]
