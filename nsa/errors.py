"""Leaf. Every error that nsa raises on purpose. Each message says what, got, expected and what to do."""


class NSAError(Exception):
    """Base of all errors raised by nsa."""


class ArgumentError(NSAError, ValueError):
    """Shapes, dtypes, devices or sizes of a call disagree."""


class UnsupportedPathError(NSAError, RuntimeError):
    """A path cannot run on this problem, device or machine. The text starts with ``unsupported: ``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason if reason.startswith("unsupported: ") else f"unsupported: {reason}")


class UnsupportedSelection(NSAError, ValueError):
    """A selection has no such form: blocks were asked of one made from ranges."""


class ReserveError(NSAError, MemoryError):
    """A workspace reserve or growth was refused before allocation."""


class DispatchTableError(NSAError, ValueError):
    """A dispatch table is unreadable, foreign, too large or names what does not exist."""


class StrictDispatchError(NSAError, RuntimeError):
    """Strict dispatch was asked for and the table holds no evidence for this very problem."""


class FlagError(NSAError, ValueError):
    """An ``NSA_*`` environment variable is misspelt, malformed or contradicts itself."""
