"""Every wording of every question, as templates: those trained on, and those kept for evaluation.

A held-out wording uses only words that some trained wording uses too (a test checks this): it asks for composition,
not for a new vocabulary. Slots: {the} a description such as "the large red circle", {a} the same with "a" or "an",
{many} a plural such as "red circles", {one} and {two} two objects, {rel} "left of", {comp} "further left".
"""

from dataclasses import dataclass

TRAINED, HELD_OUT = "trained", "held_out"


@dataclass(frozen=True)
class Wordings:
    trained: tuple[str, ...]
    held_out: tuple[str, ...]


PICTURE_WORDINGS: dict[str, Wordings] = {
    "colour": Wordings(
        trained=(
            "What colour is {the}?",
            "What color is {the}?",
            "What is the colour of {the}?",
            "Which colour is {the}?",
            "Which colour does {the} have?",
            "Tell me the colour of {the}.",
            "Name the colour of {the}.",
            "Look at {the}. What colour is it?",
            "Can you tell me what colour {the} has?",
        ),
        held_out=("Tell me which colour {the} has.", "Can you tell me the colour of {the}?"),
    ),
    "shape": Wordings(
        trained=(
            "What shape is {the}?",
            "What is the shape of {the}?",
            "Which shape is {the}?",
            "Which shape does {the} have?",
            "Tell me the shape of {the}.",
            "Name the shape of {the}.",
            "Look at {the}. What shape is it?",
            "Can you tell me what shape {the} has?",
        ),
        held_out=("Tell me which shape {the} has.", "Can you tell me the shape of {the}?"),
    ),
    "size": Wordings(
        trained=(
            "What size is {the}?",
            "What is the size of {the}?",
            "Which size is {the}?",
            "Which size does {the} have?",
            "How big is {the}?",
            "Tell me the size of {the}.",
            "Name the size of {the}.",
            "Look at {the}. How big is it?",
            "Is {the} small, medium or large?",
        ),
        held_out=("Tell me how big {the} is.", "Look at {the}. What size is it?"),
    ),
    "count": Wordings(
        trained=(
            "How many objects are there?",
            "How many objects are in the picture?",
            "How many objects do you see?",
            "How many things are there in the picture?",
            "Count the objects.",
            "Count all things in the picture.",
            "What is the number of objects?",
            "Tell me how many objects there are.",
        ),
        held_out=("How many things do you see?", "Count all objects in the picture."),
    ),
    "count_of": Wordings(
        trained=(
            "How many {many} are there?",
            "How many {many} are in the picture?",
            "How many {many} do you see?",
            "How many {many} can you see?",
            "Count the {many}.",
            "Count all {many} in the picture.",
            "What is the number of {many}?",
            "Tell me how many {many} there are.",
        ),
        held_out=("Tell me the number of {many}.", "Count the {many} you see."),
    ),
    "exists": Wordings(
        trained=(
            "Is there {a}?",
            "Is there {a} in the picture?",
            "Do you see {a}?",
            "Can you see {a}?",
            "Can you see {a} in the picture?",
            "Does the picture have {a}?",
            "Is {a} in the picture?",
            "Tell me if there is {a}.",
        ),
        held_out=("Do you see {a} in the picture?", "Tell me if you see {a}."),
    ),
    # The three forms of a relation question: yes or no, one of two, and which object lies there.
    "relation_is": Wordings(
        trained=(
            "Is {one} {rel} {two}?",
            "In the picture, is {one} {rel} {two}?",
            "Do you see {one} {rel} {two}?",
            "Can you see {one} {rel} {two}?",
            "Tell me if {one} is {rel} {two}.",
            "Look at {one}. Is it {rel} {two}?",
            "Does {one} lie {rel} {two}?",
        ),
        held_out=("Can you tell me if {one} is {rel} {two}?", "Look at the picture. Is {one} {rel} {two}?"),
    ),
    "relation_which": Wordings(
        trained=(
            "Which is {comp}, {one} or {two}?",
            "Which one is {comp}: {one} or {two}?",
            "Which object is {comp}, {one} or {two}?",
            "What is {comp}, {one} or {two}?",
            "Of {one} and {two}, which is {comp}?",
            "Tell me which is {comp}, {one} or {two}.",
            "Look at {one} and {two}. Which is {comp}?",
        ),
        held_out=("Of {one} and {two}, which one is {comp}?", "Tell me which object is {comp}, {one} or {two}."),
    ),
    "relation_what": Wordings(
        trained=(
            "What is {rel} {one}?",
            "What do you see {rel} {one}?",
            "What can you see {rel} {one}?",
            "Which object is {rel} {one}?",
            "What lies {rel} {one}?",
            "Name the object {rel} {one}.",
            "Tell me what is {rel} {one}.",
            "Look at {one}. What is {rel} it?",
        ),
        held_out=("Tell me which object is {rel} {one}.", "Look at {one}. Which object is {rel} it?"),
    ),
}

# Each direction: the words of "A is ... B", and of "which is ...".
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
COMPARISON_WORDS = {
    "left": ("further left",),
    "right": ("further right",),
    "above": ("higher", "further up"),
    "below": ("lower", "further down"),
}

