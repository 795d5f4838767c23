"""Log-likelihoods and perplexity: equal in any batch, equal to the padded call and to transformers, read as needed."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as PlainTokenizer

from minim3.evaluation import scoring
from minim3.evaluation.perplexity import perplexity, sliding_windows, text_pieces
from minim3.evaluation.scoring import Pair, Score, loglikelihoods
from minim3.inference.request import Media
from minim3.model.batch import ForwardBatch
from minim3.processing.tokenizer import Tokenizer
from tests.tiny_models import IMAGE, PATCH_VALUES, VOCABULARY, random_ids, text_model, vl_model

MODEL = text_model(seed=5).double()


def by_the_padded_call(model: Any, pair: Pair, **media: Any) -> Score:
    """The plain way: logits of the whole sequence, log_softmax, gather."""
    ids = torch.tensor([[*pair.context, *pair.continuation]])
    with torch.inference_mode():
        logprobs = model(input_ids=ids, **media).logits[0, :-1].log_softmax(-1)
    targets = ids[0, len(pair.context) :]
    rows = logprobs[len(pair.context) - 1 :]
    total = rows.gather(1, targets[:, None]).sum()
    return Score(float(total), bool((rows.argmax(-1) == targets).all()), len(targets))


def random_pair(context: int, continuation: int, seed: int) -> Pair:
    ids = random_ids(context + continuation, seed=seed).tolist()
    return Pair(ids[:context], ids[context:])


def assert_equal_scores(got: list[Score], expected: list[Score]) -> None:
    assert [score[1:] for score in got] == [score[1:] for score in expected]
    assert [score.logprob for score in got] == pytest.approx([score.logprob for score in expected], rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=8),
    batch_size=st.integers(1, 9),
    batch_tokens=st.integers(1, 120),
)
def test_a_score_does_not_depend_on_the_batch(sizes: list[tuple[int, int]], batch_size: int, batch_tokens: int) -> None:
    """Neighbours of other lengths, rows of one sequence read as another's, results out of order."""
    pairs = [random_pair(*size, seed) for seed, size in enumerate(sizes)]
    got = list(loglikelihoods(MODEL, pairs, batch_size=batch_size, batch_tokens=batch_tokens))
    assert_equal_scores(got, [by_the_padded_call(MODEL, pair) for pair in pairs])


def test_the_greedy_continuation_is_known_as_such() -> None:
    """`is_greedy` of the first token only, or never true."""
    context = random_ids(12, seed=1).tolist()
    greedy = MODEL.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    continuation = greedy[0, 12:].tolist()
    changed = [*continuation[:-1], (continuation[-1] + 1) % VOCABULARY]
    got = loglikelihoods(MODEL, [Pair(context, continuation), Pair(context, changed)])
    assert [score.is_greedy for score in got] == [True, False]


def count_tokens(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[int]:
    """Appends the tokens of every forward pass of `model`."""
    counts: list[int] = []
    plain = model.text_model.forward_packed

    def counted(embeds: torch.Tensor, batch: ForwardBatch, *rest: Any) -> torch.Tensor:
        counts.append(batch.num_tokens)
        return plain(embeds, batch, *rest)

    monkeypatch.setattr(model.text_model, "forward_packed", counted)
    return counts


def test_one_context_with_many_one_token_answers_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four letters of a multiple choice question costing four times its prompt."""
    context = random_ids(30, seed=2).tolist()
    pairs = [Pair(context, [letter]) for letter in (3, 4, 5, 6)]
    expected = [by_the_padded_call(MODEL, pair) for pair in pairs]
    counts = count_tokens(monkeypatch, MODEL)
    assert_equal_scores(list(loglikelihoods(MODEL, pairs)), expected)
    assert counts == [30]


def test_pairs_are_read_a_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of any size held in memory before the first score."""
    counts = count_tokens(monkeypatch, MODEL)
    read = 0

    def pairs() -> Iterator[Pair]:
        nonlocal read
        for seed in range(100):
            read += 1
            yield random_pair(9, 2, seed)

    scores = loglikelihoods(MODEL, pairs(), batch_size=4, batch_tokens=25)
    next(scores)
    assert read == 3, "two pairs of 10 tokens fit 25; a third is read to see that it does not"
    assert counts == [20]


def test_logits_are_made_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """[tokens, vocabulary] in memory at once: 200,000 numbers a token in the released model."""
    pairs = [random_pair(3, 37, seed) for seed in range(3)]
    expected = list(loglikelihoods(MODEL, pairs))
    rows: list[int] = []
    plain = MODEL.compute_logits
    monkeypatch.setattr(MODEL, "compute_logits", lambda hidden: (rows.append(len(hidden)), plain(hidden))[1])
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 10 * VOCABULARY)
    assert_equal_scores(list(loglikelihoods(MODEL, pairs)), expected)
    assert max(rows) == 10
    assert sum(rows) == 3 * 37


