// Reads the page as a person would, view after view, and says on the console what it saw: see tests/test_report.py.
"use strict";
const seen = {errors: [], views: {}, weights: {}, focus: []};
addEventListener("error", event => seen.errors.push(event.message));
addEventListener("unhandledrejection", event => seen.errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", event => seen.errors.push(`policy: ${event.violatedDirective}`));

/** Until the condition holds, looked at after each change of the document. */
function until(condition) {
  return new Promise(done => {
    const look = () => condition() && (watcher.disconnect(), done());
    const watcher = new MutationObserver(look);
    watcher.observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
    look();
  });
}

async function visit(hash) {
  location.hash = "group=-1";
  await until(() => $("#main").textContent === "No group with this number.");
  location.hash = hash;
  await until(() => $("#text"));
}

/** Numbers of a colour as the browser computed it: red, green, blue, alpha. */
const parts = colour => [...colour.match(/[\d.]+/g).map(Number), 1].slice(0, 4);

/** What lies behind an element, its own ground included. */
function ground(element) {
  const under = element.parentElement ? ground(element.parentElement) : [255, 255, 255];
  const [red, green, blue, alpha] = parts(getComputedStyle(element).backgroundColor);
  return [red, green, blue].map((value, i) => alpha * value + (1 - alpha) * under[i]);
}

function luminance(colour) {
  const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const [red, green, blue] = colour.map(value => linear(value / 255));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

/** The text with the least contrast to its ground. */
function worst_contrast() {
  let worst = [100, ""];
  for (const element of document.querySelectorAll("body *:not(script, noscript, option, :disabled)")) {
    const own = [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!own || !element.getClientRects().length) continue;
    const [a, b] = [luminance(parts(getComputedStyle(element).color).slice(0, 3)), luminance(ground(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = `${element.tagName}.${element.className} ${element.textContent.slice(0, 40)}`;
    if (contrast < worst[0]) worst = [contrast, name];
  }
  return worst;
}

function look() {
  const tokens = [...document.querySelectorAll("#text .tok[data-s]")].map(element => ({
    s: Number(element.dataset.s), k: Number(element.dataset.k), classes: element.className.split(" ").slice(1),
    v: Number(element.style.getPropertyValue("--v")), text: element.textContent,
    ground: getComputedStyle(element).backgroundColor, bidi: getComputedStyle(element).unicodeBidi,
    mono: getComputedStyle(element).fontFamily.includes("mono")}));
  const texts = selector => [...document.querySelectorAll(selector)].map(element => element.textContent);
  const dropped = [...document.querySelectorAll("details.dropped")].map(one => [one.open, one.textContent]);
  return {
    tokens, dropped, heading: $("#heading").textContent, facts: texts(".facts div"), why: texts(".why"),
    list: texts("#list strong"), branches: texts(".branch h3"), runs: texts(".branch .run"), fork: texts(".fork > p"),
    inspect: texts("#inspect .formula"), labels: texts(".span .label"),
    strips: new Set([...document.querySelectorAll(".branch")].map(one => one.getBoundingClientRect().top)).size,
    images: document.querySelectorAll("#main img, #list img, #main b").length, contrast: worst_contrast(),
    overflow: document.documentElement.scrollWidth - innerWidth};
}

/** Presses a key where the focus is; waits if a new trajectory comes up. */
async function press(key, opens = false) {
  if (opens) $("#text").id = "text-before";
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  if (opens) await until(() => $("#text"));
  await new Promise(done => setTimeout(done));
  const {id, dataset, tagName} = document.activeElement;
  const place = dataset.k ? `token ${dataset.k}` : dataset.group ? `group ${dataset.group}` : tagName;
  seen.focus.push([key, id || place, location.hash]);
}

const weights = () => [...shown.values()].filter(sample => sample.count).flatMap(sample =>
  Array.from({length: sample.tokens}, (_, k) => [sample.place, k, known_of(sample, k).weight ?? null]));

/** Weights of every token of every trained sample, for each variant of the run's options. */
async function all_weights(variants) {
  const kept = {...options};
  for (const group of index.groups.filter(one => one.members.some(member => index.samples[member].count))) {
    const size = group.level === "step" ? 1 : group.members.length;
    for (let sample = 0; sample < size; sample++) {
      await visit(`group=${group.group}&sample=${sample}`);
      for (const changes of variants) {
        Object.assign(options, changes);
        (seen.weights[JSON.stringify(changes)] ??= []).push(...weights());
        Object.assign(options, kept);
      }
    }
  }
}

async function walk() {
  await until(() => $("#text"));
  const {hashes, variants} = JSON.parse(document.getElementById("plan").textContent);
  seen.first = look();
  seen.charts = [...document.querySelectorAll(".curves figure")].map(figure =>
    [figure.querySelector("figcaption").textContent, figure.querySelectorAll("[role=img] .line").length,
     figure.querySelector(".now")?.getAttribute("d"), figure.querySelector(".key").textContent]);
  for (const hash of hashes) {
    await visit(hash);
    seen.views[hash] = look();
  }
  if (variants.length) await all_weights(variants);
  await visit("group=0&sample=0");
  document.querySelector("#list button[tabindex='0']").focus();
  for (const key of ["j", "ArrowDown", "k"]) await press(key);
  await press("Enter", true);
  await press("n", true);
  for (const key of ["t", "ArrowRight", "ArrowLeft", "4", "Escape", "f", "?"]) await press(key);
  seen.dialog = $("#keys").open;
  seen.unnamed = [...document.querySelectorAll("button, select, nav, main, [role=group]")].filter(one =>
    !one.textContent.trim() && !one.getAttribute("aria-label")).length;
  seen.ground = getComputedStyle(document.body).backgroundColor;
  seen.width = innerWidth;
}

async function leave() {
  await walk().catch(error => seen.errors.push(`${error} ${error.stack}`));
  const ascii = JSON.stringify(seen).replace(/[^ -~]/g, one => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
  const pieces = btoa(ascii).match(/.{1,4096}/g);
  for (const [place, piece] of pieces.entries()) console.log(`seen:${pieces.length - 1 - place}:${piece}`);
}

addEventListener("DOMContentLoaded", leave);
