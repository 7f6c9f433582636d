// Plots `fastbertCurves` (fastbert/report/interactive.py): one figure, a panel for each quantity, a color for each run.
// A run is one legend group: a click in the legend hides its lines in all panels.
"use strict";
(() => {
  const data = fastbertCurves;
  const graph = document.getElementById("curves");
  const control = (id) => document.getElementById(id);
  const colors = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
    "#17becf"];
  const dashes = ["solid", "dash", "dot", "dashdot", "longdash"]; // runs with the same color have different dashes
  const symbols = ["circle", "square", "diamond", "cross", "x", "triangle-up", "star"];
  const widest = Math.min(data.runs.length, 6) - 1; // of equal curves the first is wider and seen below the others
  const style = (run) => ({ color: colors[run % colors.length], width: 1.6 + 0.7 * Math.max(0, widest - run),
    dash: dashes[Math.floor(run / colors.length) % dashes.length] });
  const hidden = new Set(); // numbers of runs
  const characters = (name) => name.match(/&[a-z#0-9]+;|./gu) ?? []; // an entity is one
  const letter = 7; // pixels

  // The lines of a name in the legend, none wider than the plot.
  function broken(name) {
    const all = characters(name), most = Math.max(20, Math.floor((graph.clientWidth - 120) / letter)), lines = [];
    for (let start = 0; start < all.length; start += most) lines.push(all.slice(start, start + most).join(""));
    return lines;
  }

  // Centered moving mean of finite values over a window that is a fraction of the points.
  function smooth(values, fraction) {
    const half = Math.round(values.length * fraction / 2);
    const sums = [0], counts = [0];
    for (const value of values) {
      sums.push(sums[sums.length - 1] + (value ?? 0));
      counts.push(counts[counts.length - 1] + (value === null ? 0 : 1));
    }
    return values.map((value, index) => {
      const reach = Math.min(half, index, values.length - 1 - index);
      const count = counts[index + reach + 1] - counts[index - reach];
      return value === null || count === 0 ? null : (sums[index + reach + 1] - sums[index - reach]) / count;
    });
  }

  function traces() {
    const axis = control("axis").value, fraction = (control("smoothing").value / 100) ** 2 / 3;
    const found = [], named = new Set();
    data.panels.forEach((panel, row) => panel.curves.forEach((curve) => {
      const common = { x: curve.x[axis], xaxis: `x${row + 1}`, yaxis: `y${row + 1}`, type: "scatter",
        name: broken(data.runs[curve.run]).join("<br>"), legendgroup: `${curve.run}`, meta: { run: curve.run, panel: row },
        visible: hidden.has(curve.run) ? "legendonly" : true, showlegend: !named.has(curve.run) };
      const look = style(curve.run), smoothing = panel.split === "train" && fraction > 0;
      const format = panel.percent ? "%{y:.2%}" : "%{y:.4f}";
      named.add(curve.run);
      if (smoothing) {
        found.push({ ...common, y: curve.y, mode: "lines", line: { ...look, width: 1 }, opacity: 0.25, hoverinfo: "skip",
          showlegend: false });
      }
      const y = smoothing ? smooth(curve.mean ?? curve.y, fraction) : curve.y;
      const markers = panel.split !== "train" && curve.y.length <= 60;
      found.push({ ...common, y, mode: markers || y.length === 1 ? "lines+markers" : "lines",
        line: look, marker: { size: 6, symbol: symbols[curve.run % symbols.length] }, hovertemplate: format });
    }));
    return found;
  }

  function layout() {
    const page = getComputedStyle(document.documentElement);
    const text = page.getPropertyValue("--text").trim(), line = page.getPropertyValue("--line").trim();
    const background = page.getPropertyValue("--page").trim(), axis = control("axis").value;
    const heights = data.panels.map((panel) => (panel.loss ? 300 : 210)), gap = 58;
    const total = heights.reduce((sum, height) => sum + height + gap, -gap);
    const many = data.runs.length > 8;
    const names = data.runs.map(broken), longest = Math.max(...names.flat().map((line) => characters(line).length));
    const columns = Math.max(1, Math.floor((graph.clientWidth - 80) / (letter * longest + 60)));
    const rows = columns > 1 ? Math.ceil(names.length / columns) : names.flat().length;
    const legend = Math.min(300, 14 + 20 * rows); // a longer one scrolls
    const buttons = 34, above = buttons + legend + 30, height = above + total + 48;
    const wanted = { font: { color: text, family: "system-ui, sans-serif", size: 12 }, paper_bgcolor: background,
      plot_bgcolor: background, height, margin: { l: 58, r: 14, t: above, b: 48, autoexpand: false },
      hovermode: many ? "closest" : "x unified", hoverlabel: { bgcolor: background, bordercolor: line, namelength: -1 },
      showlegend: true, legend: { orientation: "h", x: 0, xanchor: "left", yref: "container", y: 1 - buttons / height,
        yanchor: "top",
        maxheight: legend, groupclick: "togglegroup", bgcolor: background },
      annotations: [], shapes: [] };
    let top = 1;
    data.panels.forEach((panel, row) => {
      const suffix = row === 0 ? "" : `${row + 1}`, bottom = top - heights[row] / total;
      wanted[`xaxis${suffix}`] = { anchor: `y${suffix}`, matches: row === 0 ? undefined : "x", gridcolor: line,
        zeroline: false, type: control("logx").checked ? "log" : "linear", exponentformat: "SI",
        uirevision: `${axis} ${control("logx").checked}`, // the zoom stays until this changes
        title: row === data.panels.length - 1 ? { text: data.axes[axis] } : undefined };
      wanted[`yaxis${suffix}`] = { anchor: `x${suffix}`, domain: [Math.max(0, bottom), top], gridcolor: line,
        zeroline: false, type: panel.loss && control("logy").checked ? "log" : "linear",
        uirevision: `${control("logy").checked}`,
        tickformat: panel.percent ? ".2~%" : undefined };
      wanted.annotations.push({ text: `<b>${panel.title}</b>`, showarrow: false, xref: "paper", yref: "paper", x: 0,
        xanchor: "left", y: top, yanchor: "bottom" });
      if (panel.loss && data.baseline !== null) {
        wanted.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, yref: `y${suffix}`, y0: data.baseline,
          y1: data.baseline, line: { color: text, width: 1, dash: "dot" },
          label: { text: `unigram entropy ${data.baseline.toFixed(2)}`, textposition: "end", font: { size: 10 } } });
      }
      top = bottom - gap / total;
    });
    return wanted;
  }

  function plot() {
    control("smoothed").textContent = control("smoothing").value === "0" ? "off" : "";
    const settings = { responsive: true, displaylogo: false, toImageButtonOptions: { format: "svg" },
      showSendToCloud: false, plotlyServerURL: "", modeBarButtonsToRemove: ["select2d", "lasso2d"] };
    return Plotly.react(graph, traces(), layout(), settings);
  }

  function remember() { // runs that were hidden in the legend stay hidden
    for (const trace of graph.data) {
      if (trace.visible === "legendonly") hidden.add(trace.meta.run);
      else hidden.delete(trace.meta.run);
    }
  }

  if (data.panels.length === 0) {
    control("controls").hidden = true;
    graph.textContent = "No run has recorded a loss.";
    return;
  }
  plot();
  graph.on("plotly_restyle", remember);
  for (const id of ["axis", "logx", "logy", "smoothing"]) control(id).addEventListener("input", plot);
  control("all").addEventListener("click", () => { hidden.clear(); plot(); });
  control("none").addEventListener("click", () => { data.runs.forEach((_, run) => hidden.add(run)); plot(); });
  window.addEventListener("resize", plot); // names in the legend are broken by the width
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", plot);
})();
