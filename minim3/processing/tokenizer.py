"""Byte-level BPE tokenizer in which text from outside can never become a control token.

`tokenizer.json` lists *added tokens* (`]~b]`, `<mm:think>`, `]<]image[>[`, ...) beside the BPE model. The usual
encoder looks for them in any text. Here the two jobs are separate: `split_special` finds added tokens, and a second
encoder built from the same file with every added token taken out does all the byte-pair work. That second encoder has
no rule that could produce a control token, so "typed markers stay text" holds by construction, not by escaping.

Ids outside the vocabulary (the model's embedding may be padded beyond it) decode to nothing.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_CONFIG_FILE = "generation_config.json"
END_OF_TURN = "[e~["
# Plain runs up to this length are remembered: system prompts and turn headers come back in every conversation.
_CACHED_RUN_CHARACTERS = 2048
_CACHED_RUNS = 8192


def _byte_of_character() -> dict[str, int]:
    """The stand-in for each byte in byte-level BPE: visible Latin-1 is itself, the rest from U+0100 (GPT-2)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    table = {chr(byte): byte for byte in visible}
    table.update({chr(256 + index): byte for index, byte in enumerate(hidden)})
    return table


_BYTE_OF_CHARACTER = _byte_of_character()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); it may be half-written: copy it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, expected a JSON object")
    return data


