"use strict";
// Facts come from /status.json every two seconds, the rest when the journal has grown. Text enters the page as text only, never as markup.

const REGIMES = {bull: "bull", bear: "bear", ranging: "ranging", high_volatility: "high volatility", low_volatility: "low volatility"};
const POLL = 2000, SLOWEST = 10000, PATIENCE = 8000; // milliseconds
const $ = id => document.getElementById(id);

function h(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false && child !== "").map(child => child instanceof Node ? child : String(child)));
  return node;
}

// ---- numbers and times in words

const number = (value, digits) => value.toLocaleString("en-US", {minimumFractionDigits: digits, maximumFractionDigits: digits});
const digitsOf = value => Math.abs(value) >= 1000 ? 1 : Math.abs(value) >= 100 ? 2 : Math.abs(value) >= 10 ? 3 : Math.abs(value) >= 1 ? 4 : 5;
const price = value => value === null || value === undefined ? "–" : number(value, digitsOf(value));
const usd = value => number(value, 2);
const signed = value => value === null || value === undefined ? "–" : `${value < 0 ? "−" : "+"}${number(Math.abs(value), 2)}`;
const percent = (share, digits = 1) => `${number(100 * share, digits)} %`;
const toneOf = value => value > 0 ? "good" : value < 0 ? "bad" : "soft";
const two = value => String(value).padStart(2, "0");
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const clock = seconds => { const d = new Date(1000 * seconds); return `${two(d.getUTCHours())}:${two(d.getUTCMinutes())}`; };
const dated = seconds => { const d = new Date(1000 * seconds); return `${d.getUTCDate()} ${MONTHS[d.getUTCMonth()]} ${clock(seconds)}`; };
const when = seconds => Math.abs(now() - seconds) < 64800 ? clock(seconds) : dated(seconds);

