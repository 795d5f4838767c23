"""/v1/completions, /tokenize and /detokenize."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from tests.running_servers import Running, pocket, running

PLACEHOLDER = pocket()[0].config.image_token_index


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    with running() as server:
        yield server


def complete(server: Running, **asked: Any) -> Any:
    return server.client().completions.create(**{"model": "pocket", "max_tokens": 6, **asked})


def test_text_and_its_ids_continue_alike(plain: Running) -> None:
    text = "What is 3 plus"
    ids = pocket()[1].tokenizer.encode(text)
    by_text = complete(plain, prompt=text)
    by_ids = complete(plain, prompt=ids)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.usage.prompt_tokens == len(ids)
    assert by_text.usage.completion_tokens <= 6


def test_several_prompts_times_n_come_in_order(plain: Running) -> None:
    """Choice p * n + i belongs to prompt p: clients count on it."""
    prompts = ["What is", "The red", "A small"]
    alone = [complete(plain, prompt=prompt).choices[0].text for prompt in prompts]
    together = complete(plain, prompt=prompts, n=2)
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == [text for text in alone for _ in range(2)]
    streamed = [""] * 6
    for chunk in complete(plain, prompt=prompts, n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in together.choices]


def test_echo_and_its_logprobs_are_those_of_the_model(plain: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What evaluation harnesses read: a log-probability for every token of the prompt but the first."""
    monkeypatch.setattr("minim3.server.completions._SCORED_ROWS", 3)  # cuts the prompt in the middle
    model, processor = pocket()
    text = "What is 3 plus 4?"
    ids = processor.tokenizer.encode(text)
    answer = complete(plain, prompt=text, echo=True, logprobs=2, max_tokens=3)
    choice = answer.choices[0]
    assert choice.text.startswith(text)
    assert choice.logprobs.token_logprobs[0] is None
    assert "".join(choice.logprobs.tokens).startswith(text)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    for place in range(1, len(ids)):
        known = float(expected[place - 1, ids[place]])
        assert choice.logprobs.token_logprobs[place] == pytest.approx(known, abs=1e-4)
        assert len(choice.logprobs.top_logprobs[place]) in (2, 3)
    offsets = choice.logprobs.text_offset
    assert offsets == sorted(offsets)
    scored = complete(plain, prompt=text, echo=True, logprobs=1, max_tokens=0)
    assert scored.choices[0].text == text
    assert scored.choices[0].logprobs.token_logprobs == choice.logprobs.token_logprobs[: len(ids)]
    assert scored.usage.completion_tokens == 0


def test_harnesses_score_the_last_token_of_a_prompt(plain: Running) -> None:
    """One token is asked for behind the prompt and taken off again: where it was the end it had no entry, and the last
    token of every choice was taken off in its place, so that all choices of one token tied."""
    processor = pocket()[1]
    messages = [{"role": "user", "content": "What is 3 plus 4?"}]
    asked = processor.apply_chat_template(messages, thinking_mode="disabled", return_tensors=None)["input_ids"]
    found = {}
    for answer in ("7", "8"):
        ids = [*asked, *processor.tokenizer.encode(answer)]
        choice = complete(plain, prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0).choices[0]
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(ids) + 1
        assert choice.text == processor.tokenizer.decode(ids)
        assert choice.logprobs.tokens[-1] == ""
        found[answer] = sum(choice.logprobs.token_logprobs[len(asked) : -1])
    assert found["8"] < found["7"] - 1 < 0


def test_offsets_of_characters_of_several_tokens(plain: Running) -> None:
    choice = complete(plain, prompt="aé日b", echo=True, logprobs=0, max_tokens=0).choices[0]
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    assert (tokens[0], tokens[-1], offsets[0], offsets[-1]) == ("a", "b", 0, 3)
    assert all(token.startswith("bytes:\\x") for token in tokens[1:-1] if token not in "é日")
    assert offsets == sorted(offsets)


def test_min_tokens_holds_stop_tokens_back(plain: Running) -> None:
    prompt = "What is 3 plus"
    ids = pocket()[1].tokenizer.encode(complete(plain, prompt=prompt, max_tokens=8).choices[0].text)
    body = {"stop_token_ids": ids[:1]}
    assert complete(plain, prompt=prompt, max_tokens=8, extra_body=body).usage.completion_tokens == 1
    held = complete(plain, prompt=prompt, max_tokens=8, extra_body={**body, "min_tokens": 6, "ignore_eos": True})
    assert held.usage.completion_tokens >= 7


