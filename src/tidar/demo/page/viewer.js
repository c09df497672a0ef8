"use strict";
// Shows runs: one that is in this file, or one that live.js is being told of. Text is only ever set as text.

const $ = (id) => document.getElementById(id);

function make(tag, name = "", text = "", children = []) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== "") element.textContent = text;
  element.append(...children);
  return element;
}

const percent = (p) => (p == null ? "–" : p > 0.995 && p < 1 ? ">99%" : p > 0 && p < 0.005 ? "<1%" : `${Math.round(p * 100)}%`);
const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
const ordinal = (n) => n + (n % 100 > 10 && n % 100 < 14 ? "th" : { 1: "st", 2: "nd", 3: "rd" }[n % 10] || "th");
const spell = (text, id) => (text === "" ? `⟨${id}⟩` : text.replaceAll("\n", "↵").replaceAll("\t", "⇥"));
const inRow = (text, id) => (text.trim() || text === "" || /[\n\t]/.test(text) ? spell(text, id).trim() : "·".repeat(text.length));

const SOURCES = {
  first: "the prefill's token",
  plain: "plain decoding",
  draft: "a draft that stood",
  leaf: "an alternative that was right",
  correction: "the verifier's correction",
  bonus: "the verifier's bonus",
};
const MARKS = { known: "decided before", stood: "stands", fell: "falls", behind: "not reached", none: "empty slot" };

/* A run, as events tell it ---------------------------------------------------------------------------------------- */

const newRun = () => ({ mode: "", prompt: [], layouts: [], steps: [], ended: false });

function absorb(run, event) {
  if (event.event === "layout") run.layouts.push(event);
  else if (event.event === "step") run.steps.push(event);
  else if (event.event === "discarded") run.steps[event.index].outcomes = event.outcomes;
  else if (event.event === "start" || event.event === "end") Object.assign(run, event, { ended: event.event === "end" });
}

/** What a run had said after `time` seconds. */
function progress(run, time) {
  const steps = run.steps.filter((step) => step.at <= time);
  const tokens = steps.reduce((sum, step) => sum + step.tokens.length, 0);
  const seconds = steps.length ? steps.at(-1).at : 0;
  return { forwards: steps.length, tokens, seconds };
}

const length = (run) => (run && run.steps.length ? run.steps.at(-1).at : 0);

/* A lane: one answer, its tokens coloured by the forward that committed them -------------------------------------- */

class Lane {
  constructor(root, onPick) {
    this.root = root;
    this.onPick = onPick;
    this.name = make("h2");
    this.speed = make("div", "speed");
    this.facts = make("p", "facts");
    this.bar = make("i");
    this.answer = make("div", "answer");
    this.answer.setAttribute("role", "group");
    this.legend = make("p", "legend");
    const track = make("div", "track", "", [this.bar]);
    root.replaceChildren(track, make("header", "", "", [this.name, this.speed]), this.facts, this.answer, this.legend);
    this.spans = [];
    this.run = null;
    this.answer.addEventListener("pointerover", (e) => this.point(e.target));
    this.answer.addEventListener("pointerleave", hideTip);
    this.answer.addEventListener("focusin", (e) => this.point(e.target));
    this.answer.addEventListener("focusout", hideTip);
    this.answer.addEventListener("click", (e) => this.pick(e.target));
    this.answer.addEventListener("keydown", (e) => this.walk(e));
  }

  begin(run) {
    this.run = run;
    this.spans = [];
    this.answer.replaceChildren();
    this.legend.replaceChildren();
    this.answer.setAttribute("aria-label", run.mode === "ar" ? "Plain AR answer" : "TiDAR answer");
  }

  /** Put down the tokens of steps that are new. */
  grow() {
    const done = this.spans.length ? this.spans.at(-1).step + 1 : 0;
    for (const step of this.run.steps.slice(done)) {
      step.tokens.forEach((token, place) => this.add(step, token, place));
      if (step.tokens.length) this.spans.at(-1).span.classList.add("last");
    }
  }

