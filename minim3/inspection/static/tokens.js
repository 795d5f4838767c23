"use strict";
/*
 * Prompt and answer, token by token: pieces of text that each belong to one block of keys, and pictures where their
 * placeholder tokens stand, with a cell for each. Answer tokens are the options of a list.
 */
const minim3Tokens = (() => {
  const { h, s } = minim3Elements;

  /* A token in a sentence: spaces and line breaks must be seen. */
  const visible = (token) => {
    if (token.text === "") return token.kind === "text" ? `byte(s) of id ${token.id}` : `id ${token.id}`;
    return token.text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  };

  class TokenText {
    /* `on`: handlers {choose(index), hover(index or null), key(event)} for the answer tokens. */
    constructor(data, on) {
      this.data = data;
      this.numPrompt = data.num_prompt_tokens;
      this.pieces = new Map(); // block -> its pieces of text
      this.cells = new Map(); // block -> its cells on pictures
      this.tokens = []; // by position: the element of the token, or its cell
      this.pictures = [];
      this.numFrames = 0;
      this.root = h("div", { class: "mi-text", role: "group", "aria-label": "Prompt and answer, token by token" });
      this.answer = h("span", {
        role: "listbox",
        "aria-label": "Answer tokens: arrow keys choose one",
        "aria-orientation": "horizontal",
        on: {
          keydown: on.key,
          click: (event) => this.onToken(event, on.choose),
          pointerover: (event) => event.pointerType === "mouse" && this.onToken(event, on.hover),
          pointerleave: () => on.hover(null),
        },
      });
      this.build();
      this.root.append(this.answer);
    }

    blockOf(position) {
      return this.data.block_size ? Math.floor(position / this.data.block_size) : 0;
    }

    build() {
      const size = this.data.block_size;
      const drawn = new Set();
      let piece = null;
      let pieceBlock = -1;
      for (const [position, token] of this.data.tokens.entries()) {
        const target = position < this.numPrompt ? this.root : this.answer;
        if (position === this.numPrompt) piece = null;
        if (token.place) {
          const key = `${token.place.media}/${token.place.time}`;
          if (!drawn.has(key)) target.append(this.buildPicture(position));
          drawn.add(key);
          piece = null;
          continue;
        }
        const block = this.blockOf(position);
        if (!piece || block !== pieceBlock) {
          piece = h("span", { class: "mi-block", "data-first": size && position % size === 0 ? block : null });
          pieceBlock = block;
          this.remember(this.pieces, block, piece);
          target.append(piece);
        }
        piece.append(this.buildToken(token, position));
      }
    }

    remember(map, block, node) {
      if (!map.has(block)) map.set(block, []);
      map.get(block).push(node);
    }

    buildToken(token, position) {
      const index = position - this.numPrompt;
      const node = h("span", { class: "mi-token" }, token.text === "" && index >= 0 ? "·" : token.text);
      node.classList.toggle("is-control", token.kind === "control");
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
      const isPicture = item.kind === "image";
      const scale = Math.max(6, (isPicture ? 232 : 132) / Math.max(rows, columns));
      const picture = s("svg", {
        viewBox: `-0.03 -0.03 ${columns + 0.06} ${rows + 0.06}`, // room for half an outline
        role: "img",
        css: { "--size": `${Math.round(columns * scale)}px` },
      });
      const url = item.thumbnails[time];
      if (url) picture.append(s("image", { href: url, width: columns, height: rows, preserveAspectRatio: "none" }));
      const cells = [];
      for (let position = first; position < first + rows * columns; position += 1) {
        const { row, column } = this.data.tokens[position].place;
        const block = this.blockOf(position);
        const where = `row ${row}, column ${column}: token ${position}${this.data.block_size ? `, block ${block}` : ""}`;
        const cell = s("rect", { class: "mi-cell", x: column, y: row, width: 1, height: 1 }, s("title", null, where));
        this.remember(this.cells, block, cell);
        this.tokens[position] = cell;
        cells.push({ cell, row, column, block });
        picture.append(cell);
      }
      const outline = [s("path", { class: "mi-edge-back" }), s("path", { class: "mi-edge" })];
      picture.append(...outline);
      this.pictures.push({ picture, cells, outline, rows, columns });
      const caption = isPicture ? `Picture, ${columns} × ${rows} tokens` : `Clip, frame ${(this.numFrames += 1)}`;
      return h("figure", { class: isPicture ? "mi-media" : "mi-media is-frame" }, picture, h("figcaption", null, caption));
    }

    onToken(event, act) {
      const node = event.target.closest("[data-index]");
      if (node && this.answer.contains(node)) act(Number(node.dataset.index));
    }

    focus(index) {
      this.tokens[this.numPrompt + index].focus();
    }

    /*
     * shades: block -> how strongly it was selected, 0 to 1. selects: whether the layer selects at all. color: of the
     * marks. query: the position that was read. shown, chosen: answer tokens. routed(position): whether to mark it.
     */
    update({ shades, selects, color, query, shown, chosen, routed }) {
      for (const [block, pieces] of this.pieces) {
        for (const piece of pieces) {
          piece.style.setProperty("--shade", shades.get(block) ?? 0);
          piece.style.setProperty("--tint", color);
          piece.classList.toggle("is-selected", shades.has(block));
        }
      }
      for (const picture of this.pictures) this.updatePicture(picture, shades, color, selects);
      for (const [position, node] of this.tokens.entries()) {
        node.classList.toggle("is-query", position === query);
        node.classList.toggle("is-routed", routed(position));
        const index = position - this.numPrompt;
        if (index < 0) continue;
        node.classList.toggle("is-later", index > shown);
        node.setAttribute("aria-selected", index === shown);
        node.tabIndex = index === chosen ? 0 : -1;
      }
    }

    /* Veils the cells that were not selected, and draws a line around those that were. */
    updatePicture({ picture, cells, outline, rows, columns }, shades, color, selects) {
      const grid = Array.from({ length: rows }, () => new Array(columns).fill(false));
      let count = 0;
      for (const { cell, row, column, block } of cells) {
        const isIn = shades.has(block);
        grid[row][column] = isIn;
        count += isIn;
        cell.classList.toggle("is-out", selects && !isIn);
      }
      const at = (row, column) => grid[row]?.[column] ?? false;
      const lines = [];
      for (let row = 0; selects && row <= rows; row += 1) {
        for (let column = 0; column <= columns; column += 1) {
          if (at(row, column) !== at(row - 1, column)) lines.push(`M${column} ${row}h1`);
          if (at(row, column) !== at(row, column - 1)) lines.push(`M${column} ${row}v1`);
        }
      }
      for (const path of outline) {
        path.setAttribute("d", lines.join(""));
        path.style.setProperty("--tint", color);
      }
      const which = selects ? `${count} of ${cells.length} patches are in selected blocks` : `${cells.length} patches`;
      picture.setAttribute("aria-label", `Picture in the prompt: ${which}`);
    }

    /* Shows where a block stands. */
    find(block) {
      const pieces = this.pieces.get(block) ?? [];
      const node = pieces[0] ?? this.cells.get(block)?.[0];
      node?.scrollIntoView({ block: "center", behavior: "smooth" });
      for (const piece of pieces) {
        piece.classList.add("is-found");
        setTimeout(() => piece.classList.remove("is-found"), 1400);
      }
    }
  }

  return { TokenText, visible };
})();
