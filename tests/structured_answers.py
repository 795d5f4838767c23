"""Answers of a model with random logits under a guide, for the tests of structured output."""

from collections.abc import Sequence
from typing import Any

import torch

from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer
from minim3.server import structured
from minim3.server.guides import GrammarGuide
from minim3.server.settings import ServerSettings

SETTINGS = ServerSettings()
PADDING = 7  # ids of the model's vocabulary that the tokenizer does not know
THINK, END_THINK = "<mm:think>", "</mm:think>"


def guide_for(tokenizer: Tokenizer, response_format: Any = None, **options: Any) -> GrammarGuide:
    processor = MiniMaxM3VLProcessor(tokenizer=tokenizer)
    options = {"thinking_mode": "disabled", **options}
    guide = structured.make_guide(
        processor, tokenizer.vocab_size + PADDING, SETTINGS, response_format=response_format, **options
    )
    assert guide is not None
    return guide


def schema_format(schema: Any, strict: bool = True) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": strict}}


def answer(
    tokenizer: Tokenizer, guide: GrammarGuide, seed: int = 0, max_tokens: int = 3000, hurry_after: int = 60
) -> list[int]:
    """What a model with random logits says under the guide. After `hurry_after` tokens it leans towards closing
    brackets and quotes, so that strings end at all."""
    generator = torch.Generator().manual_seed(seed)
    closing = [tokenizer.encode(text)[0] for text in ('"', "}", "]", "0", ":", ",")] + list(tokenizer.eos_token_ids)
    namespace = tokenizer.added_tokens["]<]minimax[>["]
    ids: list[int] = []
    while len(ids) < max_tokens:
        logits = torch.randn(tokenizer.vocab_size + PADDING, generator=generator) * 3
        if len(ids) >= hurry_after:
            logits[[*closing[:3], namespace, tokenizer.added_tokens[END_THINK]]] += 30
            logits[closing[3:]] += 20
        guide.allow(logits)
        assert logits.isfinite().any()
        ids.append(int(logits.argmax()))
        guide.accept(ids[-1])
        if ids[-1] in tokenizer.eos_token_ids:
            assert guide.finished or guide.error
            return ids[:-1]
        if guide.finished:
            return ids
    raise AssertionError(f"no end in {max_tokens} tokens: {tokenizer.decode(ids)[:300]}")


def allowed(guide: GrammarGuide, tokenizer: Tokenizer) -> set[int]:
    logits = torch.zeros(tokenizer.vocab_size + PADDING)
    guide.allow(logits)
    return set(logits.isfinite().nonzero().flatten().tolist())


def follow(guide: GrammarGuide, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    for token_id in ids:
        assert token_id in allowed(guide, tokenizer), tokenizer.decode([token_id])
        guide.accept(token_id)
