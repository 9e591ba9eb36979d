"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const last = data.steps.length - 1;
const state = { model: last, sentence: 0, below: "best", word: -1 };
const LEVEL = 25, HIGHEST_LEVEL = 34, ROW = 44, EDGE = 16;
const STRONGEST = 2, SMALLEST = 0.05, SMALLEST_OF_WORD = 0.01;

const element = (id) => document.getElementById(id);
const node = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const headName = ([layer, head]) => `${layer}-${head}`;
const percent = (share) => `${Math.round(100 * share)} %`;
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

const ruler = document.createElement("canvas").getContext("2d");
function textWidth(text, size) {
  ruler.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
  return ruler.measureText(text).width;
}

// --- What the data say ------------------------------------------------------------------------------------------------

const sentence = () => data.sentences[state.sentence];

/** What was found for each word that counts: {word, head, gold, right, weight, best: [layer, head, direction, …]}. */
function findings() {
  const { heads, relation } = sentence();
  const found = data.predictions[state.model][state.sentence];
  return found.head.flatMap((head, word) => head < 0 ? [] : [{
    word, head, gold: heads[word], right: head === heads[word], weight: found.weight[word] / 1000,
    level: found.level[word], best: data.relations[relation[word]].best[state.model],
  }]);
}

/** share(i, j): how much of word i's attention the chosen head gives word j; j = number of words: [CLS] and [SEP]. */
function attention(number) {
  const bytes = atob(data.attention[state.model][state.sentence]);
  const words = sentence().words.length;
  return (i, j) => bytes.charCodeAt((number * words + i) * (words + 1) + j) / 255;
}

const joined = (i, j) => sentence().heads[i] === j || sentence().heads[j] === i;

// --- The sentence and its arcs ------------------------------------------------------------------------------------------

/** Middles of the words; wide enough for the labels between neighbours, and the same at every step. */
function layout() {
  const { words, heads, relns } = sentence();
  const widths = words.map((word) => textWidth(word, 17) + 12);
  const middle = [EDGE + Math.max(widths[0] / 2, 24)];
  for (let i = 1; i < words.length; i++) {
    const between = [i, i - 1].filter((word) => heads[word] === 2 * i - 1 - word);
    const label = Math.max(46, ...between.map((word) => textWidth(relns[word], 12) + 26));
    middle.push(middle[i - 1] + Math.max((widths[i - 1] + widths[i]) / 2 + 12, label));
  }
  return { middle, widths, width: middle.at(-1) + Math.max(widths.at(-1) / 2, 24) + EDGE };
}

/** An arc with corners from `from` to `to`, `height` from the words; `up` is -1 above the words and 1 below them. */
function bracket(from, to, y, height, up) {
  const side = to > from ? 4 : -4; // a word's own arc and those to its dependents begin a little apart
  const a = from + side, b = to - side, turn = a < b ? 7 : -7, top = y + up * height;
  return {
    path: `M${a} ${y}V${top - up * 7}Q${a} ${top} ${a + turn} ${top}H${b - turn}Q${b} ${top} ${b} ${top - up * 7}V${y + up * 6}`,
    tip: `M${b} ${y}l-4 ${up * 8}h8z`, x: (a + b) / 2, y: top + 4,
  };
}

function arc(kind, shape, label, tip, owners) {
  const group = svg("g", { class: `arc ${kind}`, "data-tip": tip, "data-words": owners.join(" ") },
    svg("path", { class: "line", d: shape.path }), svg("path", { class: "tip", d: shape.tip }),
    svg("path", { class: "reach", d: shape.path }));
  if (label) group.append(svg("text", { x: shape.x, y: shape.y }, label));
  return group;
}

