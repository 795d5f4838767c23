"use strict";
/* The message box: text, pictures and clips, and the button that sends or stops. */
const minim3Composer = (() => {
  const { h } = minim3Elements;
  const { $, icon, say, notify, isAtEnd, scrollToEnd } = minim3Page;
  const MAX_FILE_BYTES = 40 * 2 ** 20;
  const prompt = $("prompt");
  const model = { name: "the model", vision: true };
  let attachments = []; // {kind, url, shown, node}: `url` is sent, `shown` is what the page shows
  let isRunning = false;
  let actions = { send: () => {}, stop: () => {} };

  const readFile = (file) =>
    new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.addEventListener("load", () => resolve(reader.result));
      reader.addEventListener("error", () => reject(reader.error));
      reader.readAsDataURL(file);
    });

  const attachFiles = async (files) => {
    for (const file of files) {
      const name = file.name || "This file";
      const kind = file.type.startsWith("image/") ? "image" : file.type.startsWith("video/") ? "video" : null;
      if (!kind) notify(`${name} is neither a picture nor a clip.`);
      else if (!model.vision) notify(`${model.name} is a text-only model: it takes no pictures.`);
      else if (file.size > MAX_FILE_BYTES) {
        notify(`${name} has ${Math.round(file.size / 2 ** 20)} MB; at most ${MAX_FILE_BYTES / 2 ** 20} MB can be sent.`);
      } else {
        const url = await readFile(file);
        // The page's policy lets pictures be data: URLs, but not clips.
        attach({ kind, url, shown: kind === "video" ? URL.createObjectURL(file) : url }, file.name);
      }
    }
    prompt.focus();
  };

  const attach = ({ kind, url, shown = url }, name = kind === "image" ? "picture" : "clip") => {
    const entry = { kind, url, shown };
    const remove = () => {
      attachments = attachments.filter((one) => one !== entry);
      entry.node.remove();
      update();
      prompt.focus();
    };
    const button = { type: "button", "aria-label": `Remove ${name}`, title: "Remove", on: { click: remove } };
    entry.node = h("li", null, media(entry, name), h("button", button, icon("close")));
    attachments.push(entry);
    $("attachments").append(entry.node);
    say(`${name} attached`);
    update();
  };

  /* A picture or clip as an element. */
  const media = ({ kind, shown }, name) => {
    if (kind === "video") {
      const clip = h("video", { src: shown, "aria-label": name, playsinline: true, loop: true });
      clip.muted = true;
      clip.play?.().catch(() => {}); // a browser that saves power shows the first frame
      return clip;
    }
    const image = h("img", { src: shown, alt: name });
    image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth < 200));
    return image;
  };

  const update = () => {
    const follow = isAtEnd();
    $("attachments").hidden = !attachments.length;
    prompt.style.height = "auto";
    prompt.style.height = `${prompt.scrollHeight}px`;
    const button = $("send");
    button.disabled = !isRunning && !prompt.value.trim() && !attachments.length;
    button.setAttribute("aria-label", isRunning ? "Stop" : "Send");
    button.title = isRunning ? "Stop (Esc)" : "Send (Enter)";
    button.querySelector("use").setAttribute("href", isRunning ? "#i-stop" : "#i-send");
    if (follow) scrollToEnd();
  };

  const send = () => {
    const text = prompt.value.trim();
    if (isRunning || (!text && !attachments.length)) return;
    const sent = attachments;
    clear();
    actions.send(text, sent);
  };

  const clear = () => {
    attachments = [];
    $("attachments").replaceChildren();
    prompt.value = "";
    update();
  };

  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (isRunning) actions.stop();
    else send();
  });
  prompt.addEventListener("input", update);
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
  $("attach").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", (event) => {
    const files = [...event.target.files];
    event.target.value = "";
    attachFiles(files);
  });

  let depth = 0; // elements of the page that the files being dragged are over
  const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const over = (change) => (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    depth = change === null ? 0 : Math.max(0, depth + change);
    $("drop").hidden = depth === 0;
  };
  window.addEventListener("dragenter", over(1));
  window.addEventListener("dragover", over(0));
  window.addEventListener("dragleave", over(-1));
  window.addEventListener("drop", (event) => {
    over(null)(event);
    if (carriesFiles(event)) attachFiles([...event.dataTransfer.files]);
  });

  return {
    attach,
    clear,
    media,
    send,
    focus: () => prompt.focus(),

    /* {send(text, attachments), stop()} */
    connect(given) {
      actions = given;
      update();
    },

    setRunning(running) {
      isRunning = running;
      update();
    },

    setText(text) {
      prompt.value = text;
      update();
    },

    setModel(name, vision) {
      Object.assign(model, { name, vision });
      prompt.placeholder = `Message ${name}`;
      $("attach").hidden = !vision;
    },
  };
})();