function span(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 100) return `${s} s`;
  if (s < 6000) return `${Math.floor(s / 60)} min${s < 600 ? ` ${s % 60} s` : ""}`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} min`;
  return `${Math.floor(s / 86400)} days`;
}

// ---- what is known now

const known = {facts: null, at: 0, rows: null, decisions: [], trades: {trades: [], equity: [], summary: null}, charts: {}, lost: 0};
const now = () => known.facts ? known.facts.now + (performance.now() - known.at) / 1000 : Date.now() / 1000;
const painted = {};

function paint(id, data, build) { // draws a part again only when what it shows has changed
  const text = JSON.stringify(data);
  if (painted[id] === text) return;
  painted[id] = text;
  $(id).replaceChildren(...[build(data)].flat().filter(Boolean));
}

// ---- the head of the page

function showHead(facts) {
  const {headline, status} = facts;
  $("top").dataset.level = headline.level === "good" && facts.notes.some(note => note.level === "bad") ? "warn" : headline.level;
  $("mode").textContent = status ? status.mode : "no bot";
  $("mode").dataset.mode = status ? status.mode : "";
  $("state").textContent = headline.title;
  $("words").textContent = headline.words;
  document.title = `${headline.title} · delta_go`;
  $("notes").hidden = !facts.notes.length;
  paint("notes", facts.notes, notes => notes.map(note => h("li", {"data-level": note.level}, h("b", {}, note.name), note.words, note.since ? h("span", {class: "soft"}, ` since ${when(note.since)}`) : "")));
  $("halt").textContent = facts.kill === null ? "Halt…" : "Halt asked";
}

function showClock() {
  const facts = known.facts;
  if (!facts) return;
  const age = facts.age === null ? null : facts.age + (performance.now() - known.at) / 1000;
  $("beat").textContent = age === null ? "" : `last word ${span(age)} ago`;
  const due = document.getElementById("due");
  if (due && facts.status) due.textContent = facts.quiet || ["HALTED", "STOPPED"].includes(facts.status.state) ? "–" : span(facts.status.next_close - now());
  if (known.lost) $("lost").textContent = `No connection to the dashboard since ${clock(known.lost)} UTC (${span(Date.now() / 1000 - known.lost)}). What you see is old; trying again.`;
}

// ---- figures

function figure(title, value, words, more, tone) {
  return h("div", {class: "figure"}, h("h2", {}, title), h("b", {class: tone || ""}, value), more, h("p", {}, words));
}

function meter(used) {
  const bar = h("i"), level = used >= 0.8 ? "bad" : used >= 0.5 ? "warn" : "good";
  bar.style.width = `${Math.min(100, 100 * used)}%`;
  return h("div", {class: "meter", "data-level": level, role: "meter", "aria-valuemin": 0, "aria-valuemax": 1, "aria-valuenow": used.toFixed(3), "aria-label": "share of the limit"}, bar);
}

function sparkline(points) {
  if (points.length < 2) return null;
  const values = points.map(point => point[1]), low = Math.min(...values), high = Math.max(...values), reach = high - low || 1;
  const line = values.map((value, at) => `${(200 * at / (values.length - 1)).toFixed(1)},${(56 - 52 * (value - low) / reach).toFixed(1)}`).join(" ");
  const svg = (tag, attributes) => { const node = document.createElementNS("http://www.w3.org/2000/svg", tag); for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value); return node; };
  const box = svg("svg", {viewBox: "0 0 200 60", preserveAspectRatio: "none", role: "img", "aria-label": `equity from ${usd(values[0])} to ${usd(values[values.length - 1])}`});
  box.append(svg("polyline", {points: line, fill: "none", stroke: "var(--accent)", "stroke-width": 2, "vector-effect": "non-scaling-stroke", "stroke-linejoin": "round"}));
  return box;
}

function showFigures(facts) {
  const {account, state, last_close} = facts.status;
  paint("figures", [account, facts.figures, known.trades.equity, state, last_close], () => {
    const due = h("b", {id: "due"}, "–");
    const next = h("div", {class: "figure"}, h("h2", {}, "Next decision in"), due, h("p", {}, last_close ? `last bar decided ${when(last_close)} UTC` : "no bar decided yet"));
    if (!account) return [figure("Equity", "–", "known after the first close"), next];
    const {drawdown, drawdown_used, today, daily_used} = facts.figures;
    const equity = h("div", {class: "figure wide"}, h("div", {}, h("h2", {}, "Equity, USD"), h("b", {}, usd(account.equity)), h("p", {}, h("span", {class: toneOf(today)}, `${signed(account.equity - account.day_start)} today`))), sparkline(known.trades.equity));
    return [equity,
      figure("Drawdown", percent(drawdown), account.blocked === "drawdown" ? "limit reached; latched" : `of ${percent(account.max_drawdown, 0)} allowed`, meter(drawdown_used), drawdown_used >= 0.8 ? "bad" : ""),
      figure("Loss today", percent(Math.max(0, -today)), account.blocked === "daily loss" ? "limit reached until midnight UTC" : `of ${percent(account.daily_loss, 0)} allowed`, meter(daily_used), daily_used >= 0.8 ? "bad" : ""),
      next];
  });
}

// ---- positions

function ladder(held) {
  const from = held.stop ?? held.decided_stop, to = held.target ?? held.decided_target;
  if (held.mark === null || !(Math.abs(to - from) > 0)) return null;
  const place = value => Math.max(0, Math.min(100, 100 * (value - from) / (to - from)));
  const [entry, mark] = [place(held.entry_price), place(held.mark)];
  const fill = h("i", {class: mark >= entry ? "good" : "bad"}), start = h("u"), dot = h("s");
  fill.style.left = `${Math.min(entry, mark)}%`; fill.style.width = `${Math.abs(entry - mark)}%`; start.style.left = `${entry}%`; dot.style.left = `${mark}%`;
  return [h("div", {class: "ladder", "aria-hidden": "true"}, fill, start, dot), h("div", {class: "ends"}, h("span", {}, "stop"), h("span", {}, "target"))];
}

function position(held) {
  const long = held.side === "buy", pair = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
  return h("div", {class: "position"},
    h("div", {class: "head"}, h("b", {}, held.symbol), h("span", {class: `side ${long ? "long" : "short"}`}, long ? "LONG" : "SHORT"), h("span", {}, `${number(held.size, 0)} contracts`),
      held.stop === null ? h("span", {class: "nostop"}, "NO STOP") : "", h("span", {class: `pnl ${toneOf(held.pnl)}`}, held.pnl === null ? "–" : `${signed(held.pnl)} USD`)),
    h("dl", {class: "prices"}, pair("Stop", held.stop === null ? h("span", {class: "bad"}, "none rests") : price(held.stop)), pair("Entry", price(held.entry_price)), pair("Mark", price(held.mark)), pair("Target", held.target === null ? "none rests" : price(held.target))),
    ladder(held),
    h("p", {class: "small soft"}, `since ${when(held.entry_time)} UTC`, held.stop === null ? ` · decided stop ${price(held.decided_stop)}` : ""));
}

const showPositions = status => paint("positions", status.holdings, held => held.length ? held.map(position) : h("p", {class: "soft"}, "None: nothing is held."));

// ---- decisions, trades

function decision(row) {
  const entered = row.action === "enter", side = row.side > 0 ? "long" : "short";
  const action = entered ? `enter ${side} ${number(row.size, 0)}` : row.action;
  const words = [row.words, row.reason].filter(Boolean).join("; ");
  const sure = row.certainty === null ? "" : ` ${percent(row.certainty, 0)}`, chance = row.probability === null ? "" : ` · chance ${percent(row.probability, 0)}`;
  return h("li", {}, h("div", {class: "head"}, h("b", {}, row.symbol), h("span", {class: `pill ${row.refused ? "refused" : row.action}`}, row.refused ? `${action}: refused` : action), h("span", {class: "soft small"}, `${when(row.closed)} UTC`)),
    h("p", {}, row.refused ? `Not sent: ${row.refused}` : words),
    h("p", {class: "small soft"}, `${REGIMES[row.regime] || row.regime || "regime not known"}${sure}${chance}${entered ? ` · stop ${price(row.stop)}, target ${price(row.target)}` : ""}`));
}

const showDecisions = () => paint("decisions", known.decisions, rows => rows.length ? h("ul", {class: "rows scroll", tabindex: 0, "aria-label": "decisions, newest first"}, rows.map(decision)) : h("p", {class: "soft"}, "None yet: the first comes at a bar's close."));

function showTrades() {
  paint("trades", known.trades, ({trades, summary}) => {
    if (!trades.length) return h("p", {class: "soft"}, "None closed yet.");
    const cell = (value, tone) => h("td", {class: tone}, value);
    return [h("p", {class: "sum"}, h("span", {}, h("b", {class: toneOf(summary.net)}, `${signed(summary.net)} USD`), " net"), h("span", {}, `${summary.trades} trades, ${summary.wins} won`), h("span", {class: "soft"}, `fees ${usd(summary.fees)}, funding ${signed(-summary.funding)}`)),
      h("table", {}, h("thead", {}, h("tr", {}, ["Closed", "Trade", "Why", "USD"].map(name => h("th", {scope: "col"}, name)))),
        h("tbody", {}, trades.slice(0, 10).map(row => h("tr", {}, cell(when(row.exit_time), "soft"), h("td", {}, row.symbol, " ", h("span", {class: `side ${row.side === "buy" ? "long" : "short"}`}, row.side === "buy" ? "L" : "S")), cell(row.exit_reason.replaceAll("_", " ")), cell(signed(row.pnl), toneOf(row.pnl))))))];
  });
}

// ---- lines, messages, models

const LAMPS = {closed: ["good", "answers"], "half open": ["warn", "being tried again"], open: ["bad", "not asked for a while, after failures"], live: ["good", "live"]};
const lamp = (word, name, words) => { const [tone, meaning] = LAMPS[word] || ["warn", word]; return h("div", {}, h("div", {class: "head"}, h("span", {}, h("span", {class: `dot ${tone}`}), name), h("span", {class: `soft ${tone}`}, meaning)), words ? h("p", {class: "small soft"}, words) : ""); };

function showLines(status) {
  paint("lines", [status.services, status.streams, status.quota, status.doubtful], () => h("div", {class: "rows"},
    status.services.map(service => lamp(service.breaker, `${service.name}${service.address ? "" : " (in the bot)"}`, service.words)),
    Object.entries(status.streams).map(([name, word]) => lamp(word, `${name} stream`)),
    h("div", {}, h("div", {class: "head"}, h("span", {}, "requests, of our own limit"), h("span", {class: "soft"}, percent(status.quota, 0))), meter(status.quota)),
    status.doubtful.length ? h("div", {}, h("p", {class: "warn"}, h("span", {class: "dot warn"}), `fate not known: ${status.doubtful.join(", ")}`)) : ""));
}

const showTold = status => paint("told", status.told, told => told.length ? h("ul", {class: "rows scroll", tabindex: 0, "aria-label": "messages, newest first"}, [...told].reverse().map(item => h("li", {}, h("span", {class: "soft small"}, `${when(item.at)} `), item.words))) : h("p", {class: "soft"}, "None."));

function showModels(status) {
  paint("models", [status.models, status.verdict, status.symbols, status.resolution], () => h("dl", {class: "pairs"},
    h("dt", {}, "verdict"), h("dd", {class: status.verdict === "trade" ? "good" : "warn"}, status.verdict === "trade" ? "trade" : `${status.verdict}: they advise against trading`),
    Object.entries(status.models).map(([name, sha]) => [h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, h("code", {title: sha}, sha.slice(0, 12)))]),
    h("dt", {}, "bars"), h("dd", {}, `${status.symbols.join(", ")} · ${status.resolution}`)));
}

// ---- charts

const colour = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const tinted = (context, name, alpha, draw) => { context.save(); context.globalAlpha = alpha; context.fillStyle = context.strokeStyle = colour(name); draw(); context.restore(); };

function mark(context, x, y, kind, size = 5) { // entries point the way of the trade, exits are crosses
  context.beginPath();
  if (kind === "exit") { context.lineWidth = 2; context.moveTo(x - size + 1, y - size + 1); context.lineTo(x + size - 1, y + size - 1); context.moveTo(x + size - 1, y - size + 1); context.lineTo(x - size + 1, y + size - 1); context.stroke(); return; }
  const way = kind === "long" ? 1 : -1;
  context.moveTo(x, y - way * size); context.lineTo(x - size, y + way * size); context.lineTo(x + size, y + way * size); context.closePath(); context.fill(); context.stroke();
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 2.5, 5, 10].map(times => times * power).find(size => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(value);
  return found;
}

function frame(canvas, chart, held) { // sizes, the bars that fit, and where a time and a price lie
  const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1, context = canvas.getContext("2d");
  canvas.width = Math.round(box.width * ratio); canvas.height = Math.round(box.height * ratio);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  const right = box.width - 64, bottom = box.height - 26, fits = Math.floor((right - 4) / 4), first = Math.max(0, chart.time.length - Math.max(20, fits));
  const bars = chart.time.length - first, width = (right - 4) / bars, levels = [held && held.stop, held && held.target].filter(Boolean);
  let low = Math.min(...chart.low.slice(first)), high = Math.max(...chart.high.slice(first));
  const reach = high - low || high * 0.01;
  for (const level of levels) if (level > low - reach * 0.6 && level < high + reach * 0.6) { low = Math.min(low, level); high = Math.max(high, level); }
  const margin = (high - low || reach) * 0.06; low -= margin; high += margin;
  return {context, box, right, bottom, first, bars, width, low, high, x: at => 4 + (at - first + 0.5) * width, y: value => 6 + (bottom - 10) * (high - value) / (high - low), at: time => (time - chart.time[0]) / chart.step};
}

function drawBands(view, chart) {
  const {context, bottom, width} = view;
  for (let at = view.first; at < chart.time.length;) {
    let end = at + 1;
    while (end < chart.time.length && chart.regime[end] === chart.regime[at]) end += 1;
    const left = view.x(at) - width / 2, across = (end - at) * width;
    if (chart.regime[at]) { tinted(context, chart.regime[at], 0.11, () => context.fillRect(left, 0, across, bottom)); tinted(context, chart.regime[at], 0.95, () => context.fillRect(left, bottom, across, 5)); }
    at = end;
  }
}

function drawAxes(view, chart) {
  const {context, right, bottom, box} = view;
  context.font = "11px system-ui, sans-serif"; context.textBaseline = "middle"; context.textAlign = "left";
  const last = view.y(chart.close[chart.close.length - 1]);
  for (const value of ticks(view.low, view.high, 5)) {
    tinted(context, "line", 1, () => context.fillRect(4, Math.round(view.y(value)), right - 4, 1));
    if (Math.abs(view.y(value) - last) > 14 && view.y(value) > 8) tinted(context, "soft", 1, () => context.fillText(price(value).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, ""), right + 6, view.y(value)));
  }
  context.textAlign = "center"; context.textBaseline = "alphabetic";
  const roomy = 64 / view.width * chart.step, reach = [3600, 7200, 10800, 21600, 43200].find(seconds => seconds >= roomy && seconds >= chart.step) || Math.ceil(roomy / 86400) * 86400;
  for (let at = view.first; at < chart.time.length; at += 1) if (chart.time[at] % reach === 0 && view.x(at) > 30 && view.x(at) < right - 20) {
    const time = chart.time[at], words = time % 86400 === 0 ? dated(time).replace(" 00:00", "") : clock(time);
    tinted(context, "soft", 1, () => context.fillText(words, view.x(at), box.height - 6));
  }
}

function drawBars(view, chart) {
  const {context, width} = view, body = Math.max(1, Math.floor(width * 0.68));
  for (let at = view.first; at < chart.time.length; at += 1) {
    const x = Math.round(view.x(at)), up = chart.close[at] >= chart.open[at], top = view.y(Math.max(chart.open[at], chart.close[at])), low = view.y(Math.min(chart.open[at], chart.close[at]));
    tinted(context, up ? "rise" : "fall", 1, () => { context.fillRect(x, view.y(chart.high[at]), 1, Math.max(1, view.y(chart.low[at]) - view.y(chart.high[at]))); context.fillRect(x - Math.floor(body / 2), top, body, Math.max(1, low - top)); });
  }
}

function drawLevel(view, value, name, tone, words, dash) {
  const {context, right} = view, y = view.y(value);
  if (!(y > 0 && y < view.bottom)) return;
  tinted(context, tone, 1, () => { context.setLineDash(dash); context.lineWidth = 1.5; context.beginPath(); context.moveTo(4, y); context.lineTo(right, y); context.stroke(); });
  context.font = "600 11px system-ui, sans-serif"; context.textAlign = "left"; context.textBaseline = "bottom";
  const wide = context.measureText(words).width + 8;
  tinted(context, "card", 0.85, () => context.fillRect(6, y - 16, wide, 15));
  tinted(context, tone, 1, () => context.fillText(words, 10, y - 2));
}

function drawTrades(view, chart) {
  const {context} = view;
  context.save(); context.beginPath(); context.rect(0, 0, view.right, view.bottom); context.clip();
  for (const trade of chart.trades) {
    const kind = trade.side === "buy" ? "long" : "short", from = [view.x(Math.floor(view.at(trade.entry_time))), view.y(trade.entry_price)];
    if (trade.exit_time !== null) {
      const to = [view.x(Math.floor(view.at(trade.exit_time))), view.y(trade.exit_price)];
      tinted(context, trade.gain >= 0 ? "rise" : "fall", 0.9, () => { context.setLineDash([3, 3]); context.lineWidth = 1.5; context.beginPath(); context.moveTo(...from); context.lineTo(...to); context.stroke(); context.setLineDash([]); });
      tinted(context, "ink", 1, () => mark(context, ...to, "exit"));
    }
    context.save(); context.fillStyle = colour("accent"); context.strokeStyle = colour("card"); context.lineWidth = 1; mark(context, ...from, kind, 6); context.restore();
  }
  context.restore();
}

function drawLast(view, chart) {
  const {context, right} = view, last = chart.close[chart.close.length - 1], y = Math.max(8, Math.min(view.bottom - 8, view.y(last)));
  tinted(context, "ink", 1, () => context.fillRect(right + 1, y - 8, 63, 16));
  context.font = "600 11px system-ui, sans-serif"; context.textAlign = "left"; context.textBaseline = "middle";
  tinted(context, "card", 1, () => context.fillText(price(last), right + 6, y + 0.5));
}

function draw(symbol, over = null) {
  const canvas = $(`canvas-${symbol}`), chart = known.charts[symbol];
  if (!canvas || !chart || !chart.time.length) return;
  const held = known.facts.status.holdings.find(one => one.symbol === symbol), view = frame(canvas, chart, held);
  drawBands(view, chart); drawAxes(view, chart); drawBars(view, chart);
  if (held) drawLevel(view, held.entry_price, "entry", "soft", `entry ${price(held.entry_price)}`, [1, 3]);
  if (held && held.target !== null) drawLevel(view, held.target, "target", "good", `target ${price(held.target)}`, [6, 3]);
  if (held && held.stop !== null) drawLevel(view, held.stop, "stop", "bad", `stop ${price(held.stop)}`, [6, 3]);
  drawTrades(view, chart); drawLast(view, chart);
  const at = over === null ? chart.time.length - 1 : Math.max(view.first, Math.min(chart.time.length - 1, view.first + Math.floor((over - 4) / view.width)));
  if (over !== null) tinted(view.context, "ink", 0.5, () => view.context.fillRect(Math.round(view.x(at)), 0, 1, view.bottom));
  readOut(symbol, chart, at, view.bars);
}

function readOut(symbol, chart, at, bars) {
  const regime = chart.regime[at] ? `${REGIMES[chart.regime[at]] || chart.regime[at]}${chart.certainty[at] === null ? "" : ` ${percent(chart.certainty[at], 0)}`}` : "before the bot";
  const then = chart.trades.filter(trade => [trade.entry_time, trade.exit_time].some(time => time !== null && Math.floor((time - chart.time[0]) / chart.step) === at));
  const words = then.map(trade => ` · ${trade.side === "buy" ? "long" : "short"} ${trade.words || ""}${trade.exit_reason ? ` → ${trade.exit_reason.replaceAll("_", " ")}` : ""}`).join("");
  $(`readout-${symbol}`).textContent = `${dated(chart.time[at])} · O ${price(chart.open[at])} H ${price(chart.high[at])} L ${price(chart.low[at])} C ${price(chart.close[at])} · ${regime}${words}`;
  $(`canvas-${symbol}`).setAttribute("aria-label", `${symbol}: the last ${bars} bars of ${chart.resolution}, last close ${price(chart.close[chart.close.length - 1])}, ${chart.trades.length} trades`);
}

function showCharts(status) {
  paint("charts", status.symbols, symbols => symbols.map(symbol => h("div", {class: "chart"}, h("div", {class: "head"}, h("b", {}, symbol), h("span", {id: `last-${symbol}`}), h("span", {class: "soft small"}, `${status.resolution} bars`), h("span", {class: "readout", id: `readout-${symbol}`}, "no bars yet")), h("canvas", {id: `canvas-${symbol}`, role: "img"}))));
  for (const symbol of status.symbols) {
    $(`last-${symbol}`).textContent = price(status.prices[symbol] ?? null);
    const canvas = $(`canvas-${symbol}`);
    canvas.onpointermove = event => draw(symbol, event.offsetX);
    canvas.onpointerleave = () => draw(symbol);
    const shown = JSON.stringify([status.holdings.find(one => one.symbol === symbol) ?? null, known.rows, known.charts[symbol]?.time.at(-1)]);
    if (canvas.dataset.shown !== shown) { canvas.dataset.shown = shown; draw(symbol); }
  }
}

function showLegend() {
  const swatch = name => { const box = h("span", {class: "swatch"}); box.style.background = `var(--${name})`; return box; };
  const sign = (kind, tone) => { const box = h("canvas", {width: 32, height: 24}), context = box.getContext("2d"); context.scale(2, 2); context.fillStyle = context.strokeStyle = colour(tone); mark(context, 8, 6, kind); return box; };
  $("legend").replaceChildren(...Object.entries(REGIMES).map(([name, words]) => h("li", {}, swatch(name), words)), h("li", {}, sign("long", "accent"), "long"), h("li", {}, sign("short", "accent"), "short"), h("li", {}, sign("exit", "ink"), "exit"));
}

// ---- the switch

function openKill() {
  const able = known.facts && known.facts.can_kill;
  $("kill-words").textContent = able ? "All orders are cancelled and all positions closed at the market. The bot stays halted, also after a restart, until a person clears it."
    : "This page has no key, so it cannot halt the bot. Start it with DELTA_DASHBOARD_KEY set to 32 or more characters; or make a file called KILL in the bot's folder, which halts it too.";
  $("kill-fields").hidden = $("kill-now").hidden = !able;
  $("kill-answer").textContent = "";
  $("kill-form").reset(); ready();
  $("kill").showModal();
}

const field = name => $("kill-form").elements[name];
const ready = () => { $("kill-now").disabled = !(field("typed").value.trim() === "HALT" && field("key").value); };

async function kill(event) {
  event.preventDefault();
  const answer = $("kill-answer"), headers = {"Content-Type": "application/json", "X-API-Key": field("key").value};
  $("kill-now").disabled = true; answer.className = ""; answer.textContent = "Asking…";
  try {
    const reply = await fetch("/kill", {method: "POST", headers, body: JSON.stringify({who: field("who").value, why: field("why").value}), signal: AbortSignal.timeout(PATIENCE)});
    const body = await reply.json();
    answer.className = reply.ok ? "good" : "bad";
    answer.textContent = reply.ok ? body.words : `Refused: ${body.detail}`;
    if (reply.ok) { field("key").value = ""; $("kill-fields").hidden = $("kill-now").hidden = true; }
  } catch (fault) { answer.className = "bad"; answer.textContent = `No answer: the bot was NOT told (${fault.message}). Try again, or make the file KILL in its folder.`; }
  if (!$("kill-now").hidden) ready();
}

// ---- the loop

async function ask(path) {
  const reply = await fetch(path, {cache: "no-store", signal: AbortSignal.timeout(PATIENCE)});
  if (!reply.ok) throw new Error(`${path} answered ${reply.status}`);
  return reply.json();
}

async function askMore(facts) { // what changes only with the journal
  const mark = JSON.stringify([facts.rows, facts.status.last_close, facts.status.symbols]);
  if (mark === known.rows) return;
  [known.decisions, known.trades] = await Promise.all([ask("/decisions.json").then(body => body.decisions), ask("/trades.json")]);
  for (const symbol of facts.status.symbols) known.charts[symbol] = await ask(`/chart.json?symbol=${encodeURIComponent(symbol)}`);
  known.rows = mark;
}

function show(facts) {
  showHead(facts);
  const status = facts.status;
  document.querySelectorAll("main .column, #figures").forEach(part => { part.hidden = !status; });
  if (status) { showFigures(facts); showPositions(status); showDecisions(); showTrades(); showLines(status); showTold(status); showModels(status); showCharts(status); }
  $("foot").textContent = status ? `delta_go ${status.version} · process ${status.pid}, lease ${status.epoch}, running for ${span(status.written - status.started)} · ${facts.rows} rows of journal · times are UTC` : "";
  showClock();
}

async function poll() {
  let wait = POLL;
  poll.next = 0;
  try {
    const facts = await ask("/status.json");
    known.facts = facts; known.at = performance.now(); known.lost = 0;
    $("lost").hidden = true; document.body.classList.remove("stale");
    if (facts.status) await askMore(facts);
    show(facts);
  } catch (fault) {
    known.lost = known.lost || Date.now() / 1000;
    $("lost").hidden = false; document.body.classList.add("stale");
    wait = Math.min(SLOWEST, POLL + 500 * (Date.now() / 1000 - known.lost));
    showClock();
  }
  poll.next = setTimeout(poll, wait);
}

const redraw = () => { showLegend(); for (const symbol of Object.keys(known.charts)) draw(symbol); };
$("halt").onclick = openKill; $("kill-back").onclick = () => $("kill").close(); $("kill-form").oninput = ready; $("kill-form").onsubmit = kill;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
window.addEventListener("resize", redraw);
document.addEventListener("visibilitychange", () => { if (!document.hidden && poll.next) { clearTimeout(poll.next); poll(); } });
setInterval(showClock, 1000);
showLegend();
poll();