function drawSentence() {
  const { words, heads, relns, level, counts } = sentence();
  const { middle, widths, width } = layout();
  const above = LEVEL * (Math.max(1, ...level) + 0.6);
  // The same room below at every step, or the page would jump; where many arcs need it they lie closer.
  const deepest = Math.max(3, ...data.predictions.flatMap((of) => of[state.sentence].level));
  const below = LEVEL * (Math.min(deepest, Math.max(7, ...level)) + 0.8);
  const picture = element("arcs");
  picture.setAttribute("width", Math.ceil(width));
  picture.setAttribute("height", above + ROW + below);
  picture.replaceChildren();
  heads.forEach((head, word) => {
    if (head < 0) return;
    const tip = `${relns[word]}: ${words[head]} → ${words[word]}${counts[word] ? "" : "\n(does not count)"}`;
    const shape = bracket(middle[head], middle[word], above, LEVEL * level[word], -1);
    picture.append(arc(`gold${counts[word] ? "" : " uncounted"}`, shape, relns[word], tip, [word]));
  });
  if (state.below === "best") drawFindings(picture, middle, above + ROW, below);
  else drawShares(picture, middle, above + ROW, below);
  words.forEach((word, index) => {
    const tip = describeWord(index);
    picture.append(svg("g", { tabindex: 0, role: "img", "data-word": index, "data-tip": tip, "aria-label": tip },
      svg("rect", { class: "plate", x: middle[index] - widths[index] / 2, y: above + 6, width: widths[index],
        height: ROW - 12, rx: 6 }),
      svg("text", { class: "word", x: middle[index], y: above + ROW / 2 + 6 }, word)));
  });
  dim();
}

function drawFindings(picture, middle, y, depth) {
  const { words, relns } = sentence();
  const all = findings(), space = Math.min(HIGHEST_LEVEL, (depth - 20) / Math.max(1, ...all.map((one) => one.level)));
  for (const found of all) {
    const name = headName(found.best);
    const tip = `${relns[found.word]}: ${words[found.head]} → ${words[found.word]}, ${found.right ? "right" :
      `wrong: the tree has ${words[found.gold]}`}\nhead ${name}, ${found.best[2]}, attention ${percent(found.weight)}`;
    const shape = bracket(middle[found.head], middle[found.word], y, space * found.level, 1);
    picture.append(arc(found.right ? "right" : "wrong", shape, found.right ? name : `✗ ${name}`, tip, [found.word]));
  }
}

function drawShares(picture, middle, y, depth) {
  const { words } = sentence();
  const share = attention(Number(state.below));
  const name = headName(data.heads[state.below]);
  const farthest = Math.max(1, middle.at(-1) - middle[0]);
  words.forEach((word, i) => {
    const others = words.map((_, j) => j).filter((j) => j !== i).sort((a, b) => share(i, b) - share(i, a));
    const drawn = i === state.word ? others.filter((j) => share(i, j) >= SMALLEST_OF_WORD)
      : others.slice(0, STRONGEST).filter((j) => share(i, j) >= SMALLEST);
    for (const j of drawn) {
      const side = middle[j] > middle[i] ? 4 : -4;
      const a = middle[i] + side, b = middle[j] - side;
      const deep = Math.min(depth - 10, 18 + (depth - 28) * Math.sqrt(Math.abs(a - b) / farthest)) / 0.75;
      const made = arc(`share ${joined(i, j) ? "right" : "wrong"}`, {
        path: `M${a} ${y}C${a} ${y + deep} ${b} ${y + deep} ${b} ${y + 6}`, tip: `M${b} ${y}l-4 8h8z`,
      }, "", `${word} attends to ${words[j]}: ${percent(share(i, j))}\nhead ${name}${joined(i, j) ?
        ", joined in the tree" : ""}`, [i]);
      made.style.setProperty("--w", `${(0.6 + 9 * share(i, j)).toFixed(1)}px`);
      picture.append(made);
    }
  });
}

