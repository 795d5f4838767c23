"use strict";
/*
 * Making elements, for the look-inside view and the chat page. Text enters a document as text nodes only. Styles are set
 * property by property, which a strict Content-Security-Policy allows.
 */
const minim3Elements = (() => {
  const SVG = "http://www.w3.org/2000/svg";

  const fill = (node, attributes, children) => {
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
      else if (name === "css") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
    return node;
  };

  return {
    /* h("p", {class: "note", on: {click: act}, css: {color: "red"}}, "text", child): an HTML element. */
    h: (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children),
    /* The same for SVG. */
    s: (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children),
  };
})();
