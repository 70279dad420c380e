// The page at /: asks the service, and writes what it says as text, never as HTML.
"use strict";

const at = (id) => document.getElementById(id);

async function ask(path, body) {
  const headers = at("key").value ? { Authorization: `Bearer ${at("key").value}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body: body && JSON.stringify(body) });
  if (answer.status === 401) at("key-line").hidden = false;
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

function element(tag, text = "", attributes = {}) {
  const made = tag in SVG ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
const SVG = { svg: 1, rect: 1, text: 1, title: 1 };

const line = (cells, tag = "td") => {
  const row = element("tr");
  row.append(...cells.map((cell) => element(tag, cell)));
  return row;
};

async function showStatus() {
  try {
    const { models, refused } = await ask("v1/models");
    const bad = models.filter((model) => Object.keys(model.refused).length).length + refused.length;
    at("status").textContent = bad ? `serving; refused: ${bad} (see below)` : "serving";
    at("status").className = bad ? "warning" : "well";
    at("models").replaceChildren(
      ...models.map((m) => line([m.name, m.version, m.digest, Object.entries(m.refused).map((r) => r.join(": ")).join("; ")])),
      ...refused.map((sentence) => line(["", "", "", sentence])),
    );
    const names = models.map((model) => model.name);
    const shown = [...at("model").options].map((option) => option.value);
    if (names.join("\n") !== shown.join("\n")) {
      at("model").replaceChildren(...names.map((name) => element("option", name)));
      await showSample();
    }
  } catch (error) {
    at("status").textContent = error instanceof TypeError ? "the service does not answer" : error.message;
    at("status").className = "warning";
  }
}

async function showSample() {
  const { row, kinds } = await ask(`v1/sample?model=${encodeURIComponent(at("model").value)}`);
  const fields = Object.entries(row).map(([name, value]) => {
    const label = element("label", `${name} (${kinds[name]})`);
    const text = value === null ? "" : typeof value === "string" ? value : JSON.stringify(value);
    const input = element("input", "", { name, "data-kind": kinds[name] });
    input.value = text;
    label.append(input);
    return label;
  });
  at("row").replaceChildren(...fields, element("button", "Score"));
  for (const id of ["scores", "plans"]) at(id).replaceChildren();
}

// A category is its text; numbers and lists are JSON.
function valueOf(input) {
  if (input.value === "") return null;
  if (["categorical", "hashed"].includes(input.dataset.kind)) return input.value;
  try {
    return JSON.parse(input.value);
  } catch {
    return input.value; // the service says what is wrong with it
  }
}

async function score(event) {
  event.preventDefault();
  at("mistake").hidden = true;
  const row = Object.fromEntries([...at("row").querySelectorAll("input")].map((input) => [input.name, valueOf(input)]));
  try {
    const { scores, plans } = await ask("v1/gates", { model: at("model").value, row });
    at("scores").replaceChildren(...Object.entries(scores).map(([name, value]) => line([name, value.toPrecision(6)])));
    at("plans").replaceChildren(
      ...Object.entries(plans).flatMap(([name, plan]) => [element("h3", `gates: ${name}`), picture(name, plan)]),
      ...(Object.keys(plans).length ? [] : [element("p", "This family has no gates.")]),
    );
  } catch (error) {
    at("mistake").textContent = error instanceof TypeError ? "the service does not answer" : error.message;
    at("mistake").hidden = false;
  }
}

// A gate's row of squares, one for each expert: the darker, the more weight.
function picture(name, { gates, experts, weights }) {
  const cell = 44, high = 26, left = 8 * Math.max(...gates.map((g) => g.length)) + 16;
  const top = 8 * Math.max(...experts.map((e) => e.length)) + 16;
  const width = left + cell * experts.length + 4, height = top + high * gates.length + 4;
  const svg = element("svg", "", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.setAttribute("aria-label", `weights of the gates ${gates.join(", ")} on the experts ${experts.join(", ")}`);
  experts.forEach((expert, e) => {
    const x = left + cell * (e + 0.6);
    svg.append(element("text", expert, { x, y: top - 6, transform: `rotate(-90 ${x} ${top - 6})` }));
  });
  gates.forEach((gate, g) => {
    const y = top + high * g;
    svg.append(element("text", gate, { x: left - 8, y: y + high * 0.65, "text-anchor": "end" }));
    experts.forEach((expert, e) => {
      const weight = weights[g][e], x = left + cell * e;
      const square = element("rect", "", { x, y, width: cell - 2, height: high - 2, fill: "#0072b2" });
      square.setAttribute("fill-opacity", Math.max(0.04, Math.min(1, weight)));
      square.append(element("title", `${gate} on ${expert}: ${weight}`));
      const ink = weight > 0.7 ? "#fff" : "#1a1a1a";
      svg.append(square);
      if (weight) {
        svg.append(element("text", weight.toFixed(2), { x: x + cell / 2 - 1, y: y + high * 0.65, "text-anchor": "middle", fill: ink }));
      }
    });
  });
  return svg;
}

at("row").addEventListener("submit", score);
at("model").addEventListener("change", showSample);
at("key").addEventListener("change", showStatus);
showStatus();
setInterval(showStatus, 5000);
