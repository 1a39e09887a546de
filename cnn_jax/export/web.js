// Classifies images with pixels.onnx in this browser, and compares the model with golden/ at start.
import * as ort from "./ort.wasm.min.mjs";

const LARGEST_DIFFERENCE = 0.05; // Of a probability of a golden image.
const LONGEST_SIDE = 4096; // Browsers limit the size of a canvas.
const CLASSES_SHOWN = 5;
const element = (id) => document.getElementById(id);
let session, classNames, running = Promise.resolve();

async function fetchChecked(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path} cannot be loaded: ${response.status}`);
  return response;
}

// Returns the pixels of an image, uint8 [height, width, 3].
async function decode(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale));
  const height = Math.max(1, Math.round(bitmap.height * scale));
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // For transparent pixels.
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data;
  const pixels = new Uint8Array(width * height * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4) {
    pixels[j++] = rgba[i];
    pixels[j++] = rgba[i + 1];
    pixels[j++] = rgba[i + 2];
  }
  return new ort.Tensor("uint8", pixels, [height, width, 3]);
}

// A session runs one image at a time.
function predict(blob) {
  running = running.catch(() => {}).then(async () => {
    const pixels = await decode(blob);
    const start = performance.now();
    const { probabilities } = await session.run({ pixels });
    return { probabilities: probabilities.data, milliseconds: performance.now() - start };
  });
  return running;
}

async function start() {
  ort.env.wasm.numThreads = 1;
  const certificate = await (await fetchChecked("certificate.json")).json();
  classNames = (await (await fetchChecked("bundle.json")).json()).class_names;
  const model = await (await fetchChecked("pixels.onnx")).arrayBuffer();
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  let largest = 0, agreeing = 0;
  for (const golden of certificate.golden) {
    const { probabilities } = await predict(await (await fetchChecked(golden.file)).blob());
    const differences = golden.probabilities.map((p, i) => Math.abs(p - probabilities[i]));
    const difference = Math.max(...differences);
    largest = Math.max(largest, difference);
    const best = classNames[probabilities.indexOf(Math.max(...probabilities))];
    agreeing += best === golden.predicted && difference <= LARGEST_DIFFERENCE;
  }
  const total = certificate.golden.length;
  if (agreeing < total)
    throw new Error(`the model is wrong in this browser: ${total - agreeing} of ${total} test `
      + `images have other probabilities; the largest difference is ${largest.toFixed(3)}`);
  element("check").textContent = `The model is ready. ${agreeing} of ${total} test images agree; `
    + `the largest difference of a probability is ${largest.toFixed(4)}.`;
  element("file").disabled = false;
  element("camera").disabled = !navigator.mediaDevices;
}

function show(error) {
  element("problem").hidden = !error;
  element("problem").textContent = error ? String(error.message || error) : "";
}

async function classify(blob) {
  if (!session || element("file").disabled) return;
  show(null);
  let result;
  try {
    result = await predict(blob);
  } catch (error) {
    element("result").hidden = true;
    show(new Error(`this image cannot be classified: ${error.message || error}`));
    return;
  }
  URL.revokeObjectURL(element("picture").src);
  element("picture").src = URL.createObjectURL(blob);
  const order = [...classNames.keys()]
    .sort((a, b) => result.probabilities[b] - result.probabilities[a])
    .slice(0, CLASSES_SHOWN);
  element("bars").replaceChildren(...order.map((i) => {
    const item = document.createElement("li");
    const percent = `${(100 * result.probabilities[i]).toFixed(1)} %`;
    for (const [name, text] of [["class", classNames[i]], ["probability", percent], ["bar", ""]]) {
      const part = document.createElement("span");
      part.className = name;
      part.textContent = text;
      item.append(part);
    }
    const bar = document.createElement("span");
    bar.style.width = percent.replace(" ", "");
    item.lastChild.append(bar);
    return item;
  }));
  element("result-title").textContent = classNames[order[0]];
  element("took").textContent = `${result.milliseconds.toFixed(1)} ms with one thread`;
  element("result").hidden = false;
  element("result-title").focus();
}

async function useCamera() {
  const video = element("video");
  if (!video.srcObject) {
    video.srcObject = await navigator.mediaDevices.getUserMedia(
      { video: { facingMode: "environment" } });
    video.hidden = false;
    await video.play();
    element("camera").textContent = "Classify this picture";
    return;
  }
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  video.srcObject.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  video.hidden = true;
  element("camera").textContent = "Use the camera";
  await classify(await new Promise((resolve) => canvas.toBlob(resolve, "image/png")));
}

element("file").addEventListener("change", () => {
  if (element("file").files[0]) classify(element("file").files[0]);
  element("file").value = "";
});
element("camera").addEventListener("click", () => useCamera().catch(show));
const drop = element("drop");
for (const name of ["dragover", "drop", "dragleave"])
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0]) classify(event.dataTransfer.files[0]);
  });
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files[0]) classify(event.clipboardData.files[0]);
});
start().catch((error) => {
  element("check").textContent = "The model cannot be used.";
  show(error);
});

// A program can time the session (experiments/benchmarks/bench_export.py).
export { ort, session };
