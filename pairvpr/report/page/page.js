// The gallery and the map of a report. Texts of a run are set as text or attribute, never parsed as HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const count = (number) => number.toLocaleString("en");
  const score = (value) => (value === null ? "" : value.toFixed(2));

  // ---- gallery ----
  const cards = new Map();
  const kinds = Object.fromEntries(data.kinds.map((kind) => [kind.name, kind]));
  const isRight = (query) => kinds[query.kind].right;
  const hasTruth = data.kinds.some((kind) => kind.right !== null);
  const filters = [{ name: "all", label: "All", total: data.numQueries }, ...data.filters];
  if (data.queries.some((query) => query.heat.query)) {
    for (const query of data.queries) if (query.heat.query) query.tags.push("explained");
    const total = data.queries.filter((query) => query.heat.query).length;
    filters.push({ name: "explained", label: "With attention", total });
  }
  const matches = (query, filter) => filter === "all" || query.tags.includes(filter);
  const last = (value, direction) => (value === null ? Infinity : direction * value);
  const sorts = {
    order: ["query number", (query) => query.id],
    sure: ["most confident first", (query) => last(confidence(query), -1)],
    unsure: ["least confident first", (query) => last(confidence(query), 1)],
    far: ["farthest from the truth first", (query) => last(query.error, -1)],
  };
  const sign = data.rankings[1][1] === "d²" ? -1 : 1; // of distances, less is better
  const best = (query) => (query.final.length && query.final[0].score !== null ? sign * query.final[0].score : null);
  const confidence = (query) => (query.confidence !== null ? query.confidence : best(query));
  if (!data.queries.some((query) => query.error !== null)) delete sorts.far;
  let filter = "all";
  let shown = [];
  let current = null;

  function picture(place, state, heat) {
    const photo = data.photos[place];
    const sign = state === true ? "✓" : state === false ? "✕" : null;
    const name = state === true ? "right" : state === false ? "wrong" : "";
    return element(
      "div", { class: `frame ${name}` },
      photo.uri === null
        ? element("div", { class: "gone" }, photo.reason)
        : element("img", { src: photo.uri, alt: photo.path, loading: "lazy", decoding: "async" }),
      heat ? element("img", { class: "heat", src: heat, alt: "" }) : null,
      sign && element("span", { class: "sign", role: "img", "aria-label": name }, sign),
    );
  }

  function figure(place, state, left, right, heat) {
    const path = data.photos[place].path;
    return element(
      "div", { class: "photo" }, picture(place, state, heat),
      left || right ? element("div", { class: "numbers" }, element("span", {}, left), element("span", {}, right)) : null,
      element("div", { class: "path", title: path }, path),
    );
  }

  function answers(title, list, label, heat) {
    const body = list.length
      ? element("div", { class: "answers" }, ...list.map((answer, rank) =>
        figure(answer.photo, answer.right, `${label} ${score(answer.score)}`, metres(answer.metres), rank === 0 ? heat : null)))
      : element("p", { class: "nothing" }, "No answer");
    return element("div", { class: "group wide" }, element("h4", {}, title), body);
  }

  function verdict(query) {
    const right = isRight(query);
    const words = [kinds[query.kind].label];
    for (const tag of ["corrected", "broken", "refused"]) if (query.tags.includes(tag) && tag !== query.kind) words.push(tag);
    const sign = right === null ? "" : right ? "✓ " : "✕ ";
    return element("span", { class: `verdict ${right === null ? "" : right ? "right" : "wrong"}` }, sign + words.join(", "));
  }

  function card(query) {
    const facts = [];
    if (query.confidence !== null) facts.push(`confidence ${(100 * query.confidence).toFixed(1)} %`);
    if (query.error !== null) facts.push(`${metres(query.error)} from the truth`);
    const toggle = query.heat.query
      ? element("button", { type: "button", "aria-pressed": "false" }, "Show attention") : null;
    const made = element(
      "article", { class: "card", id: `query-${query.id}`, tabIndex: -1, "aria-label": `Query ${query.id}` },
      element("header", {}, element("h3", {}, `Query ${query.id}`), verdict(query),
        element("span", { class: "meta" }, facts.join("  ·  ")), toggle,
        element("a", { class: "link", href: `#q=${query.id}` }, "Link")),
      element(
        "div", { class: query.truth ? "strip" : "strip no-truth" },
        element("div", { class: "group query" }, element("h4", {}, "Query"), figure(query.photo, null, "", "", query.heat.query)),
        answers(data.rankings[0][0], query.retrieved, data.rankings[0][1], null),
        answers(data.rankings[1][0], query.final, data.rankings[1][1], query.heat.answer),
        query.truth
          ? element("div", { class: "group truth" }, element("h4", {}, "Nearest true photo"), figure(query.truth.photo, true, "", metres(query.truth.metres)))
          : null,
      ),
    );
    toggle?.addEventListener("click", () => {
      toggle.setAttribute("aria-pressed", String(made.classList.toggle("attention")));
    });
    return made;
  }

  function apply() {
    const [, key] = sorts[byId("sort").value];
    const sorted = [...data.queries].sort((a, b) => key(a) - key(b) || a.id - b.id);
    shown = sorted.filter((query) => matches(query, filter));
    const isShown = new Set(shown);
    for (const query of data.queries) cards.get(query.id).hidden = !isShown.has(query);
    byId("cards").append(...sorted.map((query) => cards.get(query.id)));
    for (const button of byId("filters").children) button.setAttribute("aria-pressed", String(button.dataset.name === filter));
    const its = filters.find((one) => one.name === filter);
    byId("status").textContent = shown.length < its.total
      ? `${count(shown.length)} of ${count(its.total)} queries are pictured: an equal share for each outcome, spread evenly over the list of queries.`
      : `${count(shown.length)} ${shown.length === 1 ? "query" : "queries"}.`;
  }

  function select(id, focus) {
    current = id;
    for (const [query, its] of cards) its.classList.toggle("current", query === id);
    const its = cards.get(id);
    its.scrollIntoView({ block: "nearest", behavior: "instant" });
    if (focus) its.focus({ preventScroll: true });
  }

  function open(id) {
    if (!cards.has(id)) {
      byId("status").textContent = `Query ${id} is not pictured in this report.`;
      byId("status").scrollIntoView({ block: "center" });
      return;
    }
    if (cards.get(id).hidden) { filter = "all"; apply(); }
    select(id, true);
    cards.get(id).scrollIntoView({ block: "center", behavior: "instant" });
  }

  function openHash() {
    const found = /^#q=(\d+)$/.exec(location.hash);
    if (found) open(Number(found[1]));
  }

  function move(step) {
    if (!shown.length) return;
    const place = shown.findIndex((query) => query.id === current);
    const next = place < 0 ? (step > 0 ? 0 : shown.length - 1) : Math.min(shown.length - 1, Math.max(0, place + step));
    select(shown[next].id, true);
    history.replaceState(null, "", `#q=${shown[next].id}`);
  }

  function startGallery() {
    for (const query of data.queries) cards.set(query.id, card(query));
    for (const its of filters) {
      const pictured = data.queries.filter((query) => matches(query, its.name)).length;
      const number = pictured < its.total ? `${count(pictured)} / ${count(its.total)}` : count(pictured);
      const button = element("button", { type: "button", "aria-pressed": "false" }, its.label, element("span", {}, number));
      button.dataset.name = its.name;
      button.addEventListener("click", () => { filter = its.name; apply(); });
      byId("filters").append(button);
    }
    byId("sort").append(...Object.entries(sorts).map(([name, [label]]) => element("option", { value: name }, label)));
    byId("sort").addEventListener("change", apply);
    if (hasTruth) {
      byId("frames").append(
        element("li", {}, element("i", { class: "right" }), "right, a whole frame"),
        element("li", {}, element("i", { class: "wrong" }), "wrong, a dashed frame"),
      );
    }
    apply();
    addEventListener("hashchange", openHash);
    addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA|CANVAS)$/.test(event.target.tagName)) return;
      if (event.target.closest?.(".scroll")) return;
      const step = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
      if (step) { event.preventDefault(); move(step); }
    });
    openHash();
  }

  // ---- map ----
  function startMap() {
    const map = data.map;
    if (!map) { byId("map").hidden = true; byId("map-link").hidden = true; return; }
    const tip = byId("tip");
    const layers = { database: true, lines: true, queries: true };
    const places = map.queries.map((query) => ({ ...query, here: query.at ?? query.answer }));
    const failed = (query) => data.kinds[query.kind].right === false;
    let hovered = null;
    const ground = createMap({
      box: byId("map-box"), isLarge: map.database.length + map.queries.length > 4000,
      paint, over: (context, colour) => { if (hovered) drawHovered(context, hovered, colour.ink); }, hover, click,
    });
    const { canvas, size, toX, toY } = ground;

    function paint(context, colour) {
      if (map.tiles) drawTiles(context);
      if (layers.database) drawPoints(context, map.database, colour.point);
      if (layers.lines) drawLines(context, colour.wrong);
      if (layers.queries) for (const bad of [false, true]) drawQueries(context, bad, bad ? colour.wrong : hasTruth ? colour.right : colour.ink, colour.panel);
    }
    function drawPoints(context, points, colour) {
      const side = Math.min(5, Math.max(2, ground.view.zoom * 12));
      context.fillStyle = colour;
      for (const point of points) {
        if (!point) continue;
        const x = toX(point), y = toY(point);
        if (x > -5 && y > -5 && x < size.width + 5 && y < size.height + 5) context.fillRect(x - side / 2, y - side / 2, side, side);
      }
    }
    function drawLines(context, colour) {
      context.strokeStyle = colour;
      context.lineWidth = 1.2;
      context.globalAlpha = 0.75;
      context.setLineDash([5, 4]);
      context.beginPath();
      for (const query of places) {
        if (!query.at || !query.answer || (hasTruth && !failed(query))) continue;
        context.moveTo(toX(query.at), toY(query.at));
        context.lineTo(toX(query.answer), toY(query.answer));
      }
      context.stroke();
      context.setLineDash([]);
      context.globalAlpha = 1;
    }
    function drawQueries(context, bad, colour, edge) {
      const radius = Math.min(6, Math.max(2.5, ground.view.zoom * 40));
      context.beginPath();
      for (const query of places) {
        if (!query.here || failed(query) !== bad) continue;
        const x = toX(query.here), y = toY(query.here);
        if (x < -9 || y < -9 || x > size.width + 9 || y > size.height + 9) continue;
        if (bad) {
          context.moveTo(x, y - radius * 1.3); context.lineTo(x + radius * 1.2, y + radius * 0.9);
          context.lineTo(x - radius * 1.2, y + radius * 0.9); context.closePath();
        } else { context.moveTo(x + radius, y); context.arc(x, y, radius, 0, 7); }
      }
      context.fillStyle = colour;
      context.fill();
      if (radius > 3) { context.strokeStyle = edge; context.lineWidth = 1; context.stroke(); }
    }
    function drawHovered(context, query, colour) {
      context.strokeStyle = colour;
      context.lineWidth = 2;
      context.beginPath();
      context.arc(toX(query.here), toY(query.here), 10, 0, 7);
      if (query.at && query.answer) { context.moveTo(toX(query.at), toY(query.at)); context.lineTo(toX(query.answer), toY(query.answer)); }
      context.stroke();
    }

    const tiles = new Map();
    function drawTiles(context) {
      const half = Math.PI * 6378137, { template, corner, units } = map.tiles, { x: middleX, y: middleY, zoom } = ground.view;
      const pixelsPerMetre = zoom * units;
      const level = Math.max(0, Math.min(19, Math.round(Math.log2((2 * half * pixelsPerMetre) / 256))));
      const side = (2 * half) / 2 ** level;
      const west = corner[0] + middleX / units - size.width / 2 / pixelsPerMetre;
      const north = corner[1] + middleY / units + size.height / 2 / pixelsPerMetre;
      const [first, top] = [Math.floor((west + half) / side), Math.floor((half - north) / side)];
      const across = Math.ceil(size.width / pixelsPerMetre / side), down = Math.ceil(size.height / pixelsPerMetre / side);
      for (let x = first; x <= first + across; x += 1) for (let y = top; y <= top + down; y += 1) {
        const address = template.replaceAll("{z}", level).replaceAll("{x}", x).replaceAll("{y}", y);
        if (!tiles.has(address)) tiles.set(address, element("img", { onload: ground.repaint, src: address }));
        const image = tiles.get(address);
        if (!image.complete || !image.naturalWidth) continue;
        context.drawImage(image, (x * side - half - west) * pixelsPerMetre, (north - half + y * side) * pixelsPerMetre, side * pixelsPerMetre, side * pixelsPerMetre);
      }
    }

    function nearest(x, y) {
      let best = null, least = 14;
      for (const query of places) {
        if (!query.here) continue;
        const apart = Math.hypot(toX(query.here) - x, toY(query.here) - y);
        if (apart < least || (apart === least && query.pictured)) { best = query; least = apart; }
      }
      return best;
    }
    function describe(query) {
      const apart = query.at && query.answer ? Math.hypot(query.at[0] - query.answer[0], query.at[1] - query.answer[1]) / map.unitsPerMetre : null;
      return `Query ${query.id}: ${data.kinds[query.kind].label}${apart === null ? "" : `, ${metres(apart)} away`}${query.pictured ? "" : " (not pictured)"}`;
    }
    function hover(x, y) {
      const found = layers.queries ? nearest(x, y) : null;
      if (found === hovered) return;
      hovered = found;
      canvas.classList.toggle("over", Boolean(found));
      tip.hidden = !found;
      if (found) {
        tip.textContent = describe(found);
        tip.style.left = `${Math.min(toX(found.here) + 14, size.width - 190)}px`;
        tip.style.top = `${Math.max(4, toY(found.here) - 40)}px`;
      }
      ground.redraw();
    }
    function click(x, y) {
      const found = nearest(x, y);
      if (!found) return;
      byId("map-status").textContent = describe(found);
      if (!found.pictured) return;
      if (location.hash === `#q=${found.id}`) open(found.id); else location.hash = `q=${found.id}`;
    }

    function legend() {
      const rows = [
        ["database", "Database photos", sample(shape("rect", { x: 11, y: 5, width: 4, height: 4, style: "fill: var(--point)" }))],
        ["queries", hasTruth ? "Queries, right or wrong" : "Queries, where they were answered to be", sample(
          shape("circle", { cx: 7, cy: 7, r: 5, style: `fill: var(--${hasTruth ? "right" : "ink"})` }),
          ...(hasTruth ? [shape("path", { d: "M19 2l5.5 9.5h-11z", style: "fill: var(--wrong)" })] : []))],
        ["lines", hasTruth ? "From a wrong query to its answer" : "From a query to its answer", sample(shape("path", { d: "M1 7H25", style: "stroke: var(--wrong); stroke-width: 1.5; stroke-dasharray: 5 4" }))],
      ];
      for (const [name, label, its] of rows) {
        const box = element("input", { type: "checkbox", checked: true, id: `layer-${name}` });
        box.addEventListener("change", () => { layers[name] = box.checked; ground.repaint(); });
        byId("map-legend").append(element("label", {}, box, its, label));
      }
      byId("map-status").textContent = map.notes.join(" ");
      byId("tiles-note").hidden = !map.tiles;
    }
    legend();
    ground.show([...map.database, ...places.flatMap((query) => [query.at, query.answer])], map.unitsPerMetre);
  }

  for (const link of document.querySelectorAll(".nav a")) link.hidden = !document.querySelector(link.hash);
  startGallery();
  startMap();
})();
