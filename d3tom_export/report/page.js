"use strict";
(() => {
  const answers = JSON.parse(document.getElementById("data").textContent);
  const namespace = "http://www.w3.org/2000/svg";

  /** The cells of a grid in the order of its tokens: [x, y, width] each, in columns and rows. */
  function cellsOf(grid) {
    const cells = [];
    const closed = new Set(grid.newlines);
    for (let row = 0; row < grid.rows; row += 1) {
      for (let column = 0; column < grid.columns; column += 1) cells.push([column, row, 1]);
      if (closed.has(row)) cells.push([grid.columns + grid.gap, row, grid.strip]);
    }
    return cells;
  }

  function outline(cells) {
    return cells.map(([x, y, width]) => `M${x} ${y}h${width}v1h-${width}z`).join("");
  }

  function player(article) {
    const answer = answers[Number(article.dataset.answer)];
    const slider = article.querySelector("input[type=range]");
    const status = article.querySelector(".status");
    const words = article.querySelector(".saying .hidden");
    const pieces = article.querySelector(".pieces");
    const buttons = { back: article.querySelector(".back"), on: article.querySelector(".on") };
    const views = [...article.querySelectorAll("svg.tokens")].map((svg) => {
      const grid = answer.grids[Number(svg.dataset.grid)];
      const heat = svg.querySelector(".heat");
      const levels = Array.from({ length: answer.levels }, (_, level) => {
        const path = document.createElementNS(namespace, "path");
        path.setAttribute("fill-opacity", String((0.9 * level) / (answer.levels - 1)));
        heat.append(path);
        return path;
      });
      return { svg, grid, cells: cellsOf(grid), levels, veil: svg.querySelector(".veil"), kept: svg.querySelector(".kept") };
    });

    function drawView(view, step, attention) {
      const kept = step.kept === null ? null : new Set(step.kept);
      const shown = [], veiled = [], byLevel = view.levels.map(() => []);
      view.cells.forEach((cell, place) => {
        const token = view.grid.first + place;
        if (kept !== null) (kept.has(token) ? shown : veiled).push(cell);
        if (attention) byLevel[step.levels.charCodeAt(token) - 48].push(cell);
      });
      view.veil.setAttribute("d", outline(attention ? view.cells : veiled));
      view.kept.setAttribute("d", outline(attention ? [] : shown));
      view.levels.forEach((path, level) => path.setAttribute("d", outline(byLevel[level])));
      const count = kept === null ? view.cells.length : shown.length;
      const what = attention ? "attention of the deciders" : `${count} of ${view.cells.length} tokens kept`;
      view.svg.setAttribute("aria-label", `${view.grid.name}, step ${slider.value}: ${what}`);
    }

    function show() {
      const number = Number(slider.value);
      const step = answer.steps[number - 1];
      const chosen = article.querySelector("input[type=radio]:checked");
      const attention = chosen !== null && chosen.value === "heat" && step.levels !== null;
      slider.setAttribute("aria-valuetext", step.value);
      status.textContent = step.status;
      words.textContent = `The answer so far: ${step.words}`;
      pieces.replaceChildren(...step.pieces.map(([text, style]) => {
        const span = document.createElement("span");
        span.className = style;
        span.textContent = text;
        return span;
      }));
      buttons.back.disabled = number <= 1;
      buttons.on.disabled = number >= answer.steps.length;
      views.forEach((view) => drawView(view, step, attention));
    }

    function move(by) {
      slider.value = String(Number(slider.value) + by);
      show();
    }

    slider.addEventListener("input", show);
    buttons.back.addEventListener("click", () => move(-1));
    buttons.on.addEventListener("click", () => move(1));
    article.querySelectorAll("input[type=radio]").forEach((radio) => radio.addEventListener("change", show));
    show();
  }

  document.querySelectorAll(".answer").forEach(player);

  // Paper has no summary to open.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((details) => { details.open = false; }));
})();
