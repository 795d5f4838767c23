"use strict";
/*
 * A small part of Markdown as document nodes. The text of a model only ever becomes text nodes; of all addresses only
 * http and https ones become links. What is not understood stands as it was written.
 */
const minim3Markdown = (() => {
  const node = (tag, ...children) => {
    const made = document.createElement(tag);
    made.append(...children);
    return made;
  };

  const INLINE = /(`+)([\s\S]+?)\1(?!`)|\*\*(?=\S)([\s\S]+?\S)\*\*|(?<![\w*])\*(?=[^\s*])([\s\S]*?[^\s*])\*(?![\w*])|\[([^\][\n]+)\]\((https?:\/\/[^\s()<>"]+)\)|(https?:\/\/[^\s<>"]*[^\s<>".,;:!?)\]}'])/;

  /* Text with code, strong, emphasis and links in it. */
  const inline = (text, depth = 0) => {
    const parts = [];
    let rest = text;
    while (rest) {
      const found = depth < 4 ? INLINE.exec(rest) : null;
      if (!found) {
        parts.push(rest);
        break;
      }
      if (found.index) parts.push(rest.slice(0, found.index));
      const [all, , code, strong, emphasis, label, address, bare] = found;
      if (code !== undefined) parts.push(node("code", code.trim() ? code.replace(/^ (.*) $/s, "$1") : code));
      else if (strong !== undefined) parts.push(node("strong", ...inline(strong, depth + 1)));
      else if (emphasis !== undefined) parts.push(node("em", ...inline(emphasis, depth + 1)));
      else parts.push(link(address ?? bare, label ? inline(label, 4) : [bare]));
      rest = rest.slice(found.index + all.length);
    }
    return parts;
  };

  const link = (address, children) => {
    const made = node("a", ...children);
    made.href = address;
    made.target = "_blank";
    made.rel = "noopener noreferrer nofollow";
    return made;
  };

  const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
  const HEADING = /^ {0,3}(#{1,6})\s+(.+?)\s*#*$/;
  const ITEM = /^( {0,8})([-*+]|\d{1,9}[.)])\s+(.*)$/;
  const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
  const QUOTE = /^ {0,3}>\s?(.*)$/;
  const TABLE_RULE = /^\s*\|?\s*:?-{1,}:?\s*(?:\|\s*:?-{1,}:?\s*)*\|?\s*$/;

  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const starts = (line) => [FENCE, HEADING, ITEM, RULE, QUOTE].some((pattern) => pattern.test(line));

  const blocks = (lines, depth = 0) => {
    const made = [];
    let at = 0;
    while (at < lines.length) {
      const line = lines[at];
      const fence = FENCE.exec(line);
      const heading = HEADING.exec(line);
      if (!line.trim()) at += 1;
      else if (fence) {
        const code = [];
        for (at += 1; at < lines.length && !lines[at].trim().startsWith(fence[1]); at += 1) code.push(lines[at]);
        at += 1;
        made.push(node("pre", node("code", code.join("\n"))));
      } else if (heading) {
        made.push(node(`h${Math.min(5, heading[1].length + 2)}`, ...inline(heading[2])));
        at += 1;
      } else if (RULE.test(line)) {
        made.push(node("hr"));
        at += 1;
      } else if (depth < 6 && QUOTE.test(line)) {
        const inner = [];
        for (; at < lines.length && QUOTE.test(lines[at]); at += 1) inner.push(QUOTE.exec(lines[at])[1]);
        made.push(node("blockquote", ...blocks(inner, depth + 1)));
      } else if (depth < 6 && ITEM.test(line)) {
        let taken;
        [taken, at] = list(lines, at, depth);
        made.push(taken);
      } else if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) {
        const head = cells(line);
        const rows = [];
        for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) rows.push(cells(lines[at]));
        const row = (tag, values) => node("tr", ...head.map((_, column) => node(tag, ...inline(values[column] ?? ""))));
        const wrapper = node("div", node("table", node("thead", row("th", head)), node("tbody", ...rows.map((one) => row("td", one)))));
        wrapper.className = "table";
        made.push(wrapper);
      } else {
        const text = [line];
        for (at += 1; at < lines.length && lines[at].trim() && !starts(lines[at]); at += 1) text.push(lines[at]);
        made.push(node("p", ...inline(text.join("\n"))));
      }
    }
    return made;
  };

  const list = (lines, first, depth) => {
    const [, indent, marker] = ITEM.exec(lines[first]);
    const ordered = /\d/.test(marker);
    const made = node(ordered ? "ol" : "ul");
    if (ordered && parseInt(marker, 10) !== 1) made.start = parseInt(marker, 10);
    let at = first;
    while (at < lines.length) {
      const item = ITEM.exec(lines[at]);
      if (!item || item[1].length > indent.length + 1 || item[1].length < indent.length || /\d/.test(item[2]) !== ordered) break;
      const inner = [item[3]];
      const deeper = (line) => line.startsWith(" ".repeat(indent.length + 2));
      for (at += 1; at < lines.length; at += 1) {
        const line = lines[at];
        if (!line.trim() && deeper(lines[at + 1] ?? "")) inner.push("");
        else if (deeper(line)) inner.push(line.slice(indent.length + 2).replace(/^ (?=[-*+]|\d)/, ""));
        else if (line.trim() && !starts(line) && inner.at(-1)) inner.push(line.trim());
        else break;
      }
      const children = blocks(inner, depth + 1);
      const [head, ...rest] = children;
      const tight = head?.tagName === "P" && !rest.some((child) => child.tagName === "P");
      made.append(node("li", ...(tight ? [...head.childNodes, ...rest] : children)));
      if (at < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1] ?? "")) at += 1;
    }
    return [made, at];
  };

  return {
    /* Replaces what `target` holds by `text`. */
    render(target, text) {
      target.replaceChildren(...blocks(text.replaceAll("\r\n", "\n").split("\n")));
    },
  };
})();