  add(step, token, place) {
    const span = make("span", `token c${step.index % 6} ${token.source}`, token.piece);
    if (["correction", "bonus", "plain", "first"].includes(token.source) && this.run.mode !== "ar") span.classList.add("verifier");
    if (token.piece === "" && /^<.*>$/.test(token.text)) {
      span.textContent = token.text;
      span.classList.add("special");
    }
    if (!place) span.classList.add("begin");
    span.tabIndex = this.spans.length ? -1 : 0;
    this.spans.push({ span, step: step.index, at: step.at, token, place });
    this.answer.append(span);
  }

  show(time, selected) {
    for (const { span, step, at } of this.spans) {
      span.classList.toggle("ahead", at > time);
      span.classList.toggle("chosen", step === selected);
    }
    const { forwards, tokens, seconds } = progress(this.run, time);
    const all = progress(this.run, Infinity).tokens;
    this.name.textContent = this.run.mode === "ar" ? "Plain AR" : "TiDAR";
    const rate = seconds ? tokens / seconds : 0;
    this.speed.replaceChildren(rate ? rate.toFixed(rate < 100 ? 1 : 0) : "–", make("small", "", "tokens/s"));
    const facts = [count(tokens, "token"), count(forwards, "forward"), `${seconds.toFixed(2)} s`];
    if (forwards) facts.splice(2, 0, `${(tokens / forwards).toFixed(2)} tokens per forward`);
    this.facts.textContent = forwards || this.run.ended ? facts.join(" · ") : this.run.steps.length ? "not yet begun" : this.run.waits || "";
    const whole = this.run.ended ? all : Math.max(all, this.run.expected || 1);
    this.bar.style.width = `${whole ? (100 * tokens) / whole : 0}%`;
    this.follow(this.spans.findLast(({ at }) => at <= time));
  }

  /** Keep the newest tokens of a long answer in sight, without moving the page. */
  follow(newest) {
    if (!newest) return;
    const top = newest.span.offsetTop - this.answer.offsetTop;
    const least = top + newest.span.offsetHeight - this.answer.clientHeight;
    this.answer.scrollTop = Math.min(top, Math.max(least, this.answer.scrollTop));
  }

  point(target) {
    const found = this.spans.find((entry) => entry.span === target);
    if (found) showTip(target, describe(found, this.run));
  }

  pick(target) {
    const found = this.spans.find((entry) => entry.span === target);
    if (!found) return;
    this.focus(found.span);
    this.onPick(found.step);
    showTip(target, describe(found, this.run));
  }

  focus(span) {
    for (const entry of this.spans) entry.span.tabIndex = entry.span === span ? 0 : -1;
    span.focus({ preventScroll: true });
  }

  walk(event) {
    const index = this.spans.findIndex((entry) => entry.span === event.target);
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: this.spans.length - 1 }[event.key];
    const chosen = index >= 0 && (event.key === "Enter" || event.key === " ");
    if (to === undefined && !chosen) return;
    event.preventDefault();
    event.stopPropagation();
    const entry = this.spans[to ?? index];
    if (!entry) return;
    this.onPick(entry.step);
    this.focus(entry.span);
    entry.span.scrollIntoView({ block: "nearest" });
    this.point(entry.span);
  }
}

/** What the card of a token says: a name, and pairs. */
function describe({ token, step, place }, run) {
  const rows = [
    ["committed by", `forward ${step + 1} of ${run.steps.length}`],
    ["as", SOURCES[token.source]],
    ["drafter", percent(token.confidence)],
    ["AR", percent(token.ar)],
  ];
  const draft = token.source === "draft" ? run.steps[step].drafts[place + 1] : null;
  if (draft && draft.odds != null) rows.push(["stands with", percent(draft.odds)]);
  return { name: spell(token.text, token.id).replace(/^ +| +$/g, (s) => "·".repeat(s.length)), rows };
}

