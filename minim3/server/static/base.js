"use strict";
/* What all parts of the page use. */
const minim3Page = (() => {
  const { h, s } = minim3Elements;
  const $ = (id) => document.getElementById(id);

  const icon = (name) => s("svg", { class: "icon", "aria-hidden": "true" }, s("use", { href: `#i-${name}` }));

  /* Tells screen readers. */
  const say = (text) => {
    $("status").textContent = text;
  };

  /* A remark of the page itself, above the message box. */
  const notify = (text) => {
    const node = h("p", { class: "notice is-error", role: "alert" }, text);
    $("composer").before(node);
    setTimeout(() => node.remove(), 6000);
  };

  /* Begins with a capital and ends with a full stop. */
  const sentence = (text) => {
    const first = text.charAt(0).toUpperCase() + text.slice(1);
    return /[.!?]$/.test(first) ? first : `${first}.`;
  };

  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = h("textarea", { class: "visually-hidden" }); // an address without https has no clipboard
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };

  /* The end of the conversation stays in view while the reader is there. */
  const isAtEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 60;
  const updateToEnd = () => {
    $("to-end").hidden = isAtEnd();
  };
  const scrollToEnd = () => {
    $("scroll").scrollTop = $("scroll").scrollHeight;
    updateToEnd();
  };

  return {
    $,
    icon,
    say,
    notify,
    sentence,
    copy,
    isAtEnd,
    updateToEnd,
    scrollToEnd,
    config: JSON.parse($("page-config").textContent),
    hasMouse: matchMedia("(pointer: fine)"),
  };
})();
