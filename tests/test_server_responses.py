"""/v1/responses through the official client: text, reasoning, tools, typed events."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.running_servers import Running, ScriptedEngine, running
from tests.test_server_chat import CALL, NS, TWO_CALLS, WEATHER, Scene, say

TOOL = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
OFF = {"reasoning": {"effort": "none"}}


@pytest.fixture(scope="module")
def scripted() -> Iterator[Running]:
    with running(engine=ScriptedEngine()) as server:
        yield server


def test_text(scripted: Running) -> None:
    say(scripted, "Seven.")
    answer = scripted.client().responses.create(model="pocket", input="3 plus 4?", instructions="Be short.", **OFF)
    assert answer.output_text == "Seven."
    assert answer.status == "completed"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_reasoning_is_an_item_of_its_own(scripted: Running) -> None:
    say(scripted, "3 and 4</mm:think>Seven.")
    answer = scripted.client().responses.create(model="pocket", input="3 plus 4?", reasoning={"effort": "high"})
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text == "3 and 4"
    assert answer.output_text == "Seven."
    assert answer.usage.output_tokens_details.reasoning_tokens > 0


def test_the_tool_loop(scripted: Running) -> None:
    client = scripted.client()
    items: list[Any] = [{"role": "user", "content": "Weather in Oslo?"}]
    say(scripted, f"A moment.{CALL}")
    first = client.responses.create(model="pocket", input=items, tools=[TOOL], **OFF)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"city": "Oslo", "days": 2}
    items += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
    say(scripted, "Rain.")
    second = client.responses.create(model="pocket", input=items, tools=[TOOL], **OFF)
    assert second.output_text == "Rain."
    # The conversation is encoded as chat would encode it.
    messages = [
        {"role": "user", "content": "Weather in Oslo?"},
        {
            "role": "assistant",
            "content": "A moment.",
            "tool_calls": [{"id": "c", "function": {"name": "weather", "arguments": call.arguments}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
    ]
    body = {"messages": messages, "tools": [WEATHER], "chat_template_kwargs": {"thinking_mode": "disabled"}}
    assert scripted.http().post("/tokenize", json=body).json()["count"] == second.usage.input_tokens


def strip_ids(value: Any) -> Any:
    """Without what is new in every answer."""
    if isinstance(value, dict):
        return {k: strip_ids(v) for k, v in value.items() if k not in ("id", "call_id", "item_id", "created_at")}
    return [strip_ids(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "text", [f"why</mm:think>Look.{TWO_CALLS}", "why</mm:think>Seven.", "</mm:think>", f"</mm:think>{CALL}"]
)
def test_a_stream_builds_the_whole_answer(scripted: Running, text: str) -> None:
    """Every event's order, and the sum of the deltas, against the answer in one piece."""
    say(scripted, text)
    asked: dict[str, Any] = {"model": "pocket", "input": "x", "tools": [TOOL], "reasoning": {"effort": "high"}}
    client = scripted.client()
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[1].type] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    final = events[-1].response
    assert strip_ids(final.to_dict()["output"]) == strip_ids(whole.to_dict()["output"])
    texts: dict[tuple[str, str], str] = {}
    opened: list[str] = []
    for event in events:
        if event.type == "response.output_item.added":
            assert not opened, "an item begins before the last one ended"
            opened.append(event.item.id)
        elif event.type == "response.output_item.done":
            assert opened.pop() == event.item.id
            assert event.item.status == "completed"
        elif event.type.endswith(".delta"):
            key = (event.item_id, event.type.removesuffix(".delta"))
            texts[key] = texts.get(key, "") + event.delta
        elif event.type.endswith((".text.done", "_text.done", "arguments.done")):
            said = event.arguments if "arguments" in event.type else event.text
            assert texts.get((event.item_id, event.type.removesuffix(".done")), "") == said
    assert not opened


def test_the_clients_own_accumulator_agrees(scripted: Running) -> None:
    """`responses.stream` builds a snapshot from the events and fails on any that do not fit together."""
    say(scripted, f"why</mm:think>Look.{CALL}")
    with scripted.client().responses.stream(
        model="pocket", input="x", tools=[TOOL], reasoning={"effort": "high"}
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == "Look."
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]


def test_an_answer_that_was_cut_is_incomplete(scripted: Running) -> None:
    say(scripted, "one two three four five")
    answer = scripted.client().responses.create(model="pocket", input="x", max_output_tokens=2, **OFF)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_tool_choice_of_one_function(scripted: Running) -> None:
    say(scripted, CALL)
    answer = scripted.client().responses.create(
        model="pocket", input="x", tools=[TOOL], tool_choice={"type": "function", "name": "weather"}, **OFF
    )
    assert answer.output[0].name == "weather"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"input": []}, "empty"),
        ({"input": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"input": [{"type": "web_search_call"}]}, "function_call_output"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_image"),
        ({"input": "x", "previous_response_id": "resp_1"}, "whole conversation"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "functions only"),
        ({"input": "x", "truncation": "auto"}, "nothing is cut off"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "calls no tool"),
        ({"input": "x", "reasoning": {"effort": 3}}, "effort"),
        ({"input": "x", "text": {"format": 3}}, "format"),
        ({"input": "x", "text": {"format": {"type": "poem"}}}, "poem"),
    ],
)
def test_what_is_not_there_is_said(scripted: Running, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        scripted.client().post("/responses", body={"model": "pocket", **asked}, cast_to=object)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"input": [{"role": "robot", "content": "x"}], "instructions": "be kind"}, "input"),
        ({"input": "x", "reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ],
)
def test_errors_name_fields_of_this_route(scripted: Running, asked: dict[str, Any], param: str) -> None:
    """They spoke of messages and reasoning_effort, which nobody had sent."""
    with pytest.raises(openai.BadRequestError) as caught:
        scripted.client().post("/responses", body={"model": "pocket", **asked}, cast_to=object)
    assert caught.value.param.startswith(param)
    assert caught.value.body["message"].startswith(param)


def test_a_pydantic_model_as_the_format(scripted: Running) -> None:
    say(scripted, 'why</mm:think>{"colour": "red", "sizes": []}')
    answer = scripted.client().responses.parse(
        model="pocket", input="x", text_format=Scene, reasoning={"effort": "high"}
    )
    assert answer.output_parsed == Scene(colour="red", sizes=[])


def test_marker_text_is_no_marker(scripted: Running) -> None:
    """Pitfall 14: the model may talk about the format."""
    scripted.engine.script = None  # type: ignore[attr-defined]
    from tests.running_servers import pocket

    tokenizer = pocket()[1].tokenizer
    said = f"Write {NS}<tool_call> first."
    scripted.engine.script = lambda _, i: [*tokenizer.encode(said), tokenizer.eos_token_id]  # type: ignore[attr-defined]
    answer = scripted.client().responses.create(model="pocket", input="x", tools=[TOOL], **OFF)
    assert answer.output_text == said
