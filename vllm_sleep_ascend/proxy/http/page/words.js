// SPDX-License-Identifier: Apache-2.0
// Texts in the reader's language, from texts.json, and figures as that language writes them.

const texts = await (await fetch("texts.json")).json();

export let language = chosen();

function chosen() {
  const wanted = [localStorage.getItem("language"), ...navigator.languages];
  const known = wanted.map((name) => name?.split("-")[0].toLowerCase());
  return known.find((name) => name in texts) ?? "en";
}

export function setLanguage(name) {
  language = name;
  localStorage.setItem("language", name);
}

export function otherLanguage() {
  return Object.keys(texts).find((name) => name !== language);
}

// The text with this name, with what stands in braces replaced.
export function say(name, values = {}) {
  return texts[language][name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

// The text of a name that may be unknown, such as one that a newer server has sent.
export function word(kind, name) {
  return texts[language][`${kind}_${name}`] ?? name;
}

// Fill in all that the document itself says.
export function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : language;
  for (const element of document.querySelectorAll("[data-text]")) {
    element.textContent = say(element.dataset.text);
  }
}

function number(value, digits) {
  return value.toLocaleString(language, { maximumFractionDigits: digits, useGrouping: false });
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${number(value, value < 10 && unit > 2 ? 2 : value < 100 && unit > 0 ? 1 : 0)} ${units[unit]}`;
}

export function seconds(value) {
  return `${number(value, value < 10 ? 2 : value < 100 ? 1 : 0)} s`;
}

export function perSecond(value) {
  return number(value, value < 10 ? 2 : 1);
}

export function clock(epoch) {
  return new Date(epoch * 1000).toLocaleTimeString(language, { hour12: false });
}
