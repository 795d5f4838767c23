"""Messages to token ids: the documented format, and typed markers that never become control tokens."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minim3.processing.chat import ROOT_TEXT, THINKING_INSTRUCTIONS, Segment, encode_segments, render
from minim3.processing.messages import normalize_messages
from minim3.processing.placeholders import expand_image, expand_video
from minim3.processing.template import ChatTemplate
from minim3.processing.tokenizer import Tokenizer

NS = "]<]minimax[>["
SYSTEM = f"]~!b[]~b]system\n{ROOT_TEXT}\n{THINKING_INSTRUCTIONS['adaptive']}[e~[\n"
MARKERS = ["]~!b[", "]~b]", "[e~[", "<mm:think>", "</mm:think>", NS, "]<]image[>[", "<tool_call>"]
# Whole markers, halves of them that a careless join would complete, and ordinary text.
typed = st.lists(
    st.sampled_from([*MARKERS, "]~", "b]", "[e", "~[", "<mm:", "think>", "mm:think", "ai\n", "\n", " ", "é€😀"])
    | st.sampled_from(["\U000f0000", "\U000f0001"])  # what a template's text is disguised with
    | st.text(max_size=5),
    max_size=6,
).map("".join)


def text_of(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [one for one in ids if one in tokenizer.added_tokens.values()]


# --- the tokenizer ---------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=typed)
def test_typed_control_tokens_stay_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert control_ids(tokenizer, ids) == []
    assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(text=typed)
def test_allowed_control_tokens_are_those_of_the_tokenizer_file(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, allow_special=True)
    assert ids == tokenizer._full.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_markers_inside_the_bpe_vocabulary_cannot_be_typed(tokenizer_json: str) -> None:
    """Some files list the added tokens in the BPE vocabulary too, where `ignore_merges` finds whole words."""
    spec = json.loads(tokenizer_json)
    spec["model"]["ignore_merges"] = True
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    for token in spec["added_tokens"]:
        spec["model"]["vocab"][token["content"]] = token["id"]
    careless = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
    assert len(careless.encode("]~b]").ids) == 1, "the trap this test is about"
    tokenizer = Tokenizer(json.dumps(spec))
    for marker in MARKERS:
        assert control_ids(tokenizer, tokenizer.encode(marker)) == []
        assert tokenizer.encode(marker, allow_special=True) == [tokenizer.added_tokens[marker]]


def test_tokenizer_round_trips_through_a_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token_ids == (tokenizer.token_to_id("[e~["),)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode("]~b]a", allow_special=True) == tokenizer.encode("]~b]a", allow_special=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert Tokenizer.from_pretrained(tmp_path).eos_token_ids == (5, 7)
    tokenizer.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()


def test_missing_and_broken_tokenizers_are_named(tokenizer_json: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    for content in (tokenizer_json[: len(tokenizer_json) // 2], "", "[]", '{"model": null}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not readable"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ByteLevel"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).to_str())
    with pytest.raises(ValueError, match="eos_token '<none>'"):
        Tokenizer(tokenizer_json, config={"eos_token": "<none>"})


# --- the built-in format ---------------------------------------------------------------------------------------------


def test_documented_format() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes", "reasoning_content": "hm"},
        {"role": "developer", "content": "Now in French."},
        {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "v.mp4"}}]},
    ]
    assert text_of(render(messages)) == (
        f"{SYSTEM}]~b]developer\nBe brief.[e~[\n]~b]user\n]<]image[>[what?[e~[\n]~b]ai\n</mm:think>a circle[e~[\n"
        "]~b]user\nsure?[e~[\n]~b]ai\n<mm:think>hm</mm:think>yes[e~[\n]~b]developer\nNow in French.[e~[\n"
        "]~b]user\n]<]video[>[[e~[\n]~b]ai\n"
    )


@pytest.mark.parametrize(("mode", "ending"), [("enabled", "<mm:think>"), ("disabled", "</mm:think>"), ("adaptive", "")])
def test_thinking_modes(mode: str, ending: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    text = text_of(render(messages, thinking_mode=mode))
    assert text.startswith(f"]~!b[]~b]system\n{ROOT_TEXT}\n{THINKING_INSTRUCTIONS[mode]}[e~[\n]~b]user\n")
    assert text.endswith(f"hi[e~[\n]~b]ai\n{ending}")
    assert text_of(render(messages, add_generation_prompt=False)).endswith("hi[e~[\n")
    assert text_of(render(messages)) == text_of(render(messages, thinking_mode="adaptive"))


def call(identifier: str | None, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_tools_and_calls() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    arguments = '{"a": 1, "b": {"c": [true, null, "x", {"d": 2.5}]}, "e": null, "s": "1 < 2"}'
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call("1", "f", arguments)]},
    ]
    text = text_of(render(messages, tools, add_generation_prompt=False))
    assert '<tool>{"name": "f", "parameters": {"type": "object"}}</tool>' in text.split("# Tools")[1].split("[e~[")[0]
    assert text.split("]~b]ai\n")[1] == (
        f'</mm:think>{NS}<tool_call>\n{NS}<invoke name="f">{NS}<a>1{NS}</a>{NS}<b>{NS}<c>{NS}<item>true{NS}</item>'
        f"{NS}<item>x{NS}</item>{NS}<item>{NS}<d>2.5{NS}</d>{NS}</item>{NS}</c>{NS}</b>{NS}<s>1 < 2{NS}</s>"
        f"{NS}</invoke>\n{NS}</tool_call>[e~[\n"
    )


def test_pitfall_16_tool_results_follow_the_order_of_the_calls() -> None:
    calls = [call("a", "f", {}), call("b", "f", {}), call("c", "f", {})]
    results = [{"role": "tool", "tool_call_id": one, "content": f"result {one}"} for one in ("c", "a", "b")]
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": calls}, *results]
    expected = (
        "]~b]tool\n<response>result a</response>\n<response>result b</response>\n<response>result c</response>[e~[\n"
    )
    assert expected in text_of(render(messages))
    template = "{% for m in messages if m.role == 'tool' %}{{ m.content }};{% endfor %}"
    assert rendered(Tokenizer_of_nothing, template, messages) == "result a;result b;result c;"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "empty"),
        ("hi", "must be a list"),
        (["hi"], "is a str"),
        ([{"role": "bot", "content": "x"}], "role 'bot'"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": 3}], "string or a list"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "type 'audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "needs a string"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "needs"),
        ([{"role": "system", "content": [{"type": "image", "image": "x"}]}], "text only"),
        ([{"role": "user", "content": "x", "tool_calls": [call("1", "f", {})]}], "only assistant"),
        ([{"role": "assistant", "tool_calls": {"id": 1}}], "must be a list"),
        ([{"role": "assistant", "tool_calls": [call("1", "f", "{")]}], "not valid JSON"),
        ([{"role": "assistant", "tool_calls": [call("1", "f", "[1]")]}], "must be an object"),
        ([{"role": "assistant", "tool_calls": [call("1", 'f">', {})]}], "function name"),
        ([{"role": "assistant", "tool_calls": [call("1", "f", {"a>": 1})]}], "argument name 'a>'"),
        ([{"role": "assistant", "tool_calls": [call("1", "f", {"a": {1}})]}], "not a JSON value"),
        ([{"role": "tool", "content": "x"}], "calls no tool"),
        ([{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}], "calls no tool"),
    ],
)
def test_malformed_messages_are_named(messages: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        render(messages)


@pytest.mark.parametrize(
    ("ids", "error"), [(["a"], "1 tool results for 2"), (["a", "a"], "second result"), (["a", "x"], "answers no call")]
)
def test_results_that_do_not_match_their_calls_are_named(ids: list[str], error: str) -> None:
    results = [{"role": "tool", "tool_call_id": one, "content": "r"} for one in ids]
    calls = [call("a", "f", {}), call("b", "f", {})]
    with pytest.raises(ValueError, match=error):
        render([{"role": "assistant", "content": "", "tool_calls": calls}, *results])


def test_unknown_mode_and_tools_are_named() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match="thinking_mode is 'maybe'"):
        render(messages, thinking_mode="maybe")
    with pytest.raises(ValueError, match=r"tools\[0\]"):
        render(messages, [{"type": "search"}])


# --- segments to ids -------------------------------------------------------------------------------------------------


def conversation(texts: list[str], key: str = "mm:think") -> list[dict[str, Any]]:
    """Every place a caller's text can stand in; between < and > the key spells a marker."""
    a, b, c, d, e, f = texts
    return [
        {"role": "system", "content": a},
        {"role": "user", "content": [{"type": "text", "text": b}, {"type": "text", "text": c}]},
        {"role": "assistant", "content": d, "reasoning_content": e, "tool_calls": [call("1", "f", {key: f})]},
        {"role": "tool", "tool_call_id": "1", "content": f},
    ]


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(typed, min_size=6, max_size=6))
def test_no_typed_text_changes_the_control_tokens(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Injection: whatever is typed, wherever, the control tokens are those of a conversation of harmless text."""
    segments = render(conversation(texts))
    ids, mask = encode_segments(tokenizer, segments)
    harmless = render(conversation(["x" if text else "" for text in texts], "key"))
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, encode_segments(tokenizer, harmless)[0])
    assert tokenizer.decode(ids) == text_of(segments)
    assert len(ids) == len(mask)


words = st.lists(st.sampled_from(["is", "there ", "\n", " a", "red", "é", "?!"]), max_size=5).map("".join)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(words, min_size=6, max_size=6))
def test_ordinary_text_gets_the_ids_of_the_whole_string(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Encoding in pieces must not give the model other tokens than it was trained on."""
    messages = conversation(texts)
    messages[2]["tool_calls"] = [call("1", "f", {"key": texts[5]})]
    segments = render(messages)
    parts = text_of(segments).split("]~b]ai\n")
    expected = "]~b]ai\n".join(parts[:-1]) + "]~b]ai\n"
    assert encode_segments(tokenizer, segments)[0] == tokenizer.encode(expected, allow_special=True)


def test_loss_mask_covers_the_assistants_turns(tokenizer: Tokenizer) -> None:
    messages = conversation(["sys", "u", "v", "answer]~b]ai\n", "thought", "arg"])
    messages += [{"role": "assistant", "content": "done"}, {"role": "user", "content": "ai\nno"}]
    ids, mask = encode_segments(tokenizer, render(messages, add_generation_prompt=False))
    targets = tokenizer.decode([one for one, is_target in zip(ids, mask) if is_target])
    assert targets == (
        f"<mm:think>thought</mm:think>answer]~b]ai\n{NS}<tool_call>\n{NS}"
        f'<invoke name="f">{NS}<mm:think>arg{NS}</mm:think>{NS}</invoke>\n{NS}</tool_call>[e~[</mm:think>done[e~['
    )


def test_media_placeholders(tokenizer: Tokenizer) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "]<]image[>["}, {"type": "video"}, {"type": "image"}]
    segments = render([{"role": "user", "content": parts}], add_generation_prompt=False)
    images = [expand_image(2), expand_image(3)]
    ids, _ = encode_segments(tokenizer, segments, images, [expand_video(2, 1, [0, 2.04])])
    start, end = "]<]start of image[>[", "]<]end of image[>["
    assert tokenizer.decode(ids) == (
        f"{SYSTEM}]~b]user\n{start}{']<]image[>[' * 2}{end}]<]image[>[]<]0.0 seconds[>[{start}]<]video[>[{end}"
        f"]<]2.0 seconds[>[{start}]<]video[>[{end}{start}{']<]image[>[' * 3}{end}[e~[\n"
    )
    assert ids.count(tokenizer.added_tokens["]<]image[>["]) == 5
    with pytest.raises(ValueError, match=r"2 image placeholders .* but 1 images"):
        encode_segments(tokenizer, segments, images[:1], [expand_video(1, 1)])
    with pytest.raises(ValueError, match=r"1 video placeholders .* but 0 videos"):
        encode_segments(tokenizer, segments, images)
    with pytest.raises(ValueError, match="1 timestamps for 2"):
        expand_video(2, 1, [0.0])


