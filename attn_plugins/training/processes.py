"""Work of one process that the others wait for: what fails in one fails in all, so that none waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def by_main(accelerator: Any, work: Callable[[], object]) -> None:
    """Do it in the main process, while the others wait.

    Raises:
        RuntimeError: in the other processes, where it failed in the main one, which raises what it was.
    """
    by_all(accelerator, work if accelerator.is_main_process else lambda: None)


def by_all(accelerator: Any, work: Callable[[], object]) -> None:
    """Do it in every process, and go on when all have done it.

    Raises:
        RuntimeError: it failed in another process; a process in which it failed raises what it was.
    """
    failure: BaseException | None = None
    try:
        work()
    except BaseException as error:  # an interrupt too: the others would wait for it
        failure = error
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        told = None if failure is None else f"process {accelerator.process_index}: {type(failure).__name__}: {failure}"
        others = [text for text in gather_object([told]) if text is not None]
        if others and failure is None:
            raise RuntimeError(f"it failed in {others[0]}")
    if failure is not None:
        raise failure
