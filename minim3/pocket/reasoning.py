"""What pocket writes between `<mm:think>` and `</mm:think>`: the few words one would note on the way to an answer.

Sums are worked out digit by digit, counts list what is counted, relations say where each object lies, and of a clip it
is said where the object was from moment to moment. A note ends with a full stop and is never empty.
"""

from collections.abc import Sequence

from minim3.pocket.world import LATTICE, SceneObject

NOTHING = "none"


def note(text: str) -> str:
    """A note in words of the caller."""
    return f"{text}."


def look_words(item: SceneObject) -> str:
    """Everything that has a name: "small red circle", "large star", "small blue object"."""
    return " ".join(word for word in (item.size, item.colour, item.shape or "object") if word)


def place_words(item: SceneObject) -> str:
    """Where a centre lies: steps of `LATTICE` pixels to the right and down from the top left corner."""
    return f"{item.x / LATTICE:.0f} right, {item.y / LATTICE:.0f} down"


def of_look(item: SceneObject) -> str:
    return note(look_words(item))


def of_number(items: Sequence[SceneObject], answer: str) -> str:
    """What was counted, or looked for, from left to right, and what follows."""
    found = ", ".join(look_words(item) for item in sorted(items, key=lambda item: item.x))
    return note(f"{found or NOTHING}: {answer}")


def of_places(items: Sequence[SceneObject]) -> str:
    return note("; ".join(f"{item.colour} {item.shape} {place_words(item)}" for item in items))


def of_track(moments: Sequence[SceneObject]) -> str:
    """Where one object is at each moment of a clip."""
    return note("; ".join(place_words(item) for item in moments))


def of_motions(motions: Sequence[tuple[SceneObject, str]]) -> str:
    """Which objects move, and which way each of them does."""
    return note(", ".join(f"{look_words(item)} {direction}" for item, direction in motions) or NOTHING)


def of_sum(first: int, second: int) -> str:
    """Digit by digit, as on paper: "7 + 8 = 15, 4 + 5 + 1 = 10." for 47 + 58."""
    lines, carry = [], 0
    while True:
        digits = [first % 10, second % 10, *([carry] if carry else [])]
        total = sum(digits)
        lines.append(f"{' + '.join(map(str, digits))} = {total}")
        first, second, carry = first // 10, second // 10, total // 10
        if not first and not second:
            return note(", ".join(lines))
