"""Grammars over token ids: llguidance with a checkpoint's own tokenizer, and the guide of one answer.

An answer that thinks first is free until its thinking block closes; the grammar begins there. Before that the tokens
that would end the turn or open a tool call are forbidden, since neither is an answer yet.

    enabled   prompt ... <mm:think>   reasoning </mm:think> GRAMMAR
    disabled  prompt ... </mm:think>                        GRAMMAR
    adaptive  prompt ... ai\\n         either of the two, or GRAMMAR at once

Shape legend: V the model's vocabulary (perhaps padded), N ids that the tokenizer knows.
"""

import json
from collections.abc import Iterable
from enum import Enum, auto
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from minim3.processing.chat import END_THINK, THINK, check_thinking_mode
from minim3.processing.tokenizer import Tokenizer

# Time and memory that one grammar may take. A step is one token: 200,000 units of fuel are about 15 ms, and a request
# over it ends with an error instead of holding up the others.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,  # state and tokens of an answer do not belong into messages
}
_MAX_ERROR_CHARACTERS = 400


class _ByteTokens:
    """What llguidance reads of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_id: int, control_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(control_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(self._tokenizer.encode_plain(text.decode() if isinstance(text, bytes) else text))


class GrammarError(ValueError):
    """A grammar that cannot be compiled, or that no answer fits."""


class Vocabulary:
    """A tokenizer as llguidance sees it; compiles grammars. Made once a checkpoint (half a second for 200,000 ids).

    Raises:
        ValueError: the tokenizer has no token that ends a turn, so no grammar could ever be complete.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_ids = tuple(token_id for token_id in tokenizer.eos_token_ids if token_id < tokenizer.vocab_size)
        if not self.eos_ids:
            raise ValueError("structured output needs a tokenizer with an end token; this one has none")
        added = tokenizer.added_tokens
        self.control_ids = frozenset((*tokenizer.special_ids, *self.eos_ids))
        self.think_id, self.end_think_id = added.get(THINK), added.get(END_THINK)
        self._parsed = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_ByteTokens(tokenizer, self.eos_ids[0], self.control_ids)),
            eos_token=list(self.eos_ids),
        )
        self.num_ids: int = self._parsed.vocab_size
        self._limits = llguidance.LLParserLimits(**_LIMITS)
        self._control_N = np.zeros(self.num_ids, dtype=bool)
        self._control_N[list(self.control_ids)] = True
        self.reasoning_N = self._control_N.copy()
        """What reasoning may not hold: every control token but the one that ends it."""
        if self.end_think_id is not None:
            self.reasoning_N[self.end_think_id] = False

    def compile(self, grammar: str, *, control_ids: Iterable[int] = ()) -> "Grammar":
        """A grammar in one of llguidance's forms (Lark text or JSON).

        `control_ids`: control tokens that it may use beside those that end a turn. Others are never allowed, whatever
        the grammar names.

        Raises:
            GrammarError: malformed, too large or too slow, or without any answer.
        """
        matcher = llguidance.LLMatcher(self._parsed, grammar, log_level=0, limits=self._limits)
        _check(matcher)
        forbidden_N = self._control_N.copy()
        forbidden_N[list(control_ids)] = False
        compiled = Grammar(self, matcher, forbidden_N)
        # Some of what is wrong shows only in the first steps, taken on a copy: the grammar itself stays at its start.
        probe = matcher.deep_copy()
        for _ in range(2):
            allowed_N = compiled.allowed(probe)
            _check(probe)
            if probe.stop_reason() == "NoExtensionBias" or not allowed_N.any():
                raise GrammarError("no answer fits it")
            probe.consume_token(int(allowed_N.argmax()))
            _check(probe)
            if probe.is_stopped():
                break
        return compiled

    def bits(self, matcher: Any) -> np.ndarray:
        """Which of the N ids the matcher allows next, bool [N]."""
        words = np.zeros((self.num_ids + 31) // 32, dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return np.unpackbits(words.view(np.uint8), count=self.num_ids, bitorder="little").view(bool)


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise GrammarError(_reason(matcher))


def _reason(matcher: Any) -> str:
    lines = [line.strip() for line in matcher.get_error().replace("<non-verbose/>", "").splitlines()]
    text = " ".join(line for line in lines if line)
    return text if len(text) <= _MAX_ERROR_CHARACTERS else text[:_MAX_ERROR_CHARACTERS] + "..."


class Grammar:
    """A compiled grammar, from which the guides of any number of answers start."""

    def __init__(self, vocabulary: Vocabulary, matcher: Any, forbidden_N: np.ndarray) -> None:
        self.vocabulary = vocabulary
        self._matcher = matcher
        self._forbidden_N = forbidden_N

    def allowed(self, matcher: Any) -> np.ndarray:
        """bool [N]: what the matcher allows, without control tokens that are none of this grammar's. An end token only
        where the grammar is complete, even if a rule of it says otherwise."""
        allowed_N = self.vocabulary.bits(matcher) & ~self._forbidden_N
        if matcher.is_accepting():
            allowed_N[list(self.vocabulary.eos_ids)] = True
        return allowed_N

    def guide(self, thinking_mode: str | None) -> "GrammarGuide":
        """The guide of one answer. `thinking_mode`: that of its generation prompt."""
        return GrammarGuide(self, self._matcher.deep_copy(), _first_phase(self.vocabulary, thinking_mode))


class _Phase(Enum):
    START = auto()  # adaptive: nothing written yet
    REASONING = auto()
    ANSWER = auto()


def _first_phase(vocabulary: Vocabulary, thinking_mode: str | None) -> _Phase:
    mode = check_thinking_mode(thinking_mode)
    if mode == "enabled":
        if vocabulary.end_think_id is None:
            raise ValueError(f"the tokenizer has no token {END_THINK!r}, so thinking cannot come before a grammar")
        return _Phase.REASONING
    return _Phase.ANSWER if mode == "disabled" else _Phase.START


class GrammarGuide:
    """Keeps one answer inside a grammar: `minim3.inference.guide.Guide`."""

    def __init__(self, grammar: Grammar, matcher: Any, phase: _Phase) -> None:
        self._grammar = grammar
        self._matcher = matcher
        self._phase = phase
        self._forbidden_N: Tensor | None = None
        self.error: str | None = None
        """Why the answer could not be completed: the grammar met a limit, or a dead end. The request then ends at once,
        and whoever reads its text must look here first (`structured.check_guide`)."""

    @property
    def finished(self) -> bool:
        """Nothing may follow: the grammar is complete and cannot be continued, or was given up."""
        return self.error is not None or (self._phase is _Phase.ANSWER and self._matcher.is_stopped())

    def allow(self, logits_V: Tensor) -> None:
        """Set forbidden logits [V] to -inf, in place. At least one stays finite."""
        if self._forbidden_N is None:
            self._forbidden_N = torch.from_numpy(self._forbidden())
        num_ids = self._forbidden_N.shape[0]
        logits_V[num_ids:] = float("-inf")
        logits_V[:num_ids].masked_fill_(self._forbidden_N.to(logits_V.device), float("-inf"))

    def accept(self, token_id: int) -> None:
        self._forbidden_N = None
        vocabulary = self._grammar.vocabulary
        if self._phase is _Phase.START and token_id in (vocabulary.think_id, vocabulary.end_think_id):
            self._phase = _Phase.REASONING if token_id == vocabulary.think_id else _Phase.ANSWER
        elif self._phase is _Phase.REASONING:
            if token_id == vocabulary.end_think_id:
                self._phase = _Phase.ANSWER
        elif self.error is None:
            self._phase = _Phase.ANSWER
            if not self._matcher.consume_token(token_id):
                self.error = _reason(self._matcher)

    def fork(self) -> "GrammarGuide":
        copy = GrammarGuide(self._grammar, self._matcher.deep_copy(), self._phase)
        copy._forbidden_N, copy.error = self._forbidden_N, self.error
        return copy

    def _forbidden(self) -> np.ndarray:
        """bool [N]."""
        vocabulary = self._grammar.vocabulary
        if self._phase is _Phase.REASONING:
            return vocabulary.reasoning_N
        forbidden_N = ~self._grammar.allowed(self._matcher)
        if self._matcher.is_error() or forbidden_N.all():
            self.error = self.error or _reason(self._matcher) or "the grammar led to a place where nothing may follow"
            forbidden_N[:] = True
            forbidden_N[list(vocabulary.eos_ids)] = False
        elif self._phase is _Phase.START:
            if vocabulary.think_id is not None and vocabulary.end_think_id is not None:
                forbidden_N[[vocabulary.think_id, vocabulary.end_think_id]] = False
        elif self._matcher.stop_reason() == "NoExtensionBias":
            self.error = "the grammar led to a place where nothing may follow"
        return forbidden_N


def lark_string(text: str) -> str:
    """A literal of llguidance's Lark dialect."""
    return json.dumps(text)
