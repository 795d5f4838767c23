"""Tools to call: a few made-up functions for each conversation, requests in words, and what is said about the results.

A tool is of one of the sorts in `SORTS`, under one of the names of its sort: by its name one of several tools is chosen
(to choose by descriptions alone was not learnt). One that is alone may be named by any word, to be read off the schema.
Arguments have the same names in all tools of a sort; their values are copied from the request. A request that fits no
tool is answered with `NO_TOOL`, small talk as ever. A result is answered by itself where it is a value, by `DONE` or
`FAILED` where the tool does something.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minim3.pocket.questions import pick_wording
from minim3.pocket.reasoning import NOTHING, note
from minim3.pocket.text_tasks import WORDS, small_talk
from minim3.pocket.wordings import TEXT_WORDINGS, Wordings
from minim3.pocket.world import COLOURS

TOOL_KINDS = ("call", "result", "no_tool")
CHOICE_WORDINGS = ("Which tool is for this? {request}", "Name the tool for this: {request}")
NO_TOOL, DONE, FAILED = "I have no tool for that.", "Done.", "That did not work."
MAX_TOOLS = 3
LISTS_REQUIRED_SHARE = 0.3
NUM_TOOLS_WEIGHTS = (0.4, 0.4, 0.2)
NO_TOOL_SHARE = 0.3
SMALL_TALK_SHARE = 0.2  # of what fits no tool
UNHEARD_NAME_SHARE = 0.5  # of the tools that are alone are named by a word that says nothing about what they do
HELD_OUT_NAMES = WORDS[-24:]  # which training never gives to a tool
PERSONS = ("Tom", "Ann", "Ben", "Eva", "Max", "Lea", "Tim", "Ida")
DIRECTIONS = ("left", "right", "up", "down")


@dataclass(frozen=True)
class Parameter:
    """`name` is its place in the wordings too; `kind` is how values are drawn (see `_value`)."""

    name: str
    kind: str

    @property
    def json_type(self) -> str:
        return "integer" if self.kind == "number" else "string"


@dataclass(frozen=True)
class Sort:
    """What a tool does. `does_something`: without a value."""

    key: str
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    requests: Wordings
    does_something: bool = True


_FIRST = Parameter("first", "number")
_SECOND = Parameter("second", "number")
_THING = Parameter("thing", "word")

SORTS = (
    Sort(
        "add", ("add", "plus", "sum"),
        ("Add two numbers.", "The sum of two numbers."), (_FIRST, _SECOND),
        TEXT_WORDINGS["sum"], does_something=False,
    ),
    Sort(
        "times", ("times", "multiply", "product"),
        ("Multiply two numbers.", "One number times the other."), (_FIRST, _SECOND),
        Wordings(
            trained=(
                "What is {first} times {second}?", "How much is {first} times {second}?", "{first} times {second}",
                "What is the product of {first} and {second}?", "Multiply {first} and {second}.",
                "Tell me how much {first} times {second} is.",
            ),
            held_out=("Tell me what {first} times {second} is.", "Tell me the product of {first} and {second}."),
        ),
        does_something=False,
    ),
    Sort(
        "lookup", ("lookup", "find", "read"),
        ("Look up the value of a key.", "Find the word that goes with a key."),
        (Parameter("key", "word"),),
        Wordings(
            trained=(
                "Look up {key}.", "What is the value of {key}?", "Find {key}.", "Which word goes with {key}?",
                "Tell me the value of {key}.", "What goes with {key}?",
            ),
            held_out=("Find the value of {key}.", "Tell me which word goes with {key}."),
        ),
        does_something=False,
    ),
    Sort(
        "turn_on", ("turn_on", "switch_on", "start"), ("Turn a thing on.", "Switch something on."), (_THING,),
        Wordings(
            trained=(
                "Turn on the {thing}.", "Turn the {thing} on.", "Switch on the {thing}.", "Switch the {thing} on.",
                "Please turn on the {thing}.", "Can you turn the {thing} on?", "Please switch the {thing} on.",
            ),
            held_out=("Please switch on the {thing}.", "Can you switch the {thing} on?"),
        ),
    ),
    Sort(
        "turn_off", ("turn_off", "switch_off", "stop"), ("Turn a thing off.", "Switch something off."),
        (_THING,),
        Wordings(
            trained=(
                "Turn off the {thing}.", "Turn the {thing} off.", "Switch off the {thing}.", "Switch the {thing} off.",
                "Please turn off the {thing}.", "Can you turn the {thing} off?", "Please switch the {thing} off.",
            ),
            held_out=("Please switch off the {thing}.", "Can you switch the {thing} off?"),
        ),
    ),
    Sort(
        "timer", ("set_timer", "timer", "wait", "alarm"),
        ("Set a timer for some minutes.", "Wait some minutes."),
        (Parameter("minutes", "number"),),
        Wordings(
            trained=(
                "Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes.", "Wait {minutes} minutes.",
                "Tell me when {minutes} minutes are over.", "Timer, {minutes} minutes.",
                "I need a timer for {minutes} minutes.",
            ),
            held_out=("Start a timer for {minutes} minutes.", "I need a timer of {minutes} minutes."),
        ),
    ),
    Sort(
        "send", ("send", "write", "message"), ("Send a message to a person.", "Write to a person."),
        (Parameter("to", "person"), Parameter("text", "words")),
        Wordings(
            trained=(
                "Send {to} the message {text}.", "Write to {to}: {text}", "Tell {to}: {text}", "Send {text} to {to}.",
                "Send a message to {to}: {text}", "Write {text} to {to}.",
            ),
            held_out=("Send to {to}: {text}", "Write a message to {to}: {text}"),
        ),
    ),
    Sort(
        "buy", ("buy", "order", "shop"), ("Buy a number of things.", "Order things."),
        (
            _THING,
            Parameter("count", "number"),
        ),
        Wordings(
            trained=(
                "Buy {count} of {thing}.", "Order {count} of {thing}.", "Buy {thing}, {count} of them.",
                "Please buy {count} of {thing}.", "I need {count} of {thing}, please buy them.", "Buy {count} {thing}.",
            ),
            held_out=("Order {thing}, {count} of them.", "Please buy {thing}, {count} of them."),
        ),
    ),
    Sort(
        "paint", ("paint", "colour"), ("Paint a thing in a colour.", "Give a thing a colour."),
        (_THING, Parameter("colour", "colour")),
        Wordings(
            trained=(
                "Paint the {thing} {colour}.", "Make the {thing} {colour}.", "Please paint the {thing} {colour}.",
                "Can you paint the {thing} {colour}?", "The {thing} should be {colour}.",
                "Give the {thing} the colour {colour}.", "Please give the {thing} the colour {colour}.",
                "Can you make the {thing} {colour}?",
            ),
            held_out=("Please make the {thing} {colour}.", "Can you give the {thing} the colour {colour}?"),
        ),
    ),
    Sort(
        "move", ("move", "go", "walk", "step"), ("Move some steps in a direction.", "Go some steps."),
        (
            Parameter("direction", "direction"),
            Parameter("steps", "number"),
        ),
        Wordings(
            trained=(
                "Go {direction} {steps} steps.", "Move {steps} steps {direction}.", "Move {direction} {steps} steps.",
                "Please go {steps} steps {direction}.", "{steps} steps {direction}", "Take {steps} steps {direction}.",
            ),
            held_out=("Go {steps} steps {direction}.", "Please move {direction} {steps} steps."),
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Tool:
    """A tool of one conversation."""

    sort: Sort
    name: str
    description: str
    lists_required: bool

    def schema(self) -> dict[str, Any]:
        """As it is passed in `tools=`."""
        properties = {parameter.name: {"type": parameter.json_type} for parameter in self.sort.parameters}
        parameters: dict[str, Any] = {"type": "object", "properties": properties}
        if self.lists_required:
            parameters["required"] = list(properties)
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Round:
    """A request and its answers: with a tool `arguments`, the tool's `result` and the `answer` to that, else the
    `answer` alone. `reasoning` goes before the call or the only answer."""

    request: str
    answer: str
    reasoning: str
    tool: Tool | None = None
    arguments: Mapping[str, Any] | None = None
    result: str = ""


def random_tools(rng: np.random.Generator, *, held_out_names: bool = False, number: int | None = None) -> list[Tool]:
    """One to three tools, or `number` of them, of different sorts. With a held-out name it is one."""
    if held_out_names:
        number = 1
    elif number is None:
        number = int(rng.choice(MAX_TOOLS, p=NUM_TOOLS_WEIGHTS)) + 1
    tools = []
    for index in rng.choice(len(SORTS), size=number, replace=False).tolist():
        sort = SORTS[index]
        if held_out_names:
            name = _pick(rng, HELD_OUT_NAMES)
        elif number == 1 and rng.random() < UNHEARD_NAME_SHARE:
            name = _pick(rng, WORDS[: -len(HELD_OUT_NAMES)])
        else:
            name = _pick(rng, sort.names)
        tools.append(Tool(sort, name, _pick(rng, sort.descriptions), bool(rng.random() < LISTS_REQUIRED_SHARE)))
    return tools


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _value(kind: str, rng: np.random.Generator) -> int | str:
    match kind:
        case "number":
            return int(rng.integers(1, 10 ** int(rng.integers(1, 4))))  # as many of one digit as of three
        case "word":
            return _pick(rng, WORDS)
        case "words":
            return " ".join(_pick(rng, WORDS) for _ in range(int(rng.integers(1, 5))))
        case "person":
            return _pick(rng, PERSONS)
        case "colour":
            return _pick(rng, tuple(COLOURS))
        case "direction":
            return _pick(rng, DIRECTIONS)
    raise ValueError(f"values of kind {kind!r} are not known")


def call_round(tool: Tool, rng: np.random.Generator, *, held_out_wording: bool = False) -> Round:
    """A request that the tool fits."""
    request, values = _request(tool.sort, rng, held_out_wording)
    arguments = {parameter.name: values[parameter.name] for parameter in tool.sort.parameters}
    if tool.sort.does_something:
        worked = rng.random() < 0.75
        result, answer = ("ok", DONE) if worked else ("failed", FAILED)
    else:
        result = answer = _result(tool.sort, values, rng)
    return Round(request, answer, note(f"I use {tool.name}"), tool, arguments, result)


def _request(sort: Sort, rng: np.random.Generator, held_out_wording: bool) -> tuple[str, dict[str, Any]]:
    values = {parameter.name: _value(parameter.kind, rng) for parameter in sort.parameters}
    return pick_wording(rng, sort.requests, held_out_wording).format(**values), values


def _result(sort: Sort, values: Mapping[str, Any], rng: np.random.Generator) -> str:
    if sort.key == "add":
        return str(values["first"] + values["second"])
    if sort.key == "times":
        return str(values["first"] * values["second"])
    return _pick(rng, WORDS)


def plain_round(tools: Sequence[Tool], rng: np.random.Generator, *, held_out_wording: bool = False) -> Round:
    """A request that none of the tools fits."""
    if rng.random() < SMALL_TALK_SHARE:
        question = small_talk(rng)
        return Round(question.text, question.answer, question.reasoning)
    missing = _missing(tools)
    sort = missing[int(rng.integers(len(missing)))]
    return Round(_request(sort, rng, held_out_wording)[0], NO_TOOL, note("I have no tool"))


def messages_of(rounds: Sequence[Round], *, thinking: bool) -> list[dict[str, Any]]:
    """The conversation in OpenAI form; with `thinking` every turn of the assistant has its reasoning."""
    messages: list[dict[str, Any]] = []
    for number, one in enumerate(rounds):
        messages.append({"role": "user", "content": one.request})
        reasoning = {"reasoning_content": one.reasoning} if thinking else {}
        if one.tool is not None:
            identifier = f"call_{number}"
            function = {"name": one.tool.name, "arguments": dict(one.arguments or {})}
            call = {"id": identifier, "type": "function", "function": function}
            messages.append({"role": "assistant", "content": None, **reasoning, "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": identifier, "content": one.result})
            reasoning = {"reasoning_content": note(one.result)} if thinking else {}
        messages.append({"role": "assistant", "content": one.answer, **reasoning})
    return messages


def random_round(tools: Sequence[Tool], rng: np.random.Generator) -> Round:
    """A round in trained wordings, with one of the tools or without."""
    if rng.random() < NO_TOOL_SHARE:
        return plain_round(tools, rng)
    return call_round(tools[int(rng.integers(len(tools)))], rng)


def random_choice(tools: Sequence[Tool], rng: np.random.Generator) -> Round:
    """For training: only the name of the tool that a request needs, or `NOTHING`. A conversation of calls chooses a
    tool once in fifty tokens, and matching requests to descriptions was not learnt from that."""
    if rng.random() < NO_TOOL_SHARE:
        missing = _missing(tools)
        sort, answer = missing[int(rng.integers(len(missing)))], NOTHING
    else:
        tool = tools[int(rng.integers(len(tools)))]
        sort, answer = tool.sort, tool.name
    request = _pick(rng, CHOICE_WORDINGS).format(request=_request(sort, rng, False)[0])
    return Round(request, answer, note(answer))


def _missing(tools: Sequence[Tool]) -> list[Sort]:
    keys = {tool.sort.key for tool in tools}
    return [sort for sort in SORTS if sort.key not in keys]
