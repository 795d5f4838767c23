"use strict";
/* The panel that looks inside an answer. */
const minim3Inside = (() => {
  const { h } = minim3Elements;
  const { $, sentence } = minim3Page;
  let current = null; // {answer, button, controller}

  const close = (refocus = true) => {
    if (!current) return;
    const { button, controller } = current;
    controller.abort();
    current = null;
    $("panel").hidden = true;
    $("app").classList.remove("has-panel");
    $("panel-body").replaceChildren();
    button.setAttribute("aria-expanded", "false");
    if (refocus) button.focus();
  };

  /* Opens the panel for an answer; `button` opened it. `ask(signal)` gets the inspection. */
  const open = async (answer, button, ask) => {
    close(false);
    const controller = new AbortController();
    current = { answer, button, controller };
    button.setAttribute("aria-expanded", "true");
    $("panel").hidden = false;
    $("app").classList.add("has-panel");
    const body = $("panel-body");
    body.replaceChildren(h("p", { class: "notice" }, "Running the model once more over the conversation…"));
    $("panel-title").focus();
    try {
      answer.inspection ??= await ask(controller.signal);
      if (current?.answer !== answer) return;
      const root = h("div");
      body.replaceChildren(root);
      minim3Inspect.mount(root, answer.inspection);
      answer.node.scrollIntoView({ block: "nearest" });
    } catch (error) {
      if (error.name === "AbortError") return;
      body.replaceChildren(h("p", { class: "notice is-error", role: "alert" }, sentence(error.message)));
      if (error.status === 401) minim3Settings.open("s-key");
    }
  };

  $("close-panel").addEventListener("click", () => close());

  return {
    close,

    get isOpen() {
      return current !== null;
    },

    toggle(answer, button, ask) {
      if (current?.answer === answer) close();
      else open(answer, button, ask);
    },

    closeOf(answers) {
      if (current && answers.includes(current.answer)) close(false);
    },
  };
})();
