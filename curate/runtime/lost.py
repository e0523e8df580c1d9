"""A device or an engine that is lost: its actor ends itself, and Ray starts another in its place.

In: what a worker raised. Out: the same in words, where another start would not help. Knows no method and no stage.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import ray
import torch

from curate.errors import CurateError, EngineDead, EngineGone, WorkerError
from curate.runtime.memory import out_of_memory_in_words

LOST = (torch.AcceleratorError, EngineDead)
DEAD_DEVICE_EXIT = 13


class Life:
    """Of one actor's process, from its constructor on."""

    def __init__(self) -> None:
        self.answered = False
        """Whether it has answered anything yet."""
        self._replaces = bool(ray.get_runtime_context().was_current_actor_reconstructed)

    def end(self, error: Exception) -> CurateError:
        """End this process for one of LOST, to be replaced by one whose device or engine may be sound.

        Returns the error to tell instead of an engine that replaces another and fails at the first thing it is asked:
        it does so every time (one that cannot run this model, say), and each start may take minutes. A device may fail
        in one place alone: of a sweep the other trainings are to go on, each in a process that is sound.
        """
        if isinstance(error, EngineDead) and not isinstance(error, EngineGone) and self._replaces and not self.answered:
            return error
        _exit(error)

    def cannot_start(self, error: torch.AcceleratorError) -> CurateError:
        """End this process, whose device failed in its constructor, to be replaced once by one whose may be sound.

        Returns the error to tell in words if this one replaces another already: Ray would start ten more, and say then
        that the memory does not suffice.
        """
        if self._replaces:
            return _in_words(error)
        _exit(error)


def _exit(error: Exception) -> NoReturn:
    print(f"{_in_words(error)} This actor ends and is replaced.", flush=True)
    os._exit(DEAD_DEVICE_EXIT)


def _in_words(error: Exception) -> CurateError:
    """One of LOST as an error that a person can read."""
    if isinstance(error, CurateError):
        return error
    return WorkerError(
        f"a worker's device has failed ({str(error).strip().splitlines()[0]}). What was committed stays; the same "
        f"command goes on from there. If it fails again, look for a fault of that device (nvidia-smi, dmesg)."
    )


@contextmanager
def device_errors_in_words() -> Iterator[None]:
    """For work in a process that nobody replaces.

    Raises:
        WorkerError: in the place of PyTorch's own, for a device that has failed or whose memory does not suffice.
    """
    try:
        with out_of_memory_in_words():
            yield
    except torch.AcceleratorError as e:
        raise _in_words(e) from e
