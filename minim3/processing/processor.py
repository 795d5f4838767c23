"""One object that turns messages, or raw text with placeholders, into token ids and patches, and ids back into text."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minim3.processing.chat import (
    BEGIN_CONVERSATION,
    BEGIN_TURN,
    END_THINK,
    NAMESPACE,
    THINK,
    Segment,
    check_thinking_mode,
    encode_segments,
    render_normalized,
)
from minim3.processing.image import MiniMaxM3VLImageProcessor
from minim3.processing.messages import IMAGE, VIDEO, Message, normalize_messages, normalize_tools
from minim3.processing.placeholders import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    Expansion,
    expand_image,
    is_empty,
    media_of,
    process_images,
    process_videos,
)
from minim3.processing.template import ChatTemplate
from minim3.processing.tokenizer import END_OF_TURN, TOKENIZER_FILE, Tokenizer
from minim3.processing.video import MiniMaxM3VLVideoProcessor

CHAT_TEMPLATE_FILE = "chat_template.jinja"
_MARKERS = (BEGIN_CONVERSATION, BEGIN_TURN, END_OF_TURN, THINK, END_THINK)


class ProcessorOutput(dict[str, Any]):
    """Model inputs by name, to be passed on as `**inputs`; values can be read as attributes and moved with `to`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the processor returned no {name!r}, only {', '.join(self)}") from None

    def to(self, *args: Any, **kwargs: Any) -> "ProcessorOutput":
        """Move (or cast the floating-point) tensors, with the arguments of `torch.Tensor.to`."""
        moved = ProcessorOutput()
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                target = value.to(*args, **kwargs)
                # Ids and grids move with the pixels but are never cast with them.
                value = target if value.is_floating_point() else value.to(target.device)
            moved[name] = value
        return moved


