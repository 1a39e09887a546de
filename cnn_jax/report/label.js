"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const KEYS = "1234567890abcdefghijklmnopqrstuvwxyz";
const labels = new Map();
let position = 0;
let isSaved = true;
const find = (id) => document.getElementById(id);

function show() {
  const item = data.items[position];
  find("position").textContent = `${position + 1} of ${data.items.length}`;
  find("labelled").textContent = `${labels.size} labelled`;
  find("image").src = item.image;
  const label = labels.get(position);
  find("label").textContent = label ? label.name : "no label";
  for (const button of find("classes").children) {
    button.setAttribute("aria-pressed", String(Boolean(label) && button.value === label.name));
  }
}

function move(step) {
  position = Math.min(Math.max(position + step, 0), data.items.length - 1);
  show();
}

function choose(name) {
  labels.set(position, { name, isNew: !data.classes.includes(name) });
  isSaved = false;
  move(1);
}

function remove() {
  labels.delete(position);
  isSaved = false;
  show();
}

function cell(text) {
  return `"${String(text).replaceAll('"', '""')}"`;
}

function save() {
  const lines = ["request_id,image_index,label,new_class"];
  for (const [row, label] of [...labels].sort((a, b) => a[0] - b[0])) {
    const item = data.items[row];
    lines.push([item.request_id, item.image_index, cell(label.name), label.isNew].join(","));
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv" }));
  link.download = "labels.csv";
  link.click();
  isSaved = true;
}

data.classes.forEach((name, number) => {
  const option = document.createElement("option");
  option.value = name;
  find("names").append(option);
  if (data.classes.length > KEYS.length) {
    return; // With more classes than keys, names are typed.
  }
  const button = document.createElement("button");
  button.type = "button";
  button.value = name;
  button.textContent = `${KEYS[number]}  ${name}`;
  button.addEventListener("click", () => choose(name));
  find("classes").append(button);
});

find("other").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = find("name").value.trim();
  if (name) {
    find("name").value = "";
    find("name").blur();
    choose(data.classes.find((known) => known.trim() === name) ?? name);
  }
});
find("back").addEventListener("click", () => move(-1));
find("next").addEventListener("click", () => move(1));
find("remove").addEventListener("click", remove);
find("save").addEventListener("click", save);
document.addEventListener("keydown", (event) => {
  if (event.target === find("name") || event.ctrlKey || event.metaKey || event.altKey) {
    return;
  }
  const number = KEYS.indexOf(event.key.toLowerCase());
  if (event.key === "ArrowLeft") {
    move(-1);
  } else if (event.key === "ArrowRight") {
    move(1);
  } else if (event.key === "Delete" || event.key === "Backspace") {
    remove();
  } else if (number >= 0 && number < find("classes").children.length) {
    choose(data.classes[number]);
  } else {
    return;
  }
  event.preventDefault();
});
window.addEventListener("beforeunload", (event) => {
  if (!isSaved) {
    event.preventDefault();
  }
});
show();
