// Runs the page's script against a service that listens, on a document that is only as much of one as the script uses.
// node page.cjs INDEX SCRIPT ADDRESS SCENARIO TOKEN PICTURE; prints what was seen, as JSON.
"use strict";

const fs = require("node:fs");
const [index, script, address, scenario, token, picture] = process.argv.slice(2);

class Element {
  constructor(tag) {
    Object.assign(this, { tagName: tag.toUpperCase(), children: [], attributes: {}, listeners: {}, style: {}, parent: null });
    Object.assign(this, { hidden: false, disabled: false, value: "", files: [], words: "" });
    this.classList = { toggle: (name, on) => { this.attributes[`class-${name}`] = on; } };
  }
  get textContent() { return this.words + this.children.map((child) => (typeof child === "string" ? child : child.textContent)).join(" "); }
  set textContent(text) { this.children = []; this.words = String(text); }
  append(...children) { for (const child of children) { this.children.push(child); if (child instanceof Element) child.parent = this; } }
  replaceChildren(...children) { this.children = []; this.words = ""; this.append(...children); }
  addEventListener(name, listener) { (this.listeners[name] ||= []).push(listener); }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  removeAttribute(name) { delete this.attributes[name]; }
  remove() {}
  focus() { document.activeElement = this; }
  contains(other) { return other === this || this.inside === true || (other && other.within === this); }
  getContext() { return { clearRect() {}, drawImage: () => { seen.drawn += 1; }, putImageData() {}, createImageData: (w, h) => ({ data: new Uint8ClampedArray(4 * w * h) }) }; }
  all(tag) { return this.children.flatMap((child) => (child instanceof Element ? [...(child.tagName === tag ? [child] : []), ...child.all(tag)] : [])); }
  click() { if (this.download) seen.downloads.push([this.download, blobs.get(this.href)]); return this.fire("click"); }
  async fire(name, more = {}) {
    const event = { preventDefault() {}, target: this, key: "", ...more };
    for (const listener of this.listeners[name] || []) await listener(event);
  }
}

const seen = { drawn: 0, downloads: [] };
const blobs = new Map();
const elements = new Map();
for (const [, tag, attributes] of fs.readFileSync(index, "utf8").matchAll(/<([a-z0-9]+)([^>]*\sid="[^>]*)>/g)) {
  const element = new Element(tag);
  element.hidden = /\shidden(\s|$)/.test(attributes);
  element.value = (/\svalue="([^"]*)"/.exec(attributes) || ["", ""])[1];
  elements.set(/\sid="([^"]*)"/.exec(attributes)[1], element);
}
const $ = (id) => {
  if (!elements.has(id)) throw new Error(`the page has no element '${id}'`);
  return elements.get(id);
};
global.document = Object.assign(new Element("document"), { getElementById: $, createElement: (tag) => new Element(tag), body: new Element("body") });
global.Image = class { set src(value) { setTimeout(() => this.onload(), 0); } };
URL.createObjectURL = (blob) => { const name = `blob:${blobs.size}`; blobs.set(name, blob); return name; };
URL.revokeObjectURL = () => {};
const real = global.fetch;
let down = false;
global.fetch = (path, options) => (down ? Promise.reject(new TypeError("fetch failed")) : real(new URL(path, address), options));

