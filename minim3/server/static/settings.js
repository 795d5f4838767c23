"use strict";
/* What a user sets. Kept in the browser, but for the API key, which the tab forgets. */
const minim3Settings = (() => {
  const { $, config } = minim3Page;
  const KEPT = "minim3-settings";
  const KEPT_KEY = "minim3-key";
  const FIELDS = {
    system: "s-system",
    temperature: "s-temperature",
    tokens: "s-tokens",
    key: "s-key",
    tools: "s-tools",
    thinking: "thinking",
  };
  const UNSET = { system: "", temperature: "", tokens: "", thinking: config.thinking, tools: "", key: "" };
  const TOOLS_HELP = $("s-tools-help").textContent;

  /* A browser may keep nothing: then settings last as long as the page. */
  const recall = (area, key) => {
    try {
      return window[area].getItem(key);
    } catch {
      return null;
    }
  };
  const keep = (area, key, value) => {
    try {
      if (value) window[area].setItem(key, value);
      else window[area].removeItem(key);
    } catch {
      /* see recall */
    }
  };

  const values = { ...UNSET, theme: "" };
  try {
    const known = JSON.parse(recall("localStorage", KEPT) ?? "{}");
    for (const name of Object.keys(values)) if (typeof known[name] === "string") values[name] = known[name];
  } catch {
    /* What was kept is broken: begin anew. */
  }
  values.key = recall("sessionStorage", KEPT_KEY) || "";

  const keepAll = () => {
    const { key, ...rest } = values;
    keep("localStorage", KEPT, JSON.stringify(rest));
    keep("sessionStorage", KEPT_KEY, key);
  };

  /* The tools to send, or null where there are none or they cannot be read. */
  const readTools = () => {
    try {
      const tools = JSON.parse(values.tools);
      return Array.isArray(tools) && tools.length ? tools : null;
    } catch {
      return null;
    }
  };

  const show = () => {
    for (const [name, id] of Object.entries(FIELDS)) $(id).value = values[name];
    $("s-tools-details").open = Boolean(values.tools);
    checkTools();
  };

  const checkTools = () => {
    const isBad = Boolean(values.tools.trim()) && !readTools();
    $("s-tools-help").classList.toggle("is-error", isBad);
    $("s-tools-help").textContent = isBad ? "This is not a JSON list: it is left out." : TOOLS_HELP;
  };

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const showTheme = () => {
    const theme = values.theme || (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    $("theme").querySelector("use").setAttribute("href", theme === "dark" ? "#i-sun" : "#i-moon");
  };

  for (const [name, id] of Object.entries(FIELDS)) {
    $(id).addEventListener("input", () => {
      values[name] = $(id).value;
      keepAll();
      if (name === "tools") checkTools();
    });
  }
  $("reset-settings").addEventListener("click", () => {
    Object.assign(values, UNSET);
    keepAll();
    show();
  });
  $("settings").addEventListener("click", (event) => {
    if (event.target === $("settings")) $("settings").close();
  });
  $("theme").addEventListener("click", () => {
    values.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    keepAll();
    showTheme();
  });
  dark.addEventListener("change", showTheme);
  showTheme();
  show();

  return {
    get key() {
      return values.key;
    },
    get system() {
      return values.system.trim() ? values.system : null;
    },

    /* Opens the dialog, at a field. */
    open(field) {
      show();
      $("settings").showModal();
      if (field) $(field).focus();
    },

    /* What decides how a conversation is written out for the model. */
    rendering() {
      const tools = readTools();
      return { chat_template_kwargs: { thinking_mode: values.thinking }, ...(tools ? { tools } : {}) };
    },

    /* What decides how tokens are chosen. */
    sampling() {
      const temperature = Number.parseFloat(values.temperature);
      const tokens = Number.parseInt(values.tokens, 10);
      return {
        ...(temperature >= 0 ? { temperature } : {}),
        ...(tokens > 0 ? { max_tokens: tokens } : {}),
      };
    },
  };
})();
