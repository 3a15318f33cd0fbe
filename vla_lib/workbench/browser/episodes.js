// Episodes of a dataset root: a table to decide in, and one or two episodes to look at closely. The same code draws in
// JupyterLab (Python answers what it asks for) and in a saved page (everything it needs stands in the page).
//
// model.get("rows"): one object an episode. model.send asks for {open: key}, {glance: [key]}, {pictures: [[place, view,
// number]]}, {mark: key, ...}. Answers come as "msg:custom": {episode}, {glance}, {pictures}, {row}, {error}.

const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"];  // Okabe and Ito
const DASHES = [[], [7, 3], [2, 2], [9, 3, 2, 3], [4, 4], [12, 3]];  // never colour alone
const VERDICT = {good: "✓", "usable with exclusions": "◐", rejected: "✗"};
const KEYS = "← → one step, Shift: ten · Space play · Home End · n p episodes · r next rejected · u next unmarked · " +
  "x exclude · [ ] trim · c compare · drag zooms, Shift-drag pans, wheel zooms, double-click shows all";

const ROW_PX = 36, MORE = 50;  // a row's height, as in the style sheet; how many are made beyond those in sight

const COLUMNS = ["episode", "first, contact, last", "force", "way", "verdict", "marks", "seconds", "steps"];
const BELOW = {episode: (row) => [row.dataset, row.task].filter(Boolean).join("/"), verdict: (row) => row.reasons};  // a second line

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;  // text is text, whatever a folder is called
  return node;
}

function button(text, title, act) {
  const node = make("button", "", text);
  node.title = title;
  node.onclick = act;
  return node;
}

const newest = (times, t) => {  // index of the newest of rising times at or before t, -1 where there is none
  let low = 0, high = times.length;
  while (low < high) { const middle = (low + high) >> 1; if (times[middle] <= t + 1e-9) low = middle + 1; else high = middle; }
  return low - 1;
};

// ---- one episode: pictures, traces, M-mode and A-scan under one cursor

class Episode {
  constructor(place, ask, moved) {
    this.place = place;
    this.ask = ask;      // (view, number) -> promise of a picture's address
    this.moved = moved;  // told when a person moves this cursor
    this.el = make("div", "vla-episode");
    this.t = 0;
    this.charts = [];
    this.linked = [];    // of another episode, whose zoom follows
    this.shift = 0;      // what the other episode's time is ahead of the shared one
    this.turn = this.drawn = 0;  // instants that were asked for; the latest of them that is shown
  }

  show(data) {
    this.data = data;
    for (const chart of [...this.charts, this.scan]) if (chart) chart.destroy();
    this.charts = [];
    this.scan = this.column = this.grey = null;
    this.el.replaceChildren(make("div", "vla-title", data.title));
    const row = make("div", "vla-pictures");
    this.views = data.views.map((view) => {
      const box = make("figure");
      const img = make("img"), caption = make("figcaption");
      img.alt = view.name;
      box.append(img, caption);
      row.append(box);
      return {img, caption, ...view, shown: null};
    });
    if (!data.views.length) row.append(make("p", "", "no pictures"));
    this.el.append(row);
    this.grid = make("div", "vla-grid");
    this.el.append(this.grid);
    for (const trace of data.traces) this.chart(trace);
    if (data.mmode) this.mmode(data.mmode);
  }

  width() { return Math.max(240, Math.floor((this.el.clientWidth || 960) / (this.half ? 1 : 2)) - 10); }

  options(title, unit, series, extra) {
    const self = this;
    return {
      title, width: this.width(), height: 150, series, legend: {live: true},
      cursor: {sync: {key: `vla-${this.place}`, setSeries: false}, drag: {x: true, y: false}, points: {size: 5},
               bind: {dblclick: (u) => () => u.setScale("x", {min: 0, max: self.data.duration_s})}},
      scales: {x: {time: false}},
      axes: [{font: "11px sans-serif", size: 24, values: (u, v) => v.map((t) => `${t} s`)},
             {font: "11px sans-serif", size: 58, label: unit, labelSize: 16, labelFont: "11px sans-serif"}],
      ...extra,
      hooks: {
        ready: [(u) => {
          u.vlaNow = make("div", "vla-now");
          u.over.append(u.vlaNow);
          self.pointer(u);
          u.setScale("x", {min: 0, max: self.data.duration_s});
        }],
        setScale: [(u, key) => key === "x" && self.zoomed(u)],
        drawClear: [(u) => self.shade(u)],
        ...(extra && extra.hooks),
      },
    };
  }

