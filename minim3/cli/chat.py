"""`minim3 chat`: a conversation, turn by turn. Lines from a pipe work as a script, which the first error ends."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minim3.cli.errors import describe, say
from minim3.cli.generate import user_messages
from minim3.cli.session import LoadOptions, SamplingOptions, Session
from minim3.cli.show import stream_answer

THINKING_MODES = ("adaptive", "enabled", "disabled")
PROMPT = "> "
HELP = """\
/image PATH    show a picture with the next message
/video PATH    show a video with the next message
/think MODE    adaptive, enabled or disabled
/system TEXT   set the system message; without TEXT, remove it
/reset         forget the conversation, keep the system message
/save FILE     write the conversation as JSON
/help          this list
/quit          leave (so does Ctrl-D)
Ctrl-C stops an answer. // at the start of a message stands for one /."""


class Chat:
    """The state between two lines: the conversation, the media of the next message, the settings."""

    def __init__(self, session: Session, system: str | None, thinking: str) -> None:
        self.session = session
        self.system = system
        self.thinking = thinking
        self.messages: list[dict[str, Any]] = []
        self.images: list[str] = []
        self.videos: list[str] = []
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._add_image,
            "/video": self._add_video,
            "/think": self._set_thinking,
            "/system": self._set_system,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: note(HELP),
        }

    def handle(self, line: str) -> bool:
        """Acts on one line; False when it asks to leave. ValueError for what cannot be done, which changes nothing."""
        line = line.strip()
        if line.startswith("/") and not line.startswith("//"):
            name, _, argument = line.partition(" ")
            if name in ("/quit", "/exit"):
                return False
            if name not in self._commands:
                raise ValueError(f"{name} is no command; /help lists them")
            self._commands[name](argument.strip())
        elif line:
            self._ask(line[1:] if line.startswith("//") else line)
        return True

    def _ask(self, text: str) -> None:
        question = user_messages(text, self.images, self.videos)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        answer = self.session.answer([*system, *self.messages, *question], self.thinking)
        self.images, self.videos = [], []
        try:
            stream_answer(answer, sys.stdout if sys.stdout.isatty() else None)
        except KeyboardInterrupt:
            print(flush=True)
            note("stopped")
        result = answer.result
        reply: dict[str, Any] = {"role": "assistant", "content": result.content}
        if result.reasoning:
            reply["reasoning_content"] = result.reasoning
        calls = [call for call in result.tool_calls if call.complete]
        if calls:
            reply["tool_calls"] = [
                {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in calls
            ]
        self.messages += [*question, reply]
        if result.finish_reason == "length":
            note(f"cut off after {answer.request.num_output_tokens} tokens")

    def _add_image(self, path: str) -> None:
        from minim3.processing.media import load_picture

        if self.session.processor.image_processor is None:
            raise ValueError("this is a text-only model: it takes no pictures")
        _, height, width = load_picture(_path(path, "/image")).shape
        self.images.append(_path(path, "/image"))
        note(f"{path} ({width} x {height}) goes with the next message")

    def _add_video(self, path: str) -> None:
        if self.session.processor.video_processor is None:
            raise ValueError("this is a text-only model: it takes no video")
        if not Path(_path(path, "/video")).is_file():
            raise ValueError(f"{path} does not exist")
        self.videos.append(_path(path, "/video"))
        note(f"{path} goes with the next message")

    def _set_thinking(self, mode: str) -> None:
        if mode not in THINKING_MODES:
            raise ValueError(f"/think takes {', '.join(THINKING_MODES)}, not {mode!r} (now: {self.thinking})")
        self.thinking = mode
        note(f"thinking: {mode}")

    def _set_system(self, text: str) -> None:
        self.system = text or None
        note("system message set" if text else "system message removed")

    def _reset(self, _: str) -> None:
        self.messages, self.images, self.videos = [], [], []
        note("the conversation is forgotten")

    def _save(self, name: str) -> None:
        file = Path(_path(name, "/save"))
        if file.exists() and file.resolve() not in self._saved:
            raise ValueError(f"{name} exists: choose another name")
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        document = {"thinking": self.thinking, "messages": [*system, *self.messages]}
        file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self._saved.add(file.resolve())
        note(f"saved {len(document['messages'])} messages to {name}")


def run_chat(options: LoadOptions, sampling: SamplingOptions, *, system: str | None, thinking: str) -> None:
    """Reads lines until /quit or the end of input. At a terminal errors are said and the talk goes on."""
    chat = Chat(Session(options, sampling), system, thinking)
    interactive = sys.stdin.isatty()
    if interactive:
        _load_line_editing()
        note(f"{options.model or 'pocket'} is ready; /help lists the commands")
    while True:
        try:
            line = input(PROMPT if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        if not interactive:
            if not chat.handle(line):
                return
            continue
        try:
            if not chat.handle(line):
                return
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            say(describe(error)[1])


def note(text: str) -> None:
    """A remark of the program itself."""
    print(text, file=sys.stderr, flush=True)


def _path(argument: str, command: str) -> str:
    """The argument as a path: quotes around it and escaped spaces, as terminals paste them, are undone."""
    if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "'\"":
        argument = argument[1:-1]
    if not argument:
        raise ValueError(f"{command} needs a path")
    return str(Path(argument.replace("\\ ", " ")).expanduser())


def _load_line_editing() -> None:
    """`input` edits lines and remembers them once readline is loaded; some systems have none."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
