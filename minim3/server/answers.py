"""Token events of one answer to what clients are shown: text, reasoning, tool calls, log-probabilities.

Two readers of one shape: `ChatReader` for the chat format, `TextReader` for plain continuation. Each is fed events one
after the other and gives an `Update`; it says when its answer is complete although the engine would go on (a stop
string, a second tool call where one was allowed).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from minim3.inference.engine import TokenEvent
from minim3.inference.request import TokenLogprobs
from minim3.processing.chat import END_THINK, NAMESPACE, THINK
from minim3.processing.detokenizer import IncrementalDetokenizer, StopStrings
from minim3.processing.output import OutputDelta, OutputParser, ParsedOutput
from minim3.processing.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token of an answer, with what was asked about it; `silent` ones say nothing (the end, say)."""

    token_id: int
    logprobs: TokenLogprobs | None
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Update:
    """What further tokens added to answer `index`. finish_reason is set once, on its last update."""

    index: int
    delta: OutputDelta
    entries: tuple[TokenEntry, ...] = ()
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.delta or self.entries or self.finish_reason)


@dataclass(frozen=True, slots=True)
class Ending:
    """When a reader ends an answer by itself."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    max_calls: int | None = None
    ignored_ids: frozenset[int] = frozenset()
    """Ids that would end the text of a chat answer, of a request that asked to go on after them."""


class Reader(Protocol):
    """See `ChatReader`."""

    index: int
    num_reasoning_tokens: int
    stopped: bool

    @property
    def num_tokens(self) -> int: ...

    def feed(self, event: TokenEvent) -> Update: ...

    def finish(self, reason: str) -> Update: ...

    @property
    def result(self) -> ParsedOutput: ...


class _Regions:
    """Where each token of a chat answer belongs: reasoning, content, or neither (markers, tool calls, the end)."""

    def __init__(self, tokenizer: Tokenizer, mode: str) -> None:
        added = tokenizer.added_tokens
        self._think, self._end_think = added.get(THINK), added.get(END_THINK)
        self._namespace = added.get(NAMESPACE)
        self._silent = tokenizer.special_ids | set(tokenizer.eos_token_ids)
        self._region = "reasoning" if mode == "enabled" else "content"
        self._is_first = True

    def of(self, token_id: int) -> str | None:
        is_first, self._is_first = self._is_first, False
        if self._region != "calls":
            if token_id == self._think and (is_first or self._region == "reasoning"):
                self._region = "reasoning"
                return None
            if token_id == self._end_think:
                self._region = "content"
                return None
            if token_id == self._namespace and self._region == "content":
                self._region = "calls"
        if self._region == "calls" or token_id in self._silent:
            return None
        return self._region


class ChatReader:
    """Reads an answer in the chat format.

    Stop strings end the content; reasoning and arguments may speak of them. Log-probabilities are given for the tokens
    of the content, which together are its text (the last may go on where a stop string cut it).
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        mode: str,
        tools: Sequence[Mapping[str, Any]],
        ending: Ending,
        make_id: Callable[[int], str],
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.num_reasoning_tokens = 0
        self.stopped = False
        self._parser = OutputParser(tokenizer, mode, tools, make_id=make_id)
        self._regions = _Regions(tokenizer, mode)
        self._stops = StopStrings(ending.stops)
        self._ending = ending
        self._content: list[str] = []
        self._entries: list[tuple[int, TokenEntry]] = []
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        # Characters of the content: in its tokens so far, out of the parser, shown.
        self._written = self._parsed = self._shown = 0
        self._reason = "stop"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def feed(self, event: TokenEvent) -> Update:
        self.token_ids.append(event.token_id)
        region = self._regions.of(event.token_id)
        self.num_reasoning_tokens += region == "reasoning"
        if event.token_id in self._ending.stop_token_ids:
            self.stopped = True
            return Update(self.index, OutputDelta())
        if event.token_id in self._ending.ignored_ids:
            return Update(self.index, OutputDelta())
        if region == "content":
            self._entries.append((self._written, TokenEntry(event.token_id, event.logprobs)))
            self._written += len(self._detokenizer.feed(event.token_id))
        return self._update(self._parser.feed(event.token_id))

    def finish(self, reason: str) -> Update:
        """The end of the answer, for `reason`: stop or length."""
        update = self._update(self._parser.finish(), last=True)
        self._reason = "stop" if self.stopped else reason
        return replace(update, finish_reason=self.result.finish_reason)

    @property
    def result(self) -> ParsedOutput:
        parsed = self._parser.result(self._reason)
        most, calls, reason = self._ending.max_calls, parsed.tool_calls, parsed.finish_reason
        if most is not None and len(calls) > most:  # the one too many was cut off as it began
            calls = calls[:most]
            reason = "tool_calls" if all(call.complete for call in calls) else reason
        return replace(parsed, content="".join(self._content), tool_calls=calls, finish_reason=reason)

    def _update(self, delta: OutputDelta, last: bool = False) -> Update:
        most = self._ending.max_calls
        if most is not None and any(call.index >= most for call in delta.tool_calls):
            delta = replace(delta, tool_calls=tuple(call for call in delta.tool_calls if call.index < most))
            self.stopped = True
        content = delta.content
        self._parsed += len(content)
        if self._stops.stopped_by is not None:
            content = ""
        elif self.num_tokens > self._ending.min_tokens or last:
            content = self._stops.feed(content)
            if self._stops.stopped_by is None and not last:
                # A stop string may be white space, which the parser keeps back: a call might follow.
                content += self._stops.look_ahead(self._parser.white_space) or ""
            if self._stops.stopped_by is not None:
                self.stopped = True
                content += self._stops.stopped_by if self._ending.include_stop else ""
            elif last or delta.tool_calls:
                content += self._stops.finish()
        self._content.append(content)
        self._shown += len(content)
        entries: tuple[TokenEntry, ...] = ()
        if self._entries and (content or last):
            # Tokens of which something is shown; a stop string hides those behind it.
            hidden = self._parsed + len(self._parser.white_space) - self._shown
            whole = last and self._stops.stopped_by is None
            count = sum(whole or start < self._written - hidden for start, _ in self._entries)
            entries = tuple(entry for _, entry in self._entries[:count])
            self._entries = self._entries[count:]
        return Update(self.index, replace(delta, content=content), entries)


