"""One forward pass over a prompt and its answer, with everything that was decided on the way kept."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from minim3.inference.engine import Engine
from minim3.inference.request import SamplingParams
from minim3.inspection.data import Inspection, LayerInspection, WrittenToken
from minim3.inspection.statistics import expert_load, selection_statistics
from minim3.inspection.tokens import describe_media, describe_tokens
from minim3.model.attention import MiniMaxM3Indexer
from minim3.model.batch import ForwardBatch, ForwardRecord
from minim3.model.causal_lm import CausalLM
from minim3.model.decoder import Block
from minim3.processing.processor import MiniMaxM3VLProcessor

MAX_TOKENS = 4096
"""Tokens of prompt and answer, unless more are allowed."""
MAX_NUMBERS = 8_000_000
"""Numbers kept of the layers that are shown in detail: about ten bytes each once written."""

_NUM_LIKELIEST = 5
_QUERIES_AT_ONCE = 64  # rows of scores against all keys held at once
Scores = tuple[tuple[tuple[float, ...], ...], ...]
_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def record(
    model: CausalLM,
    processor: MiniMaxM3VLProcessor,
    prompt: Sequence[Mapping[str, Any]] | Sequence[int],
    *,
    answer_ids: Sequence[int] | None = None,
    media: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking_mode: str | None = None,
    max_new_tokens: int = 128,
    params: SamplingParams | None = None,
    layers: Sequence[int] | None = None,
    max_tokens: int = MAX_TOKENS,
    name: str = "",
) -> Inspection:
    """Let `model` answer `prompt`, and look inside.

    The choices are those of one forward pass over prompt and answer. The engine, which computes the same in chunks and
    one token at a time, takes the same ones but for ties within rounding.

    Args:
        prompt: a conversation in OpenAI form, or token ids.
        answer_ids: an answer that was given before; None lets the model answer now.
        media: of a prompt of token ids, as the processor returns it.
        tools, thinking_mode: of the conversation.
        max_new_tokens, params: of the answer, where the model answers now: greedy, unless `params` says otherwise. It
            never grows past `max_tokens`.
        layers: the layers to show in detail; None: all. Statistics are of all layers in any case.
        max_tokens: the most tokens that prompt and answer may have.
        name: what to call the model.

    Raises:
        ValueError: prompt and answer are longer than `max_tokens`, or too long for so many layers in detail; an empty
            answer; a layer that the model does not have; a prompt that it cannot take.
    """
    capture = capture_answer(
        model, processor, prompt, answer_ids=answer_ids, media=media, tools=tools, thinking_mode=thinking_mode,
        max_new_tokens=max_new_tokens, params=params, layers=layers, max_tokens=max_tokens,
    )  # fmt: skip
    return describe(model, processor, capture, name)


@dataclass
class Capture:
    """What the forward pass left behind, on the CPU, to be described by `describe` in any thread.

    token_ids: of prompt and answer. inputs: what the processor made of the prompt. shown: layers to show in detail.
    blocks, experts (ids and weights): by layer; scores: `[A][H][B]` by layer.
    """

    token_ids: list[int]
    num_prompt: int
    inputs: Mapping[str, Any]
    shown: frozenset[int]
    blocks: dict[int, Tensor] = field(default_factory=dict)
    experts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    scores: dict[int, Scores] = field(default_factory=dict)
    written: tuple[WrittenToken, ...] = ()


def capture_answer(
    model: CausalLM,
    processor: MiniMaxM3VLProcessor,
    prompt: Sequence[Mapping[str, Any]] | Sequence[int],
    *,
    answer_ids: Sequence[int] | None = None,
    media: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking_mode: str | None = None,
    max_new_tokens: int = 128,
    params: SamplingParams | None = None,
    layers: Sequence[int] | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Capture:
    """The part of `record` that runs the model; arguments and errors are those of `record`."""
    config = model.text_config
    shown = checked_layers(layers, config.num_hidden_layers)
    prompt_ids, inputs = _encode(processor, prompt, media, tools, thinking_mode)
    num_asked = len(answer_ids) if answer_ids is not None else 1
    _check_length(len(prompt_ids) + num_asked, max_tokens)
    if answer_ids is None:
        params = params or SamplingParams(max_new_tokens=max_new_tokens, eos_token_ids=_eos_token_ids(model, processor))
        params = replace(params, max_new_tokens=min(params.max_new_tokens, max_tokens - len(prompt_ids)))
        answer_ids = _answer(model, prompt_ids, inputs, params)
    token_ids = [*prompt_ids, *(int(token_id) for token_id in answer_ids)]
    num_prompt = len(prompt_ids)
    if not prompt_ids:
        raise ValueError("the prompt is empty: at least one token is needed")
    if len(token_ids) == num_prompt:
        raise ValueError("the answer is empty: there is no token to look into")
    _check_length(len(token_ids), max_tokens)
    if bad := [token_id for token_id in token_ids[num_prompt:] if not 0 <= token_id < config.vocab_size]:
        raise ValueError(f"token id {bad[0]} of the answer is outside the vocabulary of {config.vocab_size}")
    _check_size(model, len(token_ids), num_prompt, shown)
    capture = Capture(token_ids, num_prompt, inputs, shown)
    with torch.inference_mode():
        hidden = _forward(model, capture)
        capture.written = _describe_written(model, processor, hidden, token_ids[num_prompt:])
    return capture


def describe(model: CausalLM, processor: MiniMaxM3VLProcessor, capture: Capture, name: str = "") -> Inspection:
    """The part of `record` after the model has run; of `model` only the shape is read."""
    config, num_prompt = model.text_config, capture.num_prompt
    items, places = describe_media(model.config, processor, capture.token_ids[:num_prompt], capture.inputs)
    blocks = _blocks(model)
    sparse = next((block.self_attn.indexer for block in blocks if block.self_attn.indexer), None)
    return Inspection(
        model=name,
        num_prompt_tokens=num_prompt,
        tokens=describe_tokens(processor.tokenizer, capture.token_ids, places, items),
        written=capture.written,
        media=items,
        layers=tuple(_describe_layers(blocks, config.num_local_experts, capture)),
        block_size=sparse.block_size if sparse else 0,
        topk_blocks=sparse.topk_blocks if sparse else 0,
        init_blocks=sparse.init_blocks if sparse else 0,
        local_blocks=sparse.local_blocks if sparse else 0,
        num_index_heads=sparse.num_index_heads if sparse else 0,
        num_query_heads=config.num_attention_heads,
        num_experts=config.num_local_experts if any(block.is_moe_layer for block in blocks) else 0,
        has_shared_expert=bool(config.n_shared_experts),
    )


def _forward(model: CausalLM, capture: Capture) -> Tensor:
    """Fill in `capture`; returns the final hidden states `[A, hidden]` of the queries that wrote the answer.

    The last token of the answer is not fed: nothing was computed at its place when the answer was written.
    """
    text, blocks, first = model.text_model, _blocks(model), capture.num_prompt - 1
    ids = torch.tensor(capture.token_ids[:-1], device=model.device)
    tensors = {key: capture.inputs[key].to(model.device) for key in _MEDIA if capture.inputs.get(key) is not None}
    embeds = model.embed_packed(ids, **tensors) if tensors else model.embed_tokens_packed(ids)  # type: ignore[operator]
    kept = ForwardRecord(router_logits=[], expert_ids=[], block_indices=[])
    batch = ForwardBatch.packed([len(ids)], device=ids.device)
    with _index_scores(blocks, first, capture.shown, capture.scores):
        hidden = text.forward_packed(embeds, batch, kept)
    assert kept.block_indices is not None
    assert kept.expert_ids is not None
    assert kept.router_logits is not None
    sparse = [index for index, block in enumerate(blocks) if block.self_attn.indexer is not None]
    for index, block_indices in zip(sparse, kept.block_indices, strict=True):
        capture.blocks[index] = block_indices.cpu()
    moe = [index for index, block in enumerate(blocks) if block.is_moe_layer]
    for index, expert_ids, logits in zip(moe, kept.expert_ids, kept.router_logits, strict=True):
        _, weights = blocks[index].block_sparse_moe.route(logits, expert_ids)
        order = torch.argsort(weights, dim=-1, descending=True, stable=True)
        capture.experts[index] = expert_ids.gather(-1, order).cpu(), weights.gather(-1, order).float().cpu()
    return hidden[first:]


@contextmanager
def _index_scores(
    blocks: Sequence[Block], first_query: int, shown: frozenset[int], scores: dict[int, Scores]
) -> Iterator[None]:
    """While it is open, sparse layers in `shown` leave block scores `[A][H][B]` of the positions from `first_query` on.

    They are computed a second time, from what the layer's attention is given, since the kernels that select hold scores
    for a moment only.
    """

    def watch(index: int, indexer: MiniMaxM3Indexer) -> Any:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index_q, index_k = indexer.project(args[0], kwargs["freqs_cis"])
            scores[index] = _block_scores(index_q[first_query:], index_k.squeeze(-2), first_query, indexer)

        return before

    handles = [
        block.self_attn.register_forward_pre_hook(watch(index, block.self_attn.indexer), with_kwargs=True)
        for index, block in enumerate(blocks)
        if index in shown and block.self_attn.indexer is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _block_scores(index_q: Tensor, index_k: Tensor, first_query: int, indexer: MiniMaxM3Indexer) -> Scores:
    """`[A, H, D]` x `[Q, D]` -> the score of each block that a query sees, by the definition in `kernels.reference`."""
    size, num_keys = indexer.block_size, index_k.shape[0]
    num_blocks = -(-num_keys // size)
    keys = torch.arange(num_keys, device=index_k.device)
    rows: list[tuple[tuple[float, ...], ...]] = []
    for start in range(0, index_q.shape[0], _QUERIES_AT_ONCE):
        queries = index_q[start : start + _QUERIES_AT_ONCE].float()
        positions = torch.arange(queries.shape[0], device=keys.device) + first_query + start
        raw = torch.einsum("ahd,sd->ahs", queries, index_k.float()) * indexer.index_head_dim**-0.5
        raw = raw.masked_fill(keys > positions[:, None, None], -torch.inf)
        raw = torch.nn.functional.pad(raw, (0, num_blocks * size - num_keys), value=-torch.inf)
        raw = raw.unflatten(-1, (num_blocks, size))
        best = raw.amax(-1) if indexer.score_type == "max" else raw.logsumexp(-1)
        for position, of_heads in zip(positions.tolist(), best.tolist()):
            seen = position // size + 1
            rows.append(tuple(tuple(round(score, 4) for score in head[:seen]) for head in of_heads))
    return tuple(rows)


def _describe_layers(blocks: Sequence[Block], num_experts: int, capture: Capture) -> Iterator[LayerInspection]:
    first = capture.num_prompt - 1
    for index, block in enumerate(blocks):
        selected, chooses, statistics, experts, weights, load = None, None, None, None, None, None
        indexer = block.self_attn.indexer
        if indexer is not None:
            ids = capture.blocks[index]
            statistics = selection_statistics(
                ids, indexer.block_size, indexer.topk_blocks, indexer.init_blocks, indexer.local_blocks
            )
            if index in capture.shown:
                selected = tuple(
                    tuple(tuple(block for block in head if block >= 0) for head in heads)
                    for heads in ids[first:].tolist()
                )
                budget = indexer.topk_blocks
                chooses = tuple(p // indexer.block_size + 1 > budget for p in range(first, ids.shape[0]))
        if block.is_moe_layer:
            ids, values = capture.experts[index]
            load = expert_load(ids, first, num_experts)
            if index in capture.shown:
                experts = tuple(map(tuple, ids.tolist()))
                weights = tuple(tuple(round(value, 4) for value in row) for row in values.tolist())
        yield LayerInspection(
            layer=index,
            attention="full" if indexer is None else "sparse",
            mlp="moe" if block.is_moe_layer else "dense",
            selected=selected,
            scores=capture.scores.get(index),
            chooses=chooses,
            expert_ids=experts,
            expert_weights=weights,
            selection=statistics,
            load=load,
        )


def _describe_written(
    model: CausalLM, processor: MiniMaxM3VLProcessor, hidden: Tensor, answer_ids: Sequence[int]
) -> tuple[WrittenToken, ...]:
    written = []
    for start in range(0, len(answer_ids), _QUERIES_AT_ONCE):
        ids = torch.tensor(answer_ids[start : start + _QUERIES_AT_ONCE], device=hidden.device)
        logits = model.compute_logits(hidden[start : start + len(ids)]).float()
        probabilities = logits.softmax(-1)
        chosen = probabilities.gather(-1, ids[:, None])
        ranks = (probabilities > chosen).sum(-1) + 1
        best = probabilities.topk(min(_NUM_LIKELIEST, probabilities.shape[-1]), -1)
        rows = zip(chosen.squeeze(-1).tolist(), ranks.tolist(), best.indices.tolist(), best.values.tolist())
        for probability, rank, ids_best, values in rows:
            texts = [processor.tokenizer.decode([token_id]) for token_id in ids_best]
            likeliest = tuple((text, round(value, 5)) for text, value in zip(texts, values))
            written.append(WrittenToken(round(probability, 5), rank, likeliest))
    return tuple(written)


def _encode(
    processor: MiniMaxM3VLProcessor,
    prompt: Sequence[Mapping[str, Any]] | Sequence[int],
    media: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None,
    thinking_mode: str | None,
) -> tuple[list[int], Mapping[str, Any]]:
    ids = [token for token in prompt if isinstance(token, int)]
    if ids:
        if tools is not None or thinking_mode is not None:
            raise ValueError("a prompt of token ids takes neither tools nor a thinking mode: they are in it already")
        return ids, media or {}
    if media is not None:
        raise ValueError("media go with a prompt of token ids; a conversation holds its own")
    inputs = processor.apply_chat_template(prompt, tools, thinking_mode)
    return inputs["input_ids"][0].tolist(), inputs


def _blocks(model: CausalLM) -> list[Block]:
    return list(model.text_model.layers)  # type: ignore[arg-type]


def _answer(
    model: CausalLM, prompt_ids: Sequence[int], inputs: Mapping[str, Any], params: SamplingParams
) -> Sequence[int]:
    engine = Engine(model)
    request = engine.add_request(prompt_ids, params, media=inputs)
    engine.run()
    return request.output_ids


def _eos_token_ids(model: CausalLM, processor: MiniMaxM3VLProcessor) -> tuple[int, ...]:
    """The checkpoint's, and the token that closes a turn."""
    given = (model.generation_config or {}).get("eos_token_id", model.text_config.eos_token_id)
    ids = [] if given is None else [given] if isinstance(given, int) else list(given)
    ids += [i for i in processor.tokenizer.eos_token_ids if i < model.text_config.vocab_size]
    return tuple(dict.fromkeys(ids))