# --- a checkpoint's own template -------------------------------------------------------------------------------------

TEMPLATE = """\
{%- macro show(content) %}{% if content is string %}{{ content }}{% else %}
{%- for part in content %}{% if part.type == 'text' %}{{ part.text }}
{%- else %}{{ ']<]' ~ part.type ~ '[>[' }}{% endif %}
{%- endfor %}{% endif %}{% endmacro -%}
{{ ']~!b[]~b]system\\n' }}{{ thinking_mode }}{{ '[e~[\\n' }}
{%- if tools %}{{ '\\n' }}{% for tool in tools %}<tool>{{ tool.function | tojson }}</tool>{% endfor %}{% endif -%}
{%- for message in messages %}
{%- if message.role == 'system' %}{% continue %}{% endif -%}
{{ '\\n]~b]' ~ ('ai' if message.role == 'assistant' else message.role) ~ '\\n' }}
{%- if message.reasoning_content %}<mm:think>{{ message.reasoning_content | trim }}</mm:think>{% endif -%}
{{ show(message.content) | trim }}
{%- for call in message.tool_calls or [] %}
{%- generation %}{{ ']<]minimax[>[<invoke name="' ~ call.function.name ~ '">' }}{% endgeneration %}
{%- for key, value in call.function.arguments.items() -%}
<{{ key }}>{{ value if value is string else value | tojson }}</{{ key }}>
{%- endfor %}{% endfor %}{{ '[e~[' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '\\n]~b]ai\\n' }}{% endif %}"""