/** A word's numbers, for its tooltip and for screen readers. */
function describeWord(index) {
  const { words, heads, relns } = sentence();
  const lines = [heads[index] < 0 ? `${words[index]}: ${relns[index]}` :
    `${words[index]}: ${relns[index]} of ${words[heads[index]]}`];
  if (state.below === "best") {
    const found = findings().find((one) => one.word === index);
    lines.push(!found ? "does not count" : `${found.right ? "right" : "wrong"}: head ${headName(found.best)} takes ` +
      `${words[found.head]} for its head (${percent(found.weight)})`);
  } else {
    const share = attention(Number(state.below));
    const order = words.map((_, j) => j).sort((a, b) => share(index, b) - share(index, a)).slice(0, 4);
    lines.push(`attends to [CLS] and [SEP]: ${percent(share(index, words.length))}`,
      ...order.filter((j) => share(index, j) >= SMALLEST_OF_WORD)
        .map((j) => `to ${j === index ? "itself" : words[j]}: ${percent(share(index, j))}`));
  }
  return lines.join("\n");
}

/** With a word in focus, the arcs that are not its own step back. */
function dim() {
  for (const group of element("arcs").querySelectorAll(".arc"))
    group.classList.toggle("dimmed", state.word >= 0 && !group.dataset.words.split(" ").includes(String(state.word)));
  for (const group of element("arcs").querySelectorAll("[data-word]"))
    group.classList.toggle("hot", Number(group.dataset.word) === state.word);
}

// --- Text and tables ----------------------------------------------------------------------------------------------------

function drawScore() {
  const found = findings(), right = found.filter((one) => one.right).length;
  const where = last > 0 ? ` at step ${data.steps[state.model].toLocaleString("en")}` : "";
  if (state.below === "best") {
    element("score").replaceChildren(node("b", {}, `${right} of ${found.length}`),
      ` arcs of this sentence found by the best heads${where}`);
  } else {
    const place = headName(data.heads[state.below]);
    const serves = data.relations.filter((one) => headName(one.best[state.model]) === place).map((one) => one.name);
    element("score").replaceChildren(node("b", {}, `head ${place}`), where,
      serves.length ? `: the best one for ${serves.join(", ")}` : ": the best one for none of these relations");
  }
  element("arcs").setAttribute("aria-label", `${sentence().words.join(" ")} – ${element("score").textContent}`);
  const shares = state.below !== "best";
  element("key").replaceChildren(
    sample("gold", "tree"),
    sample("right", shares ? "attention between words that the tree joins" : "found, right"),
    sample("wrong", shares ? "other attention" : "✗ found, wrong"));
}

function sample(kind, text) {
  return node("li", {}, svg("svg", { "aria-hidden": "true" },
    svg("g", { class: `arc ${kind}` }, svg("path", { d: "M1 5H29" }))), text);
}

function drawRelations() {
  const present = new Set(sentence().relation);
  element("relations").tBodies[0].replaceChildren(...data.relations.map((one, number) => {
    const [layer, head, direction, accuracy] = one.best[state.model];
    const settled = headName(one.best[last]) === headName([layer, head]);
    const bar = node("span", { class: "bar" }, node("i", { style: `width: ${100 * accuracy}%` }),
      node("b", { style: `left: ${100 * one.baseline}%` }));
    const row = node("tr", { class: present.has(number) ? "here" : "", "data-tip":
      `${one.name}: ${plural(one.edges, "edge")}\nbest head ${layer}-${head} ${direction}: ${percent(accuracy)}\n` +
      `best fixed offset (${one.offset > 0 ? "+" : "−"}${Math.abs(one.offset)}): ${percent(one.baseline)}` },
      node("th", { scope: "row" }, one.name),
      node("td", { class: settled ? "settled" : "" }, `${layer}-${head}`), node("td", {}, direction),
      node("td", { class: "measure" }, bar, accuracy.toFixed(2)));
    return row;
  }));
}

function drawWords() {
  const { words, heads, relns } = sentence();
  const found = new Map(findings().map((one) => [one.word, one]));
  element("words").tBodies[0].replaceChildren(...words.map((word, index) => {
    const one = found.get(index);
    const cells = [relns[index], heads[index] < 0 ? "–" : words[heads[index]], ...(one ? [words[one.head],
      `${headName(one.best)} ${one.best[2]}`, one.weight.toFixed(2), one.right ? "yes" : "no"] : ["–", "–", "–", "–"])];
    return node("tr", { class: one ? "" : "absent" }, node("th", { scope: "row" }, word),
      ...cells.map((text) => node("td", {}, text)));
  }));
}

