"use strict";
/*
 * The look-inside view. minim3Inspect.mount(root, inspection) fills an element from the JSON of an Inspection
 * (minim3/inspection/data.py says what each field means). The chat page and the report both use this file.
 *
 * Everything of the model enters the document as text nodes, and every picture as a data: URL that minim3 made.
 */
const minim3Inspect = (() => {
  const { h, s } = minim3Elements;
  const { round, percent, tint } = minim3Charts;
  const { visible } = minim3Tokens;
  const MAX_SEGMENTS = 13; // more layers than this are a drop-down list
  let mounts = 0;

  const quoted = (token) => h("code", null, visible(token));

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
      this.text = new minim3Tokens.TokenText(data, {
        choose: (index) => this.choose(index),
        hover: (index) => this.hover(index),
        key: (event) => this.onKey(event),
      });
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
        h("div", { class: "mi-main" }, h("div", null, this.text.root), h("div", { class: "mi-side" }, this.says, this.side)),
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

    onKey(event) {
      const last = this.numAnswer - 1;
      const moves = { ArrowRight: this.token + 1, ArrowLeft: this.token - 1, Home: 0, End: last };
      const layers = this.detailed.map((layer) => layer.layer);
      if (event.key in moves) {
        this.choose(moves[event.key]);
        this.text.focus(this.token);
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
      const layer = this.current;
      const query = this.numPrompt - 1 + this.shownToken;
      this.text.update({
        shades: this.shades(),
        selects: Boolean(layer.selected),
        color: this.head === "all" ? "var(--accent-rgb)" : tint(this.head),
        query,
        shown: this.shownToken,
        chosen: this.token,
        routed: (position) => this.expert !== null && Boolean(layer.expert_ids?.[position]?.includes(this.expert)),
      });
      const token = this.data.tokens[this.numPrompt + this.shownToken];
      this.which.replaceChildren(h("b", null, visible(token)), ` ${this.shownToken + 1} of ${this.numAnswer}`);
      this.back.disabled = this.token === 0;
      this.forth.disabled = this.token === this.numAnswer - 1;
      this.updateSide(token, query);
      this.updateLayers();
    }

    updateSide(token, query) {
      const layer = this.current;
      const reads = this.data.tokens[query];
      this.says.replaceChildren(
        "To write ",
        quoted(token),
        ", the model read ",
        quoted(reads),
        ` at position ${query}${query === this.numPrompt - 1 ? ", the end of the prompt" : ""}.`,
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
        this.head === "all" || this.head === head ? this.headChart(head, blocks, scores[head], rows.length) : null,
      );
      const heads = this.data.num_query_heads / Math.max(1, rows.length);
      const caption = `Bars: index score of each block; coloured: selected. A head selects for ${heads} query head${heads === 1 ? "" : "s"}.`;
      return h("section", { class: "mi-card" }, h("header", null, title), h("p", { class: "mi-note" }, note), charts, h("p", { class: "mi-caption" }, caption));
    }

    headChart(head, selected, scores, numHeads) {
      const { init_blocks: init, local_blocks: local } = this.data;
      const isForced = (block) => block < init || block >= scores.length - local;
      const chart = minim3Charts.blockChart({ head, selected, scores, isForced, onPick: (block) => this.text.find(block) });
      return h("div", null, numHeads > 1 ? h("div", { class: "mi-caption" }, `Index head ${head}`) : null, chart);
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
      const ran = layer.expert_ids?.[this.numPrompt - 1 + this.shownToken] ?? [];
      const parts = this.figures(layer, { ran });
      return parts.length ? h("section", { class: "mi-card" }, h("h3", null, `Layer ${layer.layer}, all tokens`), parts) : null;
    }

    figures(layer, { width, ran }) {
      const parts = [];
      if (layer.load) parts.push(minim3Charts.loadFigure(layer.load, { width, ran }));
      if (layer.selection) parts.push(minim3Charts.distanceFigure(layer.selection, width));
      if (parts.length) parts.push(minim3Charts.numbers(layer, this.data.init_blocks > 0));
      return parts;
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
              this.figures(layer, { width: 300 }),
            );
          }),
        );
      }
      for (const card of this.layersGrid.children) card.classList.toggle("is-current", Number(card.dataset.layer) === this.layer);
    }
  }

  return {
    /* Fills `root` with the view; options.open: show all layers at once. */
    mount(root, data, options = {}) {
      const view = new View(root, data);
      view.text.root.scrollTop = view.text.root.scrollHeight; // the answer stands at the end
      if (options.open) view.all.open = true;
      return view;
    },
  };
})();
