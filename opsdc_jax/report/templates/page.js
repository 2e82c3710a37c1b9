"use strict";
// The token view. A rollout's tokens are one stop of the Tab key; the arrow keys walk along them.
const tip = document.getElementById("tip");
const data = JSON.parse(document.getElementById("choices").textContent);
let open = null;

function element(name, text, parent) {
  const made = document.createElement(name);
  made.textContent = text;
  parent.append(made);
  return made;
}

function shown(text) {
  const word = text.trim();
  return word.length > 60 ? word.slice(0, 60) + "\u2026" : word || text.replaceAll("\n", "\u21b5").replaceAll(" ", "\u2423") || "(part of a character)";
}

function percent(probability) {
  return probability < 0.001 ? "<0.1%" : (100 * probability).toFixed(1) + "%";
}

function side(name, title, choices, said, probability, parent) {
  const box = element("div", "", parent);
  box.className = name;
  element("h5", title, box);
  const list = element("ol", "", box);
  const rows = choices.map(([text, p]) => [text, p, text.trim() === said.trim()]);
  if (!rows.some((row) => row[2])) rows.push([said, probability, true]);
  for (const [text, p, is] of rows) {
    const item = element("li", "", list);
    item.style.setProperty("--p", p);
    if (is) item.className = "said";
    element("span", shown(text), item);
    element("span", percent(p), item);
  }
}

function show(token) {
  hide();
  const tokens = [...token.parentElement.children];
  const [said, kl, entropies, probabilities, student, teacher] =
    data[token.parentElement.dataset.rollout][tokens.indexOf(token)];
  tip.replaceChildren();
  element("h4", "\u201c" + shown(said) + "\u201d  " + kl + " nats", tip);
  element("p", "entropy: student " + entropies[0] + ", teacher " + entropies[1], tip);
  const sides = element("div", "", tip);
  sides.className = "sides";
  side("from-student", "The student would say", student, said, probabilities[0], sides);
  side("from-teacher", "The teacher would say", teacher, said, probabilities[1], sides);
  tip.hidden = false;
  token.classList.add("open");
  open = token;
  const box = token.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const below = box.bottom + 8 + size.height < innerHeight || box.top < size.height + 8;
  const left = Math.min(Math.max(box.left, 8), document.documentElement.clientWidth - size.width - 8);
  if (getComputedStyle(tip).position === "absolute") {
    tip.style.left = left + scrollX + "px";
    tip.style.top = (below ? box.bottom + 8 : box.top - size.height - 8) + scrollY + "px";
  }
}

function hide() {
  if (open) open.classList.remove("open");
  open = null;
  tip.hidden = true;
}

for (const group of document.querySelectorAll(".tokens")) {
  const tokens = [...group.children];
  const token = (event) => (event.target.parentElement === group ? event.target : null);
  for (const one of tokens) {
    one.tabIndex = -1;
    one.setAttribute("role", "button");
    one.setAttribute("aria-describedby", "tip");
  }
  if (tokens.length) tokens[0].tabIndex = 0;
  group.addEventListener("mouseover", (event) => token(event) && show(event.target));
  group.addEventListener("mouseleave", hide);
  group.addEventListener("click", (event) => token(event) && event.target.focus());
  group.addEventListener("focusin", (event) => {
    if (!token(event)) return;
    for (const one of tokens) one.tabIndex = -1;
    event.target.tabIndex = 0;
    show(event.target);
  });
  group.addEventListener("focusout", hide);
  group.addEventListener("keydown", (event) => {
    const last = tokens.length - 1, here = tokens.indexOf(document.activeElement);
    const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: last }[event.key];
    if (next === undefined || here < 0) return;
    event.preventDefault();
    tokens[Math.min(Math.max(next, 0), last)].focus();
  });
}
addEventListener("keydown", (event) => event.key === "Escape" && hide());
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
