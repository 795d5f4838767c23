"""A loaded model that answers: what `generate`, `chat` and `demo` share."""

import secrets
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from minim3.inference.engine import Engine
from minim3.inference.request import Request, SamplingParams
from minim3.loading import load
from minim3.processing.detokenizer import IncrementalDetokenizer, StopStrings
from minim3.processing.output import OutputDelta, OutputParser, ParsedOutput

DEFAULT_NEW_TOKENS = 2048
DEVICES = "auto, cpu, cuda, cuda:N or mps"
_SAMPLED_BY = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class LoadOptions:
    """`model` is a folder or hub id; None is pocket. `adapter` is merged into its weights. `quantization`: a format,
    "auto" (as the checkpoint stores the weights, where that loses nothing) or "none"."""

    model: str | None
    device: str
    dtype: str
    threads: int | None
    quantization: str = "auto"
    adapter: str | None = None

    @property
    def format(self) -> str | None:
        """For `minim3.load`."""
        return None if self.quantization == "none" else str(self.quantization)


@dataclass(frozen=True)
class SamplingOptions:
    """What was given on the command line; None takes the checkpoint's generation config."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    greedy: bool = False
    stop: tuple[str, ...] = ()
    seed: int | None = None


def choose_device(name: str) -> torch.device:
    """The device a user named. "auto" is the first accelerator, else the CPU. ValueError for one that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())) or name[-1:] == ":":
        raise ValueError(f"--device is {name!r}; known: {DEVICES}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"--device {name}: no such device (torch sees {count} GPUs); try cpu or auto")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: no such device here; try cpu or auto")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device, config_dtype: str | None) -> torch.dtype:
    """The dtype of the weights: "auto" is fp32 on a CPU, elsewhere the config's, or bf16 where it names none."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else config_dtype or "bfloat16"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def sampling_params(
    options: SamplingOptions, defaults: Mapping[str, Any], eos_token_ids: tuple[int, ...]
) -> SamplingParams:
    """Options first, then the checkpoint's `generation_config.json`; greedy where neither speaks of sampling.

    Stop strings are left out: they are looked for in the text of an answer, not in its reasoning.
    """
    given = {name: value for name in _SAMPLED_BY if (value := getattr(options, name)) is not None}
    do_sample = bool(given or defaults.get("do_sample")) and not options.greedy
    if options.greedy and any(value for name, value in given.items() if name != "top_p" or value != 1.0):
        raise ValueError(f"--greedy takes no {', '.join('--' + name.replace('_', '-') for name in given)}: pass one")
    drawn: dict[str, Any] = {name: given.get(name, defaults.get(name)) for name in _SAMPLED_BY} if do_sample else {}
    penalty = options.repetition_penalty
    if penalty is None:
        penalty = defaults.get("repetition_penalty")
    return SamplingParams(
        max_new_tokens=options.max_new_tokens or defaults.get("max_new_tokens") or DEFAULT_NEW_TOKENS,
        do_sample=do_sample,
        **{name: value for name, value in drawn.items() if value is not None},
        repetition_penalty=1.0 if penalty is None else float(penalty),
        # torch's own generator starts at the same number in every process: without a seed, draw one.
        seed=secrets.randbits(32) if options.seed is None else options.seed,
        eos_token_ids=eos_token_ids,
    )


@dataclass
class Answer:
    """An answer as it comes: iterate for the deltas; afterwards (or when interrupted) the rest is filled in.

    Seconds: from the request to the first token, and to the last.
    """

    request: Request
    parsed: ParsedOutput | None = None
    seconds_to_first: float = 0.0
    seconds: float = 0.0
    deltas: Generator[OutputDelta, None, None] = field(init=False)

    def __iter__(self) -> Iterator[OutputDelta]:
        return self.deltas

    def close(self) -> None:
        """Stop here: what came so far is the result."""
        self.deltas.close()
        if self.parsed is None:  # interrupted before it began
            self.parsed = ParsedOutput(None, "", (), "abort")

    @property
    def result(self) -> ParsedOutput:
        assert self.parsed is not None, "the answer was not read"
        return self.parsed


class Session:
    """A model with its processor, and the options of every answer."""

    def __init__(self, options: LoadOptions, sampling: SamplingOptions) -> None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        device = choose_device(options.device)
        dtype = None if options.dtype == "auto" else choose_dtype(options.dtype, device, None)
        self.model, self.processor = load(
            options.model, dtype, device, quantization=options.format, adapter=options.adapter,
            require_tokenizer=True,
        )  # fmt: skip
        self.model.pack_for_inference()
        self.stop = sampling.stop
        defaults = self.model.generation_config or {}
        self.params = sampling_params(sampling, defaults, self._eos_token_ids(defaults))

    def answer(self, messages: Sequence[Mapping[str, Any]], thinking: str) -> Answer:
        """The answer to a conversation in OpenAI form. ValueError for a conversation that the model cannot take."""
        inputs = self.processor.apply_chat_template(messages, thinking_mode=thinking)
        return self._run(inputs, _ChatReader(OutputParser(self.processor.tokenizer, thinking), StopStrings(self.stop)))

    def complete(self, text: str, images: Sequence[str], videos: Sequence[str]) -> Answer:
        """`text` continued as it stands; control tokens and media placeholders written in it count."""
        inputs = self.processor(images=list(images) or None, text=text, videos=list(videos) or None)
        detokenizer = IncrementalDetokenizer(self.processor.tokenizer, skip_special_tokens=False)
        return self._run(inputs, _RawReader(detokenizer, StopStrings(self.stop), self.params.eos_token_ids))

    def _eos_token_ids(self, defaults: Mapping[str, Any]) -> tuple[int, ...]:
        """The checkpoint's, and the token that closes a turn."""
        given = defaults.get("eos_token_id")
        if given is None:
            given = self.model.text_config.eos_token_id
        ids = [] if given is None else [given] if isinstance(given, int) else list(given)
        ids += [i for i in self.processor.tokenizer.eos_token_ids if i < self.model.text_config.vocab_size]
        return tuple(dict.fromkeys(ids))

    def _run(self, inputs: Mapping[str, Any], reader: "_ChatReader | _RawReader") -> Answer:
        started = time.perf_counter()
        engine = Engine(self.model)
        request = engine.add_request(inputs["input_ids"][0].tolist(), self.params, media=inputs)
        answer = Answer(request)

        def deltas() -> Generator[OutputDelta, None, None]:
            events: Any = engine.stream()
            reason = "abort"
            try:
                for event in events:
                    answer.seconds_to_first = answer.seconds_to_first or time.perf_counter() - started
                    if delta := reader.feed(event.token_id):
                        yield delta
                    if reader.stopped:
                        break
                reason = "stop" if reader.stopped else request.finish_reason or "abort"
                if delta := reader.finish():
                    yield delta
            finally:  # also when the reader of this stream was interrupted
                events.close()
                answer.seconds = time.perf_counter() - started
                answer.parsed = reader.result(reason)

        answer.deltas = deltas()
        return answer