def test_a_stream_with_echo_and_logprobs_adds_up(plain: Running) -> None:
    asked: dict[str, Any] = {"prompt": "What is", "echo": True, "logprobs": 1}
    whole = complete(plain, **asked).choices[0]
    text, tokens, offsets = "", [], []
    for chunk in complete(plain, **asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            text += choice.text
            tokens += choice.logprobs.tokens
            offsets += choice.logprobs.text_offset
    assert text == whole.text
    assert tokens == whole.logprobs.tokens
    assert offsets == whole.logprobs.text_offset


def test_stop_and_max_tokens(plain: Running) -> None:
    free = complete(plain, prompt="What is", max_tokens=12).choices[0]
    assert len(free.text) > 3
    cut = complete(plain, prompt="What is", max_tokens=12, stop=[free.text[2:4]]).choices[0]
    assert cut.text == free.text[: free.text.index(free.text[2:4])]
    assert cut.finish_reason == "stop"


def test_markers_in_a_text_prompt_count_only_when_asked_for(plain: Running) -> None:
    tokenizer = pocket()[1].tokenizer
    text = "]~b]user\nhi[e~["
    plainly = complete(plain, prompt=text).usage.prompt_tokens
    counted = complete(plain, prompt=text, extra_body={"allow_special_tokens": True}).usage.prompt_tokens
    assert plainly == len(tokenizer.encode(text))
    assert counted == len(tokenizer.encode(text, allow_special=True)) < plainly


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [5_000]}, None, "5000"),
        ({"prompt": [5_000], "echo": True, "logprobs": 1, "max_tokens": 0}, "prompt", "5000"),
        ({"prompt": [5, PLACEHOLDER]}, None, "placeholder"),
        ({"prompt": [5, PLACEHOLDER], "echo": True, "logprobs": 1, "max_tokens": 0}, "prompt", "placeholder"),
        ({"prompt": [-1]}, "prompt", "-1 is no id"),
        ({"prompt": "a", "max_tokens": 2, "extra_body": {"min_tokens": 3}}, "min_tokens", "above max_tokens (2)"),
        ({"prompt": "a", "stream_options": {"include_use": True}}, "stream_options.include_use", "no field"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"prompt": ["a", 3]}, "prompt", "3 is neither"),
        ({"prompt": {"a": 1}}, "prompt", "dict"),
        ({"prompt": [1] * 9000}, "prompt", "8192"),
        ({"prompt": ["a"] * 65}, "n", "64"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "left to right"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "echo"),
        ({"prompt": "a", "best_of": 3}, "best_of", "n instead"),
        ({"prompt": "a", "logprobs": 50}, "logprobs", "20"),
        ({"prompt": "a", "logprobs": 50, "echo": True}, "logprobs", "20"),
    ],
)
def test_wrong_requests_are_named(plain: Running, asked: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(plain, **asked)
    assert caught.value.param is None or param is None or caught.value.param.startswith(param)
    assert words in str(caught.value)
    plain.wait_idle()


def test_a_prompt_is_scored_a_few_positions_at_a_time(plain: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of all positions at once, a vocabulary wide, are hundreds of gigabytes for the longest prompt."""
    model = pocket()[0]
    rows: list[int] = []
    compute = type(model).compute_logits

    def watched(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(hidden.shape[0])
        return compute(self, hidden)

    monkeypatch.setattr(type(model), "compute_logits", watched)
    answer = complete(plain, prompt=[100] * 600, echo=True, logprobs=0, max_tokens=0)
    assert len(answer.choices[0].logprobs.token_logprobs) == 600
    assert sum(rows) == 599
    assert max(rows) <= 256


def test_tokenize_and_detokenize_are_inverse(plain: Running) -> None:
    text = "Ein Größenwahn 你好 🙂]~b]"
    with plain.http() as client:
        answer = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["tokens"] == pocket()[1].tokenizer.encode(text)
        assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
        assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
        messages = [{"role": "user", "content": "hi"}]
        chat = client.post("/tokenize", json={"messages": messages}).json()
        expected = pocket()[1].apply_chat_template(messages)["input_ids"][0].tolist()
        assert chat["tokens"] == expected
        assert client.post("/tokenize", json={}).status_code == 400
        assert client.post("/tokenize", json={"prompt": "a", "messages": messages}).status_code == 400
