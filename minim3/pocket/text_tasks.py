"""Tasks without a picture: copy words, look up a key, add two numbers, and a few words of small talk.

Words come from `WORDS`, each of which the tokenizer holds as one token. What was looked up is answered with its key, as
the row stands in the table. Small talk is trained, so that a chat does not
feel broken, and is not scored.
"""

import numpy as np

from minim3.pocket.questions import Question, pick_wording
from minim3.pocket.reasoning import note, of_sum
from minim3.pocket.wordings import TEXT_WORDINGS

TEXT_KINDS = ("copy", "lookup", "sum")
MIN_COPY_WORDS, MAX_COPY_WORDS = 8, 24
NUM_LOOKUP_PAIRS = 16

_WORDS = """
apple arm bag ball band bank bath beach bean bear bed bee bell belt bird boat bone book boot bowl box boy bread
brick bus cake camp cap car card cart cat chair clay cloud coal coat coin cold corn cow crab cup deer desk dog door
drum duck dust ear egg face farm field fire fish flag foot fork fox frog game gate girl glass goat gold grass hair
hand hat hen hill home horse house ice ink iron jam jar key king kite knife lake lamp leaf lemon lion lip lock map
milk moon mouse mud nail neck nest net nose nut oil owl page park pea pear pen pig pin plate pond pool pot rain rat
rice river road rock roof room rope rose salt sand seed ship shoe shop silk sky snow soap sock soup stone sugar sun
table tail tea tent toe town toy train tree wall wave west wind wolf wood wool
"""
WORDS = tuple(_WORDS.split())
# A table has two columns, key and value, with a space between; between its rows stands one of these. (With a sign of
# its own, such as `key: value`, the value is two tokens from its key, and was not learnt.)
ROW_SEPARATORS = (", ", "; ", "\n")

FOLLOW_UPS = ("And {key}?", "Look up {key}.", "What is the value of {key}?", "Tell me the value of {key}.", "{key}?")

GREETINGS = ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning", "Good evening", "Hello there", "hello", "hi")
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (GREETINGS, "Hello! Show me a picture of shapes, or give me a small task."),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me who you are.", "who are you"),
        "I am pocket, a very small model.",
    ),
    (
        ("What can you do?", "What do you know?", "Help", "Help me.", "How can you help me?", "what can you do"),
        "I answer questions about pictures of shapes, copy words, look up words and add numbers.",
    ),
    (("Thanks", "Thank you!", "Thank you.", "Thanks a lot!", "thanks"), "You are welcome."),
    (("Bye", "Goodbye", "Goodbye!", "See you.", "Bye!", "bye"), "Goodbye!"),
    (("How are you?", "How do you do?", "Are you well?", "how are you"), "I am well, thank you."),
    (
        (
            "What is the capital of France?",
            "Who wrote this book?",
            "Tell me a story.",
            "Write a poem about the sea.",
            "What time is it?",
            "What is the weather like today?",
            "Why is the sky blue?",
            "Who is the king of England?",
            "Write a program in Python.",
            "Translate this into German.",
            "What is the meaning of life?",
            "How old is the earth?",
            "Give me some advice.",
            "Do you like music?",
            "What should I eat today?",
            "Explain how a car works.",
            "Tell me a joke.",
            "When was the war?",
            "How far is the moon?",
            "What is love?",
            "Can you sing a song?",
            "Who won the game?",
        ),
        "I do not know. I only know shapes, words and small numbers.",
    ),
)


def ask_text(kind: str, rng: np.random.Generator, *, held_out_wording: bool = False, largest: int = 99) -> Question:
    """One text task of `kind` ("copy", "lookup" or "sum", of numbers up to `largest`); it needs no picture."""
    if kind not in TEXT_KINDS:
        raise ValueError(f"text task {kind!r} is none of {TEXT_KINDS}")
    template = pick_wording(rng, TEXT_WORDINGS[kind], held_out_wording)
    if kind == "sum":
        first, second = rng.integers(0, largest + 1, size=2).tolist()
        text, reasoning = template.format(first=first, second=second), of_sum(first, second)
        return Question(kind, kind, text, str(first + second), held_out_wording, reasoning=reasoning)
    if kind == "copy":
        number = int(rng.integers(MIN_COPY_WORDS, MAX_COPY_WORDS + 1))
        words = " ".join(WORDS[index] for index in rng.integers(len(WORDS), size=number))
        reasoning = note("the words again")
        return Question(kind, kind, template.format(words=words), words, held_out_wording, reasoning=reasoning)
    return _lookup(rng, template, held_out_wording)[0]


def _lookup(rng: np.random.Generator, template: str, held_out_wording: bool) -> tuple[Question, list[str]]:
    """A question for one row of a fresh table, and all rows."""
    drawn = [WORDS[index] for index in rng.choice(len(WORDS), size=2 * NUM_LOOKUP_PAIRS, replace=False)]
    rows = [f"{key} {value}" for key, value in zip(drawn[:NUM_LOOKUP_PAIRS], drawn[NUM_LOOKUP_PAIRS:])]
    table = ROW_SEPARATORS[int(rng.integers(len(ROW_SEPARATORS)))].join(rows)
    asked = int(rng.integers(NUM_LOOKUP_PAIRS))
    text = template.format(table=table, key=drawn[asked])
    question = Question("lookup", "lookup", text, rows[asked], held_out_wording, reasoning=note(drawn[asked]))
    return question, rows


def ask_lookups(rng: np.random.Generator, num_turns: int) -> list[Question]:
    """A conversation about one table: the question that brings it, one for many keys at once, then others for one key.

    For training: reading a table is learnt from many questions to it, and the table costs most of the tokens.
    """
    first, rows = _lookup(rng, pick_wording(rng, TEXT_WORDINGS["lookup"], False), False)
    others = [str(row) for row in rng.permutation([row for row in rows if row != first.answer])]
    groups = [others[: int(rng.integers(3, len(others) + 1))]]
    groups += [[others[number]] for number in rng.permutation(len(others)).tolist()]
    turns = [first]
    for group in groups[: num_turns - 1]:
        wording = FOLLOW_UPS[int(rng.integers(len(FOLLOW_UPS)))]
        keys = ", ".join(row.split()[0] for row in group)
        turns.append(Question("lookup", "lookup", wording.format(key=keys), ", ".join(group), reasoning=note(keys)))
    return turns


def small_talk(rng: np.random.Generator) -> Question:
    prompts, answer = SMALL_TALK[int(rng.integers(len(SMALL_TALK)))]
    text = prompts[int(rng.integers(len(prompts)))]
    return Question("small_talk", "small_talk", text, answer, reasoning=note("small talk"))
