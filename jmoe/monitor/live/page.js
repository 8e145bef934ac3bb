// Listens to the server, and draws what it says.

const QUIET_SECONDS = 6; // without a word from the server, it counts as lost
const RETRY_SECONDS = [1, 1, 2, 4, 8];
const KINDS = { serving: "serving", training: "training", vllm: "vLLM" };

const at = (id) => document.getElementById(id);
const base = new URL(location.pathname.replace(/\/?$/, "/"), location.href);

let source = null, retry = 0, timer = null;
let snapshot = null; // the last one
let heard = null; // { server: its time in seconds, here: performance.now() }
let refused = false;

function connect() {
  clearTimeout(timer);
  source?.close();
  source = new EventSource(new URL("events", base));
  source.addEventListener("snapshot", (event) => {
    snapshot = JSON.parse(event.data);
    draw();
  });
  source.addEventListener("clock", (event) => {
    heard = { server: JSON.parse(event.data), here: performance.now() };
    retry = 0;
    refused = false;
    tell();
  });
  source.onerror = lost;
}

function lost() {
  source?.close();
  refused = true;
  clearTimeout(timer);
  const seconds = RETRY_SECONDS[Math.min(retry++, RETRY_SECONDS.length - 1)];
  timer = setTimeout(connect, seconds * 1000);
  tell();
}

function draw() {
  document.title = `${snapshot.model} · ${snapshot.status}`;
  at("model").textContent = snapshot.model;
  at("kind").textContent = KINDS[snapshot.kind];
  at("kind").hidden = at("content").hidden = false;
  drawFigures(at("figures"), snapshot.figures);
  at("load").hidden = !snapshot.load_LE;
  if (snapshot.load_LE) {
    drawHeat(at("heat"), snapshot.load_LE, snapshot.max_vio_L);
    at("load-note").textContent = snapshot.load_note ? `Counted: ${snapshot.load_note}.` : "";
  }
  at("devices").hidden = !snapshot.device_load_LP;
  if (snapshot.device_load_LP) {
    drawDevices(at("bars"), at("devices-said"), snapshot.device_load_LP);
  }
  drawCharts();
  at("decisions").hidden = snapshot.kind !== "serving" && !snapshot.decisions.length;
  drawDecisions(at("decided"), snapshot.decisions);
  tell();
}

function drawCharts() {
  const charts = snapshot.charts.filter((chart) => chart.x_N.length > 1);
  const place = at("charts");
  at("over-time").hidden = !charts.length;
  while (place.children.length < charts.length) place.append(element("figure"));
  while (place.children.length > charts.length) place.lastChild.remove();
  // A chart that somebody reads values off stays as it is meanwhile.
  charts.forEach((chart, i) => {
    if (!place.children[i].matches(":hover") || tip.hidden) drawChart(place.children[i], chart);
  });
}

// Says how fresh what is shown is.
function tell() {
  const silent = heard ? (performance.now() - heard.here) / 1000 : 0;
  if (heard && silent > QUIET_SECONDS && !refused) return lost();
  const isLost = refused && silent > QUIET_SECONDS / 2;
  let state = "waiting", said = refused ? "No server answers here. Trying again…" : "Connecting…";
  if (snapshot && heard) {
    const now = heard.server + silent, age = Math.max(0, now - snapshot.time);
    const isQuiet = snapshot.patience !== null && age > snapshot.patience;
    state = isLost ? "lost" : isQuiet ? "quiet" : "live";
    said = snapshot.status;
    if (isQuiet) said += ` · nothing new for ${duration(Math.round(age))}`;
    if (isLost) {
      said = `Connection lost ${duration(Math.round(silent))} ago. Below is how it stood at `
        + `${clockTime(heard.server)}. Trying again…`;
    }
  }
  at("state").className = state;
  if (at("said").textContent !== said) at("said").textContent = said;
  document.querySelector("main").classList.toggle("old", state === "lost");
}

// Nobody looks: the server need not send. Somebody looks again: at once.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    timer = setTimeout(() => source?.close(), 30000);
  } else {
    connect();
  }
});
let resizing = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(() => snapshot && draw());
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => snapshot && draw());
setInterval(tell, 1000);
connect();