class MiniMaxM3VLProcessor:
    """Tokenizer, image processor, video processor and chat template of one checkpoint.

    Args:
        image_processor, video_processor: None for a text-only model, which then refuses pictures and clips.
        tokenizer: see `minim3.processing.tokenizer.Tokenizer`. None for bare weights: then only the image and video
            processors can be used, and whatever needs text is a ValueError.
        chat_template: Jinja source; None for the built-in rendering of the documented format.
    """

    def __init__(
        self,
        image_processor: MiniMaxM3VLImageProcessor | None = None,
        tokenizer: Tokenizer | None = None,
        video_processor: MiniMaxM3VLVideoProcessor | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.image_processor = image_processor
        self._tokenizer = tokenizer
        self.video_processor = video_processor
        self.chat_template = chat_template
        self._compiled: ChatTemplate | None = None if chat_template is None else ChatTemplate(chat_template)
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        self.image_token_id = None if tokenizer is None else tokenizer.token_to_id(IMAGE_TOKEN)
        self.video_token_id = None if tokenizer is None else tokenizer.token_to_id(VIDEO_TOKEN)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(f"text needs a tokenizer, and this processor has none (a checkpoint's {TOKENIZER_FILE})")
        return self._tokenizer

    # --- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path, *, require_tokenizer: bool = True) -> "MiniMaxM3VLProcessor":
        """Load from a checkpoint folder. A folder without vision settings gives a text-only processor.

        Raises:
            ValueError: the folder is missing, or its tokenizer is and is required, or a file is broken; it is named.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        tokenizer, template = None, None
        if require_tokenizer or (folder / TOKENIZER_FILE).is_file():
            tokenizer = Tokenizer.from_pretrained(folder)
            template = tokenizer.config.get("chat_template")
        if (folder / CHAT_TEMPLATE_FILE).is_file():
            template = (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
        elif isinstance(template, list):  # several named templates
            template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
        if _has_vision(folder):
            image_processor = _load_part(MiniMaxM3VLImageProcessor, folder)
            video_processor = _load_part(MiniMaxM3VLVideoProcessor, folder)
            return cls(image_processor, tokenizer, video_processor, template)
        return cls(None, tokenizer, None, template)

    def save_pretrained(self, path: str | Path) -> None:
        """Write every part into the folder `path`, in the files `from_pretrained` (and transformers) read."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)
        for part in (self.image_processor, self.video_processor):
            if part is not None:
                part.save_pretrained(folder)
        if self.image_processor is not None:
            text = json.dumps({"processor_class": type(self).__name__}, indent=2) + "\n"
            (folder / "processor_config.json").write_text(text, encoding="utf-8")
        stored = None if self._tokenizer is None else self._tokenizer.config.get("chat_template")
        if self.chat_template is not None and stored != self.chat_template:
            (folder / CHAT_TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")

    # --- prompts -------------------------------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        return_tensors: str | None = "pt",
        padding: bool = True,
        video_metadata: Any = None,
        images_kwargs: Mapping[str, Any] | None = None,
        videos_kwargs: Mapping[str, Any] | None = None,
    ) -> ProcessorOutput:
        """Raw prompts to model inputs. Control tokens written in `text` are control tokens: for what a user typed, use
        `apply_chat_template`.

        Args:
            images, videos: media of all prompts, flat or one list a prompt, in the order of their placeholders
                `]<]image[>[` and `]<]video[>[`, each of which becomes as many tokens as its media needs.
            text: one prompt or a list of them.
            return_tensors: "pt", "np", or None for lists of ids.
            padding: pad shorter prompts on the left; the attention mask is 0 there.
            video_metadata: one entry a clip; see the video processor.
            images_kwargs, videos_kwargs: settings of the image and the video processor for this call (`max_pixels`).

        Returns:
            input_ids [B, S] int64, attention_mask [B, S] int64, and, where there are media, pixel_values [N, C*T*P*P]
            fp32, image_grid_thw [images, 3] int64, pixel_values_videos, video_grid_thw [chunks, 3] int64.

        Raises:
            ValueError: placeholders and media differ in number, or media cannot be read.
        """
        if text is None:
            raise ValueError("text is missing: pass the prompt, with one placeholder for each picture and clip")
        prompts = [text] if isinstance(text, str) else list(text)
        segments = [[Segment(prompt, True)] for prompt in prompts]
        settings = images_kwargs, videos_kwargs
        return self._process(segments, images, videos, video_metadata, settings, padding, return_tensors)

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking_mode: str | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        *,
        padding: bool = True,
        images: Any = None,
        videos: Any = None,
        video_metadata: Any = None,
        images_kwargs: Mapping[str, Any] | None = None,
        videos_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> Any:
        """OpenAI-style messages to model inputs; nothing a message holds becomes a control token.

        Args:
            messages: one conversation, or a list of conversations (a batch, padded on the left).
            tools: functions the model may call.
            thinking_mode: enabled, disabled or adaptive (default).
            add_generation_prompt: end with the opening of the assistant's turn.
            tokenize: False returns the rendered text (with placeholders not yet expanded) in the place of ids; encoding
                that text again cannot tell typed markers from the template's.
            return_dict: False returns the ids alone.
            images, videos: media in the order of the prompt, instead of those in the messages.
            video_metadata, images_kwargs, videos_kwargs: as in `__call__`.
            template_variables: further variables that the checkpoint's own template reads.

        Returns:
            the same as `__call__`.

        Raises:
            ValueError: malformed messages or tools, unreadable media, a template that refuses the conversation, or a
                variable that it does not read.
        """
        is_batch = bool(messages) and not isinstance(messages[0], Mapping)
        if is_batch and not all(isinstance(conversation, (list, tuple)) for conversation in messages):
            raise ValueError(f"messages must hold mappings or lists of them, got {type(messages[0]).__name__}")
        conversations = [normalize_messages(one) for one in (messages if is_batch else [messages])]
        segments = [
            self._render(one, tools, thinking_mode, add_generation_prompt, template_variables) for one in conversations
        ]
        if not tokenize:
            texts = ["".join(segment.text for segment in one) for one in segments]
            return texts if is_batch else texts[0]
        if images is None:
            images = media_of(conversations, IMAGE)
        if videos is None:
            videos = media_of(conversations, VIDEO)
        settings = images_kwargs, videos_kwargs
        output = self._process(segments, images, videos, video_metadata, settings, padding, return_tensors)
        if return_tensors is None and not is_batch:
            output["input_ids"], output["attention_mask"] = output["input_ids"][0], output["attention_mask"][0]
        return output if return_dict else output["input_ids"]

    @property
    def template_variables(self) -> frozenset[str]:
        """The variables that the checkpoint's own template reads; none in the built-in chat format."""
        return frozenset() if self._compiled is None else self._compiled.variables

    def encode_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking_mode: str | None = None,
        *,
        num_image_tokens: Sequence[int] = (),
        video_expansions: Sequence[Expansion] = (),
    ) -> tuple[list[int], list[bool]]:
        """A conversation to train on, without touching its media.

        Args:
            num_image_tokens: for each picture of the conversation, in order, how many tokens it takes
                (t*h*w / merge_size**2 of its grid); pictures are processed elsewhere.
            video_expansions: for each clip, see `minim3.processing.placeholders.expand_video`.

        Returns:
            ids and mask, equally long; the mask is True on what the assistant is to produce: everything after the
            header of its turns (reasoning or the bare `</mm:think>`, text, tool calls) and the token that closes them.
        """
        segments = self._render(normalize_messages(messages), tools, thinking_mode, False, {})
        return encode_segments(
            self.tokenizer, segments, [expand_image(count) for count in num_image_tokens], video_expansions
        )

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        thinking_mode: str | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> list[Segment]:
        mode = check_thinking_mode(thinking_mode)
        checked_tools = normalize_tools(tools)
        if self._compiled is not None:
            return self._compiled.render(
                self.tokenizer, messages, checked_tools, mode, add_generation_prompt, **variables
            )
        if variables:
            raise ValueError(f"the built-in chat format has no variables {', '.join(variables)}")
        needed = (*_MARKERS, NAMESPACE) if checked_tools else _MARKERS
        missing = [token for token in needed if token not in self.tokenizer.added_tokens]
        if missing:
            raise ValueError(f"the tokenizer lacks the control tokens {' '.join(missing)} of the chat format")
        return render_normalized(messages, checked_tools, mode, add_generation_prompt)

    def _process(
        self,
        prompts: Sequence[Sequence[Segment]],
        images: Any,
        videos: Any,
        video_metadata: Any,
        settings: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None],
        padding: bool,
        return_tensors: str | None,
    ) -> ProcessorOutput:
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors is {return_tensors!r}; known: 'pt', 'np', None")
        image_processor, video_processor = self.image_processor, self.video_processor
        of_images, of_videos = (dict(one or {}) for one in settings)
        if image_processor is not None:
            image_processor = image_processor.with_settings(**of_images)
        if video_processor is not None:
            video_processor = video_processor.with_settings(**of_videos)
        keep_sized = not of_videos.keys() & {"do_resize", "min_pixels", "max_pixels"}
        media: dict[str, torch.Tensor] = {}
        image_expansions: list[Expansion] = []
        video_expansions: list[Expansion] = []
        if not is_empty(images):
            tensors, image_expansions = process_images(image_processor, images)
            media.update(tensors)
        if not is_empty(videos):
            tensors, video_expansions = process_videos(video_processor, videos, video_metadata, keep_sized)
            media.update(tensors)
        image_counts = self._placeholders(prompts, self.image_token_id)
        listed = isinstance(images, list | tuple) and all(isinstance(one, list | tuple) for one in images)
        for index, count in enumerate(image_counts if listed and len(images) == len(prompts) else ()):
            if count != (held := len(images[index])):
                raise ValueError(
                    f"prompt {index + 1} has {count} picture placeholders, but its list holds {held} pictures"
                )
        video_counts = self._placeholders(prompts, self.video_token_id)
        rows = []
        for segments, image_slice, video_slice in zip(
            prompts, _slices(image_counts, len(image_expansions)), _slices(video_counts, len(video_expansions))
        ):
            ids, _ = encode_segments(
                self.tokenizer, segments, image_expansions[image_slice], video_expansions[video_slice]
            )
            rows.append(ids)
        output = ProcessorOutput(self._pad(rows, padding, return_tensors))
        for name, value in media.items():
            output[name] = value.numpy() if return_tensors == "np" else value
        return output

    def _placeholders(self, prompts: Sequence[Sequence[Segment]], token_id: int | None) -> list[int]:
        """How many media of one kind each prompt holds."""
        if token_id is None:
            return [0] * len(prompts)
        split = self.tokenizer.split_special
        return [
            sum(found == token_id for one in segments if one.is_control for found, _ in split(one.text))
            for segments in prompts
        ]

    def _pad(self, rows: list[list[int]], padding: bool, return_tensors: str | None) -> dict[str, Any]:
        longest = max((len(row) for row in rows), default=0)
        if return_tensors is None and not padding:
            return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if any(len(row) != longest for row in rows) and not padding:
            raise ValueError(f"prompts have {[len(row) for row in rows]} tokens; pass padding=True for one tensor")
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = 0  # masked out; any id of the vocabulary will do
        ids = [[pad] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        if return_tensors is None:
            return {"input_ids": ids, "attention_mask": mask}
        make: Callable[[Any], Any] = (
            (lambda data: torch.tensor(data, dtype=torch.int64))
            if return_tensors == "pt"
            else (lambda data: np.array(data, dtype=np.int64))
        )
        return {"input_ids": make(ids), "attention_mask": make(mask)}

    # --- back to text --------------------------------------------------------------------------------------------

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """Text of one sequence of ids (list, tensor or array)."""
        return self.tokenizer.decode(_id_list(token_ids), skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """Text of each row of ids [B, S]."""
        return [self.decode(sequence, skip_special_tokens) for sequence in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False
    ) -> list[str]:
        """Texts of what `generate` returned, [B, S] or [S].

        Raises:
            ValueError: `clean_up_tokenization_spaces` is asked for; byte-level text has no spaces to clean up.
        """
        if clean_up_tokenization_spaces:
            raise ValueError("clean_up_tokenization_spaces=True would change the text; byte-level ids decode exactly")
        rows = generated_outputs if _is_nested(generated_outputs) else [generated_outputs]
        return self.batch_decode(rows, skip_special_tokens)


def _has_vision(folder: Path) -> bool:
    if (folder / MiniMaxM3VLImageProcessor.config_name).is_file():
        return True
    for name, key in (("processor_config.json", "image_processor"), ("config.json", "vision_config")):
        if (folder / name).is_file():
            try:
                values = json.loads((folder / name).read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{folder / name} is not readable JSON: {error}") from error
            if isinstance(values, dict) and values.get(key):
                return True
    return False


def _load_part(part: Any, folder: Path) -> Any:
    """The settings in the folder, or the defaults where a vision checkpoint ships none."""
    files = ("processor_config.json", part.config_name, *([part.config_fallback] if part.config_fallback else []))
    if any((folder / name).is_file() for name in files):
        return part.from_pretrained(folder)
    return part()


def _slices(counts: Sequence[int], total: int) -> list[slice]:
    """Which media belong to which prompt; what is left over goes to the last one, whose encoding then reports it."""
    ends = list(accumulate(counts, initial=0))
    slices = [slice(start, end) for start, end in pairwise(ends)]
    if slices and ends[-1] != total:
        slices[-1] = slice(slices[-1].start, total)
    return slices


def _is_nested(sequences: Any) -> bool:
    """Whether these are rows of ids, not the ids of one row."""
    if hasattr(sequences, "ndim"):
        return sequences.ndim > 1
    return len(sequences) > 0 and not isinstance(sequences[0], int)


def _id_list(token_ids: Any) -> Iterable[int]:
    return token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
