const findings = document.querySelector("#findings");
if (findings) {
  const [kind, task, keys, count, copy] = ["kind", "task", "keys", "count", "copy"].map((id) => document.getElementById(id));
  const update = () => {
    const shown = [...findings.tBodies[0].rows].filter((row) => {
      row.hidden = Boolean((kind.value && row.dataset.kind !== kind.value) || (task.value && row.dataset.task !== task.value));
      return !row.hidden;
    });
    const ticked = shown.filter((row) => row.querySelector("input").checked);
    const chosen = new Set((ticked.length ? ticked : shown).map((row) => row.dataset.key));
    keys.value = [...chosen].join("\n");
    count.textContent = `${shown.length} shown, keys of ${chosen.size} rows`;
  };
  kind.addEventListener("change", update);
  task.addEventListener("change", update);
  findings.addEventListener("change", update);
  findings.addEventListener("click", (event) => {
    if (event.target.closest("th button")) update();
  });
  copy.addEventListener("click", () => {
    keys.select();
    // a page opened from a file may have no clipboard of its own
    if (navigator.clipboard) navigator.clipboard.writeText(keys.value).catch(() => document.execCommand("copy"));
    else document.execCommand("copy");
  });
  document.getElementById("controls").hidden = false;
  update();
}
