// Tables with a search box: every word must occur in a row (its cells, or the reasons of its refusals). A click on a
// heading sorts; a click on a refused cell, or Enter there, shows its reasons below the table.
(() => {
  const SHOWN = 200; // rows drawn at once
  const kind = (cell) => (cell === "" ? "none" : /^\d/.test(cell) || /\/ \d/.test(cell) ? "refused" : "ok");
  const numbers = (cell) => cell.match(/\d+/g) || [];

  async function start(box) {
    if (box.dataset.ready) return;
    box.dataset.ready = "yes";
    const { columns, rows, reasons } = await (await fetch(box.dataset.source)).json();
    const [search, only] = box.querySelectorAll("input");
    const [count, place, why] = [".count", ".rows", ".reasons"].map((name) => box.querySelector(name));
    const plain = columns.findIndex((_, i) => rows.some((row) => kind(row[i]) === "refused")); // names come before it
    const texts = rows.map((row) =>
      [...row, ...row.slice(plain).flatMap((cell) => numbers(cell).map((n) => reasons[n]))].join(" ").toLowerCase());
    let sorted = null, down = false;

    function refused(row) {
      return row.slice(plain).some((cell) => kind(cell) === "refused");
    }

    function draw() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let found = rows.filter((row, i) => words.every((word) => texts[i].includes(word)) && (!only.checked || refused(row)));
      if (sorted !== null) {
        found = [...found].sort((a, b) => a[sorted].localeCompare(b[sorted], "en", { numeric: true }) * (down ? -1 : 1));
      }
      count.textContent = `${found.length} of ${rows.length} rows` +
        (found.length > SHOWN ? `; the first ${SHOWN} are shown` : "");
      const table = document.createElement("table");
      const head = table.createTHead().insertRow();
      columns.forEach((name, i) => {
        const th = document.createElement("th");
        const button = document.createElement("button");
        button.textContent = name;
        button.addEventListener("click", () => { down = sorted === i && !down; sorted = i; draw(); });
        th.setAttribute("aria-sort", sorted !== i ? "none" : down ? "descending" : "ascending");
        th.append(button);
        head.append(th);
      });
      const body = table.createTBody();
      for (const row of found.slice(0, SHOWN)) {
        const line = body.insertRow();
        row.forEach((cell, i) => {
          const td = line.insertCell();
          if (i < plain) { td.textContent = cell; return; }
          td.className = kind(cell);
          if (kind(cell) !== "refused") { td.textContent = cell; return; }
          const button = document.createElement("button");
          button.textContent = cell.startsWith("ok") ? "ok / refused" : "refused";
          button.title = numbers(cell).map((n) => reasons[n]).join("; ");
          button.addEventListener("click", () => {
            why.replaceChildren(...numbers(cell).map((n) => Object.assign(document.createElement("li"),
              { textContent: `${row.slice(0, plain).join(", ")}, ${columns[i]}: ${reasons[n]}` })));
          });
          td.append(button);
        });
      }
      place.replaceChildren(table);
    }

    search.addEventListener("input", draw);
    only.addEventListener("change", draw);
    draw();
  }

  const all = () => document.querySelectorAll(".records").forEach(start);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all);
  else all();
})();