  chart(trace) {
    const every = trace.every;
    const series = [{label: "time", value: (u, v, s, i) => v === null ? "-" : `${v.toFixed(3)} s, sample ${i * every}`}];
    trace.names.forEach((name, k) => series.push({
      label: name, stroke: COLOURS[k % 6], dash: DASHES[k % 6], width: 1.4, points: {show: false}, spanGaps: false,
      paths: trace.steps ? uPlot.paths.stepped({align: 1}) : undefined,
      value: (u, v) => v === null || v === undefined ? "-" : v.toPrecision(4),
    }));
    const box = make("div", "vla-chart");
    this.grid.append(box);
    this.charts.push(new uPlot(this.options(trace.title, trace.unit, series), [trace.t, ...trace.values], box));
  }

  mmode(image) {
    const paint = make("canvas"), columns = image.t.length;
    const pixels = new Image();
    const draw = (u) => {
      if (!paint.width) return;
      const {left, top, width, height} = u.bbox, x = u.scales.x;
      const at = (t) => u.valToPos(t, "x", true);
      u.ctx.save();
      u.ctx.beginPath(); u.ctx.rect(left, top, width, height); u.ctx.clip();
      u.ctx.imageSmoothingEnabled = false;
      const y0 = u.valToPos(0, "y", true), y1 = u.valToPos(image.bins, "y", true);
      u.ctx.drawImage(paint, at(image.t[0]), y0, at(image.t[columns - 1] + image.every_s) - at(image.t[0]), y1 - y0);
      u.ctx.restore();
    };
    const series = [{label: "time", value: (u, v, s, i) => v === null ? "-" : `${v.toFixed(3)} s, sample ${image.sample[i]}`},
                    {label: `intensity ${image.low.toPrecision(3)} to ${image.high.toPrecision(3)}`, show: true, stroke: "transparent", points: {show: false}, value: () => ""}];
    const box = make("div", "vla-chart");
    this.grid.append(box);
    const chart = new uPlot(this.options("A-scans over time (M-mode)", "depth (bin)", series, {
      scales: {x: {time: false}, y: {range: [0, image.bins], dir: -1}}, hooks: {draw: [draw]},
    }), [image.t, image.t.map(() => null)], box);
    this.charts.push(chart);
    const depth = Float64Array.from({length: image.rows}, (_, k) => k * image.bins / image.rows);
    const scanBox = make("div", "vla-chart");
    this.grid.append(scanBox);
    this.scan = new uPlot({
      title: "A-scan at the cursor", width: this.width(), height: 150, scales: {x: {time: false}, y: {range: [image.low, image.high]}},
      series: [{label: "depth", value: (u, v) => v === null ? "-" : `bin ${v.toFixed(0)}`},
               {label: "intensity", stroke: COLOURS[0], width: 1, points: {show: false}, value: (u, v) => v === null ? "-" : v.toPrecision(4)}],
      axes: [{font: "11px sans-serif", size: 24, label: ""}, {font: "11px sans-serif", size: 58, label: "intensity", labelSize: 16, labelFont: "11px sans-serif"}],
    }, [depth, depth.map(() => null)], scanBox);
    this.column = () => {
      const at = newest(image.t, this.t);
      if (!this.grey || at < 0) return;
      const scan = Float64Array.from({length: image.rows}, (_, k) => image.low + this.grey[4 * (k * columns + at)] / 255 * (image.high - image.low));
      this.scan.setData([depth, scan]);
    };
    pixels.onload = () => {
      paint.width = columns; paint.height = image.rows;
      const context = paint.getContext("2d", {willReadFrequently: true});
      context.drawImage(pixels, 0, 0);
      const found = context.getImageData(0, 0, columns, image.rows);
      this.grey = Uint8ClampedArray.from(found.data);  // an 8-bit picture: value 0 is low, 255 is high
      for (let k = 0; k < found.data.length; k += 4) {
        const [r, g, b] = image.colours[this.grey[k]];
        found.data[k] = r; found.data[k + 1] = g; found.data[k + 2] = b;
      }
      context.putImageData(found, 0, 0);
      chart.redraw();
      this.column();
    };
    pixels.src = image.png;
  }