class _ChatReader:
    """Ids of an answer in the chat format to deltas. Stop strings end the content; reasoning may speak of them."""

    def __init__(self, parser: OutputParser, stops: StopStrings) -> None:
        self._parser = parser
        self._stops = stops
        self._content: list[str] = []

    @property
    def stopped(self) -> bool:
        return self._stops.stopped_by is not None

    def feed(self, token_id: int) -> OutputDelta:
        return self._cut(self._parser.feed(token_id))

    def finish(self) -> OutputDelta:
        delta = self._cut(self._parser.finish())
        rest = self._stops.finish()
        self._content.append(rest)
        return replace(delta, content=delta.content + rest)

    def result(self, finish_reason: str) -> ParsedOutput:
        return replace(self._parser.result(finish_reason), content="".join(self._content))

    def _cut(self, delta: OutputDelta) -> OutputDelta:
        content = self._stops.feed(delta.content)
        self._content.append(content)
        return replace(delta, content=content)


class _RawReader:
    """Ids to text, control tokens included, but for the one that ends the answer."""

    def __init__(self, detokenizer: IncrementalDetokenizer, stops: StopStrings, eos_token_ids: Sequence[int]) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._eos_token_ids = eos_token_ids
        self._text: list[str] = []

    @property
    def stopped(self) -> bool:
        return self._stops.stopped_by is not None

    def feed(self, token_id: int) -> OutputDelta:
        return self._show("" if token_id in self._eos_token_ids else self._stops.feed(self._detokenizer.feed(token_id)))

    def finish(self) -> OutputDelta:
        return self._show(self._stops.feed(self._detokenizer.finish()) + self._stops.finish())

    def result(self, finish_reason: str) -> ParsedOutput:
        return ParsedOutput(None, "".join(self._text), (), finish_reason)

    def _show(self, text: str) -> OutputDelta:
        self._text.append(text)
        return OutputDelta(content=text)
