// The chart of a forecast. It is drawn against the bar's number, 0 the last one seen: nights and weekends take no room.
import {find} from "./dom.js";
import {text} from "./strings.js";
import {average, bollinger, rsi} from "./indicators.js";

let loading = null;
export function loadPlotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "/page/plotly.min.js";
    // The map library within plotly would add a style of its own, which the page's policy refuses and nothing here needs.
    const head = document.head, append = head.appendChild;
    head.appendChild = node => node.tagName === "STYLE" && node.textContent ? node : append.call(head, node);
    script.onload = () => { delete head.appendChild; resolve(window.Plotly); };
    script.onerror = () => { delete head.appendChild; loading = null; reject(new Error(text("noAnswer"))); };
    head.append(script);
  });
  return loading;
}

export function colours() {
  const style = getComputedStyle(document.documentElement), named = name => style.getPropertyValue(`--${name}`).trim();
  const dark = style.colorScheme.includes("dark");
  return {ground: named("ground"), ink: named("ink"), quiet: named("quiet"), line: named("line"), accent: named("accent"), dark,
    green: dark ? "#2BC79B" : "#009E73", red: dark ? "#F0685C" : "#C8322B", orange: dark ? "#F2BC4B" : "#B8860B", pink: dark ? "#E39CC5" : "#A64D87"};
}

const line = (x, y, color, name, more = {}) => ({type: "scatter", mode: "lines", x, y, name, line: {width: 1.3, color, ...more.line}, hoverinfo: "skip", ...Object.fromEntries(Object.entries(more).filter(([key]) => key !== "line"))});

function candles(bars, places, labels, name, options, opacity) {
  const [rise, fall] = options.redUp ? [options.colours.red, options.colours.green] : [options.colours.green, options.colours.red];
  return {type: "candlestick", x: places, open: bars.open, high: bars.high, low: bars.low, close: bars.close, text: labels, name, opacity, showlegend: true,
    increasing: {line: {color: rise, width: 1}, fillcolor: rise}, decreasing: {line: {color: fall, width: 1}, fillcolor: fall}};
}

