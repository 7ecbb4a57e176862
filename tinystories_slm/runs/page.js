// Tooltip with the values at the pointer. The curves do not need this script.
for (const svg of document.querySelectorAll("svg.chart")) {
  const tip = document.getElementById("tip");
  const unit = svg.dataset.x;
  const curves = [...svg.querySelectorAll("polyline")].map((line) => ({
    name: line.dataset.name, values: JSON.parse(line.dataset.values), points: [...line.points],
  }));
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  const hide = () => { tip.style.display = "none"; cursor.remove(); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const nearest = curves.map(({ name, values, points }) => {
      let best = 0;
      points.forEach((point, i) => { if (Math.abs(point.x - x) < Math.abs(points[best].x - x)) best = i; });
      return { name, x: points[best].x, step: values[best][0], value: values[best][1] };
    });
    if (!nearest.length) return;
    const lines = nearest.map((n) => `${n.name} ${n.value.toLocaleString("en", { maximumSignificantDigits: 5 })}`
      + (n.step === nearest[0].step ? "" : ` (${unit} ${n.step.toLocaleString("en")})`));
    tip.textContent = [`${unit} ${nearest[0].step.toLocaleString("en")}`, ...lines].join("\n");
    tip.style.display = "block";
    const box = tip.getBoundingClientRect();
    const right = event.clientX + 14 + box.width < innerWidth ? event.clientX + 14 : event.clientX - 14 - box.width;
    tip.style.left = `${Math.max(4, right)}px`;
    tip.style.top = `${Math.max(4, event.clientY - box.height - 10)}px`;
    const { height } = svg.viewBox.baseVal;
    cursor.setAttribute("x1", nearest[0].x); cursor.setAttribute("x2", nearest[0].x);
    cursor.setAttribute("y1", 12); cursor.setAttribute("y2", height - 40);
    svg.append(cursor);
  });
}
