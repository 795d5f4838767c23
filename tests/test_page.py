"""The page's document and `/v1/inspect`, without a browser (that is test_page_browser.py)."""

import base64
import hashlib
import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minim3.inspection import record
from minim3.server.settings import ServerSettings
from tests.running_servers import Running, pocket, running

QUESTION = [{"role": "user", "content": "What is 3 plus 4?"}]
ANSWER = {"role": "assistant", "content": "7"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerSettings()) as server:
        yield server


def picture_url(seed: int = 0) -> str:
    buffer = io.BytesIO()
    levels = np.random.default_rng(seed).integers(0, 256, (112, 112, 3)).astype(np.uint8)
    Image.fromarray(levels).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_the_page_is_one_document_that_names_its_scripts_by_hash(server: Running) -> None:
    """A page that needs a second path open, or loads something from elsewhere, or lets any inline script run."""
    response = server.http().get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert "unsafe" not in policy
    page = response.text
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    for rule, texts in (("script-src", scripts), ("style-src", styles)):
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert rules[rule].split() == [f"'sha256-{digest}'" for digest in digests]
    assert len(scripts) == 13
    assert not re.search(r"""\s(?:src|srcset|action|on\w+|style)\s*=\s*["']""", page.split("<script>")[0])
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", page)
    assert not re.search(r"""["'(](?:https?:)?//[\w.-]+\.\w""", outside), "an address in the page"
    assert "{{" not in page.split("<script>")[0].split("</style>")[1]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_a_look_inside_is_the_inspection_of_the_same_conversation(server: Running) -> None:
    """Tokens or choices of another prompt: of another thinking mode, without the picture, with the answer retold."""
    model, processor = pocket()
    parts = [{"type": "image_url", "image_url": {"url": picture_url()}}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": parts}]
    for mode, answer in (
        ("disabled", {"role": "assistant", "content": "a red circle"}),
        ("adaptive", {"role": "assistant", "content": "a red circle", "reasoning_content": "red"}),
    ):
        body = {"messages": messages, "answer": answer, "chat_template_kwargs": {"thinking_mode": mode}}
        response = server.http().post("/v1/inspect", json=body)
        assert response.status_code == 200, response.text
        data = response.json()
        whole = processor.apply_chat_template([*messages, answer], thinking_mode=mode, add_generation_prompt=False)
        ids = [token["id"] for token in data["tokens"]]
        expected = whole["input_ids"][0].tolist()
        end = len(expected) - expected[::-1].index(processor.tokenizer.eos_token_id)
        assert ids == expected[:end]
        prompt = data["num_prompt_tokens"]
        media = {name: whole[name] for name in ("pixel_values", "image_grid_thw")}
        known = record(model, processor, ids[:prompt], media=media, answer_ids=ids[prompt:])
        assert data["layers"] == _plain(known.to_dict()["layers"])
        assert data["media"] == _plain(known.to_dict()["media"])
        assert data["model"] == "pocket"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def test_ids_of_the_answer_are_taken_as_they_are(server: Running) -> None:
    ids = [100, 200, 300]
    body = {"messages": QUESTION, "answer": ANSWER, "answer_token_ids": ids, "layers": [2]}
    data = server.http().post("/v1/inspect", json=body).json()
    assert [token["id"] for token in data["tokens"][data["num_prompt_tokens"] :]] == ids
    assert [layer["selected"] is not None for layer in data["layers"]] == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "messages"),
        ({"answer": "7"}, "answer"),
        ({"answer": {"role": "assistant"}}, "assistant) has no content"),
        ({"answer": {"role": "user", "content": "7"}}, "chat template does not write this answer"),
        ({"answer_token_ids": []}, "the answer is empty"),
        ({"answer_token_ids": [5000]}, "token id 5000 of the answer is outside the vocabulary of 1533"),
        ({"answer_token_ids": [5] * 4096}, "looking inside takes at most 4096"),
        ({"layers": [5]}, "layer 5 is asked for, the model has layers 0 to 4"),
        ({"chat_template_kwargs": {"thinking_mode": "enabled"}}, "in another thinking mode"),
        ({"answers": 1}, "'answers' is no field of this request"),
        ({"model": "other"}, "the model 'other' does not exist here"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(server: Running, changes: dict[str, Any], message: str) -> None:
    response = server.http().post("/v1/inspect", json={"messages": QUESTION, "answer": ANSWER, **changes})
    assert response.status_code in (400, 404), response.text
    assert message in response.json()["error"]["message"]
    server.wait_idle()


def test_the_page_is_open_and_looking_inside_needs_the_key() -> None:
    """A key that protects the chat and not what was said in it."""
    with running(ServerSettings(api_keys=("secret",))) as server, server.http() as http:
        assert http.get("/").status_code == 200
        body = {"messages": QUESTION, "answer": ANSWER}
        assert http.post("/v1/inspect", json=body).status_code == 401
        assert http.post("/v1/inspect", json=body, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert "secret" not in http.get("/").text


def test_page_and_looking_inside_can_be_off() -> None:
    with running(ServerSettings(page=False)) as server, server.http() as http:
        assert http.get("/").status_code == 404
        assert http.post("/v1/inspect", json={"messages": QUESTION, "answer": ANSWER}).status_code == 404
    with running(ServerSettings(look_inside=False)) as server, server.http() as http:
        assert '"look_inside":false' in http.get("/").text
        response = http.post("/v1/inspect", json={"messages": QUESTION, "answer": ANSWER})
        assert response.status_code == 403
        assert response.json()["error"]["message"] == "looking inside is off on this server"
