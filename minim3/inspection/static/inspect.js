"use strict";
/*
 * The look-inside view. minim3Inspect.mount(root, inspection) fills an element from the JSON of an Inspection
 * (minim3/inspection/data.py says what each field means). The chat page and the report both use this file.
 *
 * Everything of the model enters the document as text nodes, and every picture as a data: URL of the server's own
 * making. Styles are set property by property, which a strict Content-Security-Policy allows.
 */
const minim3Inspect = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const MAX_SEGMENTS = 13; // more layers than this are a drop-down list
  let mounts = 0;

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
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  const round = (value, digits = 2) => value.toFixed(digits);
  const percent = (share) => (share > 0 && share < 0.01 ? "<1%" : `${Math.round(100 * share)}%`);
  const tint = (head) => `var(--head-${head % 4})`;
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

  /* A token in a sentence: spaces and line breaks must be seen. */
  const visible = (token) => {
    if (token.text === "") return token.kind === "text" ? `byte(s) of id ${token.id}` : `id ${token.id}`;
    return token.text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  };
  const quoted = (token) => h("code", null, visible(token));

  /* Which distance bin n of SelectionStatistics covers, in blocks back. */
  const binName = (bin) => {
    if (bin === 0) return "own";
    const last = 2 ** (bin - 1);
    const first = bin <= 2 ? last : last / 2 + 1;
    return first === last ? `${first}` : `${first}–${last}`;
  };

  class View {
    constructor(root, data) {
      this.root = root;
      this.data = data;
      this.name = `mi${++mounts}`;
      this.numPrompt = data.num_prompt_tokens;
      this.numAnswer = data.tokens.length - this.numPrompt;
      this.detailed = data.layers.filter((layer) => layer.selected || layer.expert_ids);
      const sparse = this.detailed.filter((layer) => layer.selected);
      this.layer = (sparse.find((layer) => layer.chooses.some(Boolean)) ?? sparse[0] ?? this.detailed[0] ?? data.layers[0]).layer;
      this.head = "all";
      this.token = this.firstWord();
      this.preview = null;
      this.expert = null;
      this.blocks = new Map(); // block -> its pieces of text
      this.cells = new Map(); // block -> its cells on pictures
      this.tokens = []; // by position: the element of the token, or its cell
      this.build();
      this.update();
    }

    /* The first answer token that says something: not a control token, not white space. */
    firstWord() {
      for (let index = 0; index < this.numAnswer; index += 1) {
        const token = this.data.tokens[this.numPrompt + index];
        if (token.kind === "text" && token.text.trim()) return index;
      }
      return 0;
    }

    get current() {
      return this.data.layers[this.layer];
    }

    get shownToken() {
      return this.preview ?? this.token;
    }

    build() {
      const { data } = this;
      this.root.classList.add("mi");
      this.text = this.buildText();
      this.says = h("p", { class: "mi-says" });
      this.live = h("p", { class: "visually-hidden", "aria-live": "polite" });
      this.side = h("div", { class: "mi-side" });
      this.layersGrid = h("div", { class: "mi-layers" });
      this.all = h(
        "details",
        { class: "mi-all" },
        h("summary", null, `All ${data.layers.length} layers: expert load and selection`),
        this.layersGrid,
      );
      this.all.addEventListener("toggle", () => this.updateLayers());
      this.root.replaceChildren(
        this.buildBar(),
        h("div", { class: "mi-main" }, h("div", null, this.text), h("div", { class: "mi-side" }, this.says, this.side)),
        this.live,
        this.all,
      );
    }

    buildBar() {
      const step = (label, by, path) =>
        h(
          "button",
          { type: "button", "aria-label": label, title: label, on: { click: () => this.choose(this.token + by) } },
          s("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, s("path", { d: path })),
        );
      this.back = step("Previous answer token", -1, "M14.5 6 8.5 12l6 6");
      this.forth = step("Next answer token", 1, "m9.5 6 6 6-6 6");
      this.which = h("output", { "aria-label": "Chosen answer token" });
      this.heads = h("div", { class: "mi-group" });
      return h(
        "div",
        { class: "mi-bar" },
        h("div", { class: "mi-step" }, this.back, this.which, this.forth),
        h("div", { class: "mi-group" }, this.buildLayerChoice()),
        this.heads,
      );
    }

    buildLayerChoice() {
      const layers = this.data.layers.filter((layer) => layer.selected || layer.expert_ids || this.detailed.length === 0);
      const pick = (value) => {
        this.layer = Number(value);
        this.expert = null;
        this.update();
      };
      if (layers.length > MAX_SEGMENTS) {
        const list = h(
          "select",
          { id: `${this.name}-layer`, on: { change: (event) => pick(event.target.value) } },
          layers.map((layer) => h("option", { value: layer.layer, selected: layer.layer === this.layer }, `${layer.layer}`)),
        );
        return [h("label", { class: "mi-label", for: list.id }, "Layer"), list];
      }
      return this.segments("Layer", "layer", layers.map((layer) => [layer.layer, `${layer.layer}`]), this.layer, pick);
    }

    segments(label, key, options, chosen, pick) {
      const id = `${this.name}-${key}`;
      return [
        h("span", { class: "mi-label", id, "aria-hidden": "true" }, label),
        h(
          "div",
          { class: "mi-choice", role: "radiogroup", "aria-labelledby": id },
          options.map(([value, text, color]) =>
            h(
              "label",
              null,
              h("input", {
                type: "radio",
                name: `${id}-choice`,
                value,
                "aria-label": `${label} ${text}`,
                checked: String(value) === String(chosen),
                on: { change: () => pick(value) },
              }),
              h("span", { "aria-hidden": "true" }, color ? h("i", { css: { background: `rgb(${color})` } }) : null, text),
            ),
          ),
        ),
      ];
    }

    updateHeads() {
      const heads = this.current.selected ? this.data.num_index_heads : 0;
      if (this.heads.dataset.count === String(heads)) return;
      this.heads.dataset.count = heads;
      const options = [["all", "all"]];
      for (let head = 0; head < heads; head += 1) options.push([head, `${head}`, tint(head)]);
      if (heads < 2) this.head = heads ? 0 : "all";
      this.heads.replaceChildren(
        ...(heads < 2
          ? []
          : this.segments("Head", "head", options, this.head, (value) => {
              this.head = value;
              this.update();
            })),
      );
    }

    /* Text: pieces that each belong to one block, and pictures where their placeholder tokens stand. */

    buildText() {
      const { data } = this;
      const text = h("div", { class: "mi-text", role: "group", "aria-label": "Prompt and answer, token by token" });
      const answer = h("span", {
        role: "listbox",
        "aria-label": "Answer tokens: arrow keys choose one",
        "aria-orientation": "horizontal",
        on: {
          keydown: (event) => this.onKey(event),
          click: (event) => this.onToken(event, (index) => this.choose(index)),
          pointerover: (event) => event.pointerType === "mouse" && this.onToken(event, (index) => this.hover(index)),
          pointerleave: () => this.hover(null),
        },
      });
      const drawn = new Set();
      let piece = null;
      let pieceBlock = -1;
      for (const [position, token] of data.tokens.entries()) {
        const target = position < this.numPrompt ? text : answer;
        if (position === this.numPrompt) piece = null;
        if (token.place) {
          const key = `${token.place.media}/${token.place.time}`;
          if (!drawn.has(key)) {
            drawn.add(key);
            target.append(this.buildPicture(position));
          }
          piece = null;
          continue;
        }
        const block = data.block_size ? Math.floor(position / data.block_size) : 0;
        if (!piece || block !== pieceBlock) {
          const first = data.block_size && position % data.block_size === 0;
          piece = h("span", { class: "mi-block", "data-first": first ? block : null });
          pieceBlock = block;
          if (!this.blocks.has(block)) this.blocks.set(block, []);
          this.blocks.get(block).push(piece);
          target.append(piece);
        }
        piece.append(this.buildToken(token, position));
      }
      text.append(answer);
      return text;
    }

    buildToken(token, position) {
      const index = position - this.numPrompt;
      const classes = ["mi-token"];
      if (token.kind === "control") classes.push("is-control");
      const node = h("span", { class: classes.join(" ") }, token.text === "" && index >= 0 ? "·" : token.text);
      if (index >= 0) {
        node.classList.add("mi-answer");
        node.dataset.index = index;
        node.setAttribute("role", "option");
        node.setAttribute("aria-label", `${index + 1}: ${visible(token)}`);
        if (token.text.trim() === "" && token.text.includes("\n")) node.prepend("⏎");
      }
      this.tokens[position] = node;
      return node;
    }

    buildPicture(first) {
      const { media, time } = this.data.tokens[first].place;
      const item = this.data.media[media];
      const { rows, columns } = item;
      const scale = Math.max(6, (item.kind === "image" ? 232 : 132) / Math.max(rows, columns));
      const picture = s("svg", {
        viewBox: `-0.03 -0.03 ${columns + 0.06} ${rows + 0.06}`, // room for half an outline
        role: "img",
        css: { "--size": `${Math.round(columns * scale)}px` },
      });
      const url = item.thumbnails[time];
      if (url) picture.append(s("image", { href: url, width: columns, height: rows, preserveAspectRatio: "none" }));
      const size = this.data.block_size;
      const cells = [];
      for (let position = first; position < first + rows * columns; position += 1) {
        const { row, column } = this.data.tokens[position].place;
        const block = size ? Math.floor(position / size) : 0;
        const cell = s(
          "rect",
          { class: "mi-cell", x: column, y: row, width: 1, height: 1 },
          s("title", null, `row ${row}, column ${column}: token ${position}${size ? `, block ${block}` : ""}`),
        );
        if (!this.cells.has(block)) this.cells.set(block, []);
        this.cells.get(block).push(cell);
        this.tokens[position] = cell;
        cells.push({ cell, row, column, block });
        picture.append(cell);
      }
      const back = s("path", { class: "mi-edge-back" });
      const edge = s("path", { class: "mi-edge" });
      picture.append(back, edge);
      this.pictures ??= [];
      this.pictures.push({ picture, cells, back, edge, rows, columns });
      const caption = item.kind === "image" ? `Picture, ${columns} × ${rows} tokens` : `Clip, frame ${(this.frames = (this.frames ?? 0) + 1)}`;
      return h("figure", { class: item.kind === "image" ? "mi-media" : "mi-media is-frame" }, picture, h("figcaption", null, caption));
    }

    onToken(event, act) {
      const node = event.target.closest("[data-index]");
      if (node && this.root.contains(node)) act(Number(node.dataset.index));
    }

    onKey(event) {
      const last = this.numAnswer - 1;
      const moves = { ArrowRight: this.token + 1, ArrowLeft: this.token - 1, Home: 0, End: last };
      const layers = this.detailed.map((layer) => layer.layer);
      if (event.key in moves) {
        this.choose(moves[event.key]);
        this.tokens[this.numPrompt + this.token].focus();
      } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
        const next = layers[layers.indexOf(this.layer) + (event.key === "ArrowDown" ? 1 : -1)];
        if (next === undefined) return;
        const input = this.root.querySelector(`[name="${this.name}-layer-choice"][value="${next}"]`);
        if (input) input.checked = true;
        const list = this.root.querySelector(`#${this.name}-layer`);
        if (list?.tagName === "SELECT") list.value = next;
        this.layer = next;
        this.expert = null;
        this.update();
      } else return;
      event.preventDefault();
    }

    choose(index) {
      const token = Math.max(0, Math.min(this.numAnswer - 1, index));
      this.preview = null;
      if (token !== this.token) this.expert = null;
      this.token = token;
      this.update();
    }

    hover(index) {
      if (this.preview === index || (index === this.token && this.preview === null)) return;
      this.preview = index === this.token ? null : index;
      this.update();
    }

    /* What the chosen heads selected for the shown token: block -> how strongly, 0 to 1. */
    shades() {
      const { selected, scores } = this.current;
      const shades = new Map();
      if (!selected) return shades;
      const heads = this.head === "all" ? selected[this.shownToken].map((_, head) => head) : [this.head];
      for (const head of heads) {
        const row = scores?.[this.shownToken]?.[head];
        const low = row ? Math.min(...row) : 0;
        const high = row ? Math.max(...row) : 1;
        for (const block of selected[this.shownToken][head]) {
          const score = row && high > low ? (row[block] - low) / (high - low) : 0.5;
          shades.set(block, (shades.get(block) ?? 0) + (0.22 + 0.78 * score) / heads.length);
        }
      }
      return shades;
    }

    update() {
      this.updateHeads();
      const { data } = this;
      const layer = this.current;
      const shades = this.shades();
      const color = this.head === "all" ? "var(--accent-rgb)" : tint(this.head);
      const query = this.numPrompt - 1 + this.shownToken;
      for (const [block, pieces] of this.blocks) {
        for (const piece of pieces) {
          piece.style.setProperty("--shade", shades.get(block) ?? 0);
          piece.style.setProperty("--tint", color);
          piece.classList.toggle("is-selected", shades.has(block));
        }
      }
      for (const picture of this.pictures ?? []) this.updatePicture(picture, shades, color, Boolean(layer.selected));
      const ran = layer.expert_ids;
      for (const [position, node] of this.tokens.entries()) {
        if (!node) continue;
        node.classList.toggle("is-query", position === query);
        node.classList.toggle("is-routed", this.expert !== null && Boolean(ran?.[position]?.includes(this.expert)));
        const index = position - this.numPrompt;
        if (index < 0) continue;
        node.classList.toggle("is-later", index > this.shownToken);
        node.setAttribute("aria-selected", index === this.shownToken);
        node.tabIndex = index === this.token ? 0 : -1;
      }
      const token = data.tokens[this.numPrompt + this.shownToken];
      this.which.replaceChildren(h("b", null, visible(token)), ` ${this.shownToken + 1} of ${this.numAnswer}`);
      this.back.disabled = this.token === 0;
      this.forth.disabled = this.token === this.numAnswer - 1;
      this.updateSide(token, query);
      this.updateLayers();
    }

    updatePicture({ picture, cells, back, edge, rows, columns }, shades, color, selects) {
      const grid = Array.from({ length: rows }, () => new Array(columns).fill(false));
      let count = 0;
      for (const { cell, row, column, block } of cells) {
        const is = shades.has(block);
        grid[row][column] = is;
        count += is;
        cell.classList.toggle("is-out", selects && !is);
      }
      const lines = [];
      if (selects) {
        const at = (row, column) => grid[row]?.[column] ?? false;
        for (let row = 0; row <= rows; row += 1) {
          for (let column = 0; column <= columns; column += 1) {
            if (at(row, column) !== at(row - 1, column)) lines.push(`M${column} ${row}h1`);
            if (at(row, column) !== at(row, column - 1)) lines.push(`M${column} ${row}v1`);
          }
        }
      }
      for (const path of [back, edge]) path.setAttribute("d", lines.join(""));
      edge.style.setProperty("--tint", color);
      const which = selects ? `${count} of ${cells.length} patches are in selected blocks` : `${cells.length} patches`;
      picture.setAttribute("aria-label", `Picture in the prompt: ${which}`);
    }

    updateSide(token, query) {
      const layer = this.current;
      const reads = this.data.tokens[query];
      this.says.replaceChildren(
        "To write ",
        quoted(token),
        ", the model read ",
        quoted(reads),
        ` at position ${query}`,
        reads.place || query < this.numPrompt - 1 ? "" : query === this.numPrompt - 1 ? ", the end of the prompt" : "",
        ".",
      );
      this.side.replaceChildren(
        ...[this.blocksCard(layer), this.expertsCard(layer, query), this.likelyCard(), this.layerCard(layer)].filter(Boolean),
      );
      this.live.textContent = this.preview === null ? this.spoken(token, layer) : this.live.textContent;
    }

    spoken(token, layer) {
      const parts = [`Token ${this.token + 1} of ${this.numAnswer}, ${visible(token)}, layer ${this.layer}.`];
      for (const [head, blocks] of (layer.selected?.[this.token] ?? []).entries()) {
        if (this.head === "all" || this.head === head) parts.push(`Head ${head}: blocks ${blocks.join(", ")}.`);
      }
      const experts = layer.expert_ids?.[this.numPrompt - 1 + this.token];
      if (experts) parts.push(`Experts ${experts.join(", ")}.`);
      return parts.join(" ");
    }

    blocksCard(layer) {
      const title = h("h3", null, `Blocks selected in layer ${layer.layer}`);
      if (layer.attention === "full") {
        return h("section", { class: "mi-card" }, title, h("p", { class: "mi-note" }, "This layer attends to every token: it has no indexer."));
      }
      if (!layer.selected) return null;
      const rows = layer.selected[this.shownToken];
      const scores = layer.scores[this.shownToken];
      const seen = scores[0].length;
      const budget = this.data.topk_blocks;
      const note = layer.chooses[this.shownToken]
        ? `${rows[0].length} of the ${seen} blocks of ${this.data.block_size} tokens that it saw.`
        : `It saw ${seen} blocks of ${this.data.block_size} tokens and may select ${budget}: it attended to all of them.`;
      const charts = rows.map((blocks, head) =>
        this.head === "all" || this.head === head ? this.blockChart(head, blocks, scores[head], rows.length) : null,
      );
      const heads = this.data.num_query_heads / Math.max(1, rows.length);
      const caption = `Bars: index score of each block; coloured: selected. A head selects for ${heads} query head${heads === 1 ? "" : "s"}.`;
      return h("section", { class: "mi-card" }, h("header", null, title), h("p", { class: "mi-note" }, note), charts, h("p", { class: "mi-caption" }, caption));
    }

    blockChart(head, blocks, scores, numHeads) {
      const width = 400;
      const height = 46;
      const low = Math.min(...scores);
      const high = Math.max(...scores);
      const step = width / Math.max(scores.length, 12);
      const gap = step > 6 ? 2 : step > 3 ? 1 : 0.25;
      const chosen = new Set(blocks);
      const label = `Head ${head}: blocks ${blocks.join(", ")} selected of ${scores.length}`;
      const chart = s("svg", { class: "mi-chart", viewBox: `0 0 ${width} ${height + 14}`, role: "img", "aria-label": label, css: { "--tint": tint(head) } });
      const every = Math.max(1, Math.ceil(22 / step));
      for (const [block, score] of scores.entries()) {
        const tall = high > low ? 3 + (height - 3) * ((score - low) / (high - low)) : height / 2;
        const x = block * step;
        chart.append(
          s("rect", { class: `bar${chosen.has(block) ? " is-in" : ""}`, x: x + gap / 2, y: height - tall, width: step - gap, height: tall, rx: Math.min(2, step / 5) }),
        );
        if (block % every === 0) chart.append(s("text", { x: x + step / 2, y: height + 11, "text-anchor": "middle" }, `${block}`));
        chart.append(
          s(
            "rect",
            { class: "hit", x, y: 0, width: step, height, on: { click: () => this.find(block) } },
            s("title", null, `block ${block}: score ${round(score)}${chosen.has(block) ? ", selected" : ""}${this.isForced(block, scores.length) ? " (always)" : ""}`),
          ),
        );
      }
      chart.append(s("line", { class: "axis", x1: 0, x2: width, y1: height + 0.5, y2: height + 0.5 }));
      return h("div", null, numHeads > 1 ? h("div", { class: "mi-caption" }, `Index head ${head}`) : null, chart);
    }

    isForced(block, seen) {
      return block < this.data.init_blocks || block >= seen - this.data.local_blocks;
    }

    /* Shows where a block of the chart stands in the text. */
    find(block) {
      const pieces = this.blocks.get(block) ?? [];
      const node = pieces[0] ?? this.cells.get(block)?.[0];
      node?.scrollIntoView({ block: "center", behavior: "smooth" });
      for (const piece of pieces) {
        piece.classList.add("is-found");
        setTimeout(() => piece.classList.remove("is-found"), 1400);
      }
    }

    expertsCard(layer, query) {
      const ids = layer.expert_ids?.[query];
      const title = h("h3", null, "Experts that ran");
      if (layer.mlp === "dense") {
        return h("section", { class: "mi-card" }, title, h("p", { class: "mi-note" }, "This layer has one dense MLP for every token."));
      }
      if (!ids) return null;
      const weights = layer.expert_weights[query];
      const most = Math.max(...weights);
      const rows = ids.map((id, rank) => [
        h(
          "button",
          {
            type: "button",
            class: "mi-expert",
            "aria-pressed": String(this.expert === id),
            title: "Mark the tokens that this expert worked on",
            on: {
              click: () => {
                this.expert = this.expert === id ? null : id;
                this.update();
                this.side.querySelector(`[data-expert="${id}"]`)?.focus();
              },
            },
            "data-expert": id,
          },
          `Expert ${id}`,
        ),
        h("span", { class: "mi-meter" }, h("i", { css: { width: `${(100 * weights[rank]) / most}%` } })),
        h("span", { class: "mi-number" }, round(weights[rank])),
      ]);
      if (this.data.has_shared_expert) {
        rows.push([h("span", { class: "mi-note" }, "Shared"), h("span", { class: "mi-note" }, "always runs"), h("span", { class: "mi-number" }, "1.00")]);
      }
      const marked = this.expert === null ? null : h("p", { class: "mi-caption" }, `Dotted: tokens that expert ${this.expert} worked on in layer ${layer.layer}.`);
      return h("section", { class: "mi-card" }, title, h("div", { class: "mi-rows" }, rows), marked);
    }

    likelyCard() {
      const written = this.data.written[this.shownToken];
      if (!written) return null;
      const token = this.data.tokens[this.numPrompt + this.shownToken];
      const rows = written.likeliest.map(([text, probability], rank) => [
        h("code", null, visible({ text, kind: "text", id: "?" })),
        h("span", { class: "mi-meter" }, h("i", { class: rank + 1 === written.rank ? "" : "is-plain", css: { width: `${100 * probability}%` } })),
        h("span", { class: "mi-number" }, percent(probability)),
      ]);
      if (written.rank > written.likeliest.length) {
        rows.push([quoted(token), h("span", { class: "mi-note" }, `rank ${written.rank}`), h("span", { class: "mi-number" }, percent(written.probability))]);
      }
      return h("section", { class: "mi-card" }, h("h3", null, "Likeliest tokens here"), h("div", { class: "mi-rows" }, rows));
    }

    layerCard(layer) {
      const parts = [layer.load && this.loadFigure(layer, true), layer.selection && this.distanceFigure(layer)].filter(Boolean);
      if (!parts.length) return null;
      return h("section", { class: "mi-card" }, h("h3", null, `Layer ${layer.layer}, all tokens`), parts, this.numbers(layer));
    }

    loadFigure(layer, marks) {
      const { prompt, answer } = layer.load;
      const width = marks ? 400 : 300;
      const height = 64;
      const totals = prompt.map((count, id) => count + answer[id]);
      const most = Math.max(...totals, 1);
      const step = width / totals.length;
      const gap = step > 8 ? 3 : step > 4 ? 1 : 0.25;
      const query = this.numPrompt - 1 + this.shownToken;
      const ran = marks ? (layer.expert_ids?.[query] ?? []) : [];
      const chart = s("svg", {
        class: "mi-chart",
        viewBox: `0 0 ${width} ${height + 14}`,
        role: "img",
        "aria-label": `Tokens of each expert: ${totals.map((count, id) => `expert ${id} ${count}`).join(", ")}`,
      });
      const every = Math.max(1, Math.ceil(22 / step));
      for (const [id, total] of totals.entries()) {
        const x = id * step + gap / 2;
        const tall = (height * total) / most;
        const lower = (height * prompt[id]) / most;
        const group = s(
          "g",
          null,
          s("title", null, `expert ${id}: ${prompt[id]} tokens of the prompt, ${answer[id]} of the answer`),
          s("rect", { class: "bar", x, y: height - lower, width: step - gap, height: lower }),
          s("rect", { class: "bar is-answer", x, y: height - tall, width: step - gap, height: tall - lower }),
        );
        if (ran.includes(id)) group.append(s("circle", { cx: x + (step - gap) / 2, cy: Math.max(-1, height - tall - 6), r: 2.5, fill: "currentColor" }));
        chart.append(group);
        if (id % every === 0) chart.append(s("text", { x: id * step + step / 2, y: height + 11, "text-anchor": "middle" }, `${id}`));
      }
      const mean = (height * sum(totals)) / totals.length / most;
      chart.append(
        s("line", { class: "mean", x1: 0, x2: width, y1: height - mean, y2: height - mean }, s("title", null, "equal load")),
        s("line", { class: "axis", x1: 0, x2: width, y1: height + 0.5, y2: height + 0.5 }),
      );
      const legend = h(
        "div",
        { class: "mi-caption mi-legend" },
        h("span", null, "Expert load:"),
        h("span", null, h("i", { css: { background: "rgb(128 127 120 / 45%)" } }), "prompt"),
        h("span", null, h("i", { css: { background: "rgb(var(--accent-rgb))" } }), "answer"),
        h("span", null, ran.length ? "• ran for this token" : "– – equal load"),
      );
      return h("div", null, legend, chart);
    }

    distanceFigure(layer, width = 400) {
      const { selected_at: selected, available_at: available, num_choosing: choosing } = layer.selection;
      const height = 52;
      const step = width / Math.max(selected.length, 4);
      const shares = selected.map((count, bin) => (available[bin] ? count / available[bin] : 0));
      const chart = s("svg", {
        class: "mi-chart",
        viewBox: `0 0 ${width} ${height + 14}`,
        role: "img",
        "aria-label": `Share of blocks selected by distance: ${shares.map((share, bin) => `${binName(bin)} ${percent(share)}`).join(", ")}`,
      });
      for (const [bin, share] of shares.entries()) {
        const x = bin * step + 2;
        chart.append(
          s(
            "g",
            null,
            s("title", null, `${binName(bin)}: ${selected[bin]} of ${available[bin]} blocks selected`),
            s("rect", { class: "ghost", x, y: 0, width: step - 4, height }),
            s("rect", { class: "bar is-answer", x, y: height * (1 - share), width: step - 4, height: height * share }),
          ),
          s("text", { x: x + step / 2 - 2, y: height + 11, "text-anchor": "middle" }, binName(bin)),
        );
      }
      const what = choosing ? "Share of blocks selected, by blocks back" : "All blocks were selected: no query had to choose";
      return h("div", null, h("div", { class: "mi-caption" }, what), chart);
    }

    numbers(layer) {
      const rows = [];
      const add = (name, value, title) => rows.push(h("dt", { title }, name), h("dd", null, value));
      if (layer.load) {
        add("Largest expert load / mean", round(layer.load.balance), "1 where all experts get equally many tokens");
        add("Entropy of the load", percent(layer.load.entropy), "of the entropy of an equal load");
      }
      if (layer.selection) {
        const one = layer.selection;
        add("Queries that had to choose", percent(one.num_choosing / Math.max(1, one.num_queries)), "saw more blocks than they may select");
        add("Selected because local", percent(one.share_local), "the query's own block and those right before it are always selected");
        if (this.data.init_blocks) add("Selected because first", percent(one.share_init), "the first blocks are always selected");
        add("New blocks from token to token", round(one.new_blocks), "blocks that the position before did not select, a head");
        if (one.distinct_of_8 !== null) add("Blocks of 8 adjacent tokens", round(one.distinct_of_8, 1), "distinct ones, a head");
        if (one.head_overlap !== null) add("Overlap of two heads", percent(one.head_overlap), "intersection over union");
      }
      return h("dl", { class: "mi-numbers" }, rows);
    }

    updateLayers() {
      if (!this.all.open) return;
      if (!this.layersGrid.childElementCount) {
        this.layersGrid.append(
          ...this.data.layers.map((layer) => {
            const kind = [layer.attention === "full" ? "full attention" : "sparse attention", layer.mlp === "moe" ? "experts" : "dense MLP"];
            return h(
              "section",
              { class: "mi-layer", "data-layer": layer.layer },
              h("h3", null, `Layer ${layer.layer}`, h("span", { class: "mi-note" }, ` · ${kind.join(", ")}`)),
              layer.load ? this.loadFigure(layer, false) : null,
              layer.selection ? this.distanceFigure(layer, 300) : null,
              layer.load || layer.selection ? this.numbers(layer) : null,
            );
          }),
        );
      }
      for (const card of this.layersGrid.children) card.classList.toggle("is-current", Number(card.dataset.layer) === this.layer);
    }
  }

  return {
    h,
    s,
    /* Fills `root` with the view; options.open: show all layers at once. */
    mount(root, data, options = {}) {
      const view = new View(root, data);
      view.text.scrollTop = view.text.scrollHeight; // the answer stands at the end
      if (options.open) view.all.open = true;
      return view;
    },
  };
})();