// --- Curves ---------------------------------------------------------------------------------------------------------------

/** Round numbers that cover [low, high], about `count` of them. */
function ticks(low, high, count) {
  const raw = (high - low) / count || 1, unit = 10 ** Math.floor(Math.log10(raw));
  const stride = [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= raw * 0.999);
  const first = Math.ceil(low / stride - 1e-9), found = [];
  for (let k = first; k * stride <= high + stride * 1e-6; k++) found.push(Number((k * stride).toPrecision(12)));
  return found;
}

function panels() {
  const own = data.steps.map((step, index) => [step, data.uas[index]]);
  const recorded = data.curves;
  return [
    { name: "UAS", line: recorded.uas.length ? recorded.uas : own, dots: own, baseline: data.uasBaseline },
    { name: "MLM loss", line: recorded.loss, dots: [] },
    { name: "BLiMP", line: recorded.blimp, dots: [] },
  ].filter((panel) => panel.line.length > 1);
}

let toStep = () => 0; // from a place in the curves, in pixels, to a step

function drawCurves() {
  const shown = panels(), picture = element("curves");
  const width = Math.max(200, Math.floor(picture.getBoundingClientRect().width));
  const left = 42, right = 14, high = 128, gap = 34, bottom = 26;
  const all = shown.flatMap((panel) => panel.line.map(([step]) => step)).concat(data.steps);
  const first = Math.min(...all), end = Math.max(...all, first + 1);
  const x = (step) => left + (width - left - right) * (step - first) / (end - first);
  toStep = (pixels) => first + (pixels - left) / (width - left - right) * (end - first);
  const height = shown.length * (high + gap) + bottom;
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.setAttribute("height", height);
  picture.replaceChildren();
  const here = data.steps[state.model], said = [];
  const marker = svg("line", { class: "marker", "data-step": here, x1: x(here), x2: x(here), y1: 8, y2: height - bottom });
  picture.append(marker);
  shown.forEach((panel, number) => {
    const top = number * (high + gap) + gap - 6, values = panel.line.concat(panel.dots).map(([, value]) => value);
    if (panel.baseline !== undefined) values.push(panel.baseline);
    const low = Math.min(...values), span = Math.max(...values) - low || 1;
    const y = (value) => top + high - high * (value - (low - 0.06 * span)) / (1.14 * span);
    for (const tick of ticks(low, low + span, 3))
      picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
        svg("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, tick));
    picture.append(svg("text", { class: "name", x: left, y: top - 6 }, panel.name));
    if (panel.baseline !== undefined)
      picture.append(svg("line", { class: "baseline", x1: left, x2: width - right, y1: y(panel.baseline),
        y2: y(panel.baseline) }), svg("text", { x: left + 4, y: y(panel.baseline) + 14 }, "fixed offsets"));
    const points = panel.line.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    picture.append(svg("polyline", { class: "line", points }));
    for (const [step, value] of panel.dots)
      if (step !== here) picture.append(svg("circle", { class: "dot", cx: x(step), cy: y(value), r: 3 }));
    const now = (panel.dots.length ? panel.dots : panel.line).find(([step]) => step === here);
    if (now) {
      const text = now[1].toFixed(panel.name === "MLM loss" ? 2 : 3), before = x(here) > width - 70;
      picture.append(svg("circle", { class: "dot here", cx: x(here), cy: y(now[1]), r: 5 }),
        svg("text", { class: "value", x: x(here) + (before ? -9 : 9), y: Math.max(top + 10, y(now[1]) - 7),
          "text-anchor": before ? "end" : "start" }, text));
      said.push(`${panel.name} ${text}`);
    }
  });
  for (const tick of ticks(first, end, Math.max(2, Math.floor(width / 110))))
    picture.append(svg("text", { x: Math.min(x(tick), width - 22), y: height - 6, "text-anchor": "middle" },
      tick.toLocaleString("en")));
  picture.setAttribute("aria-label", `Curves over training; at step ${here}: ${said.join(", ")}`);
}

// --- State: controls, address, keys -----------------------------------------------------------------------------------------

function draw() {
  const step = data.steps[state.model];
  element("step").value = state.model;
  element("step").setAttribute("aria-valuetext", `step ${step}`);
  element("place").textContent = `step ${step.toLocaleString("en")}`;
  element("place").title = data.names[state.model];
  element("sentence").value = state.sentence;
  element("below").value = state.below;
  element("back").disabled = state.model === 0;
  element("forward").disabled = state.model === last;
  hideTip();
  drawSentence();
  drawScore();
  drawRelations();
  drawWords();
  if (!element("training").hidden) drawCurves();
}

let pending = 0;
/** Change the state and draw; the address follows a moment later, since browsers limit how often it may change. */
function change(changes) {
  Object.assign(state, { word: -1 }, changes);
  state.model = Math.min(Math.max(state.model, 0), last);
  draw();
  clearTimeout(pending);
  pending = setTimeout(() => history.replaceState(null, "", fragment()), 100);
}

const fragment = () => `#step=${data.steps[state.model]}&sentence=${state.sentence + 1}&below=${
  state.below === "best" ? "best" : headName(data.heads[state.below])}`;

/** Take the state from the address; what it does not say, or says wrongly, stays as it is. */
function readFragment() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const model = data.steps.indexOf(Number(asked.get("step") || NaN));
  const number = Number(asked.get("sentence")) - 1;
  const head = data.heads.findIndex((place) => headName(place) === asked.get("below"));
  if (model >= 0) state.model = model;
  if (Number.isInteger(number) && number >= 0 && number < data.sentences.length) state.sentence = number;
  if (head >= 0) state.below = String(head);
  else if (asked.get("below") === "best") state.below = "best";
  state.word = -1;
}

