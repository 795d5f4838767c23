"""The page in a browser: headless Chromium against a running server, with pocket or with scripted answers."""

import base64
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minim3.inspection import record, write_report
from minim3.pocket.world import Background, Scene, SceneObject, draw
from minim3.server.settings import ServerSettings
from tests.running_servers import Running, ScriptedEngine, pocket, running

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = "/usr/bin/chromium"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"needs {CHROMIUM}"),
]
NS = "]<]minimax[>["


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    """pocket as it answers."""
    with running(ServerSettings()) as server:
        yield server


@pytest.fixture(scope="module")
def scripted() -> Iterator[Running]:
    """pocket, which says what a test wants, a token every few milliseconds."""
    with running(ServerSettings(), engine=ScriptedEngine(step_seconds=0.01)) as server:
        yield server


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page of its own; afterwards its console must be empty, and nobody else asked for anything."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def visit(url: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 860}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda one: one.url.startswith((url, "data:", "blob:")) or complaints.append(one.url))
        page.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
        page.goto(url)
        return page

    visit.complaints = complaints  # type: ignore[attr-defined]
    yield visit
    for context in contexts:
        context.close()
    assert not complaints


def say(server: Running, text: str, *, cut: int | None = None) -> None:
    """What the next answers will be."""
    tokenizer = pocket()[1].tokenizer
    ids = [*tokenizer.encode(text, allow_special=True), tokenizer.eos_token_id]
    assert isinstance(server.engine, ScriptedEngine)
    server.engine.script = lambda _prompt, _number: ids[:cut]


def ask(page: Any, text: str) -> Any:
    """Types a message and sends it by Enter; the answer's element."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    return page.locator(".message.assistant").last


def done(answer: Any) -> Any:
    """Waits until the answer is complete."""
    playwright.expect(answer).to_have_attribute("aria-busy", "false", timeout=30_000)
    return answer


def scene(colour: str, rgb: tuple[int, int, int]) -> np.ndarray:
    plain = Background("plain", (226, 229, 233), (226, 229, 233), False, 8, 0)
    return draw(Scene((SceneObject(colour, "square", "large", 20, 30, 38, rgb),), plain))


def png(levels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "png")
    return buffer.getvalue()


GREEN = png(scene("green", (35, 155, 55)))


def fits(page: Any) -> bool:
    """Whether nothing lies beyond the right edge."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_an_answer_streams_and_shows_its_figures(plain: Running, visit: Callable[..., Any]) -> None:
    page = visit(plain.url)
    playwright.expect(page.locator("#model")).to_have_text("pocket")
    answer = done(ask(page, "What can you do?"))
    assert "I answer questions about pictures of shapes" in answer.inner_text()
    assert re.search(r"\d+ tokens · \d+ tokens/s · first after \d\.\d\d s", answer.inner_text())
    playwright.expect(page.get_by_role("status")).to_have_text("The answer is complete")
    playwright.expect(page.get_by_label("Message", exact=True)).to_be_focused()
    # The conversation goes on: the second question is asked with the first one before it.
    done(ask(page, "Thanks"))
    assert page.locator(".message").count() == 4


def test_text_appears_before_the_answer_is_complete(scripted: Running, visit: Callable[..., Any]) -> None:
    """A page that waits for the end and then shows everything."""
    say(scripted, "</mm:think>" + "apple moon " * 80)
    page = visit(scripted.url)
    answer = ask(page, "hi")
    playwright.expect(answer).to_contain_text("apple moon apple")
    assert answer.get_attribute("aria-busy") == "true"
    first = len(answer.inner_text())
    done(answer)
    assert len(answer.inner_text()) > first


