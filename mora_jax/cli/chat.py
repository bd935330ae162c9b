"""Talk to a model: answers stream, and the conversation goes on.

  mora-jax chat --model M --adapter poet=runs/1 --adapter coder=runs/2

/reset forgets the conversation, /adapter NAME lets another adapter answer (`base`: none). Ctrl-C ends an answer, Ctrl-D
the chat. Without a terminal each line of stdin is a message.
"""

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from mora_jax.cli.generate import add_speaking, load_speaker, models_of
from mora_jax.cli.options import named_adapters
from mora_jax.errors import InputError

HELP = "talk to a model"
BASE = "base"
_COMMANDS = "/reset forgets the conversation, /adapter NAME switches, Ctrl-C ends an answer, Ctrl-D the chat"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_speaking(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    if sys.stdin is None:
        raise InputError("chat reads standard input, which is closed")
    from mora_jax.evaluation.chat import ChatSession

    adapters = named_adapters(args.adapter)
    model, tokenizer, options = load_speaker(args, adapters, attach=False)
    models = models_of(model, adapters, args)
    session = ChatSession(models | ({} if BASE in models else {BASE: model}), tokenizer, system=args.system, **options)
    with _Interrupts.handled() as interrupts:
        _say(f"{', '.join(session.models)}; {session.speaker} answers. {_COMMANDS}")
        for line in _lines(interrupts):
            command, _, name = line.strip().partition(" ")
            try:
                if command == "/reset":
                    session.reset()
                    _say("the conversation is forgotten")
                elif command == "/adapter":
                    session.switch(name.strip() or session.speaker)
                    _say(f"{session.speaker} answers; there are {', '.join(session.models)}")
                elif command[:1] == "/" and command[1:].isalpha():
                    _say(_COMMANDS)
                elif command:
                    _answer(session, line, interrupts)
            except InputError as error:
                _say(f"error: {error}")
    return 0


def _answer(session: Any, line: str, interrupts: "_Interrupts") -> None:
    """Prints the answer, up to a Ctrl-C."""
    pieces = session.ask(line)
    with interrupts.answering(), contextlib.closing(pieces):
        for piece in pieces:
            print(piece, end="", flush=True)
            if interrupts.asked:
                break
    print(flush=True)
    if session.left_out:
        _say(f"the first {session.left_out} messages no longer fit into the context")


def _lines(interrupts: "_Interrupts") -> Iterator[str]:
    """The user's messages, up to the end of stdin."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and earlier ones be found
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _say("Ctrl-D ends the chat")


class _Interrupts:
    """What a Ctrl-C does: while an answer is made it ends that; a second one, or one at another time, interrupts.

    Attributes:
        asked: whether the answer shall end.
    """

    def __init__(self) -> None:
        self.asked, self._answering = False, False

    @classmethod
    @contextlib.contextmanager
    def handled(cls) -> Iterator["_Interrupts"]:
        """Takes SIGINT over from the command line, for which it means the end."""
        interrupts = cls()
        if threading.current_thread() is not threading.main_thread():
            yield interrupts
            return
        before, wakeup = signal.signal(signal.SIGINT, interrupts._receive), signal.set_wakeup_fd(-1)
        try:
            yield interrupts
        finally:
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While an answer is made."""
        self.asked, self._answering = False, True
        try:
            yield
        finally:
            self._answering = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self._answering:
            raise KeyboardInterrupt
        self.asked = True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
