"use strict";
/* The server's interface, as far as the page uses it. */
const minim3Server = (() => {
  class ServerError extends Error {
    constructor(message, status) {
      super(message);
      this.status = status;
    }
  }

  const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

  /* What went wrong, in one sentence: the server's own where it sent one. */
  const failure = async (response) => {
    let message = "";
    try {
      message = (await response.json()).error?.message ?? "";
    } catch {
      message = "";
    }
    return new ServerError(message || `the server answered ${response.status} ${response.statusText}`.trim(), response.status);
  };

  const post = async (path, body, { key, signal }) => {
    let response;
    try {
      response = await fetch(path, {
        method: "POST",
        headers: { "Content-Type": "application/json", ...headers(key) },
        body: JSON.stringify(body),
        signal,
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("the server cannot be reached; is it still running?", 0);
    }
    if (!response.ok) throw await failure(response);
    return response;
  };

  /* The data of each server-sent event in a stream of bytes, wherever it was cut. */
  async function* events(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      held += done ? "\n\n" : value;
      const parts = held.split(/\r?\n\r?\n/);
      held = parts.pop();
      for (const part of parts) {
        const data = part
          .split(/\r?\n/)
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart())
          .join("\n");
        if (data) yield data;
      }
      if (done) return;
    }
  }

  return {
    ServerError,

    async model(key) {
      const response = await fetch("v1/models", { headers: headers(key) });
      if (!response.ok) throw await failure(response);
      return (await response.json()).data?.[0] ?? {};
    },

    /* Streams an answer: onDelta(delta, finishReason, tokenIds) as it comes; resolves to the usage, if the server sent
       one. */
    async chat(body, { key, signal, onDelta }) {
      const response = await post("v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true }, return_token_ids: true }, { key, signal });
      let usage = null;
      for await (const data of events(response.body)) {
        if (data === "[DONE]") return usage;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(chunk.error.message ?? "the answer failed", chunk.error.code);
        usage = chunk.usage ?? usage;
        for (const choice of chunk.choices ?? []) {
          onDelta(choice.delta ?? {}, choice.finish_reason ?? null, choice.token_ids ?? []);
        }
      }
      throw new ServerError("the connection ended before the answer did", 0);
    },

    async inspect(body, options) {
      return (await post("v1/inspect", body, options)).json();
    },
  };
})();