function showTip(target, { name, rows }) {
  const tip = $("tip");
  const list = make("dl");
  for (const [term, value] of rows) list.append(make("dt", "", term), make("dd", "", value));
  tip.replaceChildren(make("b", "", name), list);
  tip.hidden = false;
  tip.target = target;
  target.setAttribute("aria-describedby", "tip");
  placeTip();
}

/** Beside its token; away once that has been scrolled out of sight. */
function placeTip() {
  const tip = $("tip");
  if (tip.hidden) return;
  const box = tip.target.getClientRects()[0] || tip.target.getBoundingClientRect();
  if (box.bottom < 0 || box.top > innerHeight) return hideTip();
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight - 70;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - tip.offsetHeight - 8)}px`;
}

function hideTip() {
  $("tip").hidden = true;
}

/* The selected forward -------------------------------------------------------------------------------------------- */

function story(step, run) {
  const parts = [];
  const say = (...pieces) => parts.push(...pieces);
  const quote = (token) => make("q", "", inRow(token.text, token.id));
  const likely = (token) => ` (AR ${percent(token.ar)})`;
  const real = step.drafts.filter((draft) => draft.verdict !== "none").length;
  const chosen = step.outcomes.find((outcome) => outcome.chosen);
  if (step.index === 0) {
    say(`The prefill reads ${count(run.prompt.length, "token")} of prompt and says the first token of the answer, `, quote(step.next), likely(step.next), ".");
  } else if (step.next.source === "plain") {
    say("Plain decoding: one token in, one token out, ", quote(step.next), likely(step.next), ".");
  } else if (real === 1) {
    say("Nothing had been drafted for this forward. It says ", quote(step.next), likely(step.next), ".");
  } else if (step.next.source === "correction") {
    const fallen = step.drafts[step.accepted];
    say(`${step.accepted} of ${count(real, "draft")} ${step.accepted === 1 ? "stands" : "stand"}. The ${ordinal(step.accepted + 1)}, `, quote(fallen), ` (AR ${percent(fallen.ar)}), falls; the verifier says `, quote(step.next), likely(step.next), " instead.");
  } else {
    say(`All ${real} drafts stand, and the verifier adds one more: `, quote(step.next), likely(step.next), ".");
  }
  const hit = step.leaves.find((leaf) => leaf.hit);
  if (hit) say(" An alternative carried that token, so the one after it is known as well.");
  if (chosen && step.outcomes.length > 1) say(` The block drafted for “${chosen.accepted} ${chosen.accepted === 1 ? "stands" : "stand"}” goes on; ${count(step.outcomes.length - 1, "other")} ${step.outcomes.length === 2 ? "is" : "are"} thrown away.`);
  if (step.next.source !== "plain" && step.index > 0 && !chosen && step.outcomes.length) say(" No block had been drafted for that.");
  if (step.tokens.length < step.accepted + (step.index === 0)) say(" The answer ends inside what it gained.");
  return make("p", "story", "", parts);
}

function bars(draft) {
  const box = make("span", "bars");
  for (const [name, value] of [["drafter", draft.confidence], ["AR", draft.ar]]) {
    const bar = make("i", name === "AR" ? "ar" : "");
    bar.style.setProperty("--p", `${100 * (value ?? 0)}%`);
    box.append(make("span", "", name), bar, make("span", "", percent(value)));
  }
  return box;
}

function chip(name, token, mark, more) {
  const parts = [make("b", "", inRow(token.text, token.id)), make("span", "mark", mark)];
  if (more) parts.push(more);
  return make("li", `chip ${name}`, "", parts);
}

function wentIn(step) {
  const list = make("ul", "chips");
  for (const draft of step.drafts) {
    const judged = draft.verdict !== "known" && draft.verdict !== "none";
    list.append(draft.verdict === "none" ? chip("none", { text: "–", id: 0 }, MARKS.none) : chip(draft.verdict, draft, MARKS[draft.verdict], judged ? bars(draft) : null));
  }
  return list;
}

function cameOut(step) {
  const list = make("ul", "chips");
  for (const token of step.tokens) list.append(chip(["draft", "leaf"].includes(token.source) ? "stood" : "out", token, { draft: "draft", leaf: "alternative", plain: `AR ${percent(token.ar)}` }[token.source] || `${token.source} · AR ${percent(token.ar)}`));
  return list;
}

function leaves(step) {
  const list = make("ul", "chips");
  for (const leaf of [...step.leaves].reverse()) list.append(chip(leaf.hit ? "stood" : "behind", leaf, leaf.hit ? "right" : `for draft ${leaf.after + 2}`));
  return list;
}

function blocks(step) {
  const list = make("ol", "blocks");
  for (const outcome of step.outcomes) {
    const text = make("span", "text");
    (outcome.tokens || []).forEach((token, place) => text.append(make("span", place ? "" : "given", spell(token.text, token.id))));
    if (!outcome.tokens) text.textContent = "told when the run has ended";
    const name = step.index ? `if ${outcome.accepted} ${outcome.accepted === 1 ? "stands" : "stand"}` : "after the prompt";
    const share = make("span", "share", outcome.probability == null ? "" : percent(outcome.probability));
    list.append(make("li", outcome.chosen ? "right" : "", "", [make("span", "", name), share, text]));
  }
  return list;
}

function showStep(step, run) {
  const title = make("h2", "", "", [`Forward ${step.index + 1} of ${run.steps.length}${step.index ? "" : ": the prefill"}`]);
  title.append(make("small", "", [`${(1000 * step.seconds).toFixed(step.seconds < 0.1 ? 1 : 0)} ms`, step.index && step.draft_length > 1 ? `K = ${step.draft_length}` : "", count(step.slots, "slot"), step.prefix ? `${step.prefix} tokens cached` : ""].filter(Boolean).join(" · ")));
  const parts = [title, story(step, run)];
  const section = (name, note, content) => parts.push(make("h3", "", name, note ? [make("small", "", note)] : []), content);
  if (step.drafts.length) section("Went in", step.drafts.length > 1 ? "drafts, judged left to right" : "", wentIn(step));
  if (step.leaves.length) section("Verified beside them", "alternatives to single drafts", leaves(step));
  section("Came out", count(step.tokens.length, "token"), cameOut(step));
  if (step.outcomes.length) section("Drafted in the same forward", step.outcomes.length > 1 ? "one block for each outcome, with its odds before the forward" : "", blocks(step));
  $("detail").replaceChildren(...parts);
}

/* The layout, straight from its visibility ------------------------------------------------------------------------ */

const picture = { run: null, step: null, row: -1, geometry: null };

/** A colour of the style sheet, as a canvas takes it. */
function colour(name) {
  const probe = picture.probe || (picture.probe = document.body.appendChild(make("span", "hidden")));
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

/** Rows that belong together: [name, first slot, end, whether it drafts next]. */
function groups(layout, step) {
  const found = [];
  layout.kinds.forEach((kind, slot) => {
    const block = layout.blocks[slot];
    const last = found.at(-1);
    if (last && last.kind === kind && last.block === block) last.end = slot + 1;
    else found.push({ kind, block, first: slot, end: slot + 1 });
  });
  for (const group of found) {
    const outcome = step.outcomes[group.block];
    group.chosen = Boolean(outcome && outcome.chosen);
    group.name = group.kind !== "mask" ? { prompt: "prompt", draft: step.draft_length > 1 ? "drafts" : "token", leaf: "altern.", padding: "" }[group.kind] : step.index ? `if ${outcome.accepted}` : "masks";
  }
  return found;
}

function drawLayout() {
  const { run, step, row } = picture;
  if (!run || !step) return;
  const canvas = $("layout");
  const layout = run.layouts[step.layout];
  const wide = canvas.clientWidth;
  if (!wide) return;
  const left = 52;
  const top = 20;
  const band = step.prefix ? 38 : 0; // the prefix, and a gap
  const size = layout.kinds.length;
  const cell = Math.min((wide - left - band - 2) / size, 22);
  const high = top + cell * size + 2;
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(wide * ratio);
  canvas.height = Math.round(high * ratio);
  canvas.style.height = `${high}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const named = groups(layout, step);
  const of = (slot) => named.find((group) => slot >= group.first && slot < group.end);
  const [clean, own, thrown, line, soft, ink, faint] = ["clean", "own", "thrown", "line", "soft", "ink", "faint"].map(colour);
  const gap = cell > 7 ? 1 : 0;
  const snap = (place) => Math.round(place * ratio) / ratio; // whole pixels: neither seams nor blur
  const x = (slot) => snap(left + band + slot * cell);
  const y = (slot) => snap(top + slot * cell);
  picture.geometry = { top, cell, size };
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  layout.sees.forEach((ranges, slot) => {
    const me = of(slot);
    const tall = y(slot + 1) - y(slot) - gap;
    const mask = me.kind === "mask";
    pen.globalAlpha = mask && !me.chosen ? 0.42 : 1;
    if (band && layout.sees_prefix[slot]) {
      pen.fillStyle = clean;
      pen.fillRect(left, y(slot), band - 4, tall);
    }
    for (const [first, end] of ranges) {
      for (let key = first; key < end; key++) {
        const there = of(key);
        pen.fillStyle = there.kind === "mask" ? (me.chosen ? own : thrown) : clean;
        if (there.kind === "mask" && !me.chosen) pen.globalAlpha = 1;
        const stop = gap ? key + 1 : Math.min(end, there.end);
        pen.fillRect(x(key), y(slot), x(stop) - x(key) - gap, tall);
        key = stop - 1;
        pen.globalAlpha = mask && !me.chosen ? 0.42 : 1;
      }
    }
  });
  pen.globalAlpha = 1;
  pen.strokeStyle = line;
  pen.lineWidth = 1;
  let written = -20;
  for (const group of named) {
    if (group.first) {
      pen.beginPath();
      pen.moveTo(left, y(group.first) - 0.5);
      pen.lineTo(x(size), y(group.first) - 0.5);
      pen.moveTo(x(group.first) - 0.5, top);
      pen.lineTo(x(group.first) - 0.5, y(size));
      pen.stroke();
    }
    const middle = (y(group.first) + y(group.end)) / 2;
    if (middle - written < 12 && !group.chosen) continue;
    written = middle;
    pen.fillStyle = group.chosen ? ink : soft;
    pen.font = `${group.chosen ? "600 " : ""}11px system-ui, sans-serif`;
    pen.textAlign = "right";
    pen.fillText(group.name, left - 8, middle);
  }
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = faint;
  pen.textAlign = "left";
  if (band) pen.fillText("prefix", left, 9);
  else pen.fillText("sees …", left, 9);
  if (row >= 0 && row < size) {
    pen.strokeStyle = ink;
    pen.lineWidth = 1.5;
    pen.strokeRect(left - 1, y(row) - 1, x(size) - left + 2, Math.max(cell, 2) + 1);
  }
}