def test_stop_keeps_what_came_and_frees_the_pages(scripted: Running, visit: Callable[..., Any]) -> None:
    say(scripted, "</mm:think>" + "river stone " * 400)
    page = visit(scripted.url)
    for how in ("button", "escape"):
        answer = ask(page, "go on")
        playwright.expect(answer).to_contain_text("river stone")
        if how == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        done(answer)
        kept = answer.locator(".answer").inner_text()
        assert 11 <= len(kept) < 4000
        playwright.expect(page.get_by_role("status")).to_have_text("Stopped")
        playwright.expect(page.get_by_role("button", name="Send")).to_be_disabled()
        scripted.wait_idle()
    # A stopped answer can be looked into, without a token that closes its turn.
    answer.get_by_role("button", name="Look inside").click()
    tokens = page.locator(".mi-answer")
    playwright.expect(tokens.first).to_be_visible()
    assert "".join(tokens.all_inner_texts()).endswith(("river", "stone", " "))


def test_answer_again_and_change_the_question(scripted: Running, visit: Callable[..., Any]) -> None:
    page = visit(scripted.url)
    say(scripted, "</mm:think>one")
    done(ask(page, "first"))
    say(scripted, "</mm:think>two")
    page.get_by_role("button", name="Answer again").click()
    playwright.expect(page.locator(".message.assistant .answer")).to_have_text("two")
    assert page.locator(".message").count() == 2
    done(page.locator(".message.assistant"))
    page.get_by_role("button", name="Change the question").click()
    assert page.locator(".message").count() == 0
    assert page.get_by_label("Message", exact=True).input_value() == "first"
    page.get_by_role("button", name="New chat").click()
    playwright.expect(page.locator("#empty")).to_be_visible()


def test_thinking_is_folded_and_opens(scripted: Running, visit: Callable[..., Any]) -> None:
    say(scripted, "<mm:think>red or green </mm:think>green")
    page = visit(scripted.url)
    answer = done(ask(page, "which?"))
    thinking = answer.locator("details.thinking")
    assert not thinking.evaluate("node => node.open")
    assert "Thought for" in thinking.locator("summary").inner_text()
    assert answer.locator(".answer").inner_text() == "green"
    thinking.locator("summary").click()
    playwright.expect(thinking.locator("div")).to_have_text("red or green")


def test_tool_calls_are_shown_and_answered(scripted: Running, visit: Callable[..., Any]) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]  # fmt: skip  # noqa: E501
    page = visit(scripted.url)
    page.get_by_role("button", name="Settings", exact=True).click()
    page.locator("#s-tools-details summary").click()
    page.get_by_label("Tools as JSON").fill("[")
    playwright.expect(page.locator("#s-tools-help")).to_have_text("This is not a JSON list: it is left out.")
    page.get_by_label("Tools as JSON").fill(json.dumps(tools))
    page.get_by_role("button", name="Done").click()
    call = f'{NS}<tool_call>\n{NS}<invoke name="add">{NS}<a>3{NS}</a>{NS}</invoke>\n{NS}</tool_call>'
    say(scripted, f"</mm:think>{call}")
    answer = done(ask(page, "What is 3 plus 4?"))
    assert answer.locator(".tool summary").inner_text().split() == ["Calls", "add"]
    assert json.loads(answer.locator(".tool pre").inner_text()) == {"a": 3}
    say(scripted, "</mm:think>the sum is 7")
    page.get_by_label("Result of add").fill("7")
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".message.assistant .answer").last).to_have_text("the sum is 7")


@pytest.mark.parametrize("how", ["button", "drop", "paste"])
def test_a_picture_is_sent_and_seen(plain: Running, visit: Callable[..., Any], how: str) -> None:
    page = visit(plain.url)
    if how == "button":
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Attach pictures or clips").click()
        chooser.value.set_files({"name": "green.png", "mimeType": "image/png", "buffer": GREEN})
    else:
        hand_over(page, how, "green.png", "image/png", GREEN)
    playwright.expect(page.locator("#attachments img")).to_have_count(1)
    answer = done(ask(page, "What colour is the large object?"))
    assert answer.locator(".answer").inner_text() == "green"
    playwright.expect(page.locator(".message.user img")).to_be_visible()