export async function drawForecast(answer, options) {
  const Plotly = await loadPlotly(), hues = colours(), place = find("chart");
  options = {...options, colours: hues};
  const narrow = place.clientWidth < 600, height = narrow ? 480 : 600;
  place.style.height = `${height}px`;
  const {bars, times} = answer, length = bars.time.length, ahead = times.map((_, step) => step + 1), future = [0, ...ahead];
  const past = bars.time.map((_, row) => row + 1 - length), last = answer.last_close;
  const labels = new Map([...past.map((where, row) => [where, bars.time[row]]), ...times.map((time, step) => [step + 1, time])]);
  const from = values => [last, ...values];
  const data = [candles(bars, past, bars.time, text("bars"), options, 1)];
  const accent = hues.dark ? "79, 168, 224" : "0, 114, 178";
  for (const [low, high, alpha, name] of [["q05", "q95", 0.16, "band90"], ["q25", "q75", 0.3, "band50"]]) {
    data.push(line(future, from(answer.quantiles[low]), "transparent", "", {line: {width: 0}, showlegend: false}));
    data.push(line(future, from(answer.quantiles[high]), "transparent", text(name), {line: {width: 0}, fill: "tonexty", fillcolor: `rgba(${accent}, ${alpha})`}));
  }
  if (options.paths) answer.paths.forEach((path, number) => data.push(line(future, from(path), hues.accent, text("paths"), {line: {width: 0.7}, opacity: 0.4, legendgroup: "paths", showlegend: number === 0})));
  data.push(line(future, from(answer.quantiles.q50), hues.accent, text("median"), {line: {width: 2.5}, hoverinfo: "text", text: future.map(step => `${labels.get(step)}<br>${text("median")} ${Number(from(answer.quantiles.q50)[step].toPrecision(6))}`)}));
  if (answer.came) {
    const known = answer.came.time.map(time => times.indexOf(time) + 1), placed = values => values.filter((_, row) => known[row] > 0);
    const came = Object.fromEntries(["time", "open", "high", "low", "close"].map(name => [name, placed(answer.came[name])]));
    data.push(candles(came, placed(known), came.time, text("whatCame"), options, 0.65));
  }
  if (options.sma) data.push(line(past, average(bars.close, 20), hues.orange, "SMA 20"));
  if (options.bollinger) for (const [number, band] of bollinger(bars.close).entries()) data.push(line(past, band, hues.pink, text("bollinger"), {line: {dash: "dot"}, legendgroup: "bollinger", showlegend: number === 0}));
  const volume = bars.volume || bars.time.map(() => 0);
  data.push({type: "bar", x: [...past, ...ahead], y: [...volume, ...answer.volume], yaxis: "y2", showlegend: false, hoverinfo: "y", marker: {color: [...volume.map(() => hues.quiet), ...answer.volume.map(() => hues.accent)]}});
  if (options.rsi) data.push(line(past, rsi(bars.close), hues.orange, "RSI 14", {yaxis: "y3", hoverinfo: "y", showlegend: false}));
  const first = Math.max(past[0], -Math.max(60, 3 * times.length)), shown = [...labels.keys()].filter(where => where >= first);
  const ticks = shown.filter((_, row) => row % Math.ceil(shown.length / (narrow ? 3 : 8)) === 0);
  const low = options.rsi ? 0.36 : 0.24, axis = {gridcolor: hues.line, linecolor: hues.line, zeroline: false, automargin: true, tickfont: {color: hues.quiet, size: 11}, title: {font: {color: hues.quiet, size: 11}}};
  const inView = bars.high.map((high, row) => [past[row], high, bars.low[row]]).filter(([where]) => where >= first);
  const tops = [...inView.map(([, high]) => high), ...answer.quantiles.q95, ...(answer.came?.high || [])], bottoms = [...inView.map(([,, low]) => low), ...answer.quantiles.q05, ...(answer.came?.low || [])];
  const top = Math.max(...tops), bottom = Math.min(...bottoms), room = 0.06 * (top - bottom || 1);
  const layout = {
    height, margin: {l: narrow ? 44 : 60, r: 10, t: 10, b: 30}, hovermode: "closest", dragmode: narrow ? false : "pan",
    paper_bgcolor: hues.ground, plot_bgcolor: hues.ground, font: {color: hues.ink, size: 12, family: "system-ui, sans-serif"}, separators: ".,",
    legend: {orientation: "h", y: -0.07, yanchor: "top", x: 0, font: {size: 11}},
    xaxis: {...axis, range: [first - 1, times.length + 1], tickangle: 0, tickvals: ticks, ticktext: ticks.map(where => labels.get(where)), rangeslider: {visible: false}, showgrid: false, anchor: options.rsi ? "y3" : "y2"},
    yaxis: {...axis, domain: [low + 0.02, 1], range: [bottom - room, top + room], title: {...axis.title, text: text("price")}},
    yaxis2: {...axis, domain: options.rsi ? [0.18, low - 0.02] : [0, low - 0.02], title: {...axis.title, text: narrow ? "" : text("volume")}, nticks: 4},
    shapes: [{type: "line", x0: 0.5, x1: 0.5, y0: 0, y1: 1, yref: "paper", line: {dash: "dot", width: 1, color: hues.quiet}}],
  };
  if (options.rsi) layout.yaxis3 = {...axis, domain: [0, 0.14], range: [0, 100], tickvals: [30, 70], title: {...axis.title, text: narrow ? "" : "RSI"}};
  await Plotly.react(place, data, layout, {responsive: true, displaylogo: false, scrollZoom: false, displayModeBar: !narrow, modeBarButtonsToRemove: ["select2d", "lasso2d", "toImage"]});
}

export async function drawCoverage(place, coverage) {
  const Plotly = await loadPlotly(), hues = colours();
  const axis = {gridcolor: hues.line, linecolor: hues.line, tickfont: {color: hues.quiet, size: 11}, automargin: true};
  await Plotly.react(place, [{type: "scatter", mode: "lines", x: coverage.time, y: coverage.instruments, line: {color: hues.accent, width: 1.5, shape: "hv"}}], {
    height: 240, margin: {l: 50, r: 10, t: 10, b: 30}, paper_bgcolor: hues.ground, plot_bgcolor: hues.ground, font: {color: hues.ink}, xaxis: {...axis, showgrid: false}, yaxis: {...axis, rangemode: "tozero", title: {text: text("instruments")}},
  }, {responsive: true, displayModeBar: false});
}

export async function savePng(name) {
  const Plotly = await loadPlotly();
  await Plotly.downloadImage(find("chart"), {format: "png", width: 1200, height: 700, filename: name});
}