/** Runs of slots in words. */
function inWords(layout, ranges, slot) {
  const seen = { prompt: [], draft: [], leaf: [], mask: 0, padding: [] };
  for (const [first, end] of ranges) {
    for (let key = first; key < end; key++) {
      if (layout.kinds[key] === "mask") seen.mask += 1;
      else seen[layout.kinds[key]].push(key);
    }
  }
  const drafts = seen.draft.length;
  const words = [];
  if (seen.prompt.length) words.push(seen.prompt.length === layout.kinds.filter((kind) => kind === "prompt").length ? "the whole prompt" : `the first ${count(seen.prompt.length, "token")} of the prompt`);
  if (drafts) words.push(drafts === 1 ? "draft 1" : `drafts 1–${drafts}`);
  if (seen.leaf.length) words.push("itself");
  if (seen.mask) words.push(layout.kinds[slot] === "mask" ? (seen.mask === layout.blocks.filter((block) => block === layout.blocks[slot]).length ? "all of its own block" : `${count(seen.mask, "mask")} of its own block`) : count(seen.mask, "mask"));
  return words;
}

function caption() {
  const { run, step, row } = picture;
  const layout = run.layouts[step.layout];
  const masks = layout.kinds.filter((kind) => kind === "mask").length;
  const others = layout.kinds.length - masks;
  if (row < 0 || row >= layout.kinds.length) {
    const text = masks ? `${count(others, "clean token")} and ${count(masks, "mask")} in one forward. A row is a slot, and is filled where it sees.` : `${count(others, "clean token")}, no masks: plain decoding.`;
    $("layout-caption").textContent = text;
    $("layout").setAttribute("aria-label", `Attention layout of forward ${step.index + 1}: ${text} Arrow keys move from slot to slot.`);
    return;
  }
  const kind = layout.kinds[row];
  const first = layout.kinds.findIndex((k, i) => k === kind && layout.blocks[i] === layout.blocks[row]);
  const outcome = step.outcomes[layout.blocks[row]];
  const name = { prompt: "Prompt token", draft: "Draft", leaf: "Alternative", mask: "Mask", padding: "Padding" }[kind];
  const where = kind === "mask" && step.index ? ` of the block for “${outcome.accepted} stand${outcome.accepted === 1 ? "s" : ""}”` : "";
  const words = [...(step.prefix && layout.sees_prefix[row] ? ["the prefix"] : []), ...inWords(layout, layout.sees[row], row)];
  $("layout-caption").textContent = `${name} ${row - first + 1}${where}, at position ${step.prefix + layout.depth[row]}, sees ${words.join(", ").replace(/, ([^,]*)$/, " and $1")}.`;
}

