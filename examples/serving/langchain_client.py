"""A running `minim3 serve` behind LangChain: invoke, stream, tools, structured output.

pip install langchain-openai
minim3 serve &
python examples/serving/langchain_client.py [--url http://127.0.0.1:8000/v1]
"""

import argparse
import os
from typing import Literal

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr


@tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    return f"rain in {city}, 8 degrees"


class Scene(BaseModel):
    """What is in the picture."""

    colour: Literal["red", "green", "blue"]
    count: Literal[1, 2, 3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="pocket")
    options = parser.parse_args()
    key = SecretStr(os.environ.get("MINIM3_API_KEY", "none"))
    model = ChatOpenAI(
        model=options.model, base_url=options.url, api_key=key, max_completion_tokens=200, reasoning_effort="none"
    )
    print("invoke: ", model.invoke([SystemMessage("Be short."), HumanMessage("What is 3 plus 4?")]).content)
    print("stream: ", end="")
    for chunk in model.stream("What is 12 minus 5?"):
        print(chunk.content, end="", flush=True)
    print()
    answer = model.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False).invoke(
        "What is the weather in Oslo?"
    )
    for call in answer.tool_calls:  # type: ignore[attr-defined]
        print("tool:   ", call["name"], call["args"], "->", weather.invoke(call["args"]))
    structured = model.with_structured_output(Scene, method="json_schema")
    print("scene:  ", structured.invoke("Three red circles. Which colour, how many?"))


if __name__ == "__main__":
    main()
