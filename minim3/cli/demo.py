"""`minim3 demo`: a fresh picture of pocket's world, three questions about it, and whether the answers are right."""

import secrets
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from minim3.cli.generate import user_messages
from minim3.cli.session import LoadOptions, SamplingOptions, Session
from minim3.cli.show import stream_answer
from minim3.pocket.questions import demo_questions, is_right
from minim3.pocket.source import DEMO_STREAM
from minim3.pocket.world import draw, random_scene

NUM_QUESTIONS = 3
MAX_ANSWER_TOKENS = 64
PICTURE_COLUMNS = 48


def run_demo(options: LoadOptions, output: Path, seed: int | None) -> None:
    """Greedy answers. The scene is drawn from fresh numbers unless `seed` names them."""
    if seed is None:
        seed = secrets.randbits(32)
    rng = np.random.default_rng([DEMO_STREAM, seed])
    scene = random_scene(rng, pairs="all")
    questions = demo_questions(scene, rng, NUM_QUESTIONS)
    picture = draw(scene)
    session = Session(options, SamplingOptions(max_new_tokens=MAX_ANSWER_TOKENS, greedy=True))
    if output.suffix.lower() not in (".png", ".bmp", ".webp"):
        raise ValueError(f"--output is {output}: its name must end in .png, .bmp or .webp, which keep every pixel")
    Image.fromarray(picture).save(output)

    print(f"A fresh picture (minim3 demo --seed {seed} draws it again): {output.resolve()}\n")
    if sys.stdout.isatty():
        print_picture(picture)
    num_right = 0
    for question in questions:
        print(f"> {question.text}", flush=True)
        answer = stream_answer(session.answer(user_messages(question.text, [str(output)], []), "adaptive"), None)
        right = is_right(question, answer.content)
        num_right += right
        print("  right\n" if right else f"  wrong: the answer is {question.answer!r}\n", flush=True)
    print(f"{num_right} of {len(questions)} right.")


def print_picture(picture: np.ndarray, num_columns: int = PICTURE_COLUMNS) -> None:
    """A small rendering on a colour terminal: every character shows two pixels, one above the other."""
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

    console = Console()
    if console.color_system in (None, "standard", "windows"):  # 16 colours show nothing of it
        return
    height, width = picture.shape[:2]
    num_rows = round(num_columns * height / width / 2)
    small = np.asarray(Image.fromarray(picture).resize((num_columns, 2 * num_rows), Image.Resampling.BOX))
    for upper, lower in zip(small[0::2].tolist(), small[1::2].tolist()):
        line = Text("  ")
        for above, below in zip(upper, lower):
            line.append("▀", Style(color="rgb({},{},{})".format(*above), bgcolor="rgb({},{},{})".format(*below)))
        console.print(line)
    console.print()