function showLayout(run, step) {
  if (picture.step !== step) picture.row = -1;
  picture.run = run;
  picture.step = step;
  drawLayout();
  caption();
  const key = (name, text) => make("li", "", "", [make("i", name), text]);
  const entries = [key("clean", "clean tokens")];
  if (step.outcomes.length) entries.push(key("own", step.index ? "masks of the chosen block" : "masks"));
  if (step.outcomes.length > 1) entries.push(key("thrown", "masks thrown away"));
  $("layout-key").replaceChildren(...entries);
}

function watchLayout() {
  const canvas = $("layout");
  const go = (row) => {
    if (!picture.step || picture.row === row) return;
    picture.row = row;
    drawLayout();
    caption();
  };
  canvas.addEventListener("pointermove", (event) => {
    const { top, cell, size } = picture.geometry || {};
    const row = Math.floor((event.offsetY - top) / cell);
    go(row >= 0 && row < size ? row : -1);
  });
  canvas.addEventListener("pointerleave", () => go(-1));
  canvas.addEventListener("blur", () => go(-1));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!move || !picture.geometry) return;
    event.preventDefault();
    go(Math.max(0, Math.min(picture.geometry.size - 1, picture.row + move)));
  });
  new ResizeObserver(drawLayout).observe(canvas.parentElement);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawLayout);
}