def test_pictures_stay_with_their_pair_and_are_seen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a batch shifted by one pair; the same picture run again for every answer."""
    model = vl_model(seed=2).double()
    media = []
    for seed in range(3):
        pixels = torch.randn(24, PATCH_VALUES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        media.append(Media(pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 6]])))
    question = [*random_ids(4, seed=7).tolist(), *[IMAGE] * 6, *random_ids(3, seed=8).tolist()]
    answers = [[5, 6], [7, 8, 9], [4]]
    pairs = [Pair(question, answer, one) for one in media for answer in answers]
    pairs.insert(4, random_pair(8, 3, 0))
    expected = []
    for pair in pairs:
        given = {} if pair.media is None else vars_of(pair.media)
        expected.append(by_the_padded_call(model, pair, **given))
    seen: list[int] = []
    plain = model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda p, g: (seen.append(len(p)), plain(p, g))[1])
    assert_equal_scores(list(loglikelihoods(model, pairs)), expected)
    assert seen == [3 * 24]


def vars_of(media: Media) -> dict[str, Any]:
    return {"pixel_values": media.pixel_values, "image_grid_thw": media.image_grid_thw}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair([], [3]), "the context is empty"),
        (Pair([3], []), "the continuation is empty"),
        (random_pair(250, 8, 0), "258 tokens to score, but the model takes 256"),
        (Pair([3], [VOCABULARY]), f"{VOCABULARY}, the vocabulary has ids 0 to {VOCABULARY - 1}"),
        (Pair([3, -1], [3]), "-1"),
    ],
)
def test_pairs_that_cannot_be_scored(pair: Pair, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(loglikelihoods(MODEL, [pair]))


def test_the_last_position_of_the_model_is_used() -> None:
    """One token less than the model takes: the last one is only predicted."""
    (score,) = loglikelihoods(MODEL, [random_pair(250, 7, 0)])
    assert score.num_tokens == 7


# --- perplexity ------------------------------------------------------------------------------------------------------


class ByteTokenizer:
    """Ids are bytes: every id below 128 for ASCII."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


BYTES: Any = ByteTokenizer()


def test_perplexity_is_that_of_transformers(tmp_path: Path) -> None:
    """The sliding-window loop of transformers' own guide, on the same checkpoint."""
    pytest.importorskip("transformers")
    from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM
    from tests.parity.oracle import random_model

    theirs = random_model(1)
    theirs.save_pretrained(tmp_path)
    ours = MiniMaxM3SparseForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    text = "".join(
        chr(int(code)) for code in torch.randint(32, 127, (333,), generator=torch.Generator().manual_seed(0))
    )
    for window, stride in ((400, 200), (64, 32), (50, 13)):
        ids = torch.tensor([list(text.encode())])
        nats, num_tokens, previous_end = 0.0, 0, 0
        for begin in range(0, ids.shape[1], stride):
            end = min(begin + window, ids.shape[1])
            labels = ids[:, begin:end].clone()
            labels[:, : -(end - previous_end)] = -100
            num_targets = int((labels[:, 1:] != -100).sum())
            with torch.inference_mode():
                nats += float(theirs(input_ids=ids[:, begin:end], labels=labels).loss) * num_targets
            num_tokens += num_targets
            previous_end = end
            if end == ids.shape[1]:
                break
        found = perplexity(ours, BYTES, [[text]], window=window, stride=stride, batch_tokens=150)
        assert (found.num_tokens, found.num_bytes) == (num_tokens, num_tokens) == (332, 332)
        assert found.nats_per_token == pytest.approx(nats / num_tokens, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(nats / num_tokens), rel=1e-4)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_windows_score_every_token_once(data: st.DataObject) -> None:
    """A token at a window's edge scored twice, or never, or with less before it than promised."""
    window = data.draw(st.integers(2, 12))
    stride = data.draw(st.integers(1, window - 1))
    num_tokens = data.draw(st.integers(0, 40))
    scored = [0]
    for pair in sliding_windows(range(num_tokens), window, stride):
        whole = [*pair.context, *pair.continuation]
        assert whole == list(range(whole[0], whole[0] + len(whole)))
        assert len(whole) <= window
        assert whole[0] == 0 or len(pair.context) >= window - stride
        scored += pair.continuation
    assert scored == list(range(max(num_tokens, 1)))


