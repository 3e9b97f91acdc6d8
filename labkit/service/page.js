"use strict";
// The status page: asks /status every second, and lets one try a prompt with a screen. Addresses are relative, so
// that it works behind JupyterLab's proxy as well.
const $ = (id) => document.getElementById(id);
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6BB3", "#8A8F98"];
const CHINESE = {
  speed: "每秒 token 数", streams: "同时生成的回答", waiting: "个在排队", first: "首个 token 用时", answers: "个回答",
  tokens: "个 token", weights: "权重", cache: "KV 缓存", process: "进程", plan: "方案", part: "部件", scheme: "量化方式",
  bits: "每参数比特", parameters: "参数", bytes: "字节", try: "试一试", drop: "把截图拖到这里，或点击选择",
  sample: "画一个屏幕", clear: "不用屏幕", ask: "让它做什么？", audio: "或者说出来（wav、mp3、flac、ogg）", key: "API 密钥",
  think: "先思考", action: "动作语法", send: "提问", thoughts: "思考", connect: "连接", docs: "接口文档", metrics: "指标",
  models: "模型", ready: "就绪", busy: "生成中", warming: "预热中", gone: "没有应答", locked: "需要 API 密钥",
  unreadable: "浏览器无法显示这张图片",
};
const chinese = navigator.language.startsWith("zh");
const ENGLISH = { ready: "ready", busy: "generating", warming: "warming up", gone: "does not answer", locked: "API key needed",
  unreadable: "This browser cannot show that picture" };
const word = (name) => (chinese ? CHINESE : ENGLISH)[name];
if (chinese) {
  document.documentElement.lang = "zh";
  for (const label of document.querySelectorAll("[data-t]")) label.textContent = CHINESE[label.dataset.t];
}

const bytes = (size) => {
  if (size == null) return "–";
  const power = size < 1000 ? 0 : Math.min(4, Math.floor(Math.log10(size) / 3));
  return `${+(size / 1000 ** power).toPrecision(3)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
};
const count = (value) => Math.round(value).toLocaleString();
const millions = (value) => (value < 1e6 ? count(value) : `${+(value / 1e6).toPrecision(3)} M`);
const seconds = (value) => (value == null ? "–" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toPrecision(3)} s`);

const dropText = $("drop-text").textContent;
let shownPlan = null;
const speeds = [];

function showModel(facts) {
  if (shownPlan === facts.plan) return;
  shownPlan = facts.plan;
  $("description").textContent = [facts.description, facts.device, facts.engine].filter(Boolean).join(" · ");
  $("plan").textContent = facts.plan ?? "–";
  $("plan-description").textContent = facts.plan_description;
  $("plan-panel").hidden = !facts.parts.length;
  $("audio-row").hidden = !facts.modalities.includes("audio");
  $("look").hidden = !facts.modalities.includes("image");
  if (!$("look").hidden && !picture) $("sample").click();
  const byRole = new Map();
  for (const row of [...facts.parts].sort((a, b) => b.bytes - a.bytes)) {
    const part = byRole.get(row.role) ?? { role: row.role, schemes: [], parameters: 0, bytes: 0 };
    part.schemes.push(row.scheme);
    part.parameters += row.parameters;
    part.bytes += row.bytes;
    byRole.set(row.role, part);
  }
  const parts = [...byRole.values()].sort((a, b) => b.bytes - a.bytes);
  const colour = (part) => COLOURS[parts.indexOf(part) % COLOURS.length];
  $("bar").replaceChildren(...parts.map((part) => {
    const piece = document.createElement("span");
    piece.style.background = colour(part);
    piece.style.flex = `${part.bytes} 0 0`;
    piece.title = `${part.role}: ${bytes(part.bytes)}`;
    return piece;
  }));
  $("parts").replaceChildren(...parts.map((part) => {
    const row = document.createElement("tr");
    const bits = part.parameters ? (8 * part.bytes / part.parameters).toFixed(1) : "–";
    const cells = [part.role, part.schemes.join(" + "), bits, millions(part.parameters), bytes(part.bytes)];
    cells.forEach((text, at) => {
      const cell = document.createElement("td");
      if (at === 0) {
        const mark = document.createElement("i");
        mark.style.background = colour(part);
        cell.append(mark);
      }
      if (at > 1) cell.className = "n";
      cell.append(String(text));
      row.append(cell);
    });
    return row;
  }));
  $("snippet").textContent = [
    "from langchain_openai import ChatOpenAI", "",
    `model = ChatOpenAI(model="${facts.names[0]}", temperature=0,`,
    `                   base_url="${new URL("v1", location.href)}", api_key="EMPTY")`,
    'model.invoke("你是谁?")',
  ].join("\n");
}

function showNow(facts) {
  const state = facts.trouble ? "bad" : !facts.ready ? "warming" : facts.running ? "busy" : "ready";
  $("state").className = state;
  $("state-text").textContent = facts.trouble ?? word(state);
  $("speed").textContent = facts.tokens_per_s >= 100 ? count(facts.tokens_per_s) : facts.tokens_per_s.toFixed(1);
  speeds.push(facts.tokens_per_s);
  if (speeds.length > 60) speeds.shift();
  const top = Math.max(1, ...speeds);
  const points = speeds.map((value, at) => `${120 - 2 * (speeds.length - 1 - at)},${28 - 26 * value / top}`);
  document.querySelector("#spark polyline").setAttribute("points", points.join(" "));
  $("running").textContent = facts.running;
  $("rows").textContent = `/ ${facts.streams}`;
  $("waiting").textContent = facts.waiting;
  const slots = [...Array(Math.min(facts.streams, 32)).keys()].map((at) => {
    const slot = document.createElement("i");
    slot.className = at < facts.running ? "on" : "";
    return slot;
  });
  $("slots").replaceChildren(...slots);
  $("ttft").textContent = seconds(facts.ttft_s);
  $("answers").textContent = count(facts.answers);
  $("tokens").textContent = count(facts.generated_tokens);
  $("weights").textContent = bytes(facts.weights_bytes);
  $("cache").textContent = bytes(facts.cache_bytes);
  $("process").textContent = bytes(facts.process_bytes);
}