class _NoTokens:
    """Enough of a tokenizer to render text with."""

    config: dict[str, Any] = {}  # noqa: RUF012
    added_tokens: dict[str, int] = {}  # noqa: RUF012

    def split_special(self, text: str) -> Any:
        yield None, text


Tokenizer_of_nothing: Any = _NoTokens()


def rendered(tokenizer: Any, template: str, messages: Any, tools: Any = (), **variables: Any) -> str:
    checked = normalize_messages(messages)
    return text_of(ChatTemplate(template).render(tokenizer, checked, tools, "adaptive", True, **variables))


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(typed, min_size=6, max_size=6))
def test_no_typed_text_changes_the_control_tokens_of_a_template(tokenizer: Tokenizer, texts: list[str]) -> None:
    """The template joins parts, trims, writes argument names between < and >: none of it may complete a marker."""
    tools = [{"type": "function", "function": {"name": "f", "description": texts[0] + texts[1]}}]
    template = ChatTemplate(TEMPLATE)

    def encode(texts: list[str], key: str) -> tuple[list[int], str]:
        segments = template.render(tokenizer, normalize_messages(conversation(texts, key)), tools, "adaptive", True)
        return encode_segments(tokenizer, segments)[0], text_of(segments)

    ids, text = encode(texts, "mm:think")
    harmless, _ = encode(["x" if one.strip() else one for one in texts], "key")
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, harmless)
    assert tokenizer.decode(ids) == text
    for one in (texts[1] + texts[2], texts[4], texts[5]):
        assert one.strip() in text


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(words, min_size=6, max_size=6))
def test_templates_render_as_in_transformers(tokenizer: Tokenizer, texts: list[str]) -> None:
    pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = conversation(texts)
    messages[1]["content"] = [{"type": "text", "text": texts[1]}, {"type": "image"}]
    messages[2]["tool_calls"][0]["function"]["arguments"] = {"key": texts[5], "deep": {"q": ['"', 1, None]}}
    tools = [{"type": "function", "function": {"name": "f", "description": '"<q>"', "parameters": {"type": "object"}}}]
    expected, _ = render_jinja_template(
        [messages], tools=tools, chat_template=TEMPLATE, add_generation_prompt=True, thinking_mode="adaptive"
    )
    assert rendered(tokenizer, TEMPLATE, messages, tools) == expected[0]


