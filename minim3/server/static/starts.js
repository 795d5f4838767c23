"use strict";
/* What an empty conversation offers to begin with. */
const minim3Starts = (() => {
  const { h } = minim3Elements;
  const { $, hasMouse } = minim3Page;
  const TABLE = "apple moon, boat lamp, chair river, door salt, egg stone, fish tree, goat king, hat snow, ink road, jar wolf";

  /* A picture as pocket's world has them: a few shapes, 112 pixels wide. */
  const drawPicture = () => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 112;
    const pen = canvas.getContext("2d");
    const shape = (color, corners) => {
      pen.fillStyle = color;
      pen.beginPath();
      for (const [x, y] of corners) pen.lineTo(x, y);
      pen.fill();
    };
    const round = (x, y, count, radius) =>
      Array.from({ length: count }, (_, i) => {
        const angle = Math.PI * ((2 * i) / count - 0.5);
        return [x + radius(i) * Math.cos(angle), y + radius(i) * Math.sin(angle)];
      });
    pen.fillStyle = "rgb(226 229 233)";
    pen.fillRect(0, 0, 112, 112);
    shape("rgb(35 155 55)", [[13, 55], [47, 55], [47, 89], [13, 89]]);
    shape("rgb(125 45 180)", [[84, 15], [97, 38], [71, 38]]);
    shape("rgb(250 135 20)", round(77, 85, 10, (i) => (i % 2 ? 5.3 : 12.6)));
    shape("rgb(216 28 34)", round(35, 21, 60, () => 7.5));
    return canvas.toDataURL("image/png");
  };

  return {
    /* Shows the beginnings; `begin(text, picture)` when one is chosen. */
    show(name, vision, begin) {
      const starts = [
        ...(vision ? [{ title: "Look at a picture", text: "What colour is the large object?", picture: drawPicture() }] : []),
        { title: "Look something up", text: "What goes with fish?", sent: `Here is a list: ${TABLE}\nWhat goes with fish?` },
        { title: "Just say hello", text: "What can you do?" },
      ];
      const media = vision ? `, ${hasMouse.matches ? "drop" : "add"} a picture or a clip` : "";
      $("empty-text").textContent = `Write to ${name}${media}, and look inside the answer.`;
      const item = ({ title, text, sent = text, picture = null }) =>
        h(
          "li",
          null,
          h(
            "button",
            { type: "button", on: { click: () => begin(sent, picture) } },
            h("div", null, h("b", null, title), h("span", null, text)),
            picture ? h("img", { src: picture, alt: "" }) : null,
          ),
        );
      $("starts").replaceChildren(...starts.map(item));
    },
  };
})();