/* Acceptance ------------------------------------------------------------------------------------------------------ */

function showHistogram(run, time, selected) {
  const gains = run.steps.filter((step) => step.index && step.at <= time);
  const most = Math.max(4, ...run.steps.map((step) => Math.max(step.tokens.length, step.index ? step.draft_length : 0)));
  const counts = Array.from({ length: most }, (_, i) => gains.filter((step) => step.tokens.length === i + 1).length);
  const peak = Math.max(1, ...counts);
  const current = selected && selected.index ? selected.tokens.length : 0;
  const chart = $("histogram");
  if (chart.children.length !== most) chart.replaceChildren(...counts.map(() => make("div", "", "", [make("span"), make("i")])));
  counts.forEach((n, i) => {
    const column = chart.children[i];
    column.firstChild.textContent = n || "";
    column.lastChild.style.height = `${(100 * n) / peak}px`;
    column.classList.toggle("now", i + 1 === current && n > 0);
  });
  const axis = chart.nextElementSibling.className === "axis" ? chart.nextElementSibling : chart.parentElement.insertBefore(make("div", "axis"), chart.nextElementSibling);
  if (axis.children.length !== most) axis.replaceChildren(...counts.map((_, i) => make("span", "", i + 1)));
  const total = gains.reduce((sum, step) => sum + step.tokens.length, 0);
  const mean = gains.length ? (total / gains.length).toFixed(2) : "–";
  $("histogram-caption").textContent = gains.length ? `${mean} on average over ${count(gains.length, "forward")} after the prefill.` : "Nothing yet after the prefill.";
}