# Where one object lies: trained, not scored. What two objects are compared by must first be read off each of them.
PLACE_WORDINGS = (
    "Where is {the}?",
    "Where do you see {the}?",
    "Tell me where {the} is.",
    "Look at {the}. Where is it?",
)

# Lists of everything in the picture: trained for their dense signal, not scored.
DESCRIBE_WORDINGS: dict[str, tuple[str, ...]] = {
    "left_to_right": (
        "List all objects from left to right.",
        "Describe the picture.",
        "What is in the picture?",
        "What do you see?",
        "What can you see in the picture?",
        "Name all objects from left to right.",
    ),
    "top_to_bottom": (
        "List all objects from top to bottom.",
        "Describe the picture from top to bottom.",
        "Name all objects from top to bottom.",
    ),
    "places": (
        "Where are the objects?",
        "List all objects and tell me where they are.",
        "Describe the picture and tell me where the objects are.",
    ),
}

# About clips. Their words are in no other wording; the tokenizer spells them in two or three pieces.
CLIP_WORDINGS: dict[str, Wordings] = {
    "direction": Wordings(
        trained=(
            "Which way does {the} move?",
            "Which way is {the} moving?",
            "Where does {the} go?",
            "In which direction does {the} move?",
            "Does {the} move left, right, up or down?",
            "Tell me which way {the} moves.",
            "Tell me where {the} goes.",
            "Look at {the}. Which way does it move?",
            "Name the direction of {the}.",
        ),
        held_out=("Tell me which way {the} goes.", "Look at {the}. In which direction does it move?"),
    ),
    "moves": Wordings(
        trained=(
            "Does {the} move?",
            "Is {the} moving?",
            "Do you see {the} move?",
            "Can you see {the} move?",
            "Tell me if {the} moves.",
            "Look at {the}. Does it move?",
            "Does {the} move or not?",
        ),
        held_out=("Can you tell me if {the} moves?", "Look at {the}. Is it moving?"),
    ),
    "mover": Wordings(
        trained=(
            "Which moves, {one} or {two}?",
            "Which one moves: {one} or {two}?",
            "Which object is moving, {one} or {two}?",
            "What moves, {one} or {two}?",
            "Of {one} and {two}, which moves?",
            "Tell me which moves, {one} or {two}.",
            "Look at {one} and {two}. Which is moving?",
        ),
        held_out=("Of {one} and {two}, which one is moving?", "Tell me which object moves, {one} or {two}."),
    ),
    "where_at": Wordings(
        trained=(
            "Where is {the} at {time} seconds?",
            "Tell me where {the} is at {time} seconds.",
            "Look at {the}. Where is it at {time} seconds?",
            "Where do you see {the} at {time} seconds?",
            "At {time} seconds, where is {the}?",
            "Can you tell me where {the} is at {time} seconds?",
        ),
        held_out=(
            "At {time} seconds, where do you see {the}?",
            "Look at {the}. Tell me where it is at {time} seconds.",
        ),
    ),
}

# Where an object is from moment to moment, and how each object moves: trained for their dense signal, not scored.
CLIP_LIST_WORDINGS: dict[str, tuple[str, ...]] = {
    "track": ("Where is {the} from the first to the last picture?", "Follow {the} and tell me where it is."),
    "motions": (
        "Which way does each object move?",
        "What do you see in the video?",
        "Describe the video.",
        "List all objects and tell me which way they move.",
    ),
}

TEXT_WORDINGS: dict[str, Wordings] = {
    "copy": Wordings(
        trained=(
            "Repeat these words: {words}",
            "Copy these words: {words}",
            "Say these words again: {words}",
            "Copy this text: {words}",
            "Repeat this:\n{words}",
            "Write these words again:\n{words}",
            "Repeat the words below.\n{words}",
            "Copy the words below.\n{words}",
        ),
        held_out=("Repeat this text: {words}", "Write the words below again.\n{words}"),
    ),
    "lookup": Wordings(
        trained=(
            "{table}\nWhat is the value of {key}?",
            "{table}\nWhat is {key}?",
            "{table}\nLook up {key}.",
            "{table}\nTell me the value of {key}.",
            "{table}\nWhich word goes with {key}?",
            "Here is a list: {table}\nWhat goes with {key}?",
            "Look up {key} in this list: {table}",
            "Find the value of {key}.\n{table}",
            "Find {key} in the list below.\n{table}",
            "{table}\nFind the value of {key} in the list.",
        ),
        held_out=("Here is a list: {table}\nTell me what goes with {key}.", "{table}\nFind {key} in this list."),
    ),
    "sum": Wordings(
        trained=(
            "What is {first} plus {second}?",
            "What is {first} + {second}?",
            "{first} + {second} = ?",
            "{first} + {second}",
            "Add {first} and {second}.",
            "What is the sum of {first} and {second}?",
            "How much is {first} plus {second}?",
            "Tell me the sum of {first} and {second}.",
            "Tell me what the sum of {first} and {second} is.",
            "Tell me how much {first} plus {second} is.",
        ),
        held_out=("How much is {first} + {second}?", "Tell me what {first} plus {second} is."),
    ),
}