  shade(u) {  // spans that are not used
    u.ctx.save();
    u.ctx.fillStyle = "rgba(120,120,120,.28)";
    const {left, top, width, height} = u.bbox;
    u.ctx.beginPath(); u.ctx.rect(left, top, width, height); u.ctx.clip();
    for (const [begin, end] of [...this.data.unused, ...(this.data.trimmed || [])]) {
      const x0 = u.valToPos(begin, "x", true), x1 = u.valToPos(Math.min(end, this.data.duration_s), "x", true);
      u.ctx.fillRect(x0, top, x1 - x0, height);
    }
    u.ctx.restore();
  }

  zoomed(u) {  // one zoom for all panels
    if (this.zooming || !u.vlaNow) return;
    this.zooming = true;
    const {min, max} = u.scales.x;
    for (const chart of this.charts) if (chart !== u && min !== null) chart.setScale("x", {min, max});
    this.zooming = false;
    this.cursor();
  }

  pointer(u) {
    let from = null;
    u.over.addEventListener("click", (event) => {
      if (event.shiftKey || u.select.width > 2) return;
      this.moved(u.posToVal(event.offsetX, "x") - this.shift);
    });
    u.over.addEventListener("wheel", (event) => {
      if (!this.el.closest(".vla-browser").contains(document.activeElement)) return;  // the page scrolls
      event.preventDefault();
      const at = u.posToVal(event.offsetX, "x"), factor = event.deltaY > 0 ? 1.25 : 0.8;
      const {min, max} = u.scales.x;
      u.setScale("x", {min: Math.max(0, at - (at - min) * factor), max: Math.min(this.data.duration_s, at + (max - at) * factor)});
    }, {passive: false});
    u.over.addEventListener("mousedown", (event) => {
      if (!event.shiftKey) return;
      event.stopImmediatePropagation();
      from = {x: event.clientX, min: u.scales.x.min, max: u.scales.x.max};
      const move = (drag) => {
        const by = (from.x - drag.clientX) / u.over.clientWidth * (from.max - from.min);
        u.setScale("x", {min: from.min + by, max: from.max + by});
      };
      document.addEventListener("mousemove", move);
      document.addEventListener("mouseup", () => document.removeEventListener("mousemove", move), {once: true});
    }, true);
  }

  cursor() {
    for (const u of this.charts) {
      if (!u.vlaNow) continue;  // not drawn yet
      const x = u.valToPos(this.t, "x");
      u.vlaNow.style.left = `${x}px`;
      u.vlaNow.hidden = x < 0 || x > u.over.clientWidth;
    }
  }

  async go(shared) {  // everything at one instant; done when it is drawn
    const t = shared + this.shift, turn = ++this.turn;
    const wanted = await Promise.all(this.views.map(async (view) => {
      const number = newest(view.t, t);
      return {number, source: number < 0 ? null : await this.ask(this.place, view.name, number)};
    }));
    if (turn < this.drawn) return;  // a later instant was here first
    this.drawn = turn;
    await Promise.all(wanted.map(async ({number, source}, k) => {
      const view = this.views[k];
      const age = number < 0 ? "none yet" : `${Math.round(1000 * (t - view.t[number]))} ms old`;
      view.caption.textContent = source === "" ? `${view.name}: damaged or not in this page` : `${view.name}  ${age}`;
      view.img.style.visibility = source ? "visible" : "hidden";
      if (source && source !== view.shown) {
        view.img.src = view.shown = source;
        await view.img.decode().catch(() => {
          if (view.shown !== source) return;  // a later instant's picture came in between
          view.caption.textContent = `${view.name}: damaged`;
          view.img.style.visibility = "hidden";
        });
      }
    }));
    if (turn < this.drawn) return;
    this.t = t;
    this.cursor();
    if (this.column) this.column();
  }

  resize() {
    for (const u of [...this.charts, this.scan]) if (u) u.setSize({width: this.width(), height: 150});
    if (this.data) this.cursor();
  }
}

// ---- the table

