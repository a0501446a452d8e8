// Draws the figures in the colours of the reader's scheme, again when the scheme or the paper changes.
(() => {
  "use strict";
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)");
  const config = {
    responsive: true,
    displaylogo: false,
    showLink: false,
    plotlyServerURL: "",
    topojsonURL: "",
    doubleClick: touch.matches ? false : "reset+autosize", // one tap may count as two clicks
    modeBarButtons: [["toImage", "autoScale2d", "resetScale2d"]],
  };
  const plots = [...document.querySelectorAll(".plot")].map((box) => ({
    box,
    figure: JSON.parse(document.getElementById(box.dataset.figure).textContent),
  }));
  const hidden = new Set();
  let paper = null; // width in pixels while printing

  // A colour in a figure is the name of a CSS variable.
  function coloured(value, style, key = "") {
    if (Array.isArray(value)) return value.map((item) => coloured(item, style, key));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, coloured(item, style, name)]));
    }
    if (typeof value === "string" && key.includes("color") && value.startsWith("--")) {
      return style.getPropertyValue(value).trim();
    }
    return value;
  }

  function draw() {
    const style = getComputedStyle(root);
    for (const { box, figure } of plots) {
      const { data, layout } = coloured(figure, style);
      for (const trace of data) {
        if (trace.meta && hidden.has(trace.meta.method)) trace.visible = false;
      }
      layout.font.family = layout.hoverlabel.font.family = getComputedStyle(document.body).fontFamily;
      layout.dragmode = touch.matches ? false : "zoom"; // a finger scrolls the page
      layout.datarevision = `${dark.matches}${paper}${[...hidden]}`;
      if (paper) layout.width = paper;
      const name = box.dataset.figure.replace(/^figure-/, "");
      const options = { ...config, toImageButtonOptions: { format: "png", scale: 2, filename: name } };
      window.Plotly.react(box, data, layout, options);
    }
  }

  const buttons = [...document.querySelectorAll("button[data-method]")];
  function press() {
    for (const button of buttons) button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.method)));
    draw();
  }
  for (const button of buttons) {
    const { method } = button.dataset;
    button.addEventListener("click", () => {
      if (!hidden.delete(method)) hidden.add(method);
      press();
    });
    button.addEventListener("dblclick", () => {
      const alone = !hidden.has(method) && hidden.size === buttons.length - 1;
      hidden.clear();
      if (!alone) for (const other of buttons) if (other !== button) hidden.add(other.dataset.method);
      press();
    });
  }

  for (const snippet of document.querySelectorAll(".snippet")) {
    const code = snippet.querySelector("pre");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      let done = true;
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        const selection = getSelection();
        selection.selectAllChildren(code);
        done = document.execCommand("copy"); // where the clipboard is closed to files
      }
      button.textContent = done ? "Copied" : "Select and copy";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    snippet.querySelector(".head").append(button);
  }

  const closed = [];
  addEventListener("beforeprint", () => {
    root.classList.add("printing"); // light, whatever the screen is
    for (const details of document.querySelectorAll("details:not([open])")) {
      details.open = true;
      closed.push(details);
    }
    paper = 640; // A4 and Letter have a little more between the margins
    draw();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    for (const details of closed.splice(0)) details.open = false;
    paper = null;
    draw();
    for (const { box } of plots) window.Plotly.Plots.resize(box);
  });
  dark.addEventListener("change", draw);
  draw();
})();
