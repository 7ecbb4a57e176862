// Probabilities behind the words of a story, and the choice of another word.
const tip = document.createElement("div");
tip.className = "alternatives";
tip.setAttribute("role", "dialog");
tip.setAttribute("aria-label", "Probabilities of this word");
tip.hidden = true;
document.body.append(tip);
let shown = null; // the word whose probabilities are shown
let isPinned = false; // shown until a click elsewhere
let hiding = 0;

const percent = (p) => {
  if (p == null) return "";
  if (p < 0.0005) return "<0.1%";
  return `${(100 * p).toFixed(p < 0.0995 || (p > 0.99 && p < 0.9995) ? 1 : 0)}%`;
};
const readable = (text) => (text === "" ? "end of the story" : text.trim() === "" ? text.replaceAll("\n", "¶").replaceAll(" ", "␣") : text.trim());

function make(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

function hide() {
  clearTimeout(hiding);
  tip.hidden = true;
  shown?.classList.remove("shown");
  shown = null;
  isPinned = false;
}

function choose(story, at, id) {
  const chosen = story.chosen.filter((index) => index < at);
  hide();
  trigger("choose", { token_ids: [...story.ids.slice(0, at), id], num_prompt_tokens: Math.min(story.prompt, at), chosen });
}

function row(story, at, token, other) {
  const isOwn = other.id === token.id;
  const line = make("button", isOwn ? "own" : "", make("span", "text", readable(other.t)), make("span", "share", percent(other.p)));
  line.type = "button";
  line.style.setProperty("--share", `${100 * (other.p ?? 0)}%`);
  line.disabled = isOwn || other.t === "";
  line.addEventListener("click", () => choose(story, at, other.id));
  return line;
}

function show(word) {
  if (word === shown) return;
  hide();
  const story = JSON.parse(word.closest(".story").dataset.story);
  const { p, tokens } = story.words[word.dataset.word];
  tip.replaceChildren(make("p", "head", make("b", "", word.textContent), p == null ? " begins the text" : ` ${percent(p)}`));
  for (const { at, token, others } of tokens) {
    if (tokens.length > 1) tip.append(make("p", "part", `${readable(token.t)} ${percent(token.p)}`));
    tip.append(...others.map((other) => row(story, at, token, other)));
    if (others.length && !others.some((other) => other.id === token.id)) tip.append(row(story, at, token, token));
  }
  if (tip.querySelector("button:enabled")) tip.append(make("p", "part", "Choose one to continue the story from there."));
  tip.hidden = false;
  const at = word.getClientRects()[0], size = tip.getBoundingClientRect();
  const isBelow = at.bottom + size.height + 8 < innerHeight || at.top < size.height + 8;
  const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - size.width - 8));
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(isBelow ? at.bottom + 2 : at.top - size.height - 2) + scrollY}px`;
  shown = word;
  word.classList.add("shown");
}

function pin(word) {
  show(word);
  isPinned = true;
}

const wordOf = (event) => event.target.closest?.(".word");
const hideSoon = () => {
  clearTimeout(hiding);
  if (!isPinned) hiding = setTimeout(hide, 250); // the pointer may be on its way to the alternatives
};
element.addEventListener("pointerover", (event) => {
  if (event.pointerType !== "mouse" || isPinned) return;
  const word = wordOf(event);
  if (word) {
    clearTimeout(hiding);
    show(word);
  }
});
element.addEventListener("pointerout", hideSoon);
tip.addEventListener("pointerenter", () => clearTimeout(hiding));
tip.addEventListener("pointerleave", hideSoon);
element.addEventListener("click", (event) => {
  const word = wordOf(event);
  if (word) pin(word);
});
document.addEventListener("pointerdown", (event) => {
  if (!tip.contains(event.target) && !wordOf(event)) hide();
});

// Arrow keys go from word to word, Enter goes to the alternatives, Escape back to the word.
element.addEventListener("keydown", (event) => {
  const word = wordOf(event);
  if (!word) return;
  const words = [...element.querySelectorAll(".word")];
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const next = step && words[words.indexOf(word) + step];
  if (next) {
    event.preventDefault();
    word.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    hide();
    show(next);
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    pin(word);
    tip.querySelector("button:enabled")?.focus();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const word = shown;
  hide();
  word?.focus();
});
watch("value", hide);