class Table {
  constructor(rows, chosen, glance) {
    this.rows = rows;
    this.chosen = chosen;
    this.glance = glance;
    this.filter = make("input");
    this.filter.placeholder = "filter: name, verdict, mark, reason";
    this.filter.oninput = () => this.draw();
    this.count = make("span", "vla-count");
    this.sort = {name: null, down: false};
    this.body = make("div", "vla-rows");
    this.visible = new Set();  // keys of rows in sight that have no pictures yet
    this.seen = new IntersectionObserver((entries) => {
      for (const {isIntersecting, target} of entries) this.visible[isIntersecting ? "add" : "delete"](target.dataset.key);
      this.look();
    }, {root: this.body});
    this.glances = {};
    this.draw();
  }

  get shown() {
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (row) => Object.values(row).join(" ").toLowerCase();
    const found = this.rows.filter((row) => { const of = text(row); return words.every((word) => of.includes(word)); });
    const {name, down} = this.sort;
    if (!name) return found;
    const of = (row) => name === "episode" ? row.key : row[name];  // by dataset, then by name
    const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a ?? "").localeCompare(String(b ?? ""));
    return [...found].sort((a, b) => (down ? -1 : 1) * order(of(a), of(b)));
  }

  draw() {
    this.seen.disconnect();
    this.visible.clear();
    const table = make("table"), head = make("tr");
    for (const name of COLUMNS) {
      const mark = this.sort.name === name ? (this.sort.down ? " ▾" : " ▴") : "";
      const cell = make("th", `vla-${name.split(",")[0]}`, name + mark);
      if (this.rows.length && name in this.rows[0]) cell.onclick = () => {
        this.sort = {name, down: this.sort.name === name && !this.sort.down};
        this.draw();
      };
      head.append(cell);
    }
    const top = make("thead");
    top.append(head);
    const rest = make("tbody");  // as high as the rows that are not made yet
    this.lines = new Map();
    this.order = this.shown;
    this.made = make("tbody");
    this.rest = rest.appendChild(make("tr")).appendChild(make("td", "vla-rest"));
    table.append(top, this.made, rest);
    this.body.replaceChildren(table);
    this.body.onscroll = () => this.more();
    this.count.textContent = `${this.order.length} of ${this.rows.length} episodes`;
    this.more();
    this.mark(this.current, this.other);
  }

  more(key) {  // make the rows in sight and some beyond, and those up to the one of `key`
    const seen = (this.body.scrollTop + (this.body.clientHeight || 300)) / ROW_PX + MORE / 2;
    const wanted = Math.max(seen, 1 + this.order.findIndex((row) => row.key === key));
    if (this.lines.size >= Math.min(wanted, this.order.length)) return;
    const lines = this.order.slice(this.lines.size, Math.ceil(wanted) + MORE).map((row) => this.line(row));
    this.made.append(...lines);
    this.rest.style.height = `${ROW_PX * (this.order.length - this.lines.size)}px`;
    this.mark(this.current, this.other, false);
  }

  line(row) {
    const line = make("tr");
    line.dataset.key = row.key;
    line.onclick = (event) => this.chosen(row.key, event.shiftKey);
    for (const name of COLUMNS) {
      const sign = name === "verdict" && VERDICT[row[name]] ? `${VERDICT[row[name]]} ` : "";
      const cell = make("td", `vla-${name.split(",")[0]}`, sign + (row[name] ?? ""));
      cell.title = cell.textContent;
      if (BELOW[name]?.(row)) {
        const below = make("small", "", BELOW[name](row));
        below.title = below.textContent;
        cell.append(below);
      }
      line.append(cell);
    }
    line.classList.toggle("vla-out", Boolean(row.excluded));
    this.lines.set(row.key, line);
    if (this.glances[row.key]) this.fill(row.key, this.glances[row.key]);
    else this.seen.observe(line);
    return line;
  }

  change(row) {  // of one episode, where it stands
    Object.assign(this.rows.find((one) => one.key === row.key), row);
    const before = this.lines.get(row.key);
    if (before) { this.seen.unobserve(before); before.replaceWith(this.line(row)); }
    this.mark(this.current, this.other);
  }

  look() {  // one row at a time, so that whatever else is asked for does not wait
    const [key] = this.visible;
    if (this.looking || !key) return;
    this.looking = key;
    this.glance([key]);
  }

  fill(key, found) {
    this.glances[key] = found;
    this.visible.delete(key);
    if (key === this.looking) { this.looking = null; this.look(); }
    const line = this.lines.get(key);
    if (!line) return;
    this.seen.unobserve(line);
    line.children[1].replaceChildren(...found.pictures.map((source) => { const img = make("img"); img.src = source; img.alt = ""; return img; }));
    ["force", "way"].forEach((name, k) => {
      const values = found[name];
      if (!values.length) return;
      const low = Math.min(...values), high = Math.max(...values), span = high - low || 1;
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("viewBox", "0 0 100 24"); svg.setAttribute("width", 60); svg.setAttribute("height", 22); svg.setAttribute("preserveAspectRatio", "none");
      svg.setAttribute("aria-label", `${name} ${low.toPrecision(3)} to ${high.toPrecision(3)}`);
      const line2 = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
      line2.setAttribute("points", values.map((v, i) => `${100 * i / (values.length - 1 || 1)},${22 - 20 * (v - low) / span}`).join(" "));
      line2.setAttribute("fill", "none"); line2.setAttribute("stroke", COLOURS[k]); line2.setAttribute("stroke-width", 1.6);
      svg.append(line2);
      const unit = make("span", "vla-most", ` ${high.toPrecision(3)}${name === "force" ? "" : " mm"}`);
      unit.title = `at most; ${svg.getAttribute("aria-label")}`;
      line.children[2 + k].replaceChildren(svg, unit);
    });
  }

  mark(current, other, scroll = true) {
    this.current = current; this.other = other;
    if (scroll && !this.lines.has(current)) this.more(current);
    for (const [key, line] of this.lines) {
      line.classList.toggle("vla-current", key === current);
      line.classList.toggle("vla-other", key === other);
    }
    const line = this.lines.get(current), {scrollTop, clientHeight} = this.body;
    if (scroll && line && (line.offsetTop < scrollTop + 30 || line.offsetTop + 40 > scrollTop + clientHeight))
      this.body.scrollTop = line.offsetTop - clientHeight / 2;
  }

  next(by, fits) {  // the key of the next shown row that fits, round the end
    const shown = this.shown, at = shown.findIndex((row) => row.key === this.current);
    for (let k = 1; k <= shown.length; k++) {
      const row = shown[(at + by * k + shown.length * 2) % shown.length];
      if (fits(row)) return row.key;
    }
    return null;
  }
}