/* The view: which runs, which moment, which step ------------------------------------------------------------------ */

const view = { main: null, rival: null, time: Infinity, selected: -1, following: true, frame: 0, due: 0, rounds: false };
let mainLane;
let rivalLane;

/** `rounds`: both runs ask for the same tokens, and only rounding can part them. */
function setRuns(main, rival, rounds) {
  Object.assign(view, { main, rival, rounds, time: Infinity, selected: -1, following: true });
  stop();
  mainLane.begin(main);
  if (rival) rivalLane.begin(rival);
  $("rival-lane").hidden = !rival;
  $("stage").hidden = $("transport").hidden = true;
}

/** Show what the runs have by now, with the next picture of the screen: forwards may come faster. */
function soon() {
  view.due ||= requestAnimationFrame(refresh);
}

function refresh() {
  cancelAnimationFrame(view.due);
  view.due = 0;
  const { main, rival } = view;
  mainLane.grow();
  if (rival) rivalLane.grow();
  if (!main.steps.length) return;
  $("stage").hidden = $("transport").hidden = false;
  if (view.following) view.selected = main.steps.length - 1;
  show();
}

function show() {
  const { main, rival, time, selected } = view;
  const step = main.steps[selected];
  mainLane.show(time, time === Infinity && view.following && !main.ended ? -1 : selected);
  if (rival) rivalLane.show(time, -1);
  if (rival) rivalLane.legend.textContent = verdict();
  if (main.mode !== "ar" && !mainLane.legend.firstChild) mainLane.legend.append(make("span", "", "One colour a forward"), make("span", "", "", [make("u", "", "underlined"), " the verifier's own token"]), make("span", "", "", [make("u", "bad", "red"), " a correction"]));
  if (step && (picture.step !== step || picture.outcomes !== step.outcomes || picture.total !== main.steps.length)) {
    showStep(step, main);
    showLayout(main, step);
    Object.assign(picture, { outcomes: step.outcomes, total: main.steps.length });
  }
  showHistogram(main, time, step);
  const scrub = $("scrub");
  scrub.max = main.steps.length - 1;
  scrub.value = Math.max(0, selected);
  const where = `forward ${Math.max(0, selected) + 1} of ${main.steps.length}`;
  scrub.setAttribute("aria-valuetext", where);
  $("where").replaceChildren(make("span", "", "forward "), `${Math.max(0, selected) + 1} of ${main.steps.length}`);
  $("previous").disabled = selected <= 0;
  $("next").disabled = selected >= main.steps.length - 1;
}

/** How the race went, in words. */
function verdict() {
  const { main, rival } = view;
  if (!main.ended || !rival.ended) return "";
  const ratio = length(rival) / main.token_ids.length && rival.token_ids.length / length(rival) ? main.token_ids.length / length(main) / (rival.token_ids.length / length(rival)) : 1;
  const speed = ratio >= 1 ? `TiDAR is ${ratio.toFixed(2)}× as fast here` : `Plain AR is ${(1 / ratio).toFixed(2)}× as fast here`;
  const same = main.token_ids.every((id, i) => id === rival.token_ids[i]) && main.token_ids.length === rival.token_ids.length;
  const apart = main.token_ids.findIndex((id, i) => id !== rival.token_ids[i]);
  return `${speed}. ${same ? "Token for token the same answer." : `The answers part at token ${(apart < 0 ? main.token_ids.length : apart) + 1}${view.rounds ? ", as they may where two logits lie within rounding" : ""}.`}`;
}

