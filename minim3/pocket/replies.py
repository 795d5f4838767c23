"""Conversations that pocket is asked to go on with, and what came of it, read by the parser that serving uses.

`model_replies` asks a model and its processor; evaluation takes any function that gives a `Reply` for a `Dialogue`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minim3.processing.chat import END_THINK, THINK
from minim3.processing.messages import ToolCall
from minim3.processing.output import ParsedOutput, parse_output
from minim3.processing.processor import ProcessorOutput
from minim3.processing.tokenizer import Tokenizer

MAX_NEW_TOKENS = 160
DRAFTED_PER_BATCH = 16  # replies of a batch whose drafts are counted: that takes a second pass over the prompt
_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass(frozen=True)
class Dialogue:
    """Messages (pictures and clips inside) that wait for the assistant's turn. `fps` is that of each clip."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    thinking_mode: str | None = None
    fps: Sequence[float] = ()


@dataclass(frozen=True)
class Reply:
    """`well_formed`: the thinking block is as the mode asks (see `is_well_formed`). `drafts`: how many tokens the
    first MTP module would have drafted, and how many of them are those of the reply; (0, 0) where not counted."""

    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    well_formed: bool = True
    drafts: tuple[int, int] = (0, 0)


ReplyFunction = Callable[[Sequence[Dialogue]], Sequence[Reply]]


def is_well_formed(ids: Sequence[int], parsed: ParsedOutput, tokenizer: Tokenizer, thinking_mode: str | None) -> bool:
    """Whether a turn ended, said or called something, and thought as the mode asks.

    Enabled: a reasoning, closed once (the prompt opened it). Disabled: no marker of thinking at all. Adaptive: it
    starts with the bare `</mm:think>`, or with `<mm:think>`, a reasoning and `</mm:think>`.
    """
    begin, end = tokenizer.token_to_id(THINK), tokenizer.token_to_id(END_THINK)
    markers = [token for token in ids if token in (begin, end)]
    ended = tokenizer.eos_token_id in ids
    if not ended or not (parsed.content or parsed.tool_calls):
        return False
    thought = bool(parsed.reasoning and parsed.reasoning.strip())
    if thinking_mode == "enabled":
        return thought and markers == [end]
    if thinking_mode == "disabled":
        return not markers
    if ids[0] == end:
        return markers == [end]
    return ids[0] == begin and thought and markers == [begin, end]


def model_replies(model: Any, processor: Any, *, max_new_tokens: int = MAX_NEW_TOKENS) -> ReplyFunction:
    """Greedy replies of a model and its processor, as `minim3.load` returns them; a batch is one call of `generate`."""
    tokenizer = processor.tokenizer
    eos = tokenizer.eos_token_id

    def reply(dialogues: Sequence[Dialogue]) -> list[Reply]:
        prompts = [_prompt(processor, dialogue) for dialogue in dialogues]
        inputs = _join(prompts, eos).to(model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos)
        replies = []
        for number, (dialogue, prompt, row) in enumerate(zip(dialogues, prompts, output, strict=True)):
            ids = row[inputs["input_ids"].shape[1] :].tolist()
            ids = ids[: ids.index(eos) + 1] if eos in ids else ids
            parsed = parse_output(ids, tokenizer, dialogue.thinking_mode, dialogue.tools)
            well_formed = is_well_formed(ids, parsed, tokenizer, dialogue.thinking_mode)
            drafts = _count_drafts(model, prompt, ids) if number < DRAFTED_PER_BATCH else (0, 0)
            replies.append(Reply(parsed.content, parsed.reasoning, parsed.tool_calls, well_formed, drafts))
        return replies

    return reply


def _prompt(processor: Any, dialogue: Dialogue) -> ProcessorOutput:
    metadata = [{"fps": fps} for fps in dialogue.fps] or None
    return processor.apply_chat_template(
        dialogue.messages, dialogue.tools, dialogue.thinking_mode, video_metadata=metadata
    )


def _join(prompts: Sequence[ProcessorOutput], pad: int) -> ProcessorOutput:
    """One batch, padded on the left; media one after another."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    joined = ProcessorOutput()
    for name, value in (("input_ids", pad), ("attention_mask", 0)):
        rows = [prompt[name] for prompt in prompts]
        joined[name] = torch.cat(
            [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=value) for row in rows]
        )
    for name in _MEDIA:
        found = [prompt[name] for prompt in prompts if name in prompt]
        if found:
            joined[name] = torch.cat(found)
    return joined


@torch.inference_mode()
def _count_drafts(model: Any, prompt: ProcessorOutput, ids: Sequence[int]) -> tuple[int, int]:
    """After each token of a greedy reply but the last, the first MTP module drafts the next one."""
    if len(ids) < 2 or getattr(model.text_model, "mtp", None) is None:
        return 0, 0
    inputs = prompt.to(model.device)
    start = inputs["input_ids"].shape[1]
    new = torch.tensor([ids], device=model.device)
    media = {name: inputs[name] for name in _MEDIA if name in inputs}
    output = model(input_ids=torch.cat([inputs["input_ids"], new], dim=1), **media, output_mtp_logits=True)
    # At position t the module has seen token t + 1 and speaks of token t + 2.
    drafts = output.mtp_per_depth_logits[0][0, start - 1 : start + len(ids) - 2].argmax(-1)
    return len(ids) - 1, int((drafts == new[0, 1:]).sum())
