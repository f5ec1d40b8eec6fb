"use strict";
(() => {
  const config = window.APD;
  const element = (id) => document.getElementById(id);
  const size = config.shape.reduce((product, length) => product * length, 1);
  const values = new Float32Array(config.start);
  let session = null;
  let isRunning = false;
  let isStale = false;

  const show = (text) => { element("message").textContent = text; };
  const bytesOf = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

  async function unzipped(bytes) {
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  async function load() {
    if (!window.APD_RUNTIME) return;
    const ort = window.ort;
    // A script in a blob and bytes in memory: a page of file:// may fetch neither.
    const script = new Blob([window.APD_RUNTIME.script], { type: "text/javascript" });
    ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(script) };
    ort.env.wasm.wasmBinary = await unzipped(bytesOf(window.APD_RUNTIME.wasm));
    ort.env.wasm.numThreads = 1;
    ort.env.logLevel = "error";
    session = await ort.InferenceSession.create(bytesOf(window.APD_MODEL), { executionProviders: ["wasm"] });
    update();
  }

  async function update() {
    if (!session) return;
    isStale = true;
    if (isRunning) return;
    isRunning = window.APD.isBusy = true;
    try {
      while (isStale) {
        isStale = false;
        const input = new window.ort.Tensor("float32", values.slice(), [1, ...config.shape]);
        const found = await session.run({ [config.input]: input });
        render(found);
      }
    } catch (error) {
      show(`The model does not run in this browser: ${error.message}`);
    }
    isRunning = window.APD.isBusy = false;
  }

  const digits = (value, count = 3) => value.toFixed(count);
  const short = (value) => Number(value.toPrecision(4)).toString();

  function write(id, value, text) {
    element(id).textContent = text === undefined ? digits(value) : text;
    element(id).dataset.value = String(value);
  }

  function render(found) {
    const result = {};
    for (const name of config.outputs) result[name] = Array.from(found[name].data);
    if (config.classes) renderClasses(result); else renderReal(result);
    window.APD.result = result;
    document.body.dataset.runs = String(Number(document.body.dataset.runs || 0) + 1);
  }

  // ---- classes

  function makeClasses() {
    config.classes.forEach((name, k) => {
      const row = document.createElement("tr");
      row.innerHTML = '<th scope="row"></th><td class="bar"><div><span></span></div></td>'
        + '<td class="value"></td><td class="strip"><canvas role="img"></canvas></td>';
      row.querySelector("th").textContent = name;
      row.querySelector("canvas").setAttribute("aria-label", `probability of ${name} by each network`);
      row.querySelector("td.value").id = `class-${k}`;
      element("classes").append(row);
    });
  }

  function renderClasses(result) {
    const mean = result.mean;
    const top = mean.indexOf(Math.max(...mean));
    const most = Math.log(config.classes.length);
    element("answer").textContent = `${config.classes[top]} (${digits(100 * mean[top], 0)} %)`;
    write("predictive_entropy", result.predictive_entropy[0], `${digits(result.predictive_entropy[0])} nats`);
    write("mutual_information", result.mutual_information[0], `${digits(result.mutual_information[0])} nats`);
    element("share-all").style.width = `${100 * result.predictive_entropy[0] / most}%`;
    element("share-networks").style.width = `${100 * result.mutual_information[0] / most}%`;
    const rows = element("classes").children;
    config.classes.forEach((_, k) => {
      rows[k].classList.toggle("top", k === top);
      rows[k].querySelector("span").style.width = `${100 * mean[k]}%`;
      write(`class-${k}`, mean[k]);
      strip(rows[k].querySelector("canvas"), k, result.networks);
    });
  }

  function context(canvas) {
    const scale = window.devicePixelRatio || 1;
    const box = canvas.getBoundingClientRect();
    canvas.width = Math.max(1, Math.round(box.width * scale));
    canvas.height = Math.max(1, Math.round(box.height * scale));
    return [canvas.getContext("2d"), canvas.width, canvas.height, scale];
  }

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function strip(canvas, k, networks) {
    const [pen, width, height] = context(canvas);
    pen.fillStyle = style("--track");
    pen.fillRect(0, 0, width, height);
    pen.fillStyle = style("--accent");
    const step = width / config.numDraws;
    for (let s = 0; s < config.numDraws; s += 1) {
      pen.globalAlpha = networks[s * config.classes.length + k];
      pen.fillRect(s * step, 0, step + 0.5, height);
    }
    pen.globalAlpha = 1;
  }

  // ---- reals

  function renderReal(result) {
    const [mean, lower, upper] = [result.mean[0], result.lower[0], result.upper[0]];
    const deviation = Math.sqrt(result.variance[0]);
    const between = Math.sqrt(result.model_variance[0]);
    element("answer").textContent = short(mean);
    element("answer").dataset.value = String(mean);
    write("interval", lower, `${short(lower)} to ${short(upper)}`);
    element("interval").dataset.upper = String(upper);
    write("deviation", deviation, short(deviation));
    write("disagreement", between, short(between));
    element("share-networks").style.width = `${deviation > 0 ? 100 * between / deviation : 0}%`;
    histogram(element("histogram"), result.networks, lower, upper);
  }

  function histogram(canvas, networks, lower, upper) {
    const [pen, width, height, scale] = context(canvas);
    const low = Math.min(lower, ...networks);
    const high = Math.max(upper, ...networks, low + 1e-9);
    const place = (value) => ((value - low) / (high - low)) * (width - 4 * scale) + 2 * scale;
    const counts = new Array(30).fill(0);
    for (const value of networks) {
      counts[Math.min(29, Math.floor(30 * (value - low) / (high - low)))] += 1;
    }
    const floor = height - 34 * scale;
    const most = Math.max(...counts);
    pen.fillStyle = style("--accent");
    counts.forEach((count, i) => {
      const from = low + (i / 30) * (high - low);
      const tall = (count / most) * (floor - 4 * scale);
      pen.fillRect(place(from), floor - tall, width / 30 - scale, tall);
    });
    pen.strokeStyle = style("--ink");
    pen.lineWidth = 2 * scale;
    pen.beginPath();
    pen.moveTo(place(lower), floor + 8 * scale);
    pen.lineTo(place(upper), floor + 8 * scale);
    pen.stroke();
    pen.fillStyle = style("--soft");
    pen.font = `${12 * scale}px system-ui, sans-serif`;
    pen.textBaseline = "bottom";
    pen.textAlign = "left";
    pen.fillText(short(low), 2 * scale, height);
    pen.textAlign = "right";
    pen.fillText(short(high), width - 2 * scale, height);
  }

  // ---- inputs

  function setAll(list) {
    values.set(list);
    if (config.image) paint(); else moveSliders();
    update();
  }

  function makeExamples() {
    config.examples.forEach((example, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = example.label;
      button.id = `example-${i}`;
      button.addEventListener("click", () => setAll(example.values));
      element("examples").append(button);
    });
  }

  function moveSliders() {
    config.features.forEach((feature, i) => {
      element(`slider-${i}`).value = String(values[i]);
      element(`value-${i}`).textContent = short(values[i]);
    });
  }

  function makeSliders() {
    config.features.forEach((feature, i) => {
      const block = document.createElement("div");
      block.className = "slider";
      block.innerHTML = '<label><span></span><output></output></label><input type="range">';
      const [name, shown, input] = ["span", "output", "input"].map((tag) => block.querySelector(tag));
      input.id = `slider-${i}`;
      shown.id = `value-${i}`;
      block.querySelector("label").htmlFor = input.id;
      name.textContent = feature.name;
      Object.assign(input, { min: feature.low, max: feature.high, step: feature.step });
      input.addEventListener("input", () => {
        values[i] = Number(input.value);
        shown.textContent = short(values[i]);
        update();
      });
      element("sliders").append(block);
    });
    moveSliders();
  }

  const cursor = { row: 0, column: 0, isShown: false };

  function paint() {
    const [rows, columns] = config.image;
    const canvas = element("drawing");
    const cell = 32;
    canvas.width = columns * cell;
    canvas.height = rows * cell;
    const pen = canvas.getContext("2d");
    for (let i = 0; i < size; i += 1) {
      const share = (values[i] - config.low) / (config.high - config.low);
      const grey = Math.round(255 * Math.min(1, Math.max(0, share)));
      pen.fillStyle = `rgb(${grey}, ${grey}, ${grey})`;
      pen.fillRect((i % columns) * cell, Math.floor(i / columns) * cell, cell, cell);
    }
    if (cursor.isShown) {
      pen.strokeStyle = style("--accent");
      pen.lineWidth = 3;
      pen.strokeRect(cursor.column * cell + 2, cursor.row * cell + 2, cell - 4, cell - 4);
    }
  }

  function touch(row, column, amount) {
    const [rows, columns] = config.image;
    if (row < 0 || column < 0 || row >= rows || column >= columns) return;
    const i = row * columns + column;
    const next = values[i] + amount * (config.high - config.low);
    values[i] = Math.min(config.high, Math.max(config.low, next));
  }

  function brush(x, y) {
    const [rows, columns] = config.image;
    const box = element("drawing").getBoundingClientRect();
    const across = ((x - box.left) / box.width) * columns - 0.5;
    const down = ((y - box.top) / box.height) * rows - 0.5;
    const reach = Math.max(1, Math.round(Math.min(rows, columns) / 12));
    for (let row = Math.round(down) - reach; row <= Math.round(down) + reach; row += 1) {
      for (let column = Math.round(across) - reach; column <= Math.round(across) + reach; column += 1) {
        const distance = Math.hypot(row - down, column - across) / reach;
        touch(row, column, Math.max(0, 0.6 - 0.55 * distance));
      }
    }
    paint();
    update();
  }

  function onKey(event) {
    const [rows, columns] = config.image;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (moves[event.key]) {
      cursor.row = Math.min(rows - 1, Math.max(0, cursor.row + moves[event.key][0]));
      cursor.column = Math.min(columns - 1, Math.max(0, cursor.column + moves[event.key][1]));
    } else if (event.key === " " || event.key === "Enter") {
      touch(cursor.row, cursor.column, 1);
    } else if (event.key === "Delete" || event.key === "Backspace") {
      touch(cursor.row, cursor.column, -1);
    } else {
      return;
    }
    event.preventDefault();
    paint();
    update();
  }

  function makeDrawing() {
    const canvas = element("drawing");
    let isDown = false;
    let last = null;
    const draw = (event) => {
      if (last) {  // between two events of a fast pointer
        const steps = Math.ceil(Math.hypot(event.clientX - last[0], event.clientY - last[1]) / 8);
        for (let i = 1; i < steps; i += 1) {
          brush(last[0] + ((event.clientX - last[0]) * i) / steps, last[1] + ((event.clientY - last[1]) * i) / steps);
        }
      }
      brush(event.clientX, event.clientY);
      last = [event.clientX, event.clientY];
    };
    canvas.addEventListener("pointerdown", (event) => {
      isDown = true;
      last = null;
      canvas.setPointerCapture(event.pointerId);
      draw(event);
    });
    canvas.addEventListener("pointermove", (event) => { if (isDown) draw(event); });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { isDown = false; });
    canvas.addEventListener("keydown", onKey);
    canvas.addEventListener("focus", () => { cursor.isShown = canvas.matches(":focus-visible"); paint(); });
    canvas.addEventListener("blur", () => { cursor.isShown = false; paint(); });
    element("clear").addEventListener("click", () => setAll(new Float32Array(size).fill(config.low)));
    element("noise").addEventListener("click", () => {
      setAll(Float32Array.from({ length: size }, () => config.low + Math.random() * (config.high - config.low)));
    });
    paint();
  }

  if (config.classes) makeClasses();
  if (config.image) makeDrawing(); else makeSliders();
  if (config.examples.length) makeExamples();
  const again = () => { if (window.APD.result) { config.classes ? renderClasses(window.APD.result) : renderReal(window.APD.result); } };
  window.addEventListener("resize", again);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  window.APD.values = values;
  load().catch((error) => show(`The model cannot be loaded in this browser: ${error.message}`));
})();