const authorized = () => ($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {});

async function refresh() {
  try {
    const answer = await fetch("status", { cache: "no-store", headers: authorized() });
    if (answer.status === 401) {
      $("key-row").hidden = false;
      $("state").className = "warming";
      $("state-text").textContent = word("locked");
      return setTimeout(refresh, 1000);
    }
    if (!answer.ok) throw new Error();
    const facts = await answer.json();
    showModel(facts);
    showNow(facts);
  } catch {
    $("state").className = "bad";
    $("state-text").textContent = word("gone");
  }
  setTimeout(refresh, document.hidden ? 5000 : 1000);
}

let picture = null; // a data URL that the browser can show
let choices = 0; // how many pictures were chosen: one that loads slowly does not replace a later one

function draw(marks = []) {
  const canvas = $("screen"), pen = canvas.getContext("2d"), image = new Image(), drawn = picture;
  image.onload = () => {
    if (picture !== drawn) return;
    canvas.width = 2 * 252;
    canvas.height = Math.round(canvas.width * image.height / image.width);
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    pen.strokeStyle = "#D55E00";
    pen.lineWidth = 6;
    const at = ([x, y]) => [x / 1000 * canvas.width, y / 1000 * canvas.height];
    pen.beginPath();
    if (marks.length === 2) marks.forEach((mark, i) => pen[i ? "lineTo" : "moveTo"](...at(mark)));
    for (const mark of marks) {
      const [x, y] = at(mark);
      pen.moveTo(x + 20, y);
      pen.arc(x, y, 20, 0, 7);
    }
    pen.stroke();
  };
  if (picture) image.src = picture;
  canvas.hidden = $("clear").hidden = !picture;
  $("drop").hidden = !!picture;
}

const dataUrl = (blob) => new Promise((done) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result);
  reader.readAsDataURL(blob);
});

const loads = (url) => new Promise((done) => {
  const image = new Image();
  image.onload = () => done(image.width > 0);
  image.onerror = () => done(false);
  image.src = url;
});

async function take(blob) {
  if (!blob) return;
  const choice = ++choices, url = await dataUrl(blob);
  const shown = await loads(url);
  if (choice !== choices) return;
  picture = shown ? url : null; // never the screen before: what is asked is about what was chosen
  $("image").value = "";
  $("drop-text").textContent = shown ? dropText : word("unreadable");
  draw();
}

async function ask(event) {
  event.preventDefault();
  const content = [];
  if (picture) content.push({ type: "image_url", image_url: { url: picture } });
  const sound = $("audio").files[0];
  if (sound) content.push({ type: "input_audio", input_audio: { data: (await dataUrl(sound)).split(",")[1] } });
  if ($("prompt").value.trim()) content.push({ type: "text", text: $("prompt").value });
  const asked = {
    model: document.querySelector("h1").textContent, messages: [{ role: "user", content }], stream: true,
    enable_thinking: $("thinking").checked, return_reasoning: true, stream_options: { include_usage: true },
  };
  if ($("action").checked) asked.response_format = { type: "action" };
  $("answer").textContent = $("reasoning").textContent = $("cost").textContent = "";
  $("answer").className = "";
  $("thoughts").hidden = true;
  $("send").disabled = true;
  draw();
  try {
    await stream(asked);
  } catch (error) {
    $("answer").className = "bad";
    $("answer").textContent += error.message;
  }
  $("send").disabled = false;
}

async function stream(asked) {
  const started = performance.now();
  let first = null, rest = "";
  // JupyterLab's proxy hands a stream on piece by piece only where it is asked for as one.
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  Object.assign(headers, authorized());
  const answer = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(asked) });
  if (!answer.ok) {
    if (answer.status === 401) $("key-row").hidden = false;
    throw new Error((await answer.json()).error.message);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      for (const { delta } of chunk.choices) {
        if (delta.content || delta.reasoning_content) first ??= performance.now() - started;
        $("answer").append(delta.content ?? "");
        $("reasoning").append(delta.reasoning_content ?? "");
        if (delta.reasoning_content) $("thoughts").hidden = false;
      }
      if (chunk.usage) {
        const { prompt_tokens: asked, completion_tokens: given } = chunk.usage;
        const whole = performance.now() - started;
        $("cost").textContent = `${asked} + ${given} tokens, ${seconds(first / 1000)} / ${seconds(whole / 1000)}`;
      }
    }
  }
  const marks = [...$("answer").textContent.matchAll(/(?:element|start|end)=\[(\d+),\s*(\d+)\]/g)];
  draw(marks.map((mark) => [+mark[1], +mark[2]]));
}

$("form").addEventListener("submit", ask);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) $("form").requestSubmit(), event.preventDefault();
});
$("sample").addEventListener("click", async () => {
  const answer = await fetch(`screen.png?seed=${Math.floor(Math.random() * 1e6)}`, { headers: authorized() });
  if (answer.ok) take(await answer.blob());
});
$("clear").addEventListener("click", () => {
  picture = null;
  choices += 1;
  $("image").value = "";
  $("drop-text").textContent = dropText;
  draw();
});
$("drop").addEventListener("click", () => $("image").click());
$("drop").addEventListener("keydown", (event) => event.key === "Enter" && $("image").click());
$("image").addEventListener("change", () => take($("image").files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  $("try").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
refresh();
