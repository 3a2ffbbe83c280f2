"""What tests do to processes that others have started."""

import contextlib
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def suspended(*processes: psutil.Process) -> Iterator[None]:
    """They stand still for as long as the context lasts, and may have ended by then."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def kill_with_children(pid: int) -> None:
    """SIGKILL to a process, then to all that it has started: none of them says goodbye."""
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
