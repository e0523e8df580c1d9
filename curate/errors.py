"""Errors that a user can act on. Each message names the thing, the value that was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class CurateError(Exception):
    """Base of every error raised on purpose; jobs print its message without a traceback and exit with `status`."""

    status: ClassVar[int] = 2


class ConfigError(CurateError):
    """A setting is unknown, has the wrong type or cannot be met."""


class CorpusError(CurateError):
    """The corpus as a whole cannot be used: missing, empty, cut off, or of mixed schemas."""


class StorageError(CurateError):
    """A location cannot be read or written."""


class ModelError(CurateError):
    """A model, adapter or tokenizer cannot be loaded or does not fit."""


class EngineDead(ModelError):
    """A generation engine cannot go on; whoever holds it replaces it. The prompts of the call are unanswered."""


class EngineGone(EngineDead):
    """The process of a generation engine has ended; why is not known where it was asked."""


class ConceptError(CurateError):
    """A concept file is broken or belongs to another model, width or layer."""


class CurvatureError(CurateError):
    """Factors, queries or test vectors that cannot be used: of another model, singular, not finite, zero."""


class TrainingError(CurateError):
    """A fine-tune cannot be done or cannot go on: no rows, a loss that is no number, a model too large."""


class WorkerError(CurateError):
    """Workers died more often than they are replaced."""


class RecipeError(CurateError):
    """The output place already holds the product of another recipe."""


class LeaseError(CurateError):
    """Another process works in the place, or has taken it over."""


class DriftFound(CurateError):
    """An audit is done and committed, and a rule of severity `fail` has fired."""

    status = 3


class DeliveryError(CurateError):
    """A notice may not be sent where it is addressed to, or did not arrive."""


class BadRow(Exception):
    """One row cannot be used. It goes to quarantine with `reason`; its neighbours go on.

    Not a CurateError: it never reaches the user as a failure of the job.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def near(word: str, choices: Iterable[str], n: int = 3) -> str:
    """A hint for a misspelt name: ``"; did you mean 'messages'?"``, or the list of choices when none is close."""
    names = sorted({str(c) for c in choices})
    close = difflib.get_close_matches(str(word), names, n=n, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    if not names:
        return ""
    shown = ", ".join(repr(c) for c in names[:20]) + (", …" if len(names) > 20 else "")
    return f"; choose from {shown}"
