// Filters the history, moves through it by keys, and leads from the timeline to it. The page is complete without.
(() => {
  const get = (id) => document.getElementById(id);
  const copy = get("copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(get("repeat").textContent);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(get("repeat"));
        copy.textContent = "Selected";
      }
    });
  }
  const table = get("events");
  if (!table) return;
  const rows = [...table.tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const [filter, wrong, status, help] = ["filter", "wrong", "status", "help"].map(get);
  const boxes = [...document.querySelectorAll("#controls [name=component]")];
  let here = null;

  const apply = () => {
    const on = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, n) => {
      const fits = on.has(row.dataset.c) && (!wrong.checked || row.classList.contains("bad")) && words.every((word) => texts[n].includes(word));
      row.hidden = !fits;
      shown += fits;
    });
    status.textContent = `${shown} of ${rows.length} events shown`;
  };
  const go = (row) => {
    if (!row) return;
    if (here) {
      here.classList.remove("here");
      here.removeAttribute("tabindex");
    }
    here = row;
    row.classList.add("here");
    row.tabIndex = 0;
    row.focus({ preventScroll: true });
    row.scrollIntoView({ block: "nearest" });
  };
  const step = (by) => {
    const shown = rows.filter((row) => !row.hidden);
    if (!here || here.hidden) {
      const below = shown.find((row) => !here || rows.indexOf(row) > rows.indexOf(here));
      return go(below || shown[shown.length - 1]);
    }
    go(shown[shown.indexOf(here) + by]);
  };
  const edge = (last) => {
    const shown = rows.filter((row) => !row.hidden);
    go(shown[last ? shown.length - 1 : 0]);
  };
  // A link to an event must reach it, whatever the filter says.
  const reveal = (row) => {
    if (!row) return;
    if (row.hidden) {
      filter.value = "";
      wrong.checked = false;
      boxes.filter((box) => box.value === row.dataset.c).forEach((box) => (box.checked = true));
      apply();
    }
    go(row);
  };

  get("controls").hidden = false;
  const store = boxes.find((box) => box.value === "object_store");
  if (store && boxes.length > 1) store.checked = false;
  apply();
  get("controls").addEventListener("input", apply);
  get("controls").addEventListener("submit", (event) => event.preventDefault());
  get("keys").addEventListener("click", () => help.showModal());
  table.addEventListener("click", (event) => {
    if (getSelection().isCollapsed) go(event.target.closest("tbody tr"));
  });
  document.addEventListener("click", (event) => {
    const mark = event.target.closest("[data-e]");
    if (mark) reveal(get(`e${mark.dataset.e}`));
  });
  const target = () => {
    const row = /^#e\d+$/.test(location.hash) ? get(location.hash.slice(1)) : null;
    if (row) reveal(row);
  };
  addEventListener("hashchange", target);
  target();
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const typing = event.target.matches("input[type=search]");
    const inside = table.contains(event.target);
    const does = {
      j: () => step(1), k: () => step(-1), "/": () => filter.focus(), "?": () => help.showModal(),
      ...(inside && { ArrowDown: () => step(1), ArrowUp: () => step(-1), Home: () => edge(false), End: () => edge(true) }),
    };
    if (event.key === "Escape") {
      if (typing && filter.value) {
        filter.value = "";
        apply();
      } else {
        document.activeElement.blur();
      }
    } else if (!typing && does[event.key]) {
      event.preventDefault();
      does[event.key]();
    }
  });
})();