let timer = 0;
function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => state.model < last ? change({ model: state.model + 1 }) : play(false), 700) : 0;
  element("play").textContent = on ? "Pause" : "Play";
}

function nearest(step) {
  return data.steps.reduce((best, one, index) =>
    Math.abs(one - step) < Math.abs(data.steps[best] - step) ? index : best, 0);
}

function showTip(target, x, y) {
  const tip = element("tip");
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - box.width - 6))}px`;
  const above = "word" in target.dataset || y + 18 + box.height > innerHeight; // below a word are its arcs
  tip.style.top = `${above ? Math.max(6, y - box.height - 14) : y + 18}px`;
}
function hideTip() { element("tip").hidden = true; }

function setWord(word) {
  if (word === state.word) return;
  state.word = word;
  if (state.below === "best") return dim();
  const focused = document.activeElement?.dataset?.word; // drawing anew must not lose the keyboard's place
  drawSentence();
  if (focused !== undefined) element("arcs").querySelector(`[data-word="${focused}"]`)?.focus();
}

function listen() {
  element("step").addEventListener("input", (event) => { play(false); change({ model: Number(event.target.value) }); });
  element("sentence").addEventListener("change", (event) => change({ sentence: Number(event.target.value) }));
  element("below").addEventListener("change", (event) => change({ below: event.target.value }));
  element("back").addEventListener("click", () => { play(false); change({ model: state.model - 1 }); });
  element("forward").addEventListener("click", () => { play(false); change({ model: state.model + 1 }); });
  element("play").addEventListener("click", () => {
    const on = !timer;
    if (on && state.model === last) change({ model: 0 });
    play(on);
  });
  const pick = (event) => {
    const box = element("curves").getBoundingClientRect();
    const scale = element("curves").viewBox.baseVal.width / box.width;
    play(false);
    change({ model: nearest(toStep((event.clientX - box.left) * scale)) });
  };
  element("curves").addEventListener("pointerdown", pick);
  element("curves").addEventListener("pointermove", (event) => { if (event.buttons & 1) pick(event); });
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("select, input") || event.altKey || event.ctrlKey || event.metaKey) return;
    const to = { ArrowLeft: state.model - 1, ArrowRight: state.model + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hideTip();
    if (to === undefined || last === 0) return;
    event.preventDefault();
    play(false);
    change({ model: to });
  });
  document.addEventListener("pointerover", (event) => {
    const target = event.target.closest("[data-tip]");
    if (event.target.closest("#arcs")) setWord(Number(event.target.closest("[data-word]")?.dataset.word ?? -1));
    if (target) showTip(target, event.clientX, event.clientY);
    else hideTip();
  });
  element("arcs").addEventListener("pointerleave", () => setWord(-1));
  const around = element("arcs").parentElement; // Chromium lets an SVG with listeners for the focus take the focus itself
  around.addEventListener("focusin", (event) => {
    const target = event.target.closest("[data-word]");
    if (!target?.matches(":focus-visible")) return;
    setWord(Number(target.dataset.word));
    const now = element("arcs").querySelector(`[data-word="${state.word}"]`), box = now.getBoundingClientRect();
    showTip(now, box.left, box.top);
  });
  around.addEventListener("focusout", (event) => {
    if (event.relatedTarget && !event.relatedTarget.closest("#arcs")) { hideTip(); setWord(-1); }
  });
  addEventListener("hashchange", () => { readFragment(); draw(); });
  addEventListener("resize", () => { if (!element("training").hidden) drawCurves(); });
}

function begin() {
  const { treebank, sources } = data;
  const models = last > 0 ? `${sources.models}, steps ${data.steps[0].toLocaleString("en")} to ${
    data.steps[last].toLocaleString("en")}` : data.names[0];
  element("lead").textContent = `${models}${data.schedule ? `; λ = ${data.schedule}` : ""}. Sentences: ${
    sources.sentences}, ${sources.trees}.`;
  element("sentence").append(...data.sentences.map((one, index) =>
    node("option", { value: index }, `${index + 1}. ${one.words.join(" ")}`)));
  const roles = (place) => data.relations.filter((one) => headName(one.best[last]) === headName(place)).map((r) => r.name);
  element("below").append(node("option", { value: "best" }, "what the best heads find"),
    node("optgroup", { label: "all attention of one head" }, ...data.heads.map((place, index) =>
      node("option", { value: index }, `head ${headName(place)} (${roles(place).join(", ")})`))));
  element("step").max = last;
  element("stepper").hidden = last === 0;
  if (last === 0) element("stepper").style.display = "none";
  const cautions = [];
  if (treebank.own) cautions.push("The best heads were chosen on the sentences shown themselves " +
    `(${plural(treebank.sentences, "sentence")}, ${plural(treebank.edges, "edge")}): with so few, some head is always right by chance. Choose them ` +
    "on a treebank (--treebank) before concluding anything.");
  if (data.missing.length) cautions.push(`No best head for ${data.missing.join(", ")}: ${treebank.name} has no such ` +
    "edges. Does it follow another scheme than these trees?");
  element("caution").hidden = cautions.length === 0;
  element("caution").textContent = cautions.join(" ");
  const on = treebank.own ? "the sentences shown" : `${plural(treebank.sentences, "sentence")} of ${treebank.name}`;
  element("relations-note").textContent = `Chosen on ${on}${last > 0 ? " at each step. Bold: the head that is best at the " +
    "last step too" : ""}. Line across the bar: the best fixed offset. Shaded: relations of this sentence.`;
  element("training").hidden = panels().length === 0;
  element("training").parentElement.classList.toggle("alone", panels().length === 0);
  element("curves-note").textContent = data.curves.uas.length ?
    `Lines: recorded while training. Points: the models of this page, on ${on}. Click to go to a model.` :
    `UAS of the models of this page, on ${on}. Click to go to a model.`;
  readFragment();
  listen();
  draw();
}

begin();
})();
