
"use strict";

// --- what needs no page ---------------------------------------------------------------------------------------------

const percent = (share) => `${Math.round(100 * share)}%`;

function csvCell(value) {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function toCsv(rows) {
  return rows.map((row) => row.map(csvCell).join(",") + "\n").join("");
}

const best = (said) => (said.top.length ? said.top[0].label : said.label);

// As the CSV file that the service writes, with the status of each answer.
function predictionRows(rows, tasks) {
  const names = tasks.flatMap((task) => [task, `${task}_status`, `${task}_probability`, `${task}_text_weight`, `${task}_image_weight`]);
  const lines = rows.map((row) => [
    row.row, row.text, row.picture,
    ...tasks.flatMap((task) => {
      const said = row.predictions ? row.predictions[task] : null;
      return said ? [said.label, said.status, said.probability, said.text_weight, said.image_weight] : ["", "", "", "", ""];
    }),
    row.error,
  ]);
  return [["row", "text", "picture", ...names, "error"], ...lines];
}

// What to review: where the model says that it is not sure, and without thresholds what is below a limit.
function questionsOf(rows, tasks, limit) {
  const all = rows.flatMap((row) => (row.predictions ? tasks.map((task) => ({ row, task, said: row.predictions[task] })) : []));
  const judged = all.some((one) => one.said.status !== null);
  return all.filter((one) => (judged ? one.said.status === "unsure" : one.said.probability < limit));
}

// One line for each row with an answer; tasks without one stay empty, which training reads as not labelled.
function correctionRows(questions, answers, tasks, imageColumn, textColumn) {
  const rows = new Map();
  questions.forEach((question, number) => {
    if (!answers.has(number)) return;
    if (!rows.has(question.row)) rows.set(question.row, new Map());
    rows.get(question.row).set(question.task, answers.get(number));
  });
  const lines = [...rows].map(([row, found]) => [row.picture, row.text, ...tasks.map((task) => found.get(task))]);
  return [[imageColumn || "image", textColumn || "text", ...tasks], ...lines];
}

const tokenWord = (token) => token.trim().replace(/<\/w>$/, "") || "␣";

// --- the page -------------------------------------------------------------------------------------------------------

function start() {
  const $ = (id) => document.getElementById(id);
  const state = {
    model: null, token: "", picture: null, url: null, rows: [], files: new Map(),
    questions: [], answers: new Map(), place: 0, running: null,
  };

  function make(name, properties = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key.includes("-") || key === "role") element.setAttribute(key, value);
      else element[key] = value;
    }
    element.append(...children);
    return element;
  }

  function say(message) { $("status").textContent = message; }

  function fail(error) {
    $("problem").textContent = error.message;
    $("problem").hidden = false;
    say("");
  }

  async function call(path, options = {}) {
    const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The service does not answer. Check that it is running, then try again.");
    }
    if (response.ok) return response;
    let message = `The service answered with status ${response.status}.`;
    try {
      message = (await response.json()).error.message;
    } catch { /* no JSON: the status says what there is to say */ }
    if (response.status === 401) {
      $("login").hidden = false;
      message = state.token ? "This token is wrong." : "This service asks for an access token.";
    }
    throw new Error(message);
  }

  // Work that was begun before is given up. The button keeps the focus, so it is marked, not disabled.
  async function busy(button, words, work) {
    if (state.running) state.running.abort();
    const running = new AbortController();
    state.running = running;
    $("problem").hidden = true;
    button.setAttribute("aria-busy", "true");
    say(words);
    try {
      await work(running.signal);
    } catch (error) {
      if (error.name !== "AbortError") fail(error);
    } finally {
      button.removeAttribute("aria-busy");
      if (state.running === running) state.running = null;
    }
  }

  function bar(shares) {
    const track = make("span", { className: "bar", "aria-hidden": "true" });
    for (const [share, kind] of shares) {
      const part = make("i", { className: kind });
      part.style.width = `${100 * Math.min(Math.max(share, 0), 1)}%`;
      track.append(part);
    }
    return track;
  }

  function card(task, said) {
    const heading = make("p", { className: "best", dir: "auto" }, best(said) || "");
    if (said.status) heading.append(make("span", { className: `badge ${said.status === "unsure" ? "unsure" : "accepted"}` }, said.status));
    const list = make("dl");
    for (const { label, probability } of said.top) {
      list.append(make("dt", { dir: "auto" }, label), bar([[probability, ""]]), make("dd", {}, percent(probability)));
    }
    const element = make("div", { className: "card" }, make("h4", {}, task), heading, list);
    if (said.text_weight !== null && said.image_weight !== null) {
      element.append(
        make("p", { className: "weights small" }, `text ${percent(said.text_weight)}, picture ${percent(said.image_weight)}`),
        bar([[said.text_weight, "text"], [said.image_weight, "image"]]),
      );
    }
    return element;
  }

  // The picture under a map: what is not attended to is darkened.
  function paint(image, map) {
    const canvas = $("canvas"), context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = true;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    if (!map) return;
    const small = make("canvas", { width: map[0].length, height: map.length });
    const pixels = small.getContext("2d"), most = Math.max(...map.flat()) || 1;
    const veil = pixels.createImageData(small.width, small.height);
    map.flat().forEach((value, place) => { veil.data[4 * place + 3] = Math.round(205 * (1 - Math.max(0, value) / most)); });
    pixels.putImageData(veil, 0, 0);
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
  }

  function showMaps(explained) {
    const maps = [["nothing", null]];
    if (explained.image_to_patch) maps.push(["the picture as a whole", explained.image_to_patch]);
    (explained.token_to_patch || []).forEach((map, place) => maps.push([tokenWord(explained.tokens[place]), map]));
    $("maps").hidden = !explained.image || maps.length < 2;
    if ($("maps").hidden) return;
    const image = new Image();
    const choose = ([name, map]) => {
      $("canvas").setAttribute("aria-label", map ? `The picture, lit where ${name} attends to it` : "The picture");
      paint(image, map);
    };
    image.onload = () => choose(maps[1]);
    image.src = `data:image/png;base64,${explained.image}`;
    $("tokens").replaceChildren(...maps.map((entry, place) => {
      const input = make("input", { type: "radio", name: "map", value: String(place), checked: place === 1 });
      input.addEventListener("change", () => choose(entry));
      return make("label", {}, input, make("span", { dir: "auto" }, entry[0]));
    }));
  }

  function showResult(explained) {
    $("labels").replaceChildren(...Object.entries(explained.predictions).map(([task, said]) => card(task, said)));
    showMaps(explained);
    $("result").hidden = false;
    say(Object.entries(explained.predictions)
      .map(([task, said]) => `${task}: ${best(said)}, ${percent(said.probability)}${said.status ? `, ${said.status}` : ""}`).join("; "));
    $("result").focus();
  }

  function setPicture(file) {
    if (state.url) URL.revokeObjectURL(state.url);
    state.picture = file;
    state.url = file ? URL.createObjectURL(file) : null;
    $("shown").hidden = !file;
    if (file) $("shown").src = state.url;
    $("shown").alt = file ? `Chosen picture ${file.name || ""}` : "";
    $("drop-words").textContent = file ? file.name || "" : "Drop a picture here, or choose a file";
    $("remove").hidden = !file;
    if (!file) $("picture").value = "";
  }

  function classify(event) {
    event.preventDefault();
    return busy($("classify"), "Classifying.", async (signal) => {
      const form = new FormData();
      if (!state.picture && !$("text").value.trim()) throw new Error("Choose a picture, type a text, or both.");
      form.append("image", state.picture || "");
      form.append("text", $("text").value);
      const response = await call("explain", { method: "POST", body: form, signal });
      showResult((await response.json()).explanations[0]);
    });
  }

  function download(name, type, content) {
    const url = URL.createObjectURL(new Blob([content], { type }));
    const link = make("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  function tableForm() {
    const [table] = $("table").files;
    if (!table) throw new Error("Choose a table first.");
    const form = new FormData();
    form.append("table", table);
    for (const side of ["image", "text"]) {
      const column = $(`${side}-column`).value.trim();
      if (column) form.append(`${side}_column`, column);
    }
    state.files = new Map();
    for (const file of $("pictures").files) {
      form.append("picture", file);
      state.files.set(file.name, file);
    }
    return form;
  }

  function labelTable(event) {
    event.preventDefault();
    return busy($("label-table"), "Labelling the table.", async (signal) => {
      const response = await call("predict-table", { method: "POST", body: tableForm(), signal });
      state.rows = (await response.json()).rows;
      showTable();
      startReview();
      $("table-result").focus();
    });
  }

  function showTable() {
    const tasks = Object.keys(state.model.tasks), most = 100;
    const failed = state.rows.filter((row) => row.error).length;
    const summary = `${state.rows.length} rows${failed ? `, ${failed} of them with an error` : ""}.`;
    $("table-summary").textContent = summary;
    say(`The table is labelled: ${summary}`);
    $("rows-caption").textContent = state.rows.length > most ? `The first ${most} rows` : "All rows";
    $("rows-head").replaceChildren(make("tr", {}, ...["row", "text", "picture", ...tasks, "error"].map((name) => make("th", { scope: "col" }, name))));
    $("rows-body").replaceChildren(...state.rows.slice(0, most).map((row) => make("tr", {},
      make("td", {}, String(row.row)), make("td", { dir: "auto" }, row.text || ""), make("td", {}, row.picture || ""),
      ...tasks.map((task) => {
        const said = row.predictions && row.predictions[task];
        return make("td", {}, said ? `${best(said)} (${percent(said.probability)}${said.status ? `, ${said.status}` : ""})` : "");
      }),
      make("td", {}, row.error || ""))));
    $("table-result").hidden = false;
  }

  function startReview() {
    const tasks = Object.keys(state.model.tasks);
    const judged = state.rows.some((row) => row.predictions && tasks.some((task) => row.predictions[task].status !== null));
    $("limit-box").hidden = judged;
    state.questions = questionsOf(state.rows, tasks, Number($("limit").value));
    state.answers = new Map();
    state.place = 0;
    $("review").hidden = false;
    ask();
  }

  function ask() {
    const question = state.questions[state.place];
    $("question").hidden = !question;
    $("done").hidden = Boolean(question);
    $("corrections").disabled = state.answers.size === 0;
    if (!question) return;
    const { row, task, said } = question;
    $("progress").textContent = `${state.place + 1} of ${state.questions.length}, row ${row.row}; ${state.answers.size} answered`;
    $("review-text").textContent = row.text || "no text";
    $("review-task").textContent = task;
    const file = row.picture && state.files.get(row.picture.split(/[\\/]/).pop());
    $("review-picture").hidden = !file;
    if (state.shown) URL.revokeObjectURL(state.shown);
    state.shown = file ? URL.createObjectURL(file) : null;
    if (file) $("review-picture").src = state.shown;
    $("review-picture").alt = file ? `Picture ${row.picture}` : "";
    $("choices").replaceChildren(...said.top.map(({ label, probability }, place) => {
      const button = make("button", { type: "button" }, `${place + 1} · ${label} (${percent(probability)})`);
      button.addEventListener("click", () => answer(label));
      return button;
    }));
    $("classes").replaceChildren(...state.model.tasks[task].map((name) => make("option", { value: name })));
    $("other").value = "";
    say(`${task}: ${row.text || "no text"}. ${said.top.map(({ label }, place) => `${place + 1} ${label}`).join(", ")}`);
  }

  function answer(label) {
    const question = state.questions[state.place];
    if (!state.model.tasks[question.task].includes(label)) {
      fail(new Error(`${label} is no class of ${question.task}.`));
      return;
    }
    $("problem").hidden = true;
    state.answers.set(state.place, label);
    move(1);
  }

  function move(step) {
    state.place = Math.max(0, Math.min(state.questions.length, state.place + step));
    ask();
    if (!$("question").hidden) $("question").focus();
  }

  function key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || $("review").hidden || $("question").hidden) return;
    if (!$("review").contains(event.target) || event.target.tagName === "INPUT") return;
    const top = state.questions[state.place].said.top, number = Number(event.key);
    if (number >= 1 && number <= top.length) answer(top[number - 1].label);
    else if (event.key === "s") move(1);
    else if (event.key === "b") move(-1);
    else return;
    event.preventDefault();
  }

  function useExample(example) {
    $("text").value = example.text || "";
    if (example.image) {
      const bytes = Uint8Array.from(atob(example.image), (character) => character.charCodeAt(0));
      setPicture(new File([bytes], "example.png", { type: "image/png" }));
    } else {
      setPicture(null);
    }
    return classify(new Event("submit"));
  }

  async function describe() {
    state.model = await (await call("model")).json();
    $("login").hidden = true;
    $("problem").hidden = true;
    const tasks = Object.entries(state.model.tasks);
    $("title").textContent = state.model.name;
    document.title = `${state.model.name}: classify a picture and a text`;
    $("about").textContent = `${state.model.system}. ${tasks.map(([task, names]) => `${task} (${names.length} classes)`).join(", ")}.`;
    $("image-column").placeholder = state.model.image_column || "";
    $("text-column").placeholder = state.model.text_column || "";
    const { examples } = await (await call("examples")).json();
    $("examples-box").hidden = examples.length === 0;
    $("examples").replaceChildren(...examples.map((example) => {
      const button = make("button", { type: "button" });
      if (example.image) button.append(make("img", { src: `data:image/png;base64,${example.image}`, alt: "" }));
      button.append(make("span", { dir: "auto" }, example.text || "no text"));
      button.addEventListener("click", () => useExample(example));
      return make("li", {}, button);
    }));
  }

  $("one").addEventListener("submit", classify);
  $("picture").addEventListener("change", () => setPicture($("picture").files[0] || null));
  $("remove").addEventListener("click", () => { setPicture(null); $("picture").focus(); });
  for (const [name, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
    $("drop").addEventListener(name, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", over);
      if (name === "drop" && event.dataTransfer.files.length) setPicture(event.dataTransfer.files[0]);
    });
  }
  $("table-form").addEventListener("submit", labelTable);
  $("csv").addEventListener("click", () => download("predictions.csv", "text/csv", toCsv(predictionRows(state.rows, Object.keys(state.model.tasks)))));
  $("parquet").addEventListener("click", () => busy($("parquet"), "Labelling the table.", async (signal) => {
    const response = await call("predict-table?format=parquet", { method: "POST", body: tableForm(), signal });
    download("predictions.parquet", "application/vnd.apache.parquet", await response.blob());
    say("The file is ready.");
  }));
  $("limit").addEventListener("change", startReview);
  $("other-form").addEventListener("submit", (event) => { event.preventDefault(); answer($("other").value.trim()); });
  $("skip").addEventListener("click", () => move(1));
  $("back").addEventListener("click", () => move(-1));
  $("corrections").addEventListener("click", () => {
    const { tasks, image_column: image, text_column: text } = state.model;
    const columns = [$("image-column").value.trim() || image, $("text-column").value.trim() || text];
    download("corrections.csv", "text/csv", toCsv(correctionRows(state.questions, state.answers, Object.keys(tasks), ...columns)));
  });
  document.addEventListener("keydown", key);
  $("login").addEventListener("submit", (event) => {
    event.preventDefault();
    state.token = $("token").value.trim();
    describe().catch(fail);
  });
  describe().catch(fail);
}

if (typeof module !== "undefined") module.exports = { start, toCsv, predictionRows, questionsOf, correctionRows, tokenWord };
else start();
