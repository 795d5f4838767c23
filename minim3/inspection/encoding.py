"""Token ids of an answer that is known as a message only."""

from collections.abc import Mapping, Sequence
from typing import Any

from minim3.processing.processor import MiniMaxM3VLProcessor


def encode_answer(
    processor: MiniMaxM3VLProcessor,
    messages: Sequence[Mapping[str, Any]],
    answer: Mapping[str, Any],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking_mode: str | None = None,
    finished: bool = True,
    **template_variables: Any,
) -> list[int]:
    """Token ids of an answer of which only the message is known: what the chat format makes of it after `messages`.

    Pictures and clips are not looked at, since an answer is written the same after any of them.

    A model that writes a word in other pieces than its tokenizer would gives other ids. finished: whether the answer
    ended by itself, with the token that closes a turn; leave that out for one that was cut off.

    Raises:
        ValueError: malformed messages, or an answer that the template does not write after the prompt.
    """
    texts = [_without_media(message) for message in messages]
    options: dict[str, Any] = {**template_variables, "tools": tools, "thinking_mode": thinking_mode}
    options |= {"return_dict": False, "return_tensors": None}
    prompt: list[int] = processor.apply_chat_template(texts, **options)
    whole: list[int] = processor.apply_chat_template([*texts, answer], add_generation_prompt=False, **options)
    if whole[: len(prompt)] != prompt:
        raise ValueError(
            "the chat template does not write this answer after its prompt (in another thinking mode, perhaps): "
            "pass the mode that it was given in, or the ids of the answer"
        )
    written = whole[len(prompt) :]
    ends = [place for place, token_id in enumerate(written) if token_id in processor.tokenizer.eos_token_ids]
    return written[: ends[-1] + finished] if ends else written


def _without_media(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (list, tuple)):
        return message
    return {**message, "content": [part for part in content if not isinstance(part, Mapping) or "text" in part]}
