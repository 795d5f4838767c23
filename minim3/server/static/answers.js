"use strict";
/* An answer as it comes and as it stays: thinking, text, calls of functions, and its figures. */
const minim3Answers = (() => {
  const { h } = minim3Elements;
  const { icon, sentence } = minim3Page;

  class Answer {
    constructor(name) {
      this.message = { role: "assistant", content: "" };
      this.reasoning = "";
      this.calls = [];
      this.tokenIds = []; // as the model wrote them
      this.finish = null;
      this.isRunning = true;
      this.numPieces = 0;
      this.started = performance.now();
      this.above = h("div", { hidden: true });
      this.text = h("div", { class: "answer prose is-waiting" });
      this.node = h("article", { class: "message assistant", "aria-label": name, "aria-busy": "true" }, this.above, this.text);
    }

    /* Whether there is nothing to show. */
    get isEmpty() {
      return !this.message.content && !this.reasoning && !this.calls.length;
    }

    /* Takes in a delta of the stream; `draw` shows it. */
    add(delta, finish, tokenIds) {
      const now = performance.now();
      this.tokenIds.push(...tokenIds);
      if (delta.reasoning_content || delta.content || delta.tool_calls) {
        this.first ??= now;
        this.last = now;
        this.numPieces += 1;
      }
      if (delta.reasoning_content) {
        this.thoughtFrom ??= now;
        this.reasoning += delta.reasoning_content;
      }
      if (delta.content || delta.tool_calls) this.thoughtUntil ??= now;
      this.message.content += delta.content ?? "";
      for (const call of delta.tool_calls ?? []) {
        const known = (this.calls[call.index] ??= { id: "", name: "", arguments: "" });
        known.id ||= call.id ?? "";
        known.name ||= call.function?.name ?? "";
        known.arguments += call.function?.arguments ?? "";
      }
      this.finish = finish ?? this.finish;
    }

    draw() {
      const content = this.message.content ?? "";
      if (this.reasoning) this.drawThinking();
      const isWaiting = this.isRunning && this.isEmpty;
      this.text.classList.toggle("is-waiting", isWaiting);
      this.text.hidden = !content && !isWaiting;
      minim3Markdown.render(this.text, content);
      this.calls.forEach((call, index) => this.drawCall(call, index));
    }

    drawThinking() {
      if (!this.thinking) {
        const [title, text] = [h("summary"), h("div")];
        this.thinking = { title, text, node: h("details", { class: "thinking" }, title, text) };
        this.above.append(this.thinking.node);
        this.above.hidden = false;
      }
      const isGoing = this.isRunning && this.thoughtUntil === undefined;
      const seconds = ((this.thoughtUntil ?? this.last) - this.thoughtFrom) / 1000;
      this.thinking.node.classList.toggle("is-going", isGoing);
      this.thinking.title.textContent = isGoing ? "Thinking…" : `Thought for ${few(seconds)} s`;
      this.thinking.text.textContent = this.reasoning.trim();
    }

    drawCall(call, index) {
      if (!call.node) {
        call.title = h("code");
        call.text = h("code");
        call.node = h("details", { class: "tool", open: true }, h("summary", null, "Calls ", call.title), h("pre", null, call.text));
        this.node.insertBefore(call.node, (this.calls[index - 1]?.node ?? this.text).nextSibling);
      }
      call.title.textContent = call.name;
      let text = call.arguments;
      try {
        text = JSON.stringify(JSON.parse(call.arguments), null, 2);
      } catch {
        /* not whole yet */
      }
      call.text.textContent = text;
    }

    /* No more deltas will come. failed: the error that ended it, if one did; usage: the server's count. */
    end(failed, usage) {
      const { message } = this;
      this.isRunning = false;
      this.usage = usage;
      this.isBroken = Boolean(failed) || this.isEmpty;
      if (this.reasoning) message.reasoning_content = this.reasoning;
      if (this.finish === "tool_calls") {
        message.content ||= null;
        message.tool_calls = this.calls.map(({ id, name, arguments: text }) => ({
          id,
          type: "function",
          function: { name, arguments: text },
        }));
      }
      this.draw();
      this.node.setAttribute("aria-busy", "false");
      const notice = this.notice(failed);
      if (notice) this.node.append(notice);
    }

    notice(failed) {
      const note = (text, attributes) => h("p", { class: "notice", ...attributes }, text);
      if (failed) return note(sentence(failed.message), { class: "notice is-error", role: "alert" });
      if (this.finish === "length") return note("Cut off at the longest answer allowed.");
      if (!this.isEmpty) return null;
      return note(this.finish === "stopped" ? "Stopped." : "The answer is empty.");
    }

    /* Tokens, their rate, and the time to the first one. */
    figures() {
      if (this.first === undefined) return "";
      const exact = this.usage?.completion_tokens;
      const tokens = exact ?? this.numPieces;
      const seconds = (this.last - this.first) / 1000;
      const parts = [`${exact === undefined ? "about " : ""}${tokens} token${tokens === 1 ? "" : "s"}`];
      if (tokens > 1 && seconds > 0.02) parts.push(`${few((tokens - 1) / seconds)} tokens/s`);
      parts.push(`first after ${((this.first - this.started) / 1000).toFixed(2)} s`);
      return parts.join(" · ");
    }

    /* A form for the result of each call; `done(results)` once all are given. */
    askResults(done) {
      const open = new Set(this.calls);
      for (const call of this.calls) {
        const input = h("input", { type: "text", placeholder: "Result of the call", "aria-label": `Result of ${call.name}` });
        const form = h("form", null, input, h("button", { class: "primary", type: "submit" }, "Send"));
        form.addEventListener("submit", (event) => {
          event.preventDefault();
          call.result = input.value;
          open.delete(call);
          form.replaceWith(h("pre", null, h("code", null, call.result || "(empty)")));
          if (!open.size) done(this.calls.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result })));
        });
        call.node.append(form);
      }
      this.calls[0].node.querySelector("input").focus();
    }
  }

  const few = (value) => (value < 9.95 ? value.toFixed(1) : `${Math.round(value)}`);

  /* A button with an icon, of the row under an answer. */
  const action = (name, label, act, { text, ...attributes } = {}) =>
    h("button", { type: "button", title: label, "aria-label": label, ...attributes, on: { click: act } }, icon(name), text);

  return { Answer, action };
})();
