"use strict";
const at = (id) => document.getElementById(id);
const percent = (value) => (100 * value).toFixed(value > 0.9995 || value < 0.0005 ? 2 : 1) + " %";
let models = [], requests = 0, chosen = null, pictures = {}, retry = 0;

function headers() {
  const token = at("token").value.trim();
  return token ? { Authorization: "Bearer " + token } : {};
}

// Returns the JSON answer of the server, or throws an Error whose message is for people.
async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    throw new Error("The server does not answer.");
  }
  const content = await answer.json().catch(() => ({}));
  if (answer.status === 401) at("token-choice").hidden = false;
  if (!answer.ok) throw new Error(content.error || "The server answers with status " + answer.status + ".");
  return content;
}

function showError(error) {
  at("problem").hidden = !error;
  at("problem").textContent = error ? error.message : "";
}

async function load() {
  try {
    models = (await ask("models")).models;
    showError(null);
  } catch (error) {
    at("about").textContent = "";
    showError(error);
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

function selectedModel() { return models.find((model) => model.name === at("model").value); }

function showModel() {
  const model = selectedModel();
  if (!model) return;
  const available = model.versions.filter((version) => version.state === "AVAILABLE");
  const aliases = (number) => Object.keys(model.aliases).filter((name) => model.aliases[name] === number);
  fill("version", available.map((version) =>
    [String(version.version), [version.version, ...aliases(version.version)].join(", ")]));
  if (!available.some((version) => String(version.version) === at("version").dataset.touched)) {
    delete at("version").dataset.touched;
  }
  if (model.default && !at("version").dataset.touched) at("version").value = String(model.default);
  at("version-choice").hidden = available.length < 2;
  showVersion();
}

function selectedVersion() {
  return selectedModel().versions.find((version) => String(version.version) === at("version").value);
}

function showVersion() {
  const model = selectedModel(), version = selectedVersion();
  at("metrics").hidden = !version;
  if (!version) {
    at("about").textContent = model.name + " is not ready yet.";
    clearTimeout(retry);
    retry = setTimeout(load, 2000);
    return;
  }
  at("about").textContent = `${model.name}, version ${version.version}: ${version.classes} classes, ` +
    `input of ${version.image_size[1]} × ${version.image_size[0]} pixels`;
  const metrics = (version.metrics || {}).test || {};
  const rows = [["test accuracy", "accuracy"], ["precision", "precision"], ["recall", "recall"],
    ["F1", "f1"]].filter(([, key]) => key in metrics);
  at("metrics").hidden = !rows.length;
  at("facts").replaceChildren(...rows.map(([name, key]) => {
    const box = document.createElement("div");
    box.append(element("dt", name), element("dd", percent(metrics[key])));
    return box;
  }));
}

function element(tag, text, className = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  node.className = className;
  return node;
}

async function classify(file) {
  if (!file) return;
  chosen = file;
  const request = ++requests;
  showError(null);
  at("busy").textContent = "Classifying " + (file.name || "the image") + " ...";
  const query = new URLSearchParams({ top: "5", explain: "grad_cam" });
  if (at("model").value) query.set("model", at("model").value);
  // Without a version the server uses its current default, which may have changed.
  if (at("version").dataset.touched) query.set("version", at("version").value);
  try {
    const answer = await ask("predict?" + query, { method: "POST", body: file,
      headers: { "Content-Type": "application/octet-stream" } });
    const url = URL.createObjectURL(file), shape = await aspectRatio(url);
    if (request !== requests) return URL.revokeObjectURL(url);
    show(url, shape, answer);
    if (String(answer.version) !== at("version").value) await load();
  } catch (error) {
    if (request !== requests) return;
    at("result").hidden = true;
    await load(); // The chosen version may have been unloaded.
    showError(error);
  }
  if (request === requests) at("busy").textContent = "";
}

// Returns width / height; 1 for a format that the browser cannot show, such as TIFF.
async function aspectRatio(url) {
  const image = new Image();
  image.src = url;
  await image.decode().catch(() => {});
  return image.naturalWidth / image.naturalHeight || 1;
}

function show(url, shape, answer) {
  const prediction = answer.predictions[0];
  if (pictures.image) URL.revokeObjectURL(pictures.image);
  pictures = { image: url, map: "data:image/png;base64," + prediction.explanation.png,
    name: prediction.class };
  // The map has the shape of the network's input: stretch it to the shape of the photo.
  at("picture").style.setProperty("--shape", shape);
  at("result-title").textContent = `${prediction.class}, ${percent(prediction.probability)}`;
  at("bars").replaceChildren(...prediction.top.map((entry) => {
    const item = document.createElement("li");
    const bar = element("div", "", "bar"), part = document.createElement("span");
    part.style.width = 100 * entry.probability + "%";
    bar.append(part);
    bar.setAttribute("aria-hidden", "true");
    item.append(element("span", entry.class, "class"),
      element("span", percent(entry.probability), "probability"), bar);
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
  at("shown").alt = isMap ? "The image; evidence for " + pictures.name + " is bright."
    : "The classified image.";
  at("show-map").setAttribute("aria-pressed", String(isMap));
  at("show-image").setAttribute("aria-pressed", String(!isMap));
}

at("file").addEventListener("change", (event) => {
  classify(event.target.files[0]);
  event.target.value = ""; // Choosing the same file again must be a change.
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