class TextReader:
    """Reads plain text: what the tokens say, control tokens left out."""

    def __init__(self, index: int, tokenizer: Tokenizer, ending: Ending, eos_token_ids: Sequence[int]) -> None:
        self.index = index
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.stopped = False
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._silent = tokenizer.special_ids | set(eos_token_ids)
        self._stops = StopStrings(ending.stops)
        self._ending = ending
        self._text: list[str] = []
        self._reason = "stop"

    def feed(self, event: TokenEvent) -> Update:
        """Every token has an entry: harnesses count those behind a prompt."""
        if self.stopped:
            return Update(self.index, OutputDelta())
        self.num_tokens += 1
        self.stopped = event.token_id in self._ending.stop_token_ids
        silent = self.stopped or event.token_id in self._silent
        text = "" if silent else self._detokenizer.feed(event.token_id)
        if self.num_tokens > self._ending.min_tokens and not self.stopped:
            text = self._cut(text)
        return self._update(text, (TokenEntry(event.token_id, event.logprobs, silent),))

    def finish(self, reason: str) -> Update:
        text = ""
        if not self.stopped:
            text = self._cut(self._detokenizer.finish())
            text += "" if self.stopped else self._stops.finish()
        self._reason = "stop" if self.stopped else reason
        return replace(self._update(text, ()), finish_reason=self._reason)

    @property
    def result(self) -> ParsedOutput:
        return ParsedOutput(None, "".join(self._text), (), self._reason)

    def _cut(self, text: str) -> str:
        text = self._stops.feed(text)
        if self._stops.stopped_by is not None and not self.stopped:
            self.stopped = True
            text += self._stops.stopped_by if self._ending.include_stop else ""
        return text

    def _update(self, text: str, entries: tuple[TokenEntry, ...]) -> Update:
        self._text.append(text)
        return Update(self.index, OutputDelta(content=text), entries)