// ---- both together

class Browser {
  constructor(model, el) {
    this.model = model;
    this.live = model.live !== false;
    el.classList.add("vla-browser");
    el.tabIndex = 0;
    el.dataset.lmSuppressShortcuts = "true";  // keys are this page's own, not JupyterLab's
    this.el = el;
    this.sources = new Map();
    this.waiting = new Map();
    this.table = new Table(model.get("rows"), (key, beside) => this.open(key, beside), (keys) => this.live && model.send({glance: keys}));
    this.say = make("p", "vla-say");
    this.says = make("p", "vla-keys", KEYS);
    this.main = new Episode(0, (...of) => this.picture(...of), (t) => this.go(t));
    this.beside = new Episode(1, (...of) => this.picture(...of), (t) => this.go(t));
    this.pair = make("div", "vla-pair");
    this.pair.append(this.main.el);
    const bar = make("div", "vla-bar"), look = make("div", "vla-bar");
    bar.append(
      this.table.filter, this.table.count,
      button("◀ previous", "p", () => this.step(-1, () => true)), button("next ▶", "n", () => this.step(1, () => true)),
      button("next rejected", "r", () => this.step(1, (row) => row.verdict === "rejected")),
      button("next unmarked", "u", () => this.step(1, (row) => !row.marks)));
    this.slider = make("input");
    Object.assign(this.slider, {type: "range", min: 0, max: 0, step: 1, value: 0});
    this.slider.setAttribute("aria-label", "time");
    this.slider.oninput = () => this.go(this.times()[this.slider.value]);
    this.clock = make("output", "", "0.00 s");
    this.playing = button("▶ play", "Space", () => this.play());
    this.align = make("select");
    for (const way of ["aligned by time", "aligned by contact"]) this.align.append(new Option(way));
    this.align.onchange = () => this.arrange();
    this.align.hidden = true;
    look.append(this.playing, this.slider, this.clock, this.align);
    if (this.live) {
      this.note = make("input");
      this.note.placeholder = "note, Enter keeps it";
      this.note.onchange = () => this.keep({note: this.note.value || null});
      this.label = make("select");
      for (const value of ["", "success", "failure"]) this.label.append(new Option(value || "no label", value));
      this.label.onchange = () => this.keep({label: this.label.value || null});
      look.append(
        this.exclude = button("exclude", "x", () => this.toggle()),
        button("starts here", "[", () => this.keep({start_s: +this.main.t.toFixed(3)})),
        button("ends here", "]", () => this.keep({end_s: +this.main.t.toFixed(3)})),
        button("whole", "take the trim away", () => this.keep({start_s: null, end_s: null})), this.label, this.note,
        button("compare", "c: the next episode you choose stands beside this one", () => { this.comparing = true; this.tell("Choose the episode to stand beside this one."); }));
    }
    el.append(bar, this.table.body, this.say, look, this.pair, this.says);
    el.addEventListener("keydown", (event) => this.key(event));
    model.on("msg:custom", (message, buffers) => this.answer(message, buffers));
    new ResizeObserver(() => { this.main.resize(); if (this.two) this.beside.resize(); }).observe(el);
  }