function select(index) {
  const { main } = view;
  if (!main || !main.steps.length) return;
  stop();
  view.selected = Math.max(0, Math.min(main.steps.length - 1, index));
  view.following = false;
  const last = view.selected === main.steps.length - 1;
  view.time = last ? Infinity : main.steps[view.selected].at;
  if (last && !main.ended) view.following = true;
  show();
}

/** At the end both lanes stand complete; before, both show what they had at the same moment. */
function play() {
  if (view.frame) return stop();
  const end = Math.max(length(view.main), length(view.rival));
  let time = view.time >= end ? 0 : view.time;
  let before = performance.now();
  view.following = false;
  const tick = (now) => {
    time += ((now - before) / 1000) * Number($("speed").value);
    before = now;
    view.time = time;
    view.selected = view.main.steps.filter((step) => step.at <= time).length - 1;
    if (time >= Math.max(length(view.main), length(view.rival))) {
      view.time = Infinity;
      stop();
    } else view.frame = requestAnimationFrame(tick);
    show();
  };
  view.frame = requestAnimationFrame(tick);
  icon($("play"), "pause");
  $("play").setAttribute("aria-label", "Pause");
}

function stop() {
  cancelAnimationFrame(view.frame);
  view.frame = 0;
  icon($("play"), "play");
  $("play").setAttribute("aria-label", "Play");
}

const ICONS = { play: "M4 2.5v11l9-5.5z", pause: "M4 2.5h3v11H4zM9 2.5h3v11H9z", previous: "M10.5 3 5.5 8l5 5V3z", next: "M5.5 3l5 5-5 5V3z" };

function icon(button, name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  button.replaceChildren(svg);
}

function watchKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTip();
    if (event.ctrlKey || event.metaKey || event.altKey || $("transport").hidden) return;
    if (event.target.closest("input, select, textarea, canvas, .answer")) return;
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) {
      event.preventDefault();
      select(view.selected + move);
    } else if (event.key === " " && !event.target.closest("button")) {
      event.preventDefault();
      play();
    }
  });
}

function watchTheme() {
  const button = $("theme");
  const dark = () => {
    const set = document.documentElement.style.colorScheme;
    return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const name = () => {
    button.textContent = dark() ? "Light" : "Dark";
  };
  button.addEventListener("click", () => {
    document.documentElement.style.colorScheme = dark() ? "light" : "dark";
    name();
    drawLayout();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();
}

function start() {
  mainLane = new Lane($("main-lane"), select);
  rivalLane = new Lane($("rival-lane"), (index) => {
    const at = view.rival.steps[index].at;
    select(Math.max(0, view.main.steps.filter((step) => step.at <= at).length - 1));
  });
  icon($("previous"), "previous");
  icon($("next"), "next");
  icon($("play"), "play");
  $("previous").addEventListener("click", () => select(view.selected - 1));
  $("next").addEventListener("click", () => select(view.selected + 1));
  $("play").addEventListener("click", play);
  $("scrub").addEventListener("input", () => select(Number($("scrub").value)));
  document.addEventListener("scroll", placeTip, { passive: true, capture: true });
  watchLayout();
  watchKeys();
  watchTheme();
}

/** A trace that is in this file. */
function open(trace) {
  const runs = trace.runs.map((run) => ({ ...run, ended: true }));
  $("model").textContent = `${trace.model} · ${trace.device} · ${trace.dtype} · tidar ${trace.tidar}`;
  $("asked").textContent = trace.prompt;
  $("asked").hidden = false;
  const { temperature, trust } = trace.settings;
  setRuns(runs[0], runs[1] || null, temperature === 0 && trust === 1 && trace.dtype !== "float32");
  refresh();
}

start();
if ($("trace")) open(JSON.parse($("trace").textContent));
