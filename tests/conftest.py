"""Fixtures that several test files share."""

import importlib.util
import os
from unittest import mock

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from minim3.processing.tokenizer import Tokenizer as MiniMaxTokenizer

# Triton's own functions are made for its interpreter or for a GPU when it is imported, for good. torch imports it too
# (its FLOP counter, say): whichever test file comes first, the tests of the kernels need it interpreted.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        importlib.import_module("triton.language")

CONTROL_TOKENS = [
    "]~!b[",
    "]~b]",
    "[e~[",
    "<mm:think>",
    "</mm:think>",
    "]<]minimax[>[",
    "]<]image[>[",
    "]<]video[>[",
    "]<]start of image[>[",
    "]<]end of image[>[",
]


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A small byte-level BPE tokenizer with the control tokens of M3 (and one added token that is not special)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    corpus = [
        "system user ai tool developer\n the answer is think before you answer, is there a red circle in the picture?",
        "<invoke name= <tool_call> </tool_call> <response> </response> ]~b] [e~[ <mm:think> </mm:think> é € 你好",
    ]
    tokenizer.train_from_iterator(corpus * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_json: str) -> MiniMaxTokenizer:
    return MiniMaxTokenizer(tokenizer_json)