  tell(text, bad) { this.say.textContent = text; this.say.classList.toggle("vla-bad", Boolean(bad)); }

  get two() { return this.beside.el.isConnected; }

  times() { return this.main.data ? this.main.data.times : [0]; }

  open(key, beside) {
    if (beside || this.comparing) { this.comparing = false; this.model.send({open: key, place: 1}); this.table.mark(this.table.current, key); return; }
    this.stop();
    this.table.mark(key, this.table.other);
    this.tell(`opening ${key}`);
    this.model.send({open: key, place: 0});
  }

  step(by, fits) { const key = this.table.next(by, fits); if (key) this.open(key); else this.tell("No other episode fits."); }

  answer(message, buffers) {
    if (message.pictures) message.pictures.forEach(([place, view, number, kind], k) => {
      const id = `${place}/${view}/${number}`, done = this.waiting.get(id);
      const source = kind ? URL.createObjectURL(new Blob([buffers[k]], {type: kind})) : "";
      this.sources.set(id, source);
      this.waiting.delete(id);
      if (done) done.forEach((tell) => tell(source));
    });
    if (message.glance) for (const [key, found] of Object.entries(message.glance)) this.table.fill(key, found);
    if (message.row) { this.table.change(message.row); this.reflect(); }
    if (message.error) { this.tell(message.error, true); if (message.place === 0) this.clear(message.key); }
    if (message.trimmed && this.main.data) { this.main.data.trimmed = message.trimmed; this.main.charts.forEach((u) => u.redraw()); }
    if (message.episode) {
      if (!message.place) this.table.mark(message.key, this.table.other);
      this.show(message.episode, message.place || 0);
    }
  }

  clear(key) {  // never an old episode below an error
    this.main.charts.forEach((chart) => chart.destroy());
    this.main = new Episode(0, this.main.ask, this.main.moved);
    this.pair.replaceChildren(this.main.el);
    this.align.hidden = true;
    this.table.mark(key, null);
    this.reflect();
  }

  show(data, place) {
    for (const [id, source] of this.sources) if (id.startsWith(`${place}/`)) { URL.revokeObjectURL(source); this.sources.delete(id); }
    const one = place ? this.beside : this.main;
    if (place && !this.two) this.pair.append(this.beside.el);
    this.align.hidden = !this.two;
    this.main.half = this.beside.half = this.two;
    one.show(data);
    if (this.two) { this.main.resize(); this.beside.resize(); }
    if (!place) this.slider.max = data.times.length - 1;
    this.tell("");
    this.arrange(place ? undefined : data.times[Math.floor(data.times.length / 2)]);
    this.reflect();
  }

  arrange(t = this.at || 0) {
    const [a, b] = [this.main.data, this.beside.data], contact = this.align.selectedIndex === 1;
    this.beside.shift = this.two && contact && a.contact_s !== null && b.contact_s !== null ? b.contact_s - a.contact_s : 0;
    if (this.two && contact && !(a.contact_s !== null && b.contact_s !== null)) this.tell("No contact is known of one of them: aligned by time.");
    this.go(t);
  }

  reflect() {  // what the chosen row says
    const row = this.table.rows.find((one) => one.key === this.table.current);
    if (!this.live || !row) return;
    this.exclude.textContent = row.excluded ? "include" : "exclude";
    this.note.value = row.note || "";
    this.label.value = row.label || "";
  }

