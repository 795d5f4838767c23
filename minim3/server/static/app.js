"use strict";
/*
 * The chat page. A conversation is a list of messages as the server takes them, each with what the page shows of it.
 * It lives in this tab alone. Settings are kept in the browser, but for the API key, which the tab forgets.
 */
(() => {
  const { h } = minim3Inspect;
  const $ = (id) => document.getElementById(id);
  const config = JSON.parse($("page-config").textContent);
  const MAX_FILE_BYTES = 40 * 2 ** 20;
  const KEPT = "minim3-settings";
  const KEPT_KEY = "minim3-key";

  const icon = (name) => {
    const svg = minim3Inspect.s("svg", { class: "icon", "aria-hidden": "true" });
    svg.append(minim3Inspect.s("use", { href: `#i-${name}` }));
    return svg;
  };
  const say = (text) => {
    $("status").textContent = text;
  };

  const state = {
    turns: [], // {message, node, ...}; see addUser and addAssistant
    attachments: [], // {kind, url, node}
    running: null, // {controller, turn}
    inspecting: null,
    model: "the model",
    vision: config.vision,
  };

  /* Settings */

  const storage = (area, key, value) => {
    try {
      if (value === undefined) return area.getItem(key);
      if (value === null || value === "") area.removeItem(key);
      else area.setItem(key, value);
    } catch {
      /* A browser may keep nothing: then settings last as long as the page. */
    }
    return null;
  };
  const settings = { system: "", temperature: "", tokens: "", thinking: config.thinking, tools: "", theme: "" };
  Object.assign(settings, JSON.parse(storage(localStorage, KEPT) || "{}"));
  settings.key = storage(sessionStorage, KEPT_KEY) || "";

  const keepSettings = () => {
    const { key, ...rest } = settings;
    storage(localStorage, KEPT, JSON.stringify(rest));
    storage(sessionStorage, KEPT_KEY, key);
  };

  const FIELDS = { system: "s-system", temperature: "s-temperature", tokens: "s-tokens", key: "s-key", tools: "s-tools", thinking: "thinking" };

  const showSettings = () => {
    for (const [name, id] of Object.entries(FIELDS)) $(id).value = settings[name];
    $("s-tools-details").open = Boolean(settings.tools);
    checkTools();
  };

  /* The tools to send, or null where there are none or they cannot be read. */
  const readTools = () => {
    if (!settings.tools.trim()) return null;
    try {
      const tools = JSON.parse(settings.tools);
      return Array.isArray(tools) && tools.length ? tools : null;
    } catch {
      return null;
    }
  };

  const checkTools = () => {
    const bad = settings.tools.trim() && !readTools();
    $("s-tools-help").classList.toggle("is-error", Boolean(bad));
    $("s-tools-help").textContent = bad
      ? "This is not a JSON list: it is left out."
      : "A JSON list, as in OpenAI's interface. You are asked for the result of each call.";
  };

  const openSettings = (focus) => {
    showSettings();
    $("settings").showModal();
    if (focus) $(focus).focus();
  };

  const fine = matchMedia("(pointer: fine)"); // a mouse, and so most likely a keyboard
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const showTheme = () => {
    const theme = settings.theme || (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    $("theme").querySelector("use").setAttribute("href", theme === "dark" ? "#i-sun" : "#i-moon");
  };

  /* The model */

  const askModel = async () => {
    try {
      const card = await minim3Server.model(settings.key);
      state.model = card.id ?? state.model;
      state.vision = card.vision ?? state.vision;
      $("model").textContent = card.id ?? "";
      $("prompt").placeholder = `Message ${state.model}`;
    } catch (error) {
      if (error.status === 401) $("model").textContent = "needs an API key: see settings";
    }
    $("attach").hidden = !state.vision;
    showStarts();
  };

  /* Things to begin with. The picture is drawn here, in the manner of pocket's world. */

  const drawPicture = () => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 112;
    const pen = canvas.getContext("2d");
    pen.fillStyle = "rgb(226 229 233)";
    pen.fillRect(0, 0, 112, 112);
    const shape = (color, corners) => {
      pen.fillStyle = color;
      pen.beginPath();
      for (const [x, y] of corners) pen.lineTo(x, y);
      pen.fill();
    };
    shape("rgb(35 155 55)", [[13, 55], [47, 55], [47, 89], [13, 89]]);
    shape("rgb(125 45 180)", [[84, 15], [97, 38], [71, 38]]);
    const star = Array.from({ length: 10 }, (_, i) => {
      const angle = Math.PI * (i / 5 - 0.5);
      const radius = i % 2 ? 5.3 : 12.6;
      return [77 + radius * Math.cos(angle), 85 + radius * Math.sin(angle)];
    });
    shape("rgb(250 135 20)", star);
    pen.fillStyle = "rgb(216 28 34)";
    pen.beginPath();
    pen.arc(35, 21, 7.5, 0, 7);
    pen.fill();
    return canvas.toDataURL("image/png");
  };

  const showStarts = () => {
    const table = "apple moon, boat lamp, chair river, door salt, egg stone, fish tree, goat king, hat snow, ink road, jar wolf";
    const starts = [
      { title: "Look at a picture", text: "What colour is the large object?", picture: state.vision ? drawPicture() : null },
      { title: "Look something up", text: "What goes with fish?", ask: `Here is a list: ${table}\nWhat goes with fish?` },
      { title: "Just say hello", text: "What can you do?" },
    ];
    if (!state.vision) starts.shift();
    $("empty-text").textContent = state.vision
      ? `Write to ${state.model}, ${fine.matches ? "drop" : "add"} a picture or a clip, and look inside the answer.`
      : `Write to ${state.model}, and look inside the answer.`;
    $("starts").replaceChildren(
      ...starts.map(({ title, text, ask, picture }) =>
        h(
          "li",
          null,
          h(
            "button",
            {
              type: "button",
              on: {
                click: () => {
                  if (state.running) return;
                  if (picture) attach("image", picture);
                  $("prompt").value = ask ?? text;
                  send();
                },
              },
            },
            h("div", null, h("b", null, title), h("span", null, text)),
            picture ? h("img", { src: picture, alt: "" }) : null,
          ),
        ),
      ),
    );
  };

  /* Attachments */

  const readFile = (file) =>
    new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.addEventListener("load", () => resolve(reader.result));
      reader.addEventListener("error", () => reject(reader.error));
      reader.readAsDataURL(file);
    });

  const attachFiles = async (files) => {
    for (const file of files) {
      const kind = file.type.startsWith("image/") ? "image" : file.type.startsWith("video/") ? "video" : null;
      if (!kind) notify(`${file.name || "This file"} is neither a picture nor a clip.`);
      else if (!state.vision) notify(`${state.model} is a text-only model: it takes no pictures.`);
      else if (file.size > MAX_FILE_BYTES) notify(`${file.name} has ${Math.round(file.size / 2 ** 20)} MB; at most ${MAX_FILE_BYTES / 2 ** 20} MB can be sent.`);
      else attach(kind, await readFile(file), file);
    }
  };

  /* `file`: to show a clip by, since a page may not show data: URLs as video. */
  const attach = (kind, url, file) => {
    const shown = kind === "video" && file ? URL.createObjectURL(file) : url;
    const entry = { kind, url, shown };
    const name = file?.name || (kind === "image" ? "picture" : "clip");
    entry.node = h(
      "li",
      null,
      media(kind, shown, name),
      h(
        "button",
        {
          type: "button",
          "aria-label": `Remove ${name}`,
          title: "Remove",
          on: {
            click: () => {
              state.attachments = state.attachments.filter((one) => one !== entry);
              entry.node.remove();
              updateComposer();
              $("prompt").focus();
            },
          },
        },
        icon("close"),
      ),
    );
    state.attachments.push(entry);
    $("attachments").append(entry.node);
    say(`${name} attached`);
    updateComposer();
  };

  const media = (kind, url, name) => {
    if (kind === "video") {
      const clip = h("video", { src: url, "aria-label": name, playsinline: true, loop: true });
      clip.muted = true;
      clip.play?.().catch(() => {});
      return clip;
    }
    const image = h("img", { src: url, alt: name });
    image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth < 200));
    return image;
  };

  /* The message box */

  const prompt = $("prompt");

  const updateComposer = () => {
    const follow = isAtEnd();
    $("attachments").hidden = !state.attachments.length;
    prompt.style.height = "auto";
    prompt.style.height = `${prompt.scrollHeight}px`;
    const running = Boolean(state.running);
    const button = $("send");
    button.disabled = !running && !prompt.value.trim() && !state.attachments.length;
    button.setAttribute("aria-label", running ? "Stop" : "Send");
    button.title = running ? "Stop (Esc)" : "Send (Enter)";
    button.querySelector("use").setAttribute("href", running ? "#i-stop" : "#i-send");
    $("messages").setAttribute("aria-busy", String(running));
    if (follow) scrollToEnd();
  };

  const send = () => {
    const text = prompt.value.trim();
    if (state.running || (!text && !state.attachments.length)) return;
    const attached = state.attachments;
    state.attachments = [];
    $("attachments").replaceChildren();
    prompt.value = "";
    addUser(text, attached);
    answer();
  };

  const stop = () => state.running?.controller.abort();

  /* Turns */

  const action = (name, label, act, attributes = {}) =>
    h("button", { type: "button", title: label, "aria-label": label, ...attributes, on: { click: act } }, icon(name), attributes.text ?? null);

  const addTurn = (turn) => {
    state.turns.push(turn);
    $("empty").hidden = true;
    $("messages").append(turn.node);
  };

  const addUser = (text, attached) => {
    const parts = attached.map(({ kind, url }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url } }));
    const content = parts.length ? [...parts, ...(text ? [{ type: "text", text }] : [])] : text;
    const turn = { message: { role: "user", content }, text, attached };
    turn.node = h(
      "article",
      { class: "message user", "aria-label": "You" },
      attached.length ? h("div", { class: "shown" }, attached.map(({ kind, shown }) => media(kind, shown, kind === "image" ? "Attached picture" : "Attached clip"))) : null,
      text ? h("div", { class: "bubble" }, text) : null,
    );
    addTurn(turn);
  };

  /* Takes back everything from a turn on; the removed turns. */
  const dropFrom = (turn) => {
    const removed = state.turns.splice(state.turns.indexOf(turn));
    for (const one of removed) one.node.remove();
    closePanelOf(removed);
    return removed;
  };

  const conversation = (upTo = state.turns.length) => [
    ...(settings.system.trim() ? [{ role: "system", content: settings.system }] : []),
    ...state.turns.slice(0, upTo).map((turn) => turn.message),
  ];

  const options = () => {
    const body = { chat_template_kwargs: { thinking_mode: settings.thinking } };
    const tools = readTools();
    if (tools) body.tools = tools;
    return body;
  };

  const sampling = () => {
    const body = {};
    const temperature = Number.parseFloat(settings.temperature);
    const tokens = Number.parseInt(settings.tokens, 10);
    if (Number.isFinite(temperature) && temperature >= 0) body.temperature = temperature;
    if (Number.isFinite(tokens) && tokens > 0) body.max_tokens = tokens;
    return body;
  };

  /* Asks for the answer to the conversation as it stands. */
  const answer = async () => {
    const turn = {
      message: { role: "assistant", content: "" },
      reasoning: "",
      calls: [],
      pieces: 0,
      asked: conversation(),
      options: options(),
      finish: null,
    };
    turn.answer = h("div", { class: "answer prose is-waiting" });
    turn.above = h("div", { class: "assistant" });
    turn.node = h("article", { class: "message assistant", "aria-label": state.model, "aria-busy": "true" }, turn.above, turn.answer);
    turn.above.hidden = true;
    const controller = new AbortController();
    state.running = { controller, turn };
    addTurn(turn);
    updateComposer();
    scrollToEnd();
    say(`${state.model} is answering`);
    turn.started = performance.now();
    let failed = null;
    try {
      turn.usage = await minim3Server.chat(
        { messages: turn.asked, ...turn.options, ...sampling() },
        { key: settings.key, signal: controller.signal, onDelta: (delta, finish) => onDelta(turn, delta, finish) },
      );
    } catch (error) {
      if (error.name === "AbortError") turn.finish = "stopped";
      else failed = error;
    }
    turn.ended = performance.now();
    state.running = null;
    finish(turn, failed);
    updateComposer();
  };

  const onDelta = (turn, delta, finish) => {
    const now = performance.now();
    if (delta.reasoning_content || delta.content || delta.tool_calls) {
      turn.first ??= now;
      turn.last = now;
      turn.pieces += 1;
    }
    if (delta.reasoning_content) {
      turn.thoughtFrom ??= now;
      turn.reasoning += delta.reasoning_content;
    }
    if (delta.content || delta.tool_calls) turn.thoughtUntil ??= now;
    if (delta.content) turn.message.content += delta.content;
    for (const call of delta.tool_calls ?? []) {
      const known = (turn.calls[call.index] ??= { id: "", name: "", arguments: "" });
      known.id ||= call.id ?? "";
      known.name ||= call.function?.name ?? "";
      known.arguments += call.function?.arguments ?? "";
    }
    if (finish) turn.finish = finish;
    turn.frame ??= requestAnimationFrame(() => {
      turn.frame = null;
      draw(turn);
    });
  };

  /* Shows what there is of an answer. */
  const draw = (turn) => {
    const follow = isAtEnd();
    if (turn.reasoning) {
      if (!turn.thinking) {
        turn.thinking = { title: h("summary"), text: h("div") };
        turn.thinking.node = h("details", { class: "thinking" }, turn.thinking.title, turn.thinking.text);
        turn.above.append(turn.thinking.node);
        turn.above.hidden = false;
      }
      const going = state.running?.turn === turn && turn.thoughtUntil === undefined;
      const seconds = ((turn.thoughtUntil ?? turn.ended ?? performance.now()) - turn.thoughtFrom) / 1000;
      turn.thinking.node.classList.toggle("is-going", going);
      turn.thinking.title.textContent = going ? "Thinking…" : `Thought for ${seconds < 9.95 ? seconds.toFixed(1) : Math.round(seconds)} s`;
      turn.thinking.text.textContent = turn.reasoning.trim();
    }
    turn.answer.classList.toggle("is-waiting", state.running?.turn === turn && !turn.message.content && !turn.reasoning);
    minim3Markdown.render(turn.answer, turn.message.content ?? "");
    turn.answer.hidden = !turn.message.content && !turn.answer.classList.contains("is-waiting");
    for (const [index, call] of turn.calls.entries()) if (call) drawCall(turn, call, index);
    if (follow) scrollToEnd();
    else updateToEnd();
  };

  const drawCall = (turn, call, index) => {
    if (!call.node) {
      call.title = h("code");
      call.text = h("code");
      call.node = h("details", { class: "tool", open: true }, h("summary", null, "Calls ", call.title), h("pre", null, call.text));
      turn.node.insertBefore(call.node, turn.calls[index - 1]?.node?.nextSibling ?? turn.answer.nextSibling);
    }
    call.title.textContent = call.name;
    let text = call.arguments;
    try {
      text = JSON.stringify(JSON.parse(call.arguments), null, 2);
    } catch {
      /* not whole yet */
    }
    call.text.textContent = text;
  };

  const finish = (turn, failed) => {
    if (turn.frame) cancelAnimationFrame(turn.frame);
    turn.frame = null;
    const { message } = turn;
    if (turn.reasoning) message.reasoning_content = turn.reasoning;
    turn.calls = turn.calls.filter(Boolean);
    if (turn.finish === "tool_calls") {
      message.tool_calls = turn.calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
      if (!message.content) message.content = null;
    }
    draw(turn);
    turn.node.setAttribute("aria-busy", "false");
    turn.answer.classList.remove("is-waiting");
    turn.answer.hidden = !message.content;
    const empty = !message.content && !turn.reasoning && !turn.calls.length;
    if (failed) {
      turn.node.append(h("p", { class: "notice is-error", role: "alert" }, sentence(failed.message)));
      if (failed.status === 401) openSettings("s-key");
    } else if (turn.finish === "length") turn.node.append(h("p", { class: "notice" }, "Cut off at the longest answer allowed."));
    else if (turn.finish === "stopped" && empty) turn.node.append(h("p", { class: "notice" }, "Stopped."));
    else if (empty) turn.node.append(h("p", { class: "notice" }, "The answer is empty."));
    turn.broken = Boolean(failed) || empty;
    addActions(turn);
    if (turn.finish === "tool_calls" && !failed) askResults(turn);
    say(failed ? "" : turn.finish === "stopped" ? "Stopped" : "The answer is complete");
    scrollToEnd();
  };

  const sentence = (text) => {
    const first = text.charAt(0).toUpperCase() + text.slice(1);
    return /[.!?]$/.test(first) ? first : `${first}.`;
  };

  const addActions = (turn) => {
    const bar = h("div", { class: "actions" });
    if (turn.message.content) {
      bar.append(
        action("copy", "Copy the answer", async (event) => {
          const button = event.currentTarget;
          await copy(turn.message.content);
          button.replaceChildren(icon("done"));
          say("Copied");
          setTimeout(() => button.replaceChildren(icon("copy")), 1500);
        }),
      );
    }
    bar.append(
      action("retry", "Answer again", () => {
        if (state.running) return;
        dropFrom(turn);
        answer();
      }),
    );
    const index = state.turns.indexOf(turn);
    const asked = state.turns[index - 1];
    if (asked?.message.role === "user") {
      bar.append(
        action("edit", "Change the question", () => {
          if (state.running) return;
          dropFrom(asked);
          for (const { kind, url, shown } of asked.attached) {
            attach(kind, url);
            if (kind === "video") state.attachments.at(-1).node.querySelector("video").src = shown;
            state.attachments.at(-1).shown = shown;
          }
          prompt.value = asked.text;
          $("empty").hidden = state.turns.length > 0;
          updateComposer();
          prompt.focus();
        }),
      );
    }
    if (config.look_inside && !turn.broken) {
      turn.insideButton = action("inside", "Look inside this answer", () => lookInside(turn), { text: "Look inside", "aria-expanded": "false", "aria-controls": "panel" });
      bar.append(turn.insideButton);
    }
    const figures = describeFigures(turn);
    if (figures) bar.append(h("span", { class: "figures" }, figures));
    turn.node.append(bar);
  };

  const describeFigures = (turn) => {
    if (turn.first === undefined) return "";
    const exact = turn.usage?.completion_tokens;
    const tokens = exact ?? turn.pieces;
    const seconds = (turn.last - turn.first) / 1000;
    const parts = [`${exact === undefined ? "about " : ""}${tokens} token${tokens === 1 ? "" : "s"}`];
    if (tokens > 1 && seconds > 0.02) parts.push(`${rate((tokens - 1) / seconds)} tokens/s`);
    parts.push(`first after ${((turn.first - turn.started) / 1000).toFixed(2)} s`);
    return parts.join(" · ");
  };

  const rate = (value) => (value < 9.95 ? value.toFixed(1) : `${Math.round(value)}`);

  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = h("textarea", { class: "visually-hidden" });
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };

  /* A form for the result of each call; the last one sent goes on with the conversation. */
  const askResults = (turn) => {
    const open = new Set(turn.calls);
    for (const call of turn.calls) {
      const input = h("input", { type: "text", placeholder: "Result of the call", "aria-label": `Result of ${call.name}` });
      const form = h("form", { on: { submit: (event) => event.preventDefault() } }, input, h("button", { class: "primary", type: "submit" }, "Send"));
      form.addEventListener("submit", () => {
        if (state.running || state.turns.at(-1) !== turn) return;
        call.result = input.value;
        open.delete(call);
        form.replaceWith(h("pre", null, h("code", null, call.result || "(empty)")));
        if (open.size) return;
        for (const one of turn.calls) {
          state.turns.push({ message: { role: "tool", tool_call_id: one.id, content: one.result }, node: h("span", { hidden: true }), attached: [] });
        }
        answer();
      });
      call.node.append(form);
    }
    turn.calls[0].node.querySelector("input").focus();
  };

  /* A remark of the page itself. */
  const notify = (text) => {
    const node = h("p", { class: "notice is-error", role: "alert" }, text);
    $("composer").before(node);
    setTimeout(() => node.remove(), 6000);
  };

  /* Scrolling: the end stays in view while the reader is at the end. */

  const scroller = $("scroll");
  const isAtEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  const updateToEnd = () => {
    $("to-end").hidden = isAtEnd();
  };
  const scrollToEnd = () => {
    scroller.scrollTop = scroller.scrollHeight;
    updateToEnd();
  };

  /* Look inside */

  const panel = $("panel");

  const lookInside = async (turn) => {
    if (state.inspecting?.turn === turn) {
      closePanel();
      return;
    }
    closePanel(false);
    const controller = new AbortController();
    state.inspecting = { turn, controller };
    turn.insideButton.setAttribute("aria-expanded", "true");
    panel.hidden = false;
    $("app").classList.add("has-panel");
    const body = $("panel-body");
    body.replaceChildren(h("p", { class: "notice" }, "Running the model once more over the conversation…"));
    $("panel-title").focus();
    try {
      turn.inspection ??= await minim3Server.inspect(
        { messages: turn.asked, answer: turn.message, finished: ["stop", "tool_calls"].includes(turn.finish), ...turn.options },
        { key: settings.key, signal: controller.signal },
      );
      if (state.inspecting?.turn !== turn) return;
      const root = h("div");
      body.replaceChildren(root);
      minim3Inspect.mount(root, turn.inspection);
      turn.node.scrollIntoView({ block: "nearest" });
    } catch (error) {
      if (error.name === "AbortError") return;
      body.replaceChildren(h("p", { class: "notice is-error", role: "alert" }, sentence(error.message)));
      if (error.status === 401) openSettings("s-key");
    }
  };

  const closePanel = (refocus = true) => {
    if (!state.inspecting) return;
    const { turn, controller } = state.inspecting;
    controller.abort();
    state.inspecting = null;
    panel.hidden = true;
    $("app").classList.remove("has-panel");
    $("panel-body").replaceChildren();
    turn.insideButton.setAttribute("aria-expanded", "false");
    if (refocus && turn.node.isConnected) turn.insideButton.focus();
  };

  const closePanelOf = (turns) => {
    if (state.inspecting && turns.includes(state.inspecting.turn)) closePanel(false);
  };

  /* Wiring */

  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (state.running) stop();
    else send();
  });
  prompt.addEventListener("input", updateComposer);
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    send();
  });
  prompt.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    attachFiles(files);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || $("settings").open) return;
    if (state.running) {
      stop();
      prompt.focus();
    } else if (state.inspecting) closePanel();
  });

  $("attach").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", async (event) => {
    const files = [...event.target.files];
    event.target.value = "";
    await attachFiles(files);
    prompt.focus();
  });

  let inside = 0;
  const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const showDrop = (shown) => {
    inside = shown ? inside : 0;
    $("drop").hidden = !shown;
  };
  window.addEventListener("dragenter", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    inside += 1;
    showDrop(true);
  });
  window.addEventListener("dragover", (event) => {
    if (carriesFiles(event)) event.preventDefault();
  });
  window.addEventListener("dragleave", () => {
    inside = Math.max(0, inside - 1);
    if (!inside) showDrop(false);
  });
  window.addEventListener("drop", async (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    showDrop(false);
    await attachFiles([...event.dataTransfer.files]);
    prompt.focus();
  });

  $("new").addEventListener("click", () => {
    stop();
    closePanel(false);
    for (const turn of state.turns) turn.node.remove();
    for (const { shown } of state.turns.flatMap((turn) => turn.attached ?? [])) if (shown.startsWith("blob:")) URL.revokeObjectURL(shown);
    state.turns = [];
    state.attachments = [];
    $("attachments").replaceChildren();
    $("empty").hidden = false;
    prompt.value = "";
    updateComposer();
    prompt.focus();
    say("New chat");
  });
  $("theme").addEventListener("click", () => {
    settings.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    keepSettings();
    showTheme();
  });
  dark.addEventListener("change", showTheme);
  $("open-settings").addEventListener("click", () => openSettings());
  for (const [name, id] of Object.entries(FIELDS)) {
    $(id).addEventListener("input", () => {
      settings[name] = $(id).value;
      keepSettings();
      if (name === "tools") checkTools();
    });
  }
  $("settings").addEventListener("close", () => {
    askModel();
    prompt.focus();
  });
  $("settings").addEventListener("click", (event) => {
    if (event.target === $("settings")) $("settings").close();
  });
  $("reset-settings").addEventListener("click", () => {
    Object.assign(settings, { system: "", temperature: "", tokens: "", thinking: config.thinking, tools: "", key: "" });
    keepSettings();
    showSettings();
  });
  $("close-panel").addEventListener("click", () => closePanel());
  $("to-end").addEventListener("click", () => {
    scrollToEnd();
    prompt.focus();
  });
  scroller.addEventListener("scroll", updateToEnd, { passive: true });

  showTheme();
  showSettings();
  updateComposer();
  askModel();
  if (fine.matches) prompt.focus();
})();
