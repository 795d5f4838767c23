"""`generate`: continue a batch of prompts, with the arguments people know from transformers, on the engine."""

import difflib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor

from minim3.inference.cache import default_page_size
from minim3.inference.engine import DEFAULT_TOKENS_PER_STEP, Engine
from minim3.inference.media import num_media_tokens
from minim3.inference.request import FinishReason, Media, Request, SamplingParams, TokenLogprobs
from minim3.processing.detokenizer import IncrementalDetokenizer
from minim3.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minim3.model.causal_lm import CausalLM


class _Unset:
    """Stands for an argument that was not given, where None has a meaning of its own."""

    def __repr__(self) -> str:
        return "<not given>"


UNSET: Final = _Unset()
DEFAULT_NEW_TOKENS = 256
# What `generate` reads in a generation config; other fields there belong to other systems.
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p")
_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class Streamer(Protocol):
    """transformers' streamer: `put` gets the prompt `[1, S]` first, then each new token `[1]`; `end` closes."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate(..., return_dict_in_generate=True)` returns.

    sequences: int64 `[B, S + new]`. num_generated: tokens of each row before the fill. finish_reasons: "stop" (eos or a
    stop string) or "length". logprobs: fp32 `[B, new]` of the chosen tokens, 0 at the fill, when asked for;
    token_logprobs: the same as lists, with the most likely alternatives.
    """

    sequences: Tensor
    num_generated: tuple[int, ...]
    finish_reasons: tuple[FinishReason, ...]
    logprobs: Tensor | None = None
    token_logprobs: tuple[list[TokenLogprobs], ...] | None = None