def checked_layers(layers: Sequence[int] | None, num_layers: int) -> frozenset[int]:
    """The layers to show, all for None. Raises ValueError for one that the model does not have."""
    if layers is None:
        return frozenset(range(num_layers))
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer {layer} is asked for, the model has layers 0 to {num_layers - 1}")
    return frozenset(layers)


def _check_length(num_tokens: int, max_tokens: int) -> None:
    if num_tokens > max_tokens:
        raise ValueError(
            f"prompt and answer have {num_tokens} tokens, looking inside takes at most {max_tokens}: shorten the "
            "conversation, or allow more"
        )


def _check_size(model: CausalLM, num_tokens: int, num_prompt: int, shown: frozenset[int]) -> None:
    """Raises ValueError where the details of so many layers would not fit in memory, and later on a screen."""
    blocks, numbers = _blocks(model), 0
    for index in shown:
        block = blocks[index]
        indexer = block.self_attn.indexer
        if indexer is not None:
            seen = math.ceil(num_tokens / indexer.block_size)
            numbers += (num_tokens - num_prompt) * indexer.num_index_heads * (seen + min(seen, indexer.topk_blocks))
        if block.is_moe_layer:
            numbers += 2 * num_tokens * model.text_config.num_experts_per_tok
    if numbers > MAX_NUMBERS:
        raise ValueError(
            f"{len(shown)} layers of {num_tokens} tokens are {numbers:,} numbers, at most {MAX_NUMBERS:,} are kept: "
            f"ask for fewer layers (about {max(1, len(shown) * MAX_NUMBERS // numbers)}) or a shorter answer"
        )
