"""Builds pocket's tokenizer: byte-level BPE in which every word of pocket's world is one token.

Merges come in two parts. The first are learnt from a small corpus (the world's words and some plain English), by
the usual rule: join the most frequent pair. The second part completes each word of the world, one after the other, to
a single token, with and without a leading space. A merge added late never undoes an earlier one, since BPE applies
merges in the order of their rank; so each completed word stays complete.

Digits stand alone, so that sums are learnt digit by digit. Every byte is a token: any text survives the round trip.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from minim3.pocket import text_tasks
from minim3.pocket.questions import NUMBER_WORDS, Look
from minim3.pocket.wordings import COMPARISON_WORDS, DESCRIBE_WORDINGS, PICTURE_WORDINGS, RELATION_WORDS, TEXT_WORDINGS
from minim3.pocket.world import COLOURS, PICTURE_SIZE, SHAPES, SIZES

# In the order of their ids, which follow the ids of the text tokens.
SPECIAL_TOKENS = (
    "]~!b[",
    "]~b]",
    "[e~[",
    "]<]start of image[>[",
    "]<]end of image[>[",
    "]<]image[>[",
    "]<]video[>[",
    "]<]minimax[>[",
    "<mm:think>",
    "</mm:think>",
)
BOS_TOKEN, EOS_TOKEN = "]~!b[", "[e~["
NUM_LEARNT_MERGES = 160
MAX_TOKENS = 2048

PLAIN_ENGLISH = """
The sun was low over the hill when they came home, and the dog ran to the gate to meet them. It had rained in the
morning, but now the sky was clear, and there was a light wind from the west. She put the bread on the table and said
that there would be soup for everyone who was hungry. He did not answer at once. He was reading a letter that had come
the day before, and he read it again, from the first word to the last. Nothing in it was new to him, and still it was
hard to believe. What should they do now? They could stay here for the winter, or they could take the road along the
river and look for work in the next town. Most people would have gone. Some of them had gone already.
A model is a program that has learned from examples. It reads a piece of text, one part at a time, and for each part it
says which part is most likely to come next. If it is wrong, its numbers are changed a little, so that it will be less
wrong the next time. After many thousands of such steps it can answer questions, write letters, or say what it sees in a
picture. Small models know only a few things. That is no reason to be sad: what is small is easy to understand.
Please write to us if something does not work as you would expect. Tell us what you did, what you saw, and what you
think should have happened. We will try to find the reason, and we will let you know when it is better.
In mathematics, a set is a collection of different things; these things are called the elements of the set. Two sets
are equal if they have the same elements. The number of elements may be zero, or it may be without end.
"""
# Words and signs that came with clips, tools and thoughts, in the order of completion. They are listed, not gathered:
# the words of those tasks may change, the vocabulary of trained weights may not. Signs next to each other are one run
# for the pre-tokenizer; these runs stand around the names in a schema and in a call.
LATER_WORDS = (
    "Tom", " Tom", "Ann", " Ann", "Ben", " Ben", "Eva", " Eva", "Max", " Max", "Lea", " Lea", "Tim", " Tim", "Ida",
    " Ida", "left", " left", "right", " right", "up", " up", "down", " down", "add", " add", "plus", " plus", "sum",
    " sum", "numbers", " numbers", "a", " a", "first", " first", "x", " x", "one", " one", "b", " b", "second",
    " second", "y", " y", "two", " two", "times", " times", "multiply", " multiply", "product", " product", "lookup",
    " lookup", "find", " find", "get", " get", "value", " value", "read", " read", "key", " key", "word", " word",
    "name", " name", "text", " text", "turn", " turn", "on", " on", "switch", " switch", "start", " start", "thing",
    " thing", "object", " object", "device", " device", "off", " off", "stop", " stop", "set", " set", "timer",
    " timer", "wait", " wait", "alarm", " alarm", "minutes", " minutes", "time", " time", "length", " length", "send",
    " send", "write", " write", "message", " message", "to", " to", "person", " person", "words", " words", "buy",
    " buy", "order", " order", "shop", " shop", "item", " item", "what", " what", "count", " count", "number",
    " number", "many", " many", "paint", " paint", "colour", " colour", "color", " color", "move", " move", "go",
    " go", "walk", " walk", "step", " step", "direction", " direction", "where", " where", "way", " way", "steps",
    " steps", "I", " have", " no", " tool", " for", " that", "Done", "That", " did", " not", " work", "Add", "The",
    " of", "What", " is", " and", " the", "How", " much", "Tell", " me", " how", "Multiply", "One", " other", "Look",
    "Find", " goes", " with", "Which", "Turn", "Switch", " something", "Please", "Can", " you", "Set", " some",
    "Wait", "Start", " when", " are", " over", "Timer", " need", "Send", "Write", "Buy", " things", "Order", " them",
    " please", "Paint", " in", "Give", "Make", " should", " be", " give", " make", "Move", "Go", "Take", " does",
    " moving", "Where", "In", " which", "Does", " or", " moves", " at", " Which", " it", "Name", "Is", "Do", " see",
    " if", " Does", " do", " objects", "Count", " seconds", " from", " last", " picture", "Follow", " tell", " each",
    " video", "Describe", "List", " all", " they", "Tools", "tools", "tool", "call", "invoke", "response",
    "description", "parameters", "type", "properties", "string", "integer", "required", "function", "Think", " think",
    " before", " answer", " without", " thinking", " use", " failed", "failed", "ok", " still", " none", "_", ' "',
    '",', '":', '{"', ' {"', '"}', '"},', '"}}', '"}}}', '"}}},', '"}}}}</', '"]', '"]}}</', "}}</", ' ["', '="',
    '">', "</", "]<]", "[>[", "#",
)  # fmt: skip
# Text around the questions, as the chat template writes it.
CHAT_WORDS = ("system", "developer", "user", "ai", "tool", "You are pocket")


def _spell() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE (the table of GPT-2's tokenizer)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table


def build_tokenizer() -> Tokenizer:
    """The tokenizer, the same on every call: text tokens (256 bytes, then merges), SPECIAL_TOKENS, then the tokens that
    the words of clips and tools brought later, so that no id changed."""
    table = _spell()
    merges = _learn_merges(_corpus_counts(), NUM_LEARNT_MERGES)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    _complete(world_words(), ranks)
    tokens = dict.fromkeys([table[byte] for byte in range(256)] + [left + right for left, right in ranks])
    tokens.update(dict.fromkeys(SPECIAL_TOKENS))
    _complete(LATER_WORDS, ranks)
    tokens.update(dict.fromkeys(left + right for left, right in ranks))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(ranks), fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _complete(words: Iterable[str], ranks: dict[tuple[str, str], int]) -> None:
    """Adds to the merges what makes one token of each word."""
    for word in words:
        spelt = list(word.replace(" ", "Ġ"))
        while len(pieces := _apply(spelt, ranks)) > 1:
            # The space joins last, so that the forms with and without it share their merges.
            first = 1 if pieces[0] == "Ġ" and len(pieces) > 2 else 0
            ranks[pieces[first], pieces[first + 1]] = len(ranks)


def world_words() -> list[str]:
    """Every word that is to be one token, in the order of completion; with a leading space where it occurs with one."""
    # Words that answers are made of come at the start of an answer as well as inside it.
    answers = [*NUMBER_WORDS, "yes", "no", "the", *SIZES, *COLOURS, *SHAPES, *text_tasks.WORDS]
    words = dict.fromkeys(form for word in answers for form in (word, " " + word))
    plurals = [Look(shape=shape).plural() for shape in (*SHAPES, None)]
    inside = [*plurals, "object", "an", "top", "bottom", "centre", "left", "right"]
    inside += [word for group in (RELATION_WORDS, COMPARISON_WORDS) for words_ in group.values() for word in words_]
    sources = [" " + word for word in inside]
    for wordings in (*PICTURE_WORDINGS.values(), *TEXT_WORDINGS.values()):
        sources += wordings.trained
    sources += [wording for group in DESCRIBE_WORDINGS.values() for wording in group]
    sources += CHAT_WORDS
    for source in sources:
        words.update(dict.fromkeys(re.findall(r" ?[A-Za-z]+", re.sub(r"\{\w+\}", "#", source))))
    return list(words)


def _corpus_counts() -> Counter[str]:
    """How often each word (with its leading space, spelt in byte characters) occurs in the corpus."""
    lines = [PLAIN_ENGLISH.replace("\n", " ")] * 2 + [" ".join(world_words())]
    lines += [text for prompts, answer in text_tasks.SMALL_TALK for text in (*prompts, answer)]
    return Counter(word.replace(" ", "Ġ") for line in lines for word in re.findall(r" ?[A-Za-z]+", line))


def _learn_merges(counts: Counter[str], number: int) -> list[tuple[str, str]]:
    """Byte-pair encoding as it is always learnt; ties go to the pair that sorts first."""
    words = [(list(word), count) for word, count in counts.items()]
    merges: list[tuple[str, str]] = []
    while len(merges) < number:
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, count in words:
            for pair in pairwise(pieces):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = [(_join(pieces, best), count) for pieces, count in words]
    return merges


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _apply(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """BPE of one word: the pair of lowest rank is joined until none is left."""
    while True:
        known = [pair for pair in pairwise(pieces) if pair in ranks]
        if not known:
            return pieces
        pieces = _join(pieces, min(known, key=ranks.__getitem__))


def write_processing_files(folder: Path) -> None:
    """Writes what stands beside pocket's weights to read its input: the tokenizer and the settings of the processors.
    (`chat_template.jinja` is written by hand.)"""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_TOKENS,
    }
    # A clip goes through the tower moment by moment, each as a picture: what moves is for the text model to compare.
    # A picture is shown in the size of the world's pictures; larger ones are made smaller, so that they take 16 tokens.
    limits: dict[str, object] = {
        "min_pixels": 4 * 28 * 28,
        "max_pixels": PICTURE_SIZE**2,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    image_config = {**limits, "image_processor_type": "MiniMaxM3VLImageProcessor"}
    video_config = {
        **limits,
        "fps": 1.0,
        "min_frames": 4,
        "max_frames": 16,
        "vision_segment_max_frames": 1,
        "video_processor_type": "MiniMaxM3VLVideoProcessor",
    }
    processor_config = {"processor_class": "MiniMaxM3VLProcessor"}
    for name, values in (
        ("tokenizer_config.json", tokenizer_config),
        ("preprocessor_config.json", {**image_config, **processor_config}),
        ("video_preprocessor_config.json", {**video_config, **processor_config}),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_processing_files(Path(__file__).parent / "weights")
