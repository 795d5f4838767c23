"""A running `minim3 serve`, used through the official client: chat, stream, picture, tools, structured output.

    pip install openai
    minim3 serve &
    python examples/serving/openai_client.py [--url http://127.0.0.1:8000/v1] [--picture FILE]

Written for any M3-family checkpoint. pocket, which ships with minim3, knows coloured shapes, small sums and look-ups;
its answers to the rest show the interface, not wisdom.
"""

import argparse
import base64
import json
import mimetypes
import os
from pathlib import Path
from typing import Any

import openai

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]},
    },
}


def chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is 3 plus 4?"}],
        reasoning_effort="none",  # none: answer at once; low: the model decides; medium, high: think first
    )
    assert answer.usage is not None
    print("chat:     ", answer.choices[0].message.content, "|", answer.usage.total_tokens, "tokens")


def stream(client: openai.OpenAI, model: str) -> None:
    print("stream:    ", end="")
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is 12 minus 5?"}],
        stream=True,
        stream_options={"include_usage": True},
    ):
        for choice in chunk.choices:
            # The reasoning comes beside the content: getattr(choice.delta, "reasoning_content", None)
            print(choice.delta.content or "", end="", flush=True)
    print()


def picture(client: openai.OpenAI, model: str, file: Path) -> None:
    kind = mimetypes.guess_type(file)[0] or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
    content: list[Any] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "How many objects are there?"},
    ]
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}])
    print("picture:  ", answer.choices[0].message.content)


def tools(client: openai.OpenAI, model: str) -> None:
    """Ask, run the calls, send the results back, until the model answers in words."""
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    choices: list[Any] = ["required", "auto"]
    for choice in choices:  # required: so that any model shows a call
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=[WEATHER],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_tokens=200,
        )
        message = answer.choices[0].message
        calls = [call for call in message.tool_calls or () if call.type == "function"]
        if not calls or answer.choices[0].finish_reason == "length":
            print("tools:    ", message.content)
            return
        messages.append(message)
        for call in calls:
            print("call:     ", call.function.name, call.function.arguments)
            result = json.dumps({"weather": "rain", "degrees": 8})
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    print("tools:     (still calling)")


def structured(client: openai.OpenAI, model: str) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"type": "integer", "maximum": 9}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Three red circles. Which colour, how many?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "scene", "schema": schema, "strict": True}},
        max_tokens=100,
    )
    choice = answer.choices[0]
    # An answer that ran into max_tokens is not whole, whatever was asked for.
    print("structured:", json.loads(choice.message.content or "") if choice.finish_reason == "stop" else "cut off")


def responses(client: openai.OpenAI, model: str) -> None:
    answer = client.responses.create(model=model, input="What is 2 plus 6?", reasoning={"effort": "none"})
    print("responses:", answer.output_text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--picture", type=Path, help="a PNG or JPEG to ask about")
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.url, api_key=os.environ.get("MINIM3_API_KEY", "none"))
    model = client.models.list().data[0].id
    chat(client, model)
    stream(client, model)
    if options.picture is not None:
        picture(client, model, options.picture)
    tools(client, model)
    structured(client, model)
    responses(client, model)


if __name__ == "__main__":
    main()
