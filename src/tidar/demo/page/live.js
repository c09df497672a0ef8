"use strict";
// The prompt box: asks the server for runs, and tells the viewer what comes.

const EXAMPLES = {
  "a word problem": "There are 12 eggs in a box. How many eggs are in 4 boxes?",
  "some code": "Write a Python function that adds two numbers.",
  "a story": "Write a short story about a lighthouse.",
};
const GONE = "The server does not answer. Start `tidar demo` again, then press Run.";
let running = null;
let dtype = "";

function say(text, calm = false) {
  const notice = $("notice");
  notice.textContent = text;
  notice.hidden = !text;
  notice.classList.toggle("calm", calm);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

/** Server-sent events of a response. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const message of whole) yield JSON.parse(message.replace(/^data: /, ""));
  }
}

/** Why a request was refused; a server may wrap its reasons. */
async function reason(response) {
  const { error } = await response.json().catch(() => ({}));
  return error?.message || error || `the server refused this (${response.status})`;
}

/** Ask for a run, and put what it tells into `run`. */
async function follow(wanted, run, signal) {
  const response = await fetch("run", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(wanted), signal });
  if (!response.ok) throw new Refused(await reason(response));
  for await (const event of events(response)) {
    if (event.event === "error") throw new Refused(event.message);
    if (event.event === "waiting") say("Another run is using the model. Yours begins when it has ended.", true);
    else say("");
    absorb(run, event);
    soon();
  }
  if (!run.ended) throw new Error("cut off");
}

class Refused extends Error {}

function settings() {
  const number = (id) => ($(id).value === "" ? null : Number($(id).value));
  const wanted = { prompt: $("prompt").value, mode: $("mode").value, temperature: number("temperature"), max_new_tokens: number("max_new_tokens") };
  if (wanted.mode === "ar") return wanted;
  return { ...wanted, draft_length: number("draft_length"), outcomes: number("outcomes"), trust: number("trust") };
}

async function run() {
  const wanted = settings();
  if (!wanted.prompt.trim()) return refuse("Write a prompt first.");
  if (!Number.isInteger(wanted.max_new_tokens) || wanted.max_new_tokens < 1) return refuse("Longest answer must be a whole number of tokens, 1 or more.", "max_new_tokens");
  const race = wanted.mode === "tidar" && $("race").checked;
  const main = { ...newRun(), mode: wanted.mode, expected: wanted.max_new_tokens };
  const rival = race ? { ...newRun(), mode: "ar", waits: "starts when TiDAR has ended" } : null;
  running = new AbortController();
  begin(main, rival, wanted.temperature === 0 && wanted.trust === 1 && dtype !== "float32");
  try {
    await follow(wanted, main, running.signal);
    if (rival) {
      Object.assign(rival, { expected: main.token_ids.length, waits: "starting" });
      const { draft_length, outcomes, trust, ...plain } = wanted;
      await follow({ ...plain, mode: "ar" }, rival, running.signal);
    }
    $("status").textContent = "The answer is complete.";
  } catch (error) {
    failed(error, main, rival);
  }
  end();
}

function begin(main, rival, rounds) {
  say("");
  setRuns(main, rival, rounds);
  $("empty").hidden = true;
  $("run").textContent = "Stop";
  $("status").textContent = "Running.";
}

function end() {
  running = null;
  $("run").textContent = "Run";
  if (view.main.steps.length) refresh();
  else $("empty").hidden = false;
}

function refuse(text, id = "prompt") {
  say(text);
  $(id).focus();
}

function failed(error, main, rival) {
  if (rival && !rival.steps.length) {
    view.rival = null;
    $("rival-lane").hidden = true;
  }
  if (error.name === "AbortError") return say("Stopped.", true);
  if (error instanceof Refused) return refuse(sentence(error.message));
  const came = main.steps.length;
  say(came ? `The connection to the server broke; what came until then is below. ${GONE.replace("The server does not answer. ", "")}` : GONE);
}

function arrange() {
  const mode = $("mode").value;
  for (const label of document.querySelectorAll("[data-for]")) label.hidden = label.dataset.for !== mode;
  const trusting = Number($("trust").value) === 1;
  const automatic = $("draft_length").value === "" && trusting;
  $("outcomes").disabled = automatic || !trusting;
  $("outcomes").parentElement.setAttribute("aria-disabled", String($("outcomes").disabled));
  if ($("outcomes").disabled) $("outcomes").value = "";
  for (const id of ["trust", "temperature"]) $(`${id}-value`).textContent = Number($(id).value).toFixed(2);
  $("hint").textContent = mode === "ar" ? "" : !trusting ? "Trust below 1 mixes the drafter's opinion in: the answer is no longer exactly the model's. It needs a block for every outcome." : automatic ? "auto drafts as much as pays on this machine. Choose K to see every outcome of a fixed block." : "";
}

async function greet() {
  $("composer").hidden = $("empty").hidden = false;
  for (const [name, text] of Object.entries(EXAMPLES)) {
    const button = make("button", "", name);
    button.type = "button";
    button.addEventListener("click", () => {
      $("prompt").value = text;
      $("prompt").focus();
    });
    $("examples").append(button);
  }
  arrange();
  $("prompt").focus();
  try {
    const model = await (await fetch("model")).json();
    dtype = model.dtype;
    $("model").textContent = `${model.model} · ${model.device} · ${model.dtype} · tidar ${model.tidar}`;
    if (!model.can_draft) {
      $("mode").value = "ar";
      $("mode").querySelector("[value=tidar]").disabled = true;
      arrange();
      $("hint").textContent = "This model has no drafter, so it decodes plainly. `tidar train` makes one.";
    }
  } catch {
    say(GONE);
  }
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else run();
});
$("composer").addEventListener("input", arrange);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) run();
  }
});
greet();