async function until(condition, what) {
  for (let tries = 0; tries < 400; tries += 1) {
    if (condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
  throw new Error(`did not come to pass: ${what}; problem: ${$("problem").textContent}`);
}

const file = (name) => new File([fs.readFileSync(picture)], name, { type: "image/png" });
const labels = () => $("labels").children.map((card) => card.textContent);
const press = (key, target = $("question")) => { target.within = $("review"); return document.fire("keydown", { key, target }); };

const scenarios = {
  async pair() {
    await until(() => $("title").textContent === "tiny", "the description");
    seen.about = $("about").textContent;
    await $("one").fire("submit");
    seen.nothing = $("problem").textContent;
    $("text").value = "a <b>red</b> dress";
    await $("one").fire("submit");
    await until(() => !$("result").hidden, "a result");
    seen.text = labels();
    seen.withoutPicture = $("maps").hidden;
    seen.said = $("status").textContent;
    seen.focused = document.activeElement === $("result");
    $("picture").files = [file("a.png")];
    await $("picture").fire("change");
    await $("one").fire("submit");
    await until(() => !$("maps").hidden && seen.drawn, "maps");
    seen.both = labels();
    seen.tokens = $("tokens").children.map((label) => label.textContent.trim());
    seen.canvas = $("canvas").attributes["aria-label"];
    await $("tokens").all("INPUT")[2].fire("change");
    seen.chosen = $("canvas").attributes["aria-label"];
    await $("remove").fire("click");
    await $("drop").fire("drop", { dataTransfer: { files: [new File(["hello"], "a.txt")] } });
    await $("one").fire("submit");
    seen.wrong = $("problem").textContent;
    seen.examples = $("examples").children.length;
    await $("examples").all("BUTTON")[1].fire("click");
    seen.example = [$("text").value, $("problem").hidden];
    down = true;
    await $("one").fire("submit");
    seen.down = $("problem").textContent;
    seen.enabled = !("aria-busy" in $("classify").attributes);
  },
  async table() {
    await until(() => $("title").textContent === "tiny", "the description");
    await $("table-form").fire("submit");
    seen.nothing = $("problem").textContent;
    $("table").files = [new File(["file,title\na.png,red dress\nb/a.png,\"a, \"\"quoted\"\" coat\"\n,\n"], "rows.csv")];
    $("pictures").files = [file("a.png")];
    $("limit").value = "1";
    await $("table-form").fire("submit");
    seen.summary = $("table-summary").textContent;
    seen.rows = $("rows-body").children.map((row) => row.children.map((cell) => cell.textContent));
    seen.head = $("rows-head").textContent;
    seen.questions = $("progress").textContent;
    seen.pictured = !$("review-picture").hidden;
    seen.task = $("review-task").textContent;
    const second = $("choices").children[1].textContent;
    await press("2");
    seen.second = second;
    await press("s");
    await press("b");
    seen.back = $("progress").textContent;
    await press("1", Object.assign(new Element("input")));
    seen.typed = $("progress").textContent;
    $("other").value = "no class";
    await $("other-form").fire("submit");
    seen.unknown = $("problem").textContent;
    $("other").value = "long";
    await $("other-form").fire("submit");
    await $("choices").children[0].fire("click");
    await press("s");
    seen.done = !$("done").hidden && $("question").hidden;
    await $("corrections").click();
    await $("csv").click();
    await $("parquet").fire("click");
    await until(() => seen.downloads.length === 3, "the downloads");
    seen.downloads = await Promise.all(seen.downloads.map(async ([name, blob]) => [name, name.endsWith("csv") ? await blob.text() : (await blob.text()).slice(0, 4)]));
    $("table").files = [new File(["x"], "rows.xlsx")];
    await $("table-form").fire("submit");
    seen.wrong = $("problem").textContent;
  },
  async token() {
    await until(() => !$("login").hidden, "the question for a token");
    seen.asked = $("problem").textContent;
    $("token").value = "wrong-wrong-wrong-wrong";
    await $("login").fire("submit");
    await until(() => $("problem").textContent === "This token is wrong.", "the refusal");
    $("token").value = token;
    await $("login").fire("submit");
    await until(() => $("title").textContent === "tiny", "the description");
    $("text").value = "red";
    await $("one").fire("submit");
    seen.login = $("login").hidden;
    seen.labels = labels().length;
  },
};

require(script).start();
scenarios[scenario]().then(() => { console.log(JSON.stringify(seen)); process.exit(0); }, (error) => { console.error(error); process.exit(1); });