def _token_text(value: Any) -> str | None:
    """A special token is written as a string or as an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _without_added_tokens(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer with nothing left that could produce an added token's id."""
    plain = {**spec, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    model = dict(spec["model"])
    contents = {token["content"] for token in spec["added_tokens"]}
    # Some files also list the added tokens in the BPE vocabulary, where `ignore_merges` would find them whole.
    hidden = {content for content in contents if len(content) > 1 and content in model["vocab"]}
    if hidden:
        model["vocab"] = {token: index for token, index in model["vocab"].items() if token not in hidden}

        def survives(merge: str | list[str]) -> bool:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            return not ({left, right, left + right} & hidden)

        model["merges"] = [merge for merge in model["merges"] if survives(merge)]
    plain["model"] = model
    return plain


class Tokenizer:
    """Text to token ids and back.

    Args:
        tokenizer_json: the content of a `tokenizer.json` (byte-level BPE).
        config: the content of a `tokenizer_config.json`, kept and written back.
        eos_token_ids: ids that end a generation; default: the configuration's `eos_token`, else `[e~[`.

    Raises:
        ValueError: not a tokenizer file, not byte-level BPE, or an end token that does not exist.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        config: Mapping[str, Any] | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ) -> None:
        self._json = tokenizer_json
        try:
            self._full = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises nothing more specific for a malformed file
            raise ValueError(f"tokenizer.json cannot be read ({error}); the file may be half-written") from error
        spec = json.loads(tokenizer_json)
        model_type = spec["model"].get("type", "BPE")
        decoder = spec.get("decoder") or {}
        decoders = [decoder.get("type"), *(step.get("type") for step in decoder.get("decoders", ()))]
        if model_type != "BPE" or "ByteLevel" not in decoders:
            raise ValueError(
                f"tokenizer.json holds a {model_type} model with decoder {decoder.get('type')}; "
                "MiniMax-M3 tokenizers are BPE with a ByteLevel decoder"
            )
        spec["added_tokens"] = spec.get("added_tokens") or []
        self.config: dict[str, Any] = dict(config or {})
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(_without_added_tokens(spec)))
        self._plain_runs: dict[str, tuple[int, ...]] = {}
        self._bytes: dict[int, bytes] = {}
        self._added: dict[str, int] = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.special_ids = frozenset(token["id"] for token in spec["added_tokens"] if token.get("special"))
        self._pattern, self._groups = self._compile_added_tokens(spec["added_tokens"])

        if eos_token_ids is None:
            eos_token = _token_text(self.config.get("eos_token")) or END_OF_TURN
            eos_id = self.token_to_id(eos_token)
            if eos_id is None and "eos_token" in self.config:
                raise ValueError(f"eos_token {eos_token!r} of the tokenizer configuration is not in the vocabulary")
            eos_token_ids = () if eos_id is None else (eos_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(eos_token_ids)

    @staticmethod
    def _compile_added_tokens(added: Sequence[Mapping[str, Any]]) -> tuple[re.Pattern[str] | None, list[int]]:
        """One alternation, longest token first; group i belongs to the i-th id."""
        tokens = sorted((token for token in added if token["content"]), key=lambda token: -len(token["content"]))
        if not tokens:
            return None, []
        alternatives = []
        for token in tokens:
            body = re.escape(token["content"])
            if token.get("single_word"):
                body = rf"(?<!\w){body}(?!\w)"
            before, after = (r"\s*" if token.get(side) else "" for side in ("lstrip", "rstrip"))
            alternatives.append(f"{before}({body}){after}")
        return re.compile("|".join(alternatives)), [token["id"] for token in tokens]

    # --- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Load from a checkpoint folder: `tokenizer.json`, and what is there of its configuration files.

        The end ids are those of `generation_config.json` (one id or a list), else the `eos_token`.
        """
        folder = Path(path)
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            raise ValueError(f"{folder} has no {TOKENIZER_FILE}; a checkpoint folder must ship its tokenizer")
        config: dict[str, Any] = {}
        for name in (SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE):
            if (folder / name).is_file():
                config.update({key: value for key, value in _read_json(folder / name).items() if value is not None})
        eos_token_ids: Sequence[int] | None = None
        if (folder / GENERATION_CONFIG_FILE).is_file():
            eos = _read_json(folder / GENERATION_CONFIG_FILE).get("eos_token_id")
            eos_token_ids = [eos] if isinstance(eos, int) else eos
        try:
            return cls(file.read_text(encoding="utf-8"), config=config, eos_token_ids=eos_token_ids)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file}: {error}") from error

    def save_pretrained(self, path: str | Path) -> None:
        """Write `tokenizer.json` (unchanged, byte for byte) and `tokenizer_config.json`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(self._json, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        if "eos_token" not in config and self.eos_token_id is not None:
            config["eos_token"] = self.id_to_token(self.eos_token_id)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / TOKENIZER_CONFIG_FILE).write_text(text, encoding="utf-8")

    # --- vocabulary ----------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a meaning, added tokens included."""
        return self._full.get_vocab_size(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Every token that only the template or the model may produce, with its id."""
        return self._added

    @property
    def eos_token_id(self) -> int | None:
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def pad_token_id(self) -> int | None:
        """The configured padding token, else the end token."""
        pad_token = _token_text(self.config.get("pad_token"))
        pad_id = None if pad_token is None else self.token_to_id(pad_token)
        return self.eos_token_id if pad_id is None else pad_id

    def token_to_id(self, token: str) -> int | None:
        return self._full.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._full.id_to_token(token_id)

    # --- text to ids ---------------------------------------------------------------------------------------------

    def split_special(self, text: str) -> Iterator[tuple[int | None, str]]:
        """Cut text at its added tokens: pairs of (id, token text), or (None, text) for what lies between."""
        if self._pattern is None:
            if text:
                yield None, text
            return
        end = 0
        for match in self._pattern.finditer(text):
            if match.start() > end:
                yield None, text[end : match.start()]
            assert match.lastindex is not None
            yield self._groups[match.lastindex - 1], match.group()
            end = match.end()
        if end < len(text):
            yield None, text[end:]

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """Ids of text in which nothing is a control token."""
        ids = self._plain_runs.get(text)
        if ids is None:
            try:
                ids = tuple(self._plain.encode(text, add_special_tokens=False).ids)
            except TypeError as error:
                raise ValueError(_what_is_no_text(text)) from error
            if len(text) <= _CACHED_RUN_CHARACTERS:
                if len(self._plain_runs) >= _CACHED_RUNS:
                    self._plain_runs.clear()
                self._plain_runs[text] = ids
        return ids

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`.

        With `allow_special=False` (the default, for anything a person typed) markers inside the text are ordinary
        characters; with True they become control tokens, as in a base-model prompt.
        """
        if not isinstance(text, str):
            raise ValueError(f"text to encode must be a string, got {type(text).__name__}")
        if not allow_special:
            return list(self.encode_plain(text))
        ids: list[int] = []
        for token_id, piece in self.split_special(text):
            if token_id is None:
                ids.extend(self.encode_plain(piece))
            else:
                ids.append(token_id)
        return ids

    # --- ids to text ---------------------------------------------------------------------------------------------

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for an id outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self._full.id_to_token(token_id) if 0 <= token_id < 2**32 else None
            if token is None:
                found = b""
            else:
                values = [_BYTE_OF_CHARACTER.get(character) for character in token]
                # A token with a character outside the byte alphabet (an added token with a space) is literal text.
                found = token.encode() if None in values else bytes(value for value in values if value is not None)
            self._bytes[token_id] = found
        return found

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. `skip_special_tokens` leaves control tokens out."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        joined = b"".join(self.token_bytes(token_id) for token_id in map(int, ids) if token_id not in skipped)
        return joined.decode("utf-8", errors="replace")


def _what_is_no_text(text: str) -> str:
    """Why the library does not take a string for text."""
    half = next((place for place, character in enumerate(text) if 0xD800 <= ord(character) <= 0xDFFF), None)
    if half is None:
        return "the text cannot be encoded"
    return f"the text holds half of a surrogate pair (U+{ord(text[half]):04X}) in the place of character {half + 1}"
