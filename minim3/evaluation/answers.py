"""Greedy answers to many prompts, on the engine; results come in the order of the prompts."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from minim3.evaluation.records import Prompt
from minim3.inference.engine import Engine
from minim3.inference.request import Request, SamplingParams
from minim3.model.causal_lm import CausalLM
from minim3.processing.detokenizer import IncrementalDetokenizer
from minim3.processing.output import OutputParser
from minim3.processing.tokenizer import Tokenizer

BATCH_SIZE = 16


def greedy_ids(
    model: CausalLM,
    prompts: Iterable[Prompt],
    *,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    tokenizer: Tokenizer | None = None,
    stop: Sequence[str] = (),
) -> Iterator[Request]:
    """The finished request of every prompt, with the most likely token at each place; prompts are read as needed.

    batch_size: the most requests that run at once. stop: texts that end an answer (they need the tokenizer; then
    `request.text` holds the answer without them). Raises ValueError as `Engine.add_request` does.
    """
    engine = Engine(model, max_running=batch_size)
    params = SamplingParams(
        max_new_tokens=max_new_tokens, eos_token_ids=tuple(eos_token_ids), stop=tuple(stop), do_sample=False
    )
    waiting = iter(prompts)
    open_requests: deque[Request] = deque()
    try:
        while True:
            while len(engine.requests) < batch_size and (prompt := next(waiting, None)) is not None:
                detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer)
                request = engine.add_request(prompt.ids, params, media=prompt.media, detokenizer=detokenizer)
                open_requests.append(request)
            if not open_requests:
                return
            engine.step()
            while open_requests and open_requests[0].finished:
                yield open_requests.popleft()
    finally:
        engine.abort_all()


def greedy_answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Iterable[Prompt],
    *,
    thinking: str | None = None,
    raw: bool = False,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
) -> Iterator[str]:
    """The text of every answer, without reasoning and tool calls. raw: all text up to the token that ends it.

    thinking: the mode the prompts were made for. Arguments and errors otherwise as of `greedy_ids`.
    """
    requests = greedy_ids(
        model, prompts, eos_token_ids=eos_token_ids, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    for request in requests:
        if raw:
            yield tokenizer.decode(request.output_ids, skip_special_tokens=True)
        else:
            parser = OutputParser(tokenizer, thinking)
            parser.feed(request.output_ids)
            parser.finish()
            yield parser.result(request.finish_reason or "stop").content
