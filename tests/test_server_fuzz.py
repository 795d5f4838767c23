"""Requests nobody would write by hand: never a 5xx, every error in OpenAI's shape, every page free afterwards."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minim3.server.settings import ServerSettings
from tests.running_servers import Running, running
from tests.test_server_media import data_url, image_part, picture

SETTINGS = ServerSettings(page=False, default_new_tokens=3, max_new_tokens=6, max_choices=3, allow_priority=True)
HEALTH = [
    HealthCheck.too_slow,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
    HealthCheck.function_scoped_fixture,
]
PNG = picture(30, 30)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(SETTINGS) as one:
        yield one
        one.wait_idle()


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.http() as one:
        yield one


@pytest.fixture(scope="module")
def api_schema(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def check(status: int, content: bytes, media_type: str) -> None:
    """An answer, or an error that tells the client what to change."""
    assert status < 500, content[:1000]
    if status >= 400 and media_type.startswith("application/json"):
        error = json.loads(content)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]
    if media_type.startswith("text/event-stream"):
        events = [line[5:].strip() for line in content.decode().splitlines() if line.startswith("data:")]
        for event in events:
            if event != "[DONE]":
                problem = json.loads(event).get("error")
                assert not problem or problem.get("type") != "server_error", event


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_our_own_openapi_finds_no_5xx(api_schema: Any, server: Running, mode: schemathesis.GenerationMode) -> None:
    """schemathesis: whatever the published description of the routes allows, and what it just does not."""
    operations = [found.ok() for found in api_schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"} <= {one.path for one in operations}
    tested = 0
    for operation in operations:
        if mode is schemathesis.GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # nothing about it can be wrong

        @settings(max_examples=60, deadline=None, suppress_health_check=HEALTH)
        @given(operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            response = case.call(timeout=60)
            check(response.status_code, response.content, response.headers.get("content-type", [""])[0])

        run()
        tested += 1
    assert tested >= 5
    server.wait_idle()


# --- requests that are almost right ---

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8), st.just([]), st.just({}), st.lists(st.integers(-5, 5), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["Hello", "[e~[", "]~b]system\n", "]<]image[>[", "<mm:think>", "{{ 1 }}", "\x00", ""]),
)
PARTS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, TEXTS),
    st.sampled_from(
        [
            image_part(PNG), image_part(data_url(PNG[:60])), image_part("http://localhost/"), {"type": "image"},
            {"type": "video_url", "video_url": {"url": "data:,x"}}, {"type": "file", "file": {"file_data": "aGk="}},
        ]
    ),
    ODD,
)  # fmt: skip
CALLS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.one_of(st.just("1"), ODD),
            "type": st.one_of(st.just("function"), ODD),
            "function": st.one_of(
                st.fixed_dictionaries(
                    {
                        "name": st.one_of(st.just("f"), ODD),
                        "arguments": st.one_of(st.sampled_from(["{}", '{"a": 1}', "["]), ODD),
                    }
                ),
                ODD,
            ),
        },
    ),
    max_size=2,
)
MESSAGES = st.lists(
    st.one_of(
        st.builds(
            lambda role, text: {"role": role, "content": text}, st.sampled_from(["system", "user", "assistant"]), TEXTS
        ),
        st.fixed_dictionaries(
            {"role": st.one_of(st.sampled_from(["system", "developer", "user", "assistant", "tool"]), ODD)},
            optional={
                "content": st.one_of(TEXTS, st.lists(PARTS, max_size=3), ODD),
                "tool_calls": st.one_of(CALLS, ODD),
                "tool_call_id": st.one_of(st.just("1"), ODD),
                "reasoning_content": st.one_of(TEXTS, ODD),
                "name": ODD,
            },
        ),
    ),
    max_size=4,
)
NODES = st.recursive(
    st.one_of(
        st.sampled_from([{}, True, False, {"type": "integer"}, {"type": "string", "minLength": 2}, {"$ref": "#"}]), ODD
    ),
    lambda node: st.one_of(
        st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(TEXTS, node, max_size=2)}),
        st.fixed_dictionaries({"type": st.just("array"), "items": node}),
        st.fixed_dictionaries({"anyOf": st.lists(node, max_size=2)}),
        st.fixed_dictionaries({"enum": st.lists(ODD, max_size=3)}),
        st.fixed_dictionaries({"type": ODD, "required": ODD, "properties": ODD}),
    ),
    max_leaves=4,
)
FORMATS = st.one_of(
    st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    st.builds(
        lambda node, strict: {"type": "json_schema", "json_schema": {"name": "x", "schema": node, "strict": strict}},
        NODES,
        ODD,
    ),
    st.builds(
        lambda kind, value: {"type": kind, kind: value},
        st.sampled_from(["regex", "choice", "grammar", "json_schema"]),
        ODD,
    ),
    st.builds(lambda text: {"type": "regex", "regex": text}, st.text("ab|()[]{},.*+?\\^$19", max_size=10)),
    st.builds(
        lambda text: {"type": "grammar", "grammar": "start: " + text}, st.text('ab"|()[]{},.*+?/\\<>%@~1', max_size=12)
    ),
    ODD,
)
TOOLS = st.lists(
    st.builds(
        lambda name, node, strict: {
            "type": "function",
            "function": {"name": name, "parameters": node, "strict": strict},
        },
        st.one_of(st.sampled_from(["f", "g"]), ODD),
        NODES,
        st.booleans(),
    ),
    max_size=2,
)
COMMON = {
    "stream": st.booleans(),
    "n": st.one_of(st.integers(1, 3), ODD),
    "max_tokens": st.one_of(st.integers(1, 6), ODD),
    "temperature": st.one_of(st.floats(0, 2), ODD),
    "top_p": st.one_of(st.floats(0, 1), ODD),
    "top_k": st.one_of(st.integers(-1, 5), ODD),
    "seed": ODD,
    "stop": st.one_of(TEXTS, st.lists(TEXTS, max_size=2), ODD),
    "logit_bias": st.one_of(st.dictionaries(st.integers(-1, 2000).map(str), st.floats(-100, 100), max_size=2), ODD),
    "presence_penalty": st.one_of(st.floats(-2, 2), ODD),
    "repetition_penalty": st.one_of(st.floats(0.1, 3), ODD),
    "min_tokens": st.one_of(st.integers(0, 6), ODD),
    "ignore_eos": ODD,
    "priority": ODD,
    "response_format": FORMATS,
    "guided_regex": st.one_of(st.just("a+"), ODD),
    "structured_outputs": ODD,
}
CHAT = st.fixed_dictionaries(
    {"messages": MESSAGES},
    optional={
        **COMMON,
        "tools": st.one_of(TOOLS, ODD),
        "tool_choice": st.one_of(
            st.sampled_from(["auto", "none", "required", {"type": "function", "function": {"name": "f"}}]), ODD
        ),
        "parallel_tool_calls": ODD,
        "logprobs": st.booleans(),
        "top_logprobs": st.one_of(st.integers(0, 20), ODD),
        "reasoning_effort": st.one_of(st.sampled_from(["none", "low", "high"]), ODD),
        "chat_template_kwargs": st.one_of(st.just({"thinking_mode": "enabled"}), ODD),
        "stream_options": st.one_of(st.just({"include_usage": True}), ODD),
    },
)
COMPLETION = st.fixed_dictionaries(
    {"prompt": st.one_of(TEXTS, st.lists(TEXTS, max_size=2), st.lists(st.integers(-1, 1200), max_size=4), ODD)},
    optional={**COMMON, "echo": ODD, "logprobs": st.one_of(st.integers(0, 20), ODD)},
)
RESPONSES = st.fixed_dictionaries(
    {"input": st.one_of(TEXTS, MESSAGES, ODD)},
    optional={
        "stream": st.booleans(),
        "instructions": ODD,
        "max_output_tokens": st.one_of(st.integers(1, 6), ODD),
        "text": st.one_of(FORMATS.map(lambda one: {"format": one}), ODD),
        "tools": ODD,
        "tool_choice": ODD,
        "reasoning": ODD,
    },
)


ROUTES = pytest.mark.parametrize(
    ("route", "bodies"),
    [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION), ("/v1/responses", RESPONSES)],
)


def send_almost_right(client: httpx.Client, server: Running, route: str, bodies: Any, num_requests: int) -> None:
    @settings(max_examples=num_requests, deadline=None, suppress_health_check=HEALTH)
    @given(bodies)
    def run(body: Any) -> None:
        response = client.post(route, json=body)
        check(response.status_code, response.content, response.headers.get("content-type", ""))

    run()
    server.wait_idle()


@ROUTES
def test_requests_that_are_almost_right(client: httpx.Client, server: Running, route: str, bodies: Any) -> None:
    send_almost_right(client, server, route, bodies, 60)


@pytest.mark.slow
@ROUTES
def test_many_requests_that_are_almost_right(client: httpx.Client, server: Running, route: str, bodies: Any) -> None:
    send_almost_right(client, server, route, bodies, 1500)
