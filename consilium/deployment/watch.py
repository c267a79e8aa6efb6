"""Composition: the watch over a node. In: Flower's SuperNode. Out: the same; one that can work no more ends.

Flower's node may stop asking for work and stay: its loop ends at the first error that it does not know, its heartbeat
at another, and the thread of a web server keeps the process; a reply that it cannot send it forgets; without the
program that starts client apps it waits for ever, and so it does for an app that is killed between its two calls for
its message, or that is asked to end. From outside all of this looks like a node that is alive. So whatever Flower calls
an error, the death of any part, and a wait for a dead app ends the process and all that it started: the supervisor
begins anew, and the coordinator, which asks again, gets the reply that the site's service remembers. No part of Flower
is changed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import entry_points

SUPERNODE = "flower-supernode"
WAITS = "_push_messages"  # Flower's function in whose own lines it waits for the reply of a client app
DONE = "finished"  # what Flower calls a task that no app will work on any more
ENDS = "This program ends: "  # before the reason, in its log
PATIENCE = 10.0  # seconds after an error in which Flower may end by itself, and say more
LEAVING = 4.0  # seconds to take leave of the coordinator; Flower would make an end after five, of this process alone
LOOK = 1.0  # seconds between two looks at the programs that the node started
LOOKS = 10  # at a node that waits for a reply that nobody will bring


class Watch(logging.Handler):
    """Ends the node, once, for the first reason that comes."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.error = ""  # what Flower said first of what it calls an error
        self.said = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Of every error in Flower's log."""
        if not self.error:
            self.error = _line(record.getMessage())
            _later(PATIENCE, self.leave, f"it met an error ({self.error})")

    def died(self, thread: threading.ExceptHookArgs) -> None:
        """A part of the node ended by an exception."""
        sys.__excepthook__(thread.exc_type, thread.exc_value or thread.exc_type(), thread.exc_traceback)
        self.leave(f"a part of it died ({_line(f'{thread.exc_type.__name__}: {thread.exc_value}')})")

    def look(self) -> None:
        """Wait until a program that it started has ended, or the node waits for a reply that nobody will bring."""
        looks = 0

        def waits_in_vain() -> bool:
            nonlocal looks
            looks = looks + 1 if _in_vain() else 0
            return looks == LOOKS

        if await_child(waits_in_vain):
            self.leave("the program that starts its client apps has ended (flower-superexec)")
        else:
            self.leave("a client app has ended, and no reply of it is there (flwr-clientapp)")

    def leave(self, why: str) -> None:
        """Ask Flower to take leave of the coordinator, which then knows at once; make an end where that takes long."""
        if self.say(why):
            _later(LEAVING, end)
            os.kill(os.getpid(), signal.SIGTERM)

    def say(self, why: str) -> bool:
        """Write why the node ends; False where that was said before."""
        first = not self.said.is_set()
        self.said.set()
        if first:
            say(why)
        return first


def say(why: str) -> None:
    """Into the log; on a full disk it ends all the same."""
    with suppress(OSError):
        print(ENDS + why, file=sys.stderr, flush=True)


def await_child(enough: Callable[[], bool] = lambda: False) -> bool:
    """Until a program that this process started has ended, and nobody asked how: it was meant to stay. False, where a
    look between found that it is enough."""
    before = None
    while (ended := _ended()) is None or ended != before:
        before = ended
        if enough():
            return False
        time.sleep(LOOK)
    return True


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def _later(seconds: float, do: object, *words: object) -> None:
    timer = threading.Timer(seconds, do, words)  # type: ignore[arg-type]
    timer.daemon = True
    timer.start()


def _ended() -> int | None:
    """A child of this process that has ended and is still to be asked for its exit code; None where there is none."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except (AttributeError, ChildProcessError):  # no such call on this system; nothing started
        return None
    return found.si_pid if found else None


def _in_vain() -> bool:
    """Whether Flower's loop stands where it waits for a reply, and no task is open that could bring one: a reply is
    there before its task ends. False where Flower's names are others."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None or frame.f_code.co_name != WAITS:
        return False
    with suppress(Exception):
        tasks = frame.f_locals["state"].get_tasks()
        return bool(tasks) and all(task.status.status == DONE for task in tasks)
    return False


def end() -> None:
    """At once, with all that this process started: its supervisor made it the first of a group of processes."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Flower's own program, with the words of the command line, watched."""
    watch = Watch()
    logging.getLogger("flwr").addHandler(watch)
    threading.excepthook = watch.died
    signal.signal(signal.SIGTERM, lambda *_: end())  # until Flower has a way of its own
    threading.Thread(target=watch.look, daemon=True).start()
    (program,) = entry_points(group="console_scripts", name=SUPERNODE)
    sys.argv[0] = SUPERNODE
    try:
        program.load()()
        watch.say(f"it no longer asks for work ({watch.error or 'Flower does not say why'})")
    except Exception as error:
        watch.say(f"it failed ({_line(f'{type(error).__name__}: {error}')})")
    finally:  # an exit that Flower chose itself it has explained itself
        if watch.said.is_set():
            end()


if __name__ == "__main__":
    main()
