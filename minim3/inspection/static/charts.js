"use strict";
/* The charts of the look-inside view, as SVG elements: index scores, expert load, distances, and the figures beside. */
const minim3Charts = (() => {
  const { h, s } = minim3Elements;

  const round = (value, digits = 2) => value.toFixed(digits);
  const percent = (share) => (share > 0 && share < 0.01 ? "<1%" : `${Math.round(100 * share)}%`);
  const tint = (head) => `var(--head-${head % 4})`;

  /* Which distance bin n of SelectionStatistics covers, in blocks back. */
  const binName = (bin) => {
    if (bin === 0) return "own";
    const last = 2 ** (bin - 1);
    const first = bin <= 2 ? last : last / 2 + 1;
    return first === last ? `${first}` : `${first}–${last}`;
  };

  const frame = (width, height, label, css) =>
    s("svg", { class: "mi-chart", viewBox: `0 0 ${width} ${height + 14}`, role: "img", "aria-label": label, css });
  const below = (x, height, text) => s("text", { x, y: height + 11, "text-anchor": "middle" }, text);
  const axis = (width, height) => s("line", { class: "axis", x1: 0, x2: width, y1: height + 0.5, y2: height + 0.5 });
  const everyNth = (step) => Math.max(1, Math.ceil(22 / step));

  /* A bar a block, as tall as its index score; `onPick(block)` when one is clicked. */
  const blockChart = ({ head, selected, scores, isForced, onPick }) => {
    const [width, height] = [400, 46];
    const low = Math.min(...scores);
    const high = Math.max(...scores);
    const step = width / Math.max(scores.length, 12);
    const gap = step > 6 ? 2 : step > 3 ? 1 : 0.25;
    const label = `Head ${head}: blocks ${selected.join(", ")} selected of ${scores.length}`;
    const chart = frame(width, height, label, { "--tint": tint(head) });
    for (const [block, score] of scores.entries()) {
      const tall = high > low ? 3 + (height - 3) * ((score - low) / (high - low)) : height / 2;
      const x = block * step;
      const isIn = selected.includes(block);
      const what = `block ${block}: score ${round(score)}${isIn ? ", selected" : ""}${isForced(block) ? " (always)" : ""}`;
      chart.append(
        s("rect", {
          class: `bar${isIn ? " is-in" : ""}`,
          x: x + gap / 2,
          y: height - tall,
          width: step - gap,
          height: tall,
          rx: Math.min(2, step / 5),
        }),
        s("rect", { class: "hit", x, y: 0, width: step, height, on: { click: () => onPick(block) } }, s("title", null, what)),
      );
      if (block % everyNth(step) === 0) chart.append(below(x + step / 2, height, `${block}`));
    }
    chart.append(axis(width, height));
    return chart;
  };

  /* A bar an expert: tokens of the prompt, and on them those of the answer; a dot over the experts in `ran`. */
  const loadFigure = (load, { width = 400, ran = [] } = {}) => {
    const height = 64;
    const totals = load.prompt.map((count, id) => count + load.answer[id]);
    const most = Math.max(...totals, 1);
    const step = width / totals.length;
    const gap = step > 8 ? 3 : step > 4 ? 1 : 0.25;
    const said = totals.map((count, id) => `expert ${id} ${count}`).join(", ");
    const chart = frame(width, height, `Tokens of each expert: ${said}`);
    for (const [id, total] of totals.entries()) {
      const x = id * step + gap / 2;
      const tall = (height * total) / most;
      const lower = (height * load.prompt[id]) / most;
      const bar = { x, width: step - gap };
      chart.append(
        s(
          "g",
          null,
          s("title", null, `expert ${id}: ${load.prompt[id]} tokens of the prompt, ${load.answer[id]} of the answer`),
          s("rect", { class: "bar", ...bar, y: height - lower, height: lower }),
          s("rect", { class: "bar is-answer", ...bar, y: height - tall, height: tall - lower }),
          ran.includes(id)
            ? s("circle", { cx: x + (step - gap) / 2, cy: Math.max(-1, height - tall - 6), r: 2.5, fill: "currentColor" })
            : null,
        ),
      );
      if (id % everyNth(step) === 0) chart.append(below(id * step + step / 2, height, `${id}`));
    }
    const mean = (height * totals.reduce((a, b) => a + b, 0)) / totals.length / most;
    chart.append(
      s("line", { class: "mean", x1: 0, x2: width, y1: height - mean, y2: height - mean }, s("title", null, "equal load")),
      axis(width, height),
    );
    const legend = h(
      "div",
      { class: "mi-caption mi-legend" },
      h("span", null, "Expert load:"),
      h("span", null, h("i", { class: "is-prompt" }), "prompt"),
      h("span", null, h("i", { class: "is-answer" }), "answer"),
      h("span", null, ran.length ? "• ran for this token" : "– – equal load"),
    );
    return h("div", null, legend, chart);
  };

  /* Which share of the blocks at each distance was selected. */
  const distanceFigure = (selection, width = 400) => {
    const { selected_at: selected, available_at: available, num_choosing: choosing } = selection;
    const height = 52;
    const step = width / Math.max(selected.length, 4);
    const shares = selected.map((count, bin) => (available[bin] ? count / available[bin] : 0));
    const said = shares.map((share, bin) => `${binName(bin)} ${percent(share)}`).join(", ");
    const chart = frame(width, height, `Share of blocks selected by distance: ${said}`);
    for (const [bin, share] of shares.entries()) {
      const bar = { x: bin * step + 2, width: step - 4 };
      chart.append(
        s(
          "g",
          null,
          s("title", null, `${binName(bin)}: ${selected[bin]} of ${available[bin]} blocks selected`),
          s("rect", { class: "ghost", ...bar, y: 0, height }),
          s("rect", { class: "bar is-answer", ...bar, y: height * (1 - share), height: height * share }),
        ),
        below(bin * step + step / 2, height, binName(bin)),
      );
    }
    const what = choosing ? "Share of blocks selected, by blocks back" : "All blocks were selected: no query had to choose";
    return h("div", null, h("div", { class: "mi-caption" }, what), chart);
  };

  /* The figures of a layer, each with its meaning as a hint. */
  const numbers = (layer, hasInitBlocks) => {
    const rows = [];
    const add = (name, value, title) => rows.push(h("dt", { title }, name), h("dd", null, value));
    if (layer.load) {
      add("Largest expert load / mean", round(layer.load.balance), "1 where all experts get equally many tokens");
      add("Entropy of the load", percent(layer.load.entropy), "of the entropy of an equal load");
    }
    if (layer.selection) {
      const one = layer.selection;
      const local = "the query's own block and those right before it are always selected";
      add("Queries that had to choose", percent(one.num_choosing / Math.max(1, one.num_queries)), "saw more blocks than they may select");
      add("Selected because local", percent(one.share_local), local);
      if (hasInitBlocks) add("Selected because first", percent(one.share_init), "the first blocks are always selected");
      add("New blocks from token to token", round(one.new_blocks), "blocks that the position before did not select, a head");
      if (one.distinct_of_8 !== null) add("Blocks of 8 adjacent tokens", round(one.distinct_of_8, 1), "distinct ones, a head");
      if (one.head_overlap !== null) add("Overlap of two heads", percent(one.head_overlap), "intersection over union");
    }
    return h("dl", { class: "mi-numbers" }, rows);
  };

  return { round, percent, tint, blockChart, loadFigure, distanceFigure, numbers };
})();
