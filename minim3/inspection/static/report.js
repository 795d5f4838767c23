"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const show = (isDark) => {
    root.dataset.theme = isDark ? "dark" : "light";
  };
  show(dark.matches);
  dark.addEventListener("change", (event) => show(event.matches));
  document.getElementById("theme").addEventListener("click", () => show(root.dataset.theme !== "dark"));
  const data = JSON.parse(document.getElementById("inspection").textContent);
  minim3Inspect.mount(document.getElementById("view"), data, { open: true });
})();