def generate(
    model: "CausalLM",
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    pixel_values_videos: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    num_chunks_per_video: Any = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | _Unset | None = UNSET,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Streamer | None = None,
    num_return_sequences: int = 1,
    return_dict_in_generate: bool = False,
    output_logprobs: bool | int = False,
    prefill_chunk: int | None = None,
    page_size: int | None = None,
    shuffle_pages_seed: int | None = None,
    **unknown: Any,
) -> Tensor | GenerateOutput:
    """Continue every row of `input_ids`.

    A value not given is taken from the checkpoint's `generation_config.json` where it has one; then greedy decoding and
    256 new tokens. The answer of a row does not depend on the other rows, on padding, or on `prefill_chunk`.

    Args:
        input_ids: int64 `[B, S]`, prompts padded on either side.
        attention_mask: `[B, S]`, nonzero at tokens; None where no row is padded.
        pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw: media of all rows, in order of the rows, as
            the processor returns them. Each row takes as many grid rows as its placeholders ask for.
        num_chunks_per_video: accepted because processors return it; the grid says the same.
        max_new_tokens: most new tokens a row. max_length: the same counted with the S columns of the prompt.
        do_sample, temperature, top_k, top_p, min_p, repetition_penalty: see `SamplingParams`.
        seed: row i draws from stream `seed + i`; a list: one a row; None: seeds from torch's global generator.
        eos_token_id: an id or several that end a row; None never stops early; by default the checkpoint's.
        pad_token_id: fills rows that ended; by default the checkpoint's, else the first eos id, else 0.
        stop_strings: end a row when its text, control tokens included, contains one; needs the processor's `tokenizer`.
        streamer: for one row only.
        num_return_sequences: samples of each prompt, in adjacent rows.
        output_logprobs: True for those of the chosen tokens, n for the n most likely beside (needs the dictionary).
        prefill_chunk: tokens computed in one step, at most; bounds the memory of a long prompt.
        page_size, shuffle_pages_seed: the cache's page in tokens, and the order in which pages are handed out.

    Returns:
        int64 `[B, S + new]`: the S columns as given, new tokens from column S on in every row, then the fill. On the
        device of `input_ids`. A `GenerateOutput` if `return_dict_in_generate`.

    Raises:
        ValueError: a bad value or shape, a mask with a hole, media that do not match, a prompt longer than the model.
        TypeError: an unknown keyword.
    """
    _refuse(unknown)
    if input_ids is None or input_ids.dim() != 2 or 0 in input_ids.shape:
        given = "None" if input_ids is None else str(list(input_ids.shape))
        raise ValueError(f"input_ids must be [batch, tokens] with at least one token, got {given}")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids must hold integers, got {input_ids.dtype}")
    _check_count("num_return_sequences", num_return_sequences)
    if output_logprobs is not False and not return_dict_in_generate:
        raise ValueError("output_logprobs has no place in a plain tensor: pass return_dict_in_generate=True as well")

    defaults = _generation_defaults(model)
    prompts = _unpad(input_ids, attention_mask)
    batch_size, num_columns = input_ids.shape
    eos_token_ids = _eos_token_ids(model, defaults, eos_token_id)
    params = SamplingParams(
        max_new_tokens=_max_new_tokens(defaults, max_new_tokens, max_length, num_columns),
        **_sampling_choice(
            defaults, do_sample, {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        ),
        repetition_penalty=float(_first(repetition_penalty, defaults.get("repetition_penalty"), 1.0)),
        eos_token_ids=eos_token_ids,
        stop=_stop_strings(_first(stop_strings, defaults.get("stop_strings"), ())),
        logprobs=None if output_logprobs is False else int(output_logprobs) if output_logprobs is not True else 0,
    )
    if num_return_sequences > 1 and params.greedy:
        raise ValueError(f"{num_return_sequences} greedy answers to one prompt are all the same: pass do_sample=True")
    num_rows = batch_size * num_return_sequences
    if streamer is not None and num_rows != 1:
        raise ValueError(f"a streamer follows one row, got {num_rows}")
    seeds = _seeds(seed, num_rows)
    if pad_token_id is None:
        pad_token_id = _first(defaults.get("pad_token_id"), model.text_config.pad_token_id, *eos_token_ids[:1], 0)
    grids = [None if grid is None else torch.as_tensor(grid) for grid in (image_grid_thw, video_grid_thw)]
    grids = [grid.view(0, 3) if grid is not None and grid.shape == (0,) else grid for grid in grids]
    medias = _distribute(model, prompts, Media(pixel_values, grids[0], pixel_values_videos, grids[1]))

    limit = model.text_config.max_position_embeddings
    longest = max(len(prompt) for prompt in prompts)
    if longest <= limit < longest + params.max_new_tokens - 1 and max_new_tokens is not None:
        room = limit + 1 - longest
        warnings.warn(
            f"max_new_tokens is {max_new_tokens}, but after a prompt of {longest} tokens this model has positions for "
            f"{room} (max_position_embeddings {limit}): the answer ends there",
            stacklevel=3,
        )
    stored = [min(len(prompt) + min(params.max_new_tokens, DEFAULT_NEW_TOKENS), limit) for prompt in prompts]
    size = default_page_size(model.text_config) if page_size is None else page_size
    engine = Engine(
        model,
        page_size=page_size,
        max_tokens_per_step=DEFAULT_TOKENS_PER_STEP if prefill_chunk is None else prefill_chunk,
        max_running=max(num_rows, 1),
        initial_pages=num_return_sequences * sum(-(-tokens // max(size, 1)) for tokens in stored),
        shuffle_seed=shuffle_pages_seed,
    )
    requests: list[Request] = []
    for row in range(num_rows):
        prompt = row // num_return_sequences
        requests.append(
            engine.add_request(
                prompts[prompt],
                params if seeds is None else _with_seed(params, seeds[row]),
                media=medias[prompt],
                detokenizer=_detokenizer(tokenizer) if params.stop else None,
                request_id=f"row {row}",
            )
        )
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for event in engine.stream():
        if streamer is not None:
            streamer.put(torch.tensor([event.token_id]))
    if streamer is not None:
        streamer.end()
    return _collect(input_ids, requests, num_return_sequences, int(pad_token_id), return_dict_in_generate)


def _collect(
    input_ids: Tensor, requests: Sequence[Request], num_return_sequences: int, pad_token_id: int, as_dict: bool
) -> Tensor | GenerateOutput:
    width = max(request.num_output_tokens for request in requests)
    filled = [request.output_ids + [pad_token_id] * (width - request.num_output_tokens) for request in requests]
    new = torch.tensor(filled, dtype=input_ids.dtype, device=input_ids.device)
    sequences = torch.cat([input_ids.repeat_interleave(num_return_sequences, 0), new], 1)
    if not as_dict:
        return sequences
    reasons = [request.finish_reason for request in requests if request.finish_reason is not None]
    assert len(reasons) == len(requests)
    logprobs, token_logprobs = None, None
    if requests[0].params.logprobs is not None:
        token_logprobs = tuple(request.logprobs for request in requests)
        logprobs = torch.zeros(len(requests), width)
        for row, request in enumerate(requests):
            logprobs[row, : len(request.logprobs)] = torch.tensor([chosen.chosen for chosen in request.logprobs])
    counts = tuple(request.num_output_tokens for request in requests)
    return GenerateOutput(sequences, counts, tuple(reasons), logprobs, token_logprobs)


_SAYS_NOTHING: dict[str, tuple[Any, ...]] = {
    "use_cache": (True, None), "past_key_values": (None,), "num_beams": (1, None), "position_ids": (None,),
    "synced_gpus": (False, None), "generation_config": (None,), "logits_processor": (None,),
    "stopping_criteria": (None,),
}  # fmt: skip
"""Arguments of transformers' `generate` with the values that describe what happens here."""


def _refuse(unknown: Mapping[str, Any]) -> None:
    for name, value in unknown.items():
        if any(value is known for known in _SAYS_NOTHING.get(name, ())):
            continue
        if name in ("use_cache", "past_key_values"):
            raise ValueError(
                f"{name} is not an argument here: generate always runs on the paged cache; to keep a conversation's "
                "cache between calls, drive minim3.inference.Engine"
            )
        known = [p for p in inspect.signature(generate).parameters if p not in ("model", "unknown")]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(known)}"
        raise TypeError(f"generate() got an unknown argument {name!r}{hint}")


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _generation_defaults(model: "CausalLM") -> Mapping[str, Any]:
    config = getattr(model, "generation_config", None)
    return {} if config is None else config


def _unpad(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row, without the padding on either side."""
    rows: list[list[int]] = input_ids.tolist()
    if attention_mask is None:
        return rows
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} must have the shape of input_ids {list(input_ids.shape)}"
        )
    prompts = []
    for row, (ids, keep) in enumerate(zip(rows, attention_mask.bool().tolist(), strict=True)):
        if True not in keep:
            raise ValueError(f"row {row} of attention_mask hides every token: the prompt is empty")
        first, stop = keep.index(True), len(keep) - keep[::-1].index(True)
        if not all(keep[first:stop]):
            hole = keep.index(False, first)
            raise ValueError(
                f"row {row} of attention_mask has a hole at column {hole}: padding may stand on the left or on the "
                "right of a row, not inside it"
            )
        prompts.append(ids[first:stop])
    return prompts


def _eos_token_ids(
    model: "CausalLM", defaults: Mapping[str, Any], given: int | Sequence[int] | _Unset | None
) -> tuple[int, ...]:
    if isinstance(given, _Unset):
        given = defaults.get("eos_token_id")
        if given is None:
            given = model.text_config.eos_token_id
    if given is None:
        return ()
    return (given,) if isinstance(given, int) else tuple(int(token_id) for token_id in given)


def _max_new_tokens(
    defaults: Mapping[str, Any], max_new_tokens: int | None, max_length: int | None, num_columns: int
) -> int:
    if max_new_tokens is not None and max_length is not None:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) and max_length ({max_length}) say the same: pass one")
    if max_new_tokens is None and max_length is None:
        max_new_tokens, max_length = defaults.get("max_new_tokens"), defaults.get("max_length")
    if max_new_tokens is None and max_length is not None:
        if max_length <= num_columns:
            raise ValueError(f"max_length ({max_length}) leaves no room after a prompt of {num_columns} columns")
        return max_length - num_columns
    return DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens


def _sampling_choice(
    defaults: Mapping[str, Any], do_sample: bool | None, given: Mapping[str, float | None]
) -> dict[str, Any]:
    """The fields of `SamplingParams` that say how to draw: explicit arguments, then the checkpoint's, then off."""
    if do_sample is None:
        do_sample = bool(defaults.get("do_sample") or False)
    if not do_sample:
        idle = [name for name, value in given.items() if value is not None and value != _OFF[name]]
        if idle and given["temperature"] != 0:
            warnings.warn(f"{', '.join(idle)} without do_sample=True has no effect: decoding is greedy", stacklevel=4)
        return {"do_sample": False}
    chosen = {name: _first(given[name], defaults.get(name), _OFF[name]) for name in _SAMPLING_FIELDS}
    return {"do_sample": True, **chosen}


def _stop_strings(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _seeds(seed: int | Sequence[int] | None, num_rows: int) -> list[int] | None:
    if seed is None:
        return None
    if isinstance(seed, int):
        return [seed + row for row in range(num_rows)]
    if len(seed) != num_rows:
        raise ValueError(f"{len(seed)} seeds were given for {num_rows} rows")
    return list(seed)


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return replace(params, seed=seed)


def _detokenizer(tokenizer: Any) -> IncrementalDetokenizer:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor will do
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"stop_strings need tokenizer=processor.tokenizer, got {type(tokenizer).__name__}")
    return IncrementalDetokenizer(tokenizer, skip_special_tokens=False)


def _distribute(model: "CausalLM", prompts: Sequence[Sequence[int]], media: Media) -> list[Media | None]:
    """Hand each prompt the grid rows, and their patches, that its placeholders ask for, in order.

    Raises:
        ValueError: placeholders and features do not add up, over all prompts or within one.
    """
    if media.empty:
        return [None] * len(prompts)
    if getattr(model.config, "vision_config", None) is None:
        raise ValueError("pictures or clips were given, but this is a text-only model without a vision tower")
    images = _split(model, prompts, "image", media.pixel_values, media.image_grid_thw)
    videos = _split(model, prompts, "video", media.pixel_values_videos, media.video_grid_thw)
    return [Media(*image, *video) for image, video in zip(images, videos, strict=True)]


def _split(
    model: "CausalLM", prompts: Sequence[Sequence[int]], kind: str, pixels: Tensor | None, grid_thw: Tensor | None
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Each prompt's part of `pixels` `[patches, ...]` and of `grid_thw` `[n, 3]`; (None, None) where it has none."""
    if pixels is None or grid_thw is None:
        return [(None, None)] * len(prompts)
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
        raise ValueError(f"the {kind} grid must be [n, 3] (time, rows, columns), got {list(grid_thw.shape)}")
    patches = grid_thw.prod(-1).tolist()
    if sum(patches) != pixels.shape[0]:
        raise ValueError(f"the {kind} grids ask for {sum(patches)} patches, but {pixels.shape[0]} were given")
    tokens = num_media_tokens(model, grid_thw)
    token_id = getattr(model.config, f"{kind}_token_index")
    counts = [sum(known == token_id for known in prompt) for prompt in prompts]
    if sum(counts) != sum(tokens):
        raise ValueError(
            f"the prompts have {sum(counts)} {kind} placeholder tokens (id {token_id}), but the {kind}s given make "
            f"{sum(tokens)} features"
        )
    parts: list[tuple[Tensor | None, Tensor | None]] = []
    row = first_patch = 0
    for prompt, count in enumerate(counts):
        first_row, found = row, 0
        while found < count:
            found += tokens[row]
            row += 1
        if found != count:
            raise ValueError(
                f"prompt {prompt} has {count} {kind} placeholder tokens (id {token_id}), but the next "
                f"{row - first_row} {kind} grid rows make {found} features"
            )
        num_patches = sum(patches[first_row:row])
        parts.append(
            (pixels[first_patch : first_patch + num_patches], grid_thw[first_row:row]) if count else (None, None)
        )
        first_patch += num_patches
    return parts