def test_what_is_counted_with_and_without_a_first_token(tokenizer: Tokenizer) -> None:
    """A head of zeros gives every token log(V): figures are known exactly. A token not scored has no bytes."""
    model = text_model(vocab_size=450)
    torch.nn.init.zeros_(model.lm_head.weight)
    texts = ["the answer is é, the answer", "system user tool"]
    ids = [tokenizer.encode(text) for text in texts]
    num_tokens, num_bytes = sum(map(len, ids)), sum(len(text.encode()) for text in texts)
    whole = perplexity(model, tokenizer, [[text] for text in texts], prefix_id=0)
    assert (whole.num_tokens, whole.num_bytes) == (num_tokens, num_bytes)
    assert whole.perplexity == pytest.approx(450, rel=1e-5)
    assert whole.bits_per_byte == pytest.approx(num_tokens * math.log2(450) / num_bytes, rel=1e-5)
    first = sum(len(tokenizer.token_bytes(row[0])) for row in ids)
    bare = perplexity(model, tokenizer, [[text] for text in texts])
    assert (bare.num_tokens, bare.num_bytes) == (num_tokens - 2, num_bytes - first)
    some = perplexity(model, tokenizer, [[text] for text in texts], prefix_id=0, max_windows=1)
    assert (some.num_tokens, some.num_bytes) == (len(ids[0]), len(texts[0].encode()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 257}, "the window is 257 tokens; the model takes 2 to 256"),
        ({"window": 1}, "the window is 1 tokens"),
        ({"window": 8, "stride": 8}, "with a window of 8 it can be 1 to 7"),
        ({"window": 8, "stride": 0}, "the stride is 0"),
        ({}, "nothing to score"),
    ],
)
def test_refused_windows(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(MODEL, BYTES, [["a"]], **options)


RECENT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def white_space_tokenizer(pattern: str | None) -> Tokenizer:
    """A tokenizer that has tokens for runs of white space. pattern: how it cuts text into words; None as GPT-2 does."""
    tokenizer = PlainTokenizer(models.BPE())
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, whole])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    corpus = ["a \n", "b.\n\n", "the end\n", "a\t\n", ".\r\n", "the\n \n", "a  \n\n"]
    tokenizer.train_from_iterator(corpus * 20, trainer)
    return Tokenizer(tokenizer.to_str())


WHITE_SPACE_TOKENIZERS = (white_space_tokenizer(None), white_space_tokenizer(RECENT))


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(st.sampled_from(["a", "the", " ", "\n", "\r\n", ".", "é", "\t", "7"]), max_size=40).map("".join),
    characters=st.integers(1, 12),
)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, text: str, characters: int
) -> None:
    """Cuts that part a run of line breaks, or a word: other tokens, another perplexity."""
    file = tmp_path_factory.getbasetemp() / "piece.txt"
    file.write_bytes(text.encode())
    pieces = list(text_pieces(file, characters))
    assert "".join(pieces) == text
    for one in WHITE_SPACE_TOKENIZERS:
        assert [token_id for piece in pieces for token_id in one.encode(piece)] == one.encode(text)


def test_a_long_file_comes_in_pieces(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("a line of text\n" * 1000, encoding="utf-8")
    assert max(map(len, text_pieces(file, 300))) < 330
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"lines\.txt is not UTF-8 text"):
        list(text_pieces(file))