def test_what_templates_may_use(tokenizer_json: str) -> None:
    tokenizer = Tokenizer(tokenizer_json, config={"bos_token": "]~!b[", "eos_token": {"content": "[e~["}})
    messages = [{"role": "user", "content": 'a "<b>" '}]
    template = "{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y')|length }}{{ extra }}{{ messages[0].content|e }}"
    assert rendered(tokenizer, template, messages, extra="+") == "]~!b[[e~[4+a &quot;&lt;b&gt;&quot; "
    # JSON escapes go by the true characters, also where a control token holds a quote.
    spec = json.loads(tokenizer_json)
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 999, "content": '"\\é'})
    tokenizer = Tokenizer(json.dumps(spec))
    messages = [{"role": "user", "content": '"\\é'}]
    assert rendered(tokenizer, "{{ messages[0].content|tojson }}", messages) == '"\\"\\\\é"'
    assert rendered(tokenizer, "{{ messages[0].content|tojson(ensure_ascii=true) }}", messages) == r'"\"\\\u00e9"'
    with pytest.raises(ValueError, match="no pictures please"):
        rendered(tokenizer, "{{ raise_exception('no pictures please') }}", messages)
    with pytest.raises(ValueError, match="undefined"):
        rendered(tokenizer, "{{ nothing.at.all }}", messages)
    with pytest.raises(ValueError, match="failed"):
        rendered(tokenizer, "{{ ''.__class__.__mro__[1].__subclasses__() }}", messages)
    with pytest.raises(ValueError, match="not valid"):
        ChatTemplate("{% if %}")
    with pytest.raises(ValueError, match="no variable 'tongue': did you mean 'tone'"):
        rendered(tokenizer, "{% set n = 1 %}{{ tone }}{{ n }}", [{"role": "user", "content": "x"}], tongue=1)
    assert rendered(tokenizer, "{{ tone }}", [{"role": "user", "content": "x"}], tone="mild") == "mild"


@pytest.mark.parametrize(
    "arguments",
    ['{"a":' * 900 + "1" + "}" * 900, "[" * 100_000, '{"a": ' + "1" * 5000 + "}", '{"a": NaN}', '{"a": 1e999}'],
)
def test_tool_arguments_of_strangers_are_errors_not_crashes(arguments: str) -> None:
    """A RecursionError is no ValueError: it would be the server's fault, not the request's."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(ValueError, match=r"arguments|not a JSON number"):
        normalize_messages([{"role": "assistant", "tool_calls": [call]}])
