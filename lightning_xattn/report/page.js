"use strict";
// Filters and sorts the samples. Without it the page shows all of them, in the order of the data.
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
          const wanted = form.elements[name].value;
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
