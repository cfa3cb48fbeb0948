"""Layer: a combination of paths, one per operation of NSAAttention, and the problems that a layer poses. Pure values.

In records a combination is a candidate of path ``layer``, and the layer's own sizes stand in the pattern's place.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from nsa.paths import Candidate
from nsa.problem import Operation, SelectionProblem
from nsa.trace import ParameterValue

LAYER = "layer"
"""The path of a combination, and the first word of its pattern."""
OPERATIONS: tuple[Operation, ...] = ("selection", "compression", "window")


class LayerSizes(msgspec.Struct, frozen=True, kw_only=True):
    """What a layer has beside its selection."""

    window: int
    kernel_size: int
    kernel_stride: int

    @property
    def pattern(self) -> str:
        """``layer window=512 kernel_size=32 kernel_stride=16``."""
        return " ".join((LAYER, *(f"{name}={value}" for name, value in msgspec.structs.asdict(self).items())))

    @staticmethod
    def of_pattern(pattern: str) -> LayerSizes:
        """The inverse of ``pattern``."""
        sizes = dict(word.split("=") for word in pattern.split()[1:])
        return LayerSizes(**{name: int(value) for name, value in sizes.items()})

    def problems(self, selection: SelectionProblem) -> dict[Operation, SelectionProblem]:
        """The dispatch problem of each operation in a call of the layer around this selection."""
        ranged = {"block_size": 0, "topk": 1, "form": "ranges", "overlap": "high", "complete": False}
        compressed = {"operation": "compression", "kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride}
        replace = msgspec.structs.replace
        return {
            "selection": selection,
            "compression": replace(selection, **ranged, **compressed),
            "window": replace(selection, **ranged, operation="window", window=self.window),
        }


def combined(choices: Mapping[Operation, Candidate]) -> Candidate:
    """The combination as a candidate: ``operation`` -> path, ``operation.parameter`` -> value."""
    parameters: dict[str, ParameterValue] = {}
    for operation in OPERATIONS:
        parameters[operation] = choices[operation].path
        parameters |= {f"{operation}.{name}": value for name, value in choices[operation].parameters.items()}
    return Candidate(path=LAYER, parameters=parameters)


def choices_of(parameters: Mapping[str, ParameterValue]) -> dict[Operation, Candidate]:
    """The inverse of ``combined``."""
    found: dict[Operation, Candidate] = {}
    for operation in OPERATIONS:
        prefix = f"{operation}."
        own = {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
        found[operation] = Candidate(path=str(parameters[operation]), parameters=own)
    return found