  keep(changes) { if (this.table.current) this.model.send({mark: this.table.current, changes}); }

  toggle() {
    const row = this.table.rows.find((one) => one.key === this.table.current);
    if (row) this.keep({exclude: row.excluded ? false : true});
  }

  picture(place, view, number) {
    const id = `${place}/${view}/${number}`;
    if (this.sources.has(id)) return this.sources.get(id);
    if (!this.live) {  // a saved page holds some pictures: the newest that is there
      const there = (place ? this.beside : this.main).data.pictures[view] || {};
      const best = Object.keys(there).map(Number).filter((k) => k <= number).sort((a, b) => b - a)[0];
      return best === undefined ? "" : there[best];
    }
    return new Promise((tell) => {
      if (this.waiting.has(id)) this.waiting.get(id).push(tell);
      else { this.waiting.set(id, [tell]); this.asked = [...(this.asked || []), [place, view, number]]; }
      queueMicrotask(() => { if (this.asked?.length) { this.model.send({pictures: this.asked}); this.asked = []; } });
    });
  }

  ahead(direction) {  // ask for what comes next, before it is needed
    if (!this.live) return;
    const at = newest(this.times(), this.at);
    for (let k = 1; k <= 6; k++) {
      const t = this.times()[at + k * direction];
      if (t !== undefined) for (const view of this.main.views) { const number = newest(view.t, t); if (number >= 0) this.picture(0, view.name, number); }
    }
  }

  async go(t) {
    if (!this.main.data) return;
    const direction = t >= (this.at ?? 0) ? 1 : -1;
    this.at = Math.min(Math.max(0, t), this.times().at(-1));
    const begun = performance.now();
    await Promise.all([this.main.go(this.at), this.two ? this.beside.go(this.at) : null]);
    this.slider.value = newest(this.times(), this.at);
    this.clock.textContent = `${this.at.toFixed(2)} s`;
    await new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)));
    this.el.dataset.redrawMs = (performance.now() - begun).toFixed(1);
    this.el.dataset.drawn = 1 + Number(this.el.dataset.drawn || 0);
    this.ahead(direction);
  }

  play() {
    if (this.going) return this.stop();
    const from = this.at >= this.times().at(-1) ? 0 : this.at, begun = performance.now();
    this.going = true;
    this.playing.textContent = "⏸ pause";
    const frame = async () => {
      if (!this.going) return;
      const t = from + (performance.now() - begun) / 1000;  // the episode's own speed, however long a redraw takes
      await this.go(this.times()[Math.max(0, newest(this.times(), t))]);
      if (t >= this.times().at(-1)) this.stop(); else requestAnimationFrame(frame);
    };
    frame();
  }

  stop() { this.going = false; this.playing.textContent = "▶ play"; }

  async key(event) {
    if (["INPUT", "SELECT"].includes(event.target.tagName) && event.target !== this.slider) { event.stopPropagation(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const times = this.times(), at = newest(times, this.at ?? 0), by = event.shiftKey ? 10 : 1;
    const move = {ArrowRight: at + by, ArrowLeft: at - by, Home: 0, End: times.length - 1}[event.key];
    const acts = {
      " ": () => this.play(), n: () => this.step(1, () => true), p: () => this.step(-1, () => true),
      r: () => this.step(1, (row) => row.verdict === "rejected"), u: () => this.step(1, (row) => !row.marks),
      x: () => this.toggle(), "[": () => this.keep({start_s: +this.main.t.toFixed(3)}),
      "]": () => this.keep({end_s: +this.main.t.toFixed(3)}), c: () => { this.comparing = true; this.tell("Choose the episode to stand beside this one."); },
    };
    if (move === undefined && !(event.key in acts)) return;
    event.preventDefault();
    event.stopPropagation();
    if (move === undefined) return acts[event.key]();
    if (this.busy) return;  // a held key: each state is drawn before the next one begins
    this.busy = true;
    this.stop();
    await this.go(times[Math.min(Math.max(0, move), times.length - 1)]);
    this.busy = false;
  }
}

export default {
  render({model, el}) {
    const browser = new Browser(model, el);
    model.send({ready: true});
    return () => browser.stop();
  },
};
