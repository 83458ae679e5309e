// The filter and the tints of report.html. Without this script the page shows everything, tinted by probability.
"use strict";

const samples = document.getElementById("samples"), form = document.getElementById("filter");
const groups = [...samples.querySelectorAll(".group")];

function apply() {
  // An empty field bounds nothing.
  const bound = (name, otherwise) => form.elements[name].value === "" ? otherwise : Number(form.elements[name].value);
  const first = bound("first", -Infinity), last = bound("last", Infinity);
  const least = bound("least", NaN), most = bound("most", NaN);
  const verdict = form.elements.verdict.value;

  function fits(completion) {
    // Without a reward this is NaN, which is within no bounds.
    const reward = parseFloat(completion.dataset.reward);
    return (isNaN(least) || reward >= least) && (isNaN(most) || reward <= most)
      && (!verdict || completion.classList.contains(verdict));
  }

  let shownGroups = 0, shownCompletions = 0;
  for (const group of groups) {
    const completions = [...group.querySelectorAll(".completion")], step = Number(group.dataset.step);
    const shown = first <= step && step <= last ? completions.filter(fits) : [];
    for (const completion of completions) completion.hidden = !shown.includes(completion);
    group.hidden = shown.length === 0;
    shownGroups += !group.hidden;
    shownCompletions += shown.length;
  }
  document.getElementById("count").textContent = `${shownGroups} groups, ${shownCompletions} completions`;
  samples.dataset.tint = form.elements.tint.value;
}

form.addEventListener("input", apply);
form.addEventListener("submit", event => event.preventDefault());
form.elements.unfold.addEventListener("click", () => {
  const shown = groups.filter(group => !group.hidden), open = shown.some(group => !group.open);
  for (const group of shown) group.open = open;
});
form.hidden = false;
apply();
