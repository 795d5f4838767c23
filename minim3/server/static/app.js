"use strict";
/* The conversation: turns as the server takes them, each with what the page shows of it. It lives in this tab alone. */
(() => {
  const { h } = minim3Elements;
  const { $, config, icon, say, copy, isAtEnd, updateToEnd, scrollToEnd } = minim3Page;
  const { action } = minim3Answers;
  const settings = minim3Settings;
  const composer = minim3Composer;
  const inside = minim3Inside;
  const model = { name: "the model", vision: config.vision };
  let turns = []; // {message, node}, and of questions {text, attached}
  let running = null; // AbortController of the answer under way

  /* The model */

  const askModel = async () => {
    try {
      const card = await minim3Server.model(settings.key);
      model.name = card.id ?? model.name;
      model.vision = card.vision ?? model.vision;
      $("model").textContent = model.name;
    } catch (error) {
      if (error.status === 401) $("model").textContent = "needs an API key: see settings";
    }
    composer.setModel(model.name, model.vision);
    minim3Starts.show(model.name, model.vision, (text, picture) => {
      if (running) return;
      if (picture) composer.attach({ kind: "image", url: picture });
      composer.setText(text);
      composer.send();
    });
  };

  /* Turns */

  const addTurn = (turn) => {
    turns.push(turn);
    $("empty").hidden = true;
    $("messages").append(turn.node);
    return turn;
  };

  const addQuestion = (text, attached) => {
    const parts = attached.map(({ kind, url }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url } }));
    if (parts.length && text) parts.push({ type: "text", text });
    const shown = attached.map((one) => composer.media(one, one.kind === "image" ? "Attached picture" : "Attached clip"));
    const node = h(
      "article",
      { class: "message user", "aria-label": "You" },
      shown.length ? h("div", { class: "shown" }, shown) : null,
      text ? h("div", { class: "bubble" }, text) : null,
    );
    addTurn({ message: { role: "user", content: parts.length ? parts : text }, text, attached, node });
  };

  /* Takes back everything from a turn on. */
  const dropFrom = (turn) => {
    const dropped = turns.splice(turns.indexOf(turn));
    for (const { node } of dropped) node.remove();
    inside.closeOf(dropped);
    $("empty").hidden = turns.length > 0;
  };

  const conversation = () => [
    ...(settings.system === null ? [] : [{ role: "system", content: settings.system }]),
    ...turns.map((turn) => turn.message),
  ];

  /* Asks for the answer to the conversation as it stands. */
  const answer = async () => {
    const asked = { messages: conversation(), ...settings.rendering() };
    const turn = new minim3Answers.Answer(model.name);
    const controller = new AbortController();
    let frame = null;
    let usage = null;
    let failed = null;
    const draw = () => {
      frame = null;
      const follow = isAtEnd();
      turn.draw();
      if (follow) scrollToEnd();
      else updateToEnd();
    };
    const onDelta = (delta, finish, tokenIds) => {
      turn.add(delta, finish, tokenIds);
      frame ??= requestAnimationFrame(draw);
    };
    turn.asked = asked;
    running = controller;
    addTurn(turn);
    setRunning(true);
    scrollToEnd();
    say(`${model.name} is answering`);
    try {
      const options = { key: settings.key, signal: controller.signal, onDelta };
      usage = await minim3Server.chat({ ...asked, ...settings.sampling() }, options);
    } catch (error) {
      if (error.name === "AbortError") turn.finish = "stopped";
      else failed = error;
    }
    if (frame !== null) cancelAnimationFrame(frame);
    if (running === controller) {
      running = null;
      setRunning(false);
    }
    turn.end(failed, usage);
    if (!turns.includes(turn)) return; // the conversation was given up meanwhile
    addActions(turn);
    if (failed?.status === 401) settings.open("s-key");
    if (turn.finish === "tool_calls" && !failed) turn.askResults((results) => goOn(turn, results));
    say(failed ? "" : turn.finish === "stopped" ? "Stopped" : "The answer is complete");
    scrollToEnd();
  };

  /* With the results of an answer's calls, which the answer itself shows. */
  const goOn = (turn, results) => {
    if (running || turns.at(-1) !== turn) return;
    for (const message of results) turns.push({ message, node: h("span") });
    answer();
  };

  const setRunning = (isRunning) => {
    composer.setRunning(isRunning);
    $("messages").setAttribute("aria-busy", String(isRunning));
  };

  const addActions = (turn) => {
    const bar = h("div", { class: "actions" });
    const question = turns[turns.indexOf(turn) - 1];
    if (turn.message.content) bar.append(action("copy", "Copy the answer", (event) => copyAnswer(turn, event.currentTarget)));
    bar.append(
      action("retry", "Answer again", () => {
        if (running) return;
        dropFrom(turn);
        answer();
      }),
    );
    if (question?.message.role === "user") {
      bar.append(
        action("edit", "Change the question", () => {
          if (running) return;
          dropFrom(question);
          composer.clear();
          for (const one of question.attached) composer.attach(one);
          composer.setText(question.text);
          composer.focus();
        }),
      );
    }
    if (config.look_inside && !turn.isBroken) {
      const look = (event) => inside.toggle(turn, event.currentTarget, (signal) => inspect(turn, signal));
      const attributes = { text: "Look inside", "aria-expanded": "false", "aria-controls": "panel" };
      bar.append(action("inside", "Look inside this answer", look, attributes));
    }
    const figures = turn.figures();
    if (figures) bar.append(h("span", { class: "figures" }, figures));
    turn.node.append(bar);
  };

  const inspect = (turn, signal) => {
    const finished = turn.finish === "stop" || turn.finish === "tool_calls";
    const answer = { answer: turn.message, answer_token_ids: turn.tokenIds.length ? turn.tokenIds : null, finished };
    return minim3Server.inspect({ ...turn.asked, ...answer }, { key: settings.key, signal });
  };

  const copyAnswer = async (turn, button) => {
    await copy(turn.message.content);
    button.replaceChildren(icon("done"));
    say("Copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  };

  const startAnew = () => {
    running?.abort();
    inside.close(false);
    const clips = turns.flatMap((turn) => turn.attached ?? []).filter(({ shown }) => shown.startsWith("blob:"));
    for (const { node } of turns) node.remove();
    for (const { shown } of clips) URL.revokeObjectURL(shown);
    turns = [];
    $("empty").hidden = false;
    composer.clear();
    composer.focus();
    say("New chat");
  };

  /* Wiring */

  composer.connect({
    send(text, attached) {
      addQuestion(text, attached);
      answer();
    },
    stop: () => running?.abort(),
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || $("settings").open) return;
    if (running) {
      running.abort();
      composer.focus();
    } else inside.close();
  });
  $("new").addEventListener("click", startAnew);
  $("open-settings").addEventListener("click", () => settings.open());
  $("settings").addEventListener("close", () => {
    askModel();
    composer.focus();
  });
  $("to-end").addEventListener("click", () => {
    scrollToEnd();
    composer.focus();
  });
  $("scroll").addEventListener("scroll", updateToEnd, { passive: true });
  askModel();
  if (minim3Page.hasMouse.matches) composer.focus();
})();
