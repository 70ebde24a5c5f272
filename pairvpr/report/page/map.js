// A map on a canvas, moved by pointer, wheel and keys, with a scale. What stands on it is its owner's:
// `paint(context, colours)` draws the layers, `over(context, colours)` what changes while the pointer moves,
// `hover(x, y)` and `click(x, y)` hear of the pointer. A place is [east, north] in the owner's units.
"use strict";
function createMap({ box, isLarge = false, paint, over = () => {}, hover = () => {}, click = () => {} }) {
  const canvas = box.querySelector("canvas");
  const context = canvas.getContext("2d");
  const picture = document.createElement("canvas"); // the layers, as they were painted last
  const layers = picture.getContext("2d");
  const size = { width: 0, height: 0 };
  let unitsPerMetre = 1;
  let bounds = null; // west, south, east, north
  let view = { x: 0, y: 0, zoom: 1 }; // the middle, and pixels per unit
  let painted = null; // the view that the picture shows
  let stale = true;
  let waiting = false;
  let moving = null; // the timer that ends a movement

  const toX = (place) => (place[0] - view.x) * view.zoom + size.width / 2;
  const toY = (place) => size.height / 2 - (place[1] - view.y) * view.zoom;

  function show(places, itsUnitsPerMetre) {
    const known = places.filter(Boolean);
    unitsPerMetre = itsUnitsPerMetre;
    bounds = known.reduce(
      ([west, south, east, north], [x, y]) => [Math.min(west, x), Math.min(south, y), Math.max(east, x), Math.max(north, y)],
      [Infinity, Infinity, -Infinity, -Infinity],
    );
    fit();
  }
  function fit() {
    if (!size.width || !bounds) return;
    const [west, south, east, north] = bounds;
    const room = 100, least = 5 * unitsPerMetre;
    const zoom = Math.min((size.width - room) / Math.max(east - west, least), (size.height - room) / Math.max(north - south, least));
    view = { x: (west + east) / 2, y: (south + north) / 2, zoom };
    repaint();
  }
  function zoomBy(factor, x = size.width / 2, y = size.height / 2) {
    const zoom = Math.min(200 / unitsPerMetre, Math.max(1e-5 / unitsPerMetre, view.zoom * factor));
    const [east, north] = [view.x + (x - size.width / 2) / view.zoom, view.y - (y - size.height / 2) / view.zoom];
    view = { x: east - (x - size.width / 2) / zoom, y: north + (y - size.height / 2) / zoom, zoom };
    moved();
  }
  function pan(x, y) {
    view.x += x / view.zoom;
    view.y -= y / view.zoom;
    moved();
  }

  // Painting thousands of points takes longer than a frame. While a large map moves, its last picture moves instead.
  function moved() {
    stale = true;
    clearTimeout(moving);
    moving = setTimeout(() => { moving = null; redraw(); }, 150);
    redraw();
  }
  function repaint() {
    stale = true;
    redraw();
  }
  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }
  function colours() {
    const style = getComputedStyle(document.documentElement);
    const names = ["point", "right", "wrong", "third", "soft", "ink", "line", "panel"];
    return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }
  function draw() {
    if (!size.width || !bounds) return;
    const colour = colours();
    if (stale && (!painted || moving === null || !isLarge)) {
      layers.clearRect(0, 0, size.width, size.height);
      paint(layers, colour);
      painted = { ...view };
      stale = false;
    }
    const ratio = view.zoom / painted.zoom;
    context.clearRect(0, 0, size.width, size.height);
    context.drawImage(
      picture,
      (size.width * (1 - ratio)) / 2 + (painted.x - view.x) * view.zoom, (size.height * (1 - ratio)) / 2 - (painted.y - view.y) * view.zoom,
      size.width * ratio, size.height * ratio,
    );
    over(context, colour);
    drawScale(colour);
  }
  function drawScale(colour) {
    const perPixel = 1 / view.zoom / unitsPerMetre;
    const power = 10 ** Math.floor(Math.log10(120 * perPixel));
    const length = [5, 2, 1].map((digit) => digit * power).find((value) => value <= 120 * perPixel) ?? power;
    const width = length / perPixel;
    context.fillStyle = colour.panel;
    context.globalAlpha = 0.8;
    context.fillRect(10, size.height - 38, width + 20, 30);
    context.globalAlpha = 1;
    context.strokeStyle = colour.ink;
    context.lineWidth = 1.5;
    context.beginPath();
    context.moveTo(20, size.height - 20); context.lineTo(20, size.height - 15);
    context.lineTo(20 + width, size.height - 15); context.lineTo(20 + width, size.height - 20);
    context.stroke();
    context.fillStyle = colour.ink;
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "left";
    context.textBaseline = "alphabetic";
    context.fillText(length >= 1000 ? `${length / 1000} km` : `${length} m`, 24, size.height - 21);
  }

  function listen() {
    const pointers = new Map();
    let dragged = 0;
    const local = (event) => { const its = canvas.getBoundingClientRect(); return [event.clientX - its.left, event.clientY - its.top]; };
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); pointers.set(event.pointerId, local(event)); dragged = 0; });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = local(event);
      const before = pointers.get(event.pointerId);
      if (!before) { hover(x, y); return; }
      const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
      if (others.length) {
        const [other] = others;
        const ratio = Math.hypot(x - other[0], y - other[1]) / Math.max(1, Math.hypot(before[0] - other[0], before[1] - other[1]));
        zoomBy(ratio, other[0], other[1]);
      } else pan(before[0] - x, before[1] - y);
      dragged += Math.hypot(x - before[0], y - before[1]);
      canvas.classList.toggle("dragged", dragged > 4);
      pointers.set(event.pointerId, [x, y]);
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => {
      const was = pointers.delete(event.pointerId);
      canvas.classList.remove("dragged");
      if (was && dragged <= 4 && event.type === "pointerup") click(...local(event));
    });
    canvas.addEventListener("pointerleave", () => hover(-1e9, -1e9));
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) return;
      event.preventDefault();
      zoomBy(Math.exp(-event.deltaY / 300), ...local(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-60, 0], ArrowRight: [60, 0], ArrowUp: [0, -60], ArrowDown: [0, 60] }[event.key];
      if (step) pan(...step);
      else if (event.key === "+" || event.key === "=") zoomBy(1.4);
      else if (event.key === "-") zoomBy(1 / 1.4);
      else if (event.key === "0") fit();
      else return;
      event.preventDefault();
    });
    const [closer, farther, everything] = box.querySelectorAll(".map-buttons button");
    closer.addEventListener("click", () => zoomBy(1.4));
    farther.addEventListener("click", () => zoomBy(1 / 1.4));
    everything.addEventListener("click", fit);
    new ResizeObserver(([entry]) => {
      const wasHidden = !size.width;
      Object.assign(size, { width: entry.contentRect.width, height: entry.contentRect.height });
      const scale = devicePixelRatio || 1;
      for (const its of [canvas, picture]) {
        its.width = Math.round(size.width * scale);
        its.height = Math.round(size.height * scale);
        its.getContext("2d").setTransform(scale, 0, 0, scale, 0, 0);
      }
      if (wasHidden) fit(); else repaint();
    }).observe(box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
    addEventListener("beforeprint", () => { clearTimeout(moving); moving = null; stale = true; draw(); });
  }

  listen();
  return { canvas, size, toX, toY, show, repaint, redraw, get view() { return view; } };
}
