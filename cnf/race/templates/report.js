"use strict";
(() => {
  const heads = [...document.querySelectorAll("#table thead th")];
  const body = document.querySelector("#table tbody");

  // Numbers by size, names by letter; what is no finite number goes last in either direction.
  const compare = (a, b, numeric, sign) => {
    if (!numeric) return sign * a.localeCompare(b);
    const [x, y] = [parseFloat(a), parseFloat(b)];
    if (Number.isFinite(x) && Number.isFinite(y)) return sign * (x - y);
    return Number.isFinite(y) - Number.isFinite(x);
  };

  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value;
      body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b), column > 0, sign)));
    });
  });

  const zoom = document.querySelector("#zoom");
  document.querySelectorAll("[data-zoom]").forEach((button) => {
    button.addEventListener("click", () => {
      const [from, to] = [button.querySelector("img"), zoom.querySelector("img")];
      to.src = from.src;
      to.alt = from.alt;
      zoom.showModal();
    });
  });
  zoom.querySelector("div").addEventListener("click", () => zoom.close());
})();
