"use strict";
const at = (id) => document.getElementById(id);
const percent = (share) => (100 * share).toFixed(share > 0.9995 || share < 0.0005 ? 2 : 1) + " %";
let models = [], sent = 0, chosen = null, pictures = {}, waiting = 0;

function headers() {
  const token = at("token").value.trim();
  return token ? { Authorization: "Bearer " + token } : {};
}

// What the server says, or an error that a person can read.
async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    throw new Error("The server does not answer.");
  }
  const content = await answer.json().catch(() => ({}));
  if (answer.status === 401) at("token-choice").hidden = false;
  if (!answer.ok) throw new Error(content.error || "The server answers " + answer.status + ".");
  return content;
}

function complain(error) {
  at("problem").hidden = !error;
  at("problem").textContent = error ? error.message : "";
}

async function load() {
  try {
    models = (await ask("models")).models;
    complain(null);
  } catch (error) {
    at("about").textContent = "";
    complain(error);
    return;
  }
  fill("model", models.map((model) => [model.name, model.name]));
  at("model-choice").hidden = models.length < 2;
  showModel();
}

function fill(id, options) {
  const before = at(id).value;
  at(id).replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  if (options.some(([value]) => value === before)) at(id).value = before;
}

function model() { return models.find((one) => one.name === at("model").value); }

function showModel() {
  const own = model();
  if (!own) return;
  const present = own.versions.filter((version) => version.state === "AVAILABLE");
  const names = (number) => Object.keys(own.aliases).filter((name) => own.aliases[name] === number);
  fill("version", present.map((version) =>
    [String(version.version), [version.version, ...names(version.version)].join(", ")]));
  if (!present.some((version) => String(version.version) === at("version").dataset.touched)) {
    delete at("version").dataset.touched;
  }
  if (own.default && !at("version").dataset.touched) at("version").value = String(own.default);
  at("version-choice").hidden = present.length < 2;
  showVersion();
}

function version() {
  return model().versions.find((one) => String(one.version) === at("version").value);
}

function showVersion() {
  const own = version();
  at("figures").hidden = !own;
  if (!own) {
    at("about").textContent = model().name + " is not ready yet.";
    clearTimeout(waiting);
    waiting = setTimeout(load, 2000);
    return;
  }
  at("about").textContent = `${model().name}, version ${own.version}: ${own.classes} classes, ` +
    `seen at ${own.image_size[1]} × ${own.image_size[0]} pixels`;
  const figures = (own.metrics || {}).test || {};
  const rows = [["test accuracy", "accuracy"], ["precision", "precision"], ["recall", "recall"],
    ["F1", "f1"]].filter(([, key]) => key in figures);
  at("figures").hidden = !rows.length;
  at("facts").replaceChildren(...rows.map(([name, key]) => {
    const box = document.createElement("div");
    box.append(element("dt", name), element("dd", percent(figures[key])));
    return box;
  }));
}

function element(tag, text, className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

async function classify(file) {
  if (!file) return;
  chosen = file;
  const turn = ++sent;
  complain(null);
  at("busy").textContent = "Looking at " + (file.name || "the image") + " ...";
  const query = new URLSearchParams({ top: "5", explain: "grad_cam" });
  if (at("model").value) query.set("model", at("model").value);
  // Without a choice it is the one that answers now, which may have changed since.
  if (at("version").dataset.touched) query.set("version", at("version").value);
  try {
    const answer = await ask("predict?" + query, { method: "POST", body: file,
      headers: { "Content-Type": "application/octet-stream" } });
    if (turn !== sent) return;
    show(file, answer);
    if (String(answer.version) !== at("version").value) await load();
  } catch (error) {
    if (turn !== sent) return;
    at("result").hidden = true;
    await load(); // A version that was chosen may be gone.
    complain(error);
  }
  if (turn === sent) at("busy").textContent = "";
}

function show(file, answer) {
  const found = answer.predictions[0];
  if (pictures.image) URL.revokeObjectURL(pictures.image);
  pictures = { image: URL.createObjectURL(file), map: "data:image/png;base64," +
    found.explanation.png, name: found.class };
  at("result-title").textContent = `${found.class}, ${percent(found.probability)}`;
  at("bars").replaceChildren(...found.top.map((one) => {
    const item = document.createElement("li");
    const bar = element("div", "", "bar"), part = document.createElement("span");
    part.style.width = 100 * one.probability + "%";
    bar.append(part);
    bar.setAttribute("aria-hidden", "true");
    item.append(element("span", one.class, "class"), element("span", percent(one.probability), "share"), bar);
    return item;
  }));
  at("took").textContent = `${answer.model}, version ${answer.version}; ` +
    `${answer.milliseconds.total.toFixed(0)} ms on the server`;
  at("result").hidden = false;
  showPicture(true);
  at("result-title").focus({ preventScroll: true });
  at("result").scrollIntoView({ block: "nearest" });
}

function showPicture(isMap) {
  at("shown").src = isMap ? pictures.map : pictures.image;
  at("shown").alt = isMap ? "The image; what speaks for " + pictures.name + " is bright."
    : "The image that was classified.";
  at("show-map").setAttribute("aria-pressed", String(isMap));
  at("show-image").setAttribute("aria-pressed", String(!isMap));
}

at("file").addEventListener("change", (event) => {
  classify(event.target.files[0]);
  event.target.value = ""; // The same file may be chosen once more.
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); at("drop").classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); at("drop").classList.remove("over"); });
}
document.addEventListener("drop", (event) => classify(event.dataTransfer.files[0]));
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) classify(file);
});
at("show-map").addEventListener("click", () => showPicture(true));
at("show-image").addEventListener("click", () => showPicture(false));
at("model").addEventListener("change", () => { delete at("version").dataset.touched; showModel(); if (chosen) classify(chosen); });
at("version").addEventListener("change", () => { at("version").dataset.touched = at("version").value; showVersion(); if (chosen) classify(chosen); });
at("token").addEventListener("change", load);
load();
