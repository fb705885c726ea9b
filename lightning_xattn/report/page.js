"use strict";
// Filters and sorts the samples. Without it the page shows all of them, the lowest support first.
(() => {
  const form = document.querySelector("#choose");
  if (!form) return;
  const list = document.querySelector("#list");
  const samples = [...list.children];
  const shown = document.querySelector("#shown");
  const number = (sample, name) => (sample.dataset[name] === "" ? NaN : Number(sample.dataset[name]));
  const update = () => {
    const words = form.elements.words.value.trim().toLowerCase();
    let count = 0;
    for (const sample of samples) {
      const fits =
        ["true", "outcome"].every((name) => {
          const wanted = form.elements[name]?.value;
          return !wanted || sample.dataset[name] === wanted;
        }) &&
        (!words || sample.dataset.name.toLowerCase().includes(words));
      sample.hidden = !fits;
      count += fits;
    }
    shown.textContent = `${count} of ${samples.length} samples`;
    const [name, way] = form.elements.order.value.split(" ");
    const sign = way === "down" ? -1 : 1;
    const sorted = [...samples].sort((one, other) => {
      const [x, y] = [number(one, name), number(other, name)];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y);
    });
    list.append(...sorted);
  };
  form.addEventListener("input", update);
  form.addEventListener("reset", () => setTimeout(update));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update();
})();
// A link leads into a folded part, paper has no folds, and what is cut off says that it scrolls.
(() => {
  const parts = [...document.querySelectorAll(".part")];
  const open = () => {
    const part = parts.find((one) => `#${one.id}` === location.hash);
    if (part) part.open = true;
  };
  window.addEventListener("hashchange", open);
  document.querySelector("nav").addEventListener("click", (event) => {
    const part = parts.find((one) => `#${one.id}` === event.target.getAttribute("href"));
    if (part) part.open = true;
  });
  open();
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = parts.filter((one) => !one.open);
    for (const one of closed) one.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const one of closed) one.open = false;
  });
  const watch = new ResizeObserver((all) => {
    for (const { target } of all) target.classList.toggle("cut", target.scrollWidth > target.clientWidth + 1);
  });
  for (const one of document.querySelectorAll(".wide")) watch.observe(one);
})();