def hand_over(page: Any, how: str, name: str, kind: str, data: bytes) -> None:
    """A file dropped on the page or pasted into the message box."""
    page.evaluate(
        """([how, name, kind, data]) => {
            const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, {type: kind}));
            if (how === 'paste') {
                const event = new ClipboardEvent('paste', {clipboardData: transfer, bubbles: true, cancelable: true});
                document.getElementById('prompt').dispatchEvent(event);
            } else {
                for (const type of ['dragenter', 'dragover', 'drop'])
                    window.dispatchEvent(new DragEvent(type, {dataTransfer: transfer, cancelable: true}));
            }
        }""",
        [how, name, kind, base64.b64encode(data).decode()],
    )


def test_a_clip_is_sent(scripted: Running, visit: Callable[..., Any], tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    file = tmp_path / "clip.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 112
        for step in range(16):
            levels = np.roll(scene("green", (35, 155, 55)), 2 * step, axis=1)
            for packet in stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    say(scripted, "</mm:think>right")
    page = visit(scripted.url)
    hand_over(page, "drop", "clip.mp4", "video/mp4", file.read_bytes())
    playwright.expect(page.locator("#attachments video")).to_have_count(1)
    answer = done(ask(page, "Which way does it move?"))
    assert answer.locator(".answer").inner_text() == "right"
    answer.get_by_role("button", name="Look inside").click()
    playwright.expect(page.locator(".mi-media")).to_have_count(2)  # 4 frames, two a temporal patch


def test_other_files_are_refused_by_name(plain: Running, visit: Callable[..., Any]) -> None:
    page = visit(plain.url)
    hand_over(page, "drop", "notes.txt", "text/plain", b"hello")
    playwright.expect(page.get_by_role("alert")).to_have_text("notes.txt is neither a picture nor a clip.")
    assert page.locator("#attachments li").count() == 0


def test_look_inside_shows_what_the_model_selected(plain: Running, visit: Callable[..., Any]) -> None:
    """Pictures until the prompt has more blocks than a query may select; then every mark on the page is checked."""
    page = visit(plain.url)
    for colour, rgb in (("green", (35, 155, 55)), ("red", (216, 28, 34)), ("purple", (125, 45, 180))) * 3:
        hand_over(page, "drop", "picture.png", "image/png", png(scene(colour, rgb)))
    playwright.expect(page.locator("#attachments img")).to_have_count(9)
    answer = done(ask(page, f"{'apple moon, boat lamp, cake river, ' * 8}\nWhat goes with boat?"))
    with page.expect_response(lambda response: "inspect" in response.url) as response:
        answer.get_by_role("button", name="Look inside").click()
    data = response.value.json()
    # The ids that the answer was written with, its end among them: its text could be tokenized in another way.
    sent = response.value.request.post_data_json["answer_token_ids"]
    assert [one["id"] for one in data["tokens"][data["num_prompt_tokens"] :]] == sent
    assert sent[-1] in plain.state.eos_token_ids
    playwright.expect(page.locator(".mi-bar")).to_be_visible()
    playwright.expect(page.locator("#panel-title")).to_be_focused()
    size, prompt = data["block_size"], data["num_prompt_tokens"]
    layer = next(one for one in data["layers"] if one["chooses"] and any(one["chooses"]))
    token = int(page.locator('.mi-answer[aria-selected="true"]').get_attribute("data-index"))
    page.locator(f'.mi-choice input[value="{layer["layer"]}"][name$="layer-choice"]').check(force=True)

    def check(head: int) -> None:
        page.locator(f'.mi-choice input[value="{head}"][name$="head-choice"]').check(force=True)
        chosen = set(layer["selected"][token][head])
        assert 0 < len(chosen) < (prompt + token - 1) // size + 1
        texts = page.locator(".mi-block.is-selected").all_inner_texts()
        expected = [
            "".join(one["text"] for one in data["tokens"][block * size : (block + 1) * size] if not one["place"])
            for block in sorted(chosen)
        ]
        assert "".join("".join(texts).split()) == "".join("".join(expected).split())
        cells = [position for position, one in enumerate(data["tokens"]) if one["place"]]
        out = page.locator(".mi-cell").evaluate_all("cells => cells.map((cell) => cell.classList.contains('is-out'))")
        assert out == [position // size not in chosen for position in cells]
        label = page.get_by_label(re.compile(rf"^Head {head}: blocks ")).get_attribute("aria-label")
        assert label == f"Head {head}: blocks {', '.join(map(str, sorted(chosen)))} selected of {len(layer['scores'][token][head])}"  # fmt: skip  # noqa: E501

    check(0)
    check(1)
    ran = layer["expert_ids"][prompt - 1 + token]
    assert page.locator(".mi-expert").all_inner_texts() == [f"Expert {expert}" for expert in ran]
    page.locator(".mi-expert").first.click()
    marked = page.locator(".is-routed").count()
    assert marked == sum(ran[0] in row for row in layer["expert_ids"])
    # Pointing at a token shows it for as long as the pointer is there.
    page.locator(".mi-answer").nth(0).hover()
    playwright.expect(page.locator(".mi-step output")).to_contain_text("1 of")
    page.locator("#panel-title").hover()
    playwright.expect(page.locator(".mi-step output")).to_contain_text(f"{token + 1} of")
    # Another token, by click and by arrow keys; another layer, by arrow keys.
    page.locator(".mi-answer").nth(0).click()
    playwright.expect(page.locator(".mi-step output")).to_contain_text("1 of")
    page.locator(".mi-answer").nth(0).press("ArrowRight")
    playwright.expect(page.locator('.mi-answer[aria-selected="true"]')).to_have_attribute("data-index", "1")
    token = 1
    check(1)
    page.locator(".mi-answer").nth(1).press("ArrowDown")
    playwright.expect(page.get_by_text(f"Blocks selected in layer {layer['layer'] + 1}")).to_be_visible()
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#panel")).to_be_hidden()
    playwright.expect(answer.get_by_role("button", name="Look inside")).to_be_focused()


def focused(page: Any) -> str:
    """The name, the id or else the text of what has the focus."""
    return page.evaluate("(({ariaLabel, id, textContent}) => ariaLabel || id || textContent)(document.activeElement)")


def test_everything_works_by_keyboard_alone(plain: Running, visit: Callable[..., Any]) -> None:
    """A control that the tab key does not reach, or that only a mouse can press."""
    page = visit(plain.url)
    page.keyboard.type("What can you do?")  # the box has the focus from the start
    page.keyboard.press("Enter")
    done(page.locator(".message.assistant"))
    names: list[str] = []
    for _ in range(24):
        page.keyboard.press("Shift+Tab")
        name = focused(page)
        if name in names:
            break
        names.append(name)
        if name == "Look inside this answer":
            page.keyboard.press("Enter")
            break
    playwright.expect(page.locator(".mi-bar")).to_be_visible()
    seen: set[str] = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.add(focused(page))
    assert "Next answer token" in seen
    assert any(name.startswith("Layer ") for name in seen)
    assert any("layers: expert load" in name for name in seen)
    page.keyboard.press("Escape")
    names = []
    for _ in range(24):
        page.keyboard.press("Tab")
        names.append(focused(page))
    for needed in ("New chat", "Switch between light and dark", "Settings", "Attach pictures or clips", "prompt"):
        assert needed in names, (needed, names)


def test_settings_reach_the_server_and_the_key_stays_in_the_tab(visit: Callable[..., Any]) -> None:
    with running(ServerSettings(api_keys=("secret",))) as server:
        page = visit(server.url)
        playwright.expect(page.locator("#model")).to_have_text("needs an API key: see settings")
        answer = done(ask(page, "Who are you?"))
        playwright.expect(answer.get_by_role("alert")).to_contain_text("This server needs an API key")
        playwright.expect(page.locator("#s-key")).to_be_focused()
        page.locator("#s-key").fill("secret")
        page.get_by_label("System prompt").fill("You are kind.")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Longest answer").fill("3")
        page.get_by_role("button", name="Done").click()
        playwright.expect(page.locator("#model")).to_have_text("pocket")
        page.get_by_label("Thinking").select_option("disabled")
        with page.expect_request(lambda one: "chat/completions" in one.url) as sent:
            page.get_by_role("button", name="Answer again").click()
        body = sent.value.post_data_json
        assert body["messages"][0] == {"role": "system", "content": "You are kind."}
        assert (body["temperature"], body["max_tokens"]) == (0, 3)
        assert body["chat_template_kwargs"] == {"thinking_mode": "disabled"}
        playwright.expect(page.locator(".notice")).to_have_text("Cut off at the longest answer allowed.")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        page.reload()
        assert page.get_by_label("System prompt").input_value() == "You are kind."
    complaints = visit.complaints  # type: ignore[attr-defined]
    assert all("401" in text for text in complaints)
    complaints.clear()  # the browser itself says that a request was refused


EVIL = (
    "<img src=x onerror=alert(1)> <script>alert(2)</script> [a](javascript:alert(3)) [b](https://example.com/x) "
    '**<b onclick="alert(4)">bold</b>** `<i>` https://example.com/"onmouseover="alert(5)\n\n'
    "```html\n</code></pre><svg onload=alert(6)>\n```\n\n| <u>h</u> | b |\n|---|---|\n| <iframe src=/> | c |"
)


def test_what_a_model_or_a_user_writes_stays_text(scripted: Running, visit: Callable[..., Any]) -> None:
    """Script in an answer, in reasoning, in a question, or in a token shown in the panel."""
    say(scripted, f"<mm:think>{EVIL}</mm:think>{EVIL}")
    page = visit(scripted.url)
    answer = done(ask(page, EVIL.replace("\n", " ")))
    answer.get_by_role("button", name="Look inside").click()
    playwright.expect(page.locator(".mi-bar")).to_be_visible()
    answer.locator("details.thinking summary").click()
    content = page.locator("#messages, #panel")
    for tag in ("script", "iframe", "img", "svg[onload]", "[onerror]", "[onclick]", "[onmouseover]", "[onload]"):
        assert content.locator(tag).count() == 0, tag
    assert "<img src=x onerror=alert(1)> <script>alert(2)</script>" in answer.locator(".answer").inner_text()
    links = answer.locator(".answer a").evaluate_all("links => links.map((link) => [link.href, link.rel])")
    assert [link for link, _ in links] == ["https://example.com/x", "https://example.com/"]
    assert all("noopener" in rel and "noreferrer" in rel for _, rel in links)
    assert answer.locator(".answer strong").inner_text() == '<b onclick="alert(4)">bold</b>'
    assert answer.locator(".answer pre").inner_text().strip() == "</code></pre><svg onload=alert(6)>"
    assert "<u>h</u>" in answer.locator(".answer th").first.inner_text()


MARKDOWN = """# Title

Some *slanted*, **strong** and `code` text, 2 * 3 * 4, snake_case_name.

1. one
2. two
   - inner
   - other

> quoted

```
x = 1
```

| a | b |
|---|---|
| 1 | 2 |

---
end"""


def test_markdown_as_people_expect_it(scripted: Running, visit: Callable[..., Any]) -> None:
    say(scripted, f"</mm:think>{MARKDOWN}")
    page = visit(scripted.url)
    answer = done(ask(page, "write")).locator(".answer")
    found = answer.evaluate("node => [...node.querySelectorAll('*')].map((one) => one.tagName.toLowerCase()).join(' ')")
    assert found == (
        "h3 p em strong code ol li li ul li li blockquote p pre code div table thead tr th th tbody tr td td hr p"
    )
    assert "2 * 3 * 4, snake_case_name." in answer.inner_text()


@pytest.mark.parametrize("width", [375, 320])
def test_phone_width_needs_no_sideways_scrolling(plain: Running, visit: Callable[..., Any], width: int) -> None:
    page = visit(plain.url, viewport={"width": width, "height": 740}, has_touch=True, is_mobile=True)
    assert fits(page)
    hand_over(page, "drop", "green.png", "image/png", GREEN)
    assert fits(page)
    answer = done(ask(page, "What colour is the large object? " + "W" * 120))
    assert fits(page)
    answer.get_by_role("button", name="Look inside").click()
    playwright.expect(page.locator(".mi-bar")).to_be_visible()
    page.locator(".mi-all summary").click()
    assert fits(page)
    assert page.locator("#panel-body").evaluate("node => node.scrollWidth <= node.clientWidth")
    assert page.locator("#panel").bounding_box()["width"] == width
    page.get_by_role("button", name="Close look inside").click()
    page.get_by_role("button", name="Settings", exact=True).click()
    assert fits(page)


CONTRAST = """() => {
    const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const read = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const color = read(getComputedStyle(node).backgroundColor);
            if (color.length === 3 || color[3] === 1) return color;
        }
        return [255, 255, 255];
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !node.checkVisibility({checkOpacity: true})) continue;
        if (node.closest('.mi-text, svg, .skip, .visually-hidden, :disabled')) continue;
        const [a, b] = [light(read(getComputedStyle(node).color)), light(behind(node))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) found.push(`${walker.currentNode.data.trim()}: ${ratio.toFixed(2)}`);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(plain: Running, visit: Callable[..., Any], scheme: str) -> None:
    """At least 4.5 to 1, as WCAG AA asks; the toggle turns it round and the page remembers."""
    page = visit(plain.url, color_scheme=scheme)
    root = page.locator("html")
    assert root.get_attribute("data-theme") == scheme
    assert page.evaluate(CONTRAST) == []
    answer = done(ask(page, "What can you do?"))
    answer.get_by_role("button", name="Look inside").click()
    playwright.expect(page.locator(".mi-bar")).to_be_visible()
    page.locator(".mi-all summary").click()
    time.sleep(0.3)
    assert page.evaluate(CONTRAST) == []
    page.get_by_role("button", name="Settings", exact=True).click()
    assert page.evaluate(CONTRAST) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Switch between light and dark").click()
    other = "light" if scheme == "dark" else "dark"
    assert root.get_attribute("data-theme") == other
    page.reload()
    assert root.get_attribute("data-theme") == other


def test_every_control_has_a_name(plain: Running, visit: Callable[..., Any]) -> None:
    page = visit(plain.url)
    done(ask(page, "What can you do?")).get_by_role("button", name="Look inside").click()
    playwright.expect(page.locator(".mi-bar")).to_be_visible()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, svg[role=img], [role=listbox]')]
            .filter((node) => !node.getAttribute('aria-label') && !node.getAttribute('aria-labelledby')
                && !node.labels?.length && !node.textContent.trim() && node.getAttribute('aria-hidden') !== 'true')
            .map((node) => node.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))


def test_an_error_of_the_server_is_said_and_can_be_retried(scripted: Running, visit: Callable[..., Any]) -> None:
    say(scripted, "</mm:think>fine")
    page = visit(scripted.url)
    assert isinstance(scripted.engine, ScriptedEngine)
    scripted.engine.fail_steps = 1
    answer = done(ask(page, "hello"))
    playwright.expect(answer.get_by_role("alert")).to_contain_text("Computing the answer failed")
    page.get_by_role("button", name="Answer again").click()
    playwright.expect(page.locator(".message.assistant .answer")).to_have_text("fine")
    done(page.locator(".message.assistant"))
    complaints = visit.complaints  # type: ignore[attr-defined]
    assert all("500" in text for text in complaints)
    complaints.clear()


def test_the_report_shows_the_same_without_a_server(visit: Callable[..., Any], tmp_path: Path) -> None:
    model, processor = pocket()
    parts = [{"type": "image", "image": scene("green", (35, 155, 55))}, {"type": "text", "text": "What is it?"}]
    found = record(model, processor, [{"role": "user", "content": parts}], name="pocket")
    file = write_report(found, tmp_path / "report.html", title="What is it?")
    for width in (1280, 375):
        page = visit(file.as_uri(), viewport={"width": width, "height": 800})
        assert page.locator(".mi-answer").count() == found.num_answer_tokens
        assert page.locator(".mi-layer").count() == 5
        assert page.locator(".mi-cell").count() == 16
        assert fits(page)
