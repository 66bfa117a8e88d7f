"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const folds = Array.from(document.querySelectorAll("main details"));
  const items = Array.from(document.querySelectorAll("main .l"));
  const search = find("search"), hits = find("hits");
  let texts = null, before = null, waiting = 0;

  const leaf = (item) => item.closest(".leaf") || item;

  // A line that is found opens all it lies in; folds without one are hidden.
  const look = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) {
      if (before) folds.forEach((f, i) => { f.open = before[i]; f.classList.remove("hide"); });
      if (before) items.forEach((item) => leaf(item).classList.remove("hide"));
      before = null;
      hits.textContent = "";
      return;
    }
    if (!texts) texts = items.map((item) => {
      const block = item.closest("[data-paths]");  // a line is found by its module, too
      return `${item.textContent} ${block ? block.dataset.paths : ""}`.toLowerCase();
    });
    if (!before) before = folds.map((f) => f.open);
    const kept = new Set();
    let count = 0;
    items.forEach((item, i) => {
      const found = words.every((word) => texts[i].includes(word));
      if (found) {
        count += 1;
        for (let f = item.closest("details"); f && !kept.has(f); f = f.parentElement.closest("details")) kept.add(f);
      }
      if (item.parentElement.tagName !== "SUMMARY") leaf(item).classList.toggle("hide", !found);
    });
    folds.forEach((f) => {
      const inner = f.closest(".site");
      f.classList.toggle("hide", !kept.has(f) && !inner && !f.closest("td"));
      if (kept.has(f)) f.open = true;
    });
    hits.textContent = `${count} found`;
  };

  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(look, 120); });
  find("open").addEventListener("click", () => folds.forEach((f) => { f.open = true; }));
  find("fold").addEventListener("click", () => folds.forEach((f) => { f.open = false; }));
  find("changes").addEventListener("change", (event) => document.body.classList.toggle("changes", event.target.checked));

  // What a link within the page points to is opened.
  const reveal = () => {
    const target = location.hash && find(decodeURIComponent(location.hash.slice(1)));
    for (let f = target && target.closest("details"); f; f = f.parentElement.closest("details")) f.open = true;
    if (target) target.scrollIntoView();
  };
  window.addEventListener("hashchange", reveal);
  reveal();
})();
